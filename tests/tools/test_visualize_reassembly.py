"""tools/visualize_reassembly.py: pictures, the page with and without a browser, geometry, one line for mistakes."""

from __future__ import annotations

import base64
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from chromium import CHROMIUM, Browser
from PIL import Image
from tiny_models import scene, write_config
from tool_runs import call_tool, one_line

pytest.importorskip("mmdet", reason="tools: mmdet is not installed")

from carafe_plugin.analysis import Reassembly, compose
from carafe_plugin.engine import bare_models, prediction, reassembly_pictures, reassembly_view
from carafe_plugin.engine.config import prediction_pipeline
from carafe_plugin.engine.reassembly_pictures import Shown
from carafe_plugin.modules.carafe import KernelPrediction

pytestmark = pytest.mark.usefixtures("one_thread")
BACKBONE = ["backbone.maxpool", *(f"backbone.layer{stage}.0.conv1.downsampler" for stage in (2, 3, 4))]
FPN = [f"neck.upsample_modules.{i}" for i in (2, 1, 0)]
# The image becomes 60 x 90, to which mmseg's pipeline adds a border and of which mmpretrain's keeps the middle 56 x 56.
STEPS = dict(
    mmseg="dict(type='Resize', scale=(90, 60)), dict(type='Pad', size=(96, 64))",
    mmpretrain="dict(type='ResizeEdge', scale=60, backend='pillow'), dict(type='CenterCrop', crop_size=56)",
)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of the scenes, 64 rows and 96 columns."""
    pixels = np.concatenate([scene(2)[0], scene(2)[0][:, :32]], axis=1)
    path = tmp_path_factory.mktemp("images") / "scene.png"
    cv2.imwrite(str(path), pixels)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Config and weights of a toolbox's tiny model with CARAFE++ in its backbone, whose kernels depend on the image."""
    done: dict[str, tuple[Path, Path]] = {}

    def make(scope: str) -> tuple[Path, Path]:
        if scope not in done:
            folder = tmp_path_factory.mktemp(scope)
            config = write_config(folder / "config.py", scope, folder)
            changes = "model['backbone']['type'] = 'CARAFEResNet'\n"
            if scope in STEPS:
                changes += f"test_dataloader['dataset']['pipeline'][1:1] = [{STEPS[scope]}]\n"
            config.write_text(config.read_text() + changes)
            torch.manual_seed(0)
            model = bare_models.build_model(bare_models.read_config(str(config)))
            for name, site in model.named_modules():
                if isinstance(site, KernelPrediction):  # the neck's features are small
                    torch.nn.init.normal_(site.content_encoder.weight, std=30 if "neck" in name else 0.3)
            torch.save(dict(state_dict=model.state_dict(), meta={}), folder / "weights.pth")
            done[scope] = config, folder / "weights.pth"
        return done[scope]

    return make


@pytest.fixture
def show(models: Callable, image: Path, tmp_path: Path) -> Callable[..., int]:
    """Run the tool on the image, into tmp_path/out."""

    def call(scope: str, *options: object, path: Path = image, points: tuple[str, ...] = ("30,40", "80,10")) -> int:
        config, weights = models(scope)
        command = [path, "--config", config, "--checkpoint", weights, "--out", tmp_path / "out"]
        return call_tool("visualize_reassembly", *command, "--points", *points, *options)

    return call


@pytest.fixture(scope="module")
def seen(models: Callable, image: Path) -> dict[str, Any]:
    """The detector's view of the image, its chains and the data of a page for the FPN's."""
    config, weights = models("mmdet")
    cfg = bare_models.read_config(str(config))
    model = bare_models.build_model(cfg)
    prediction.load_weights(model, str(weights))
    pipeline = prediction_pipeline(cfg)
    picture = prediction.load_picture(pipeline, image)
    view = reassembly_view.view_image(cfg, model, pipeline, picture)
    chains = reassembly_view.find_chains(model, view, None, [])
    pixels = cv2.imread(str(image))[..., ::-1]
    data = reassembly_pictures.page_data("fpn", chains["fpn"], view, pixels, (7, 5), None)
    return dict(view=view, chains=chains, data=data, model=model)


def page_content(path: Path) -> dict[str, Any]:
    text = path.read_text()
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    # Nothing from elsewhere, and nothing that the data could end early.
    assert not re.search(r"https?://|<link|@import|src=[\"']", text)
    assert "default-src 'none'" in text
    return json.loads(found[1])


def test_a_detector(show: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert show("mmdet", "--html") == 0
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["scene.png", "scene_backbone.html", "scene_fpn.html"]
    said = capsys.readouterr().out
    assert all(str(tmp_path / "out" / name) in said for name in written)
    backbone, fpn = (page_content(tmp_path / "out" / f"scene_{chain}.html") for chain in ("backbone", "fpn"))
    assert [operator["name"] for operator in backbone["operators"]] == BACKBONE
    assert [operator["name"] for operator in fpn["operators"]] == FPN
    assert [operator["source"] for operator in fpn["operators"]] == [[2, 3], [4, 6], [8, 12]]
    assert fpn["start"] == [10, 7], "the first point, stride 4"
    assert backbone["start"] == [1, 1], "stride 32: location 1 stands for the pixels around 33"
    picture = cv2.imread(str(tmp_path / "out/scene.png"))
    assert picture.shape[1] == 800


def test_other_toolboxes(show: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("mmseg", reason="mmseg is not installed")
    pytest.importorskip("mmpretrain", reason="mmpretrain is not installed")
    assert show("mmseg", "--html", "--chain", "backbone") == 0
    data = page_content(tmp_path / "out/scene_backbone.html")
    assert data["operators"][0]["source"] == [32, 48], "of 64 x 96, padded"
    # 60 rows for 64: the stem's location 0 stands for the first two of them.
    assert data["operators"][0]["source_cells"] == pytest.approx([0, 0, 2 * 96 / 90, 2 * 64 / 60], abs=0.1)
    names = ["backbone.layer3.0.conv1.downsampler", "backbone.layer2.0.conv1.downsampler"]
    assert show("mmpretrain", "--html", "--modules", *names, points=("30,40",)) == 0
    data = page_content(tmp_path / "out/scene_modules.html")
    assert [operator["name"] for operator in data["operators"]] == names[::-1], "in the order in which they ran"
    # 60 x 90 of 64 x 96; the middle 56 of 60 and 90 begin at 2 and 17, and a location stands for 4 x 4 of them.
    assert data["operators"][0]["source_cells"] == pytest.approx(
        [17 * 64 / 60, 2 * 64 / 60, *[4 * 64 / 60] * 2], abs=0.1
    )
    capsys.readouterr()
    assert show("mmpretrain", points=("5,30",)) == 2
    assert "point 5,30 is in a part of the image that the test pipeline cuts away" in one_line(capsys)


def test_the_page_holds_the_kernels(seen: dict[str, Any]) -> None:
    for operator, reassembly in zip(seen["data"]["operators"], seen["chains"]["fpn"], strict=True):
        height, width = reassembly.output_size
        packed = np.frombuffer(base64.b64decode(operator["kernels"]), np.uint8).reshape(height, width, -1)
        weights = packed / packed.sum(-1, keepdims=True)
        expected = reassembly.kernels[0, 0].flatten(0, 1).permute(1, 2, 0).numpy()
        assert operator["normalised"]
        assert np.ptp(expected) > 0.2, "kernels that differ"
        assert np.abs(weights - expected).max() < 0.01
        assert (operator["k"], operator["up"], operator["down"]) == (5, 2, 1)
    flat = torch.rand(2, 25, 4, 5).softmax(1).reshape(2, 5, 5, 4, 5)
    packed = reassembly_pictures.pack_kernels(flat)[0].reshape(2, 4, 5, 5, 5)
    weights = packed / packed.sum((3, 4), keepdims=True, dtype=int)
    assert np.abs(weights - flat.permute(0, 3, 4, 1, 2).numpy()).max() < 0.0003, "small weights keep their precision"
    sigmoid = torch.rand(1, 3, 3, 4, 5)
    packed, normalised = reassembly_pictures.pack_kernels(sigmoid)
    assert not normalised
    assert np.abs(packed.reshape(4, 5, 3, 3) / 255 - sigmoid[0].permute(2, 3, 0, 1).numpy()).max() < 0.003


def test_data_cannot_end_the_script(seen: dict[str, Any], tmp_path: Path) -> None:
    reassembly_pictures.write_page(tmp_path / "page.html", dict(seen["data"], title="</script><b>"))
    assert page_content(tmp_path / "page.html")["title"] == "</script><b>"


def test_where_locations_lie(seen: dict[str, Any]) -> None:
    view, chains = seen["view"], seen["chains"]
    for axis in (view.x, view.y):
        assert (axis.scale, axis.shift) == pytest.approx((1, 0), abs=0.01)
    assert view.cells((16, 24), chains["fpn"]) == pytest.approx((0, 0, 4, 4), abs=0.05)
    assert view.cells((2, 3), chains["fpn"]) == pytest.approx((0, 0, 32, 32), abs=0.4)
    # Around the first square of the stem's source, which has a stride of 2.
    assert view.cells((32, 48), chains["backbone"]) == pytest.approx((0, 0, 2, 2), abs=0.05)
    assert view.cells((2, 3), chains["backbone"]) == pytest.approx((-15, -15, 32, 32), abs=0.4)
    assert [view.locate(x, y, chains["fpn"]) for x, y in ((0, 0), (95, 63), (40.5, 19.4))] == [
        (0, 0),
        (15, 23),
        (4, 10),
    ]
    assert [view.locate(x, y, chains["backbone"]) for x, y in ((14, 18), (95, 63))] == [(1, 0), (1, 2)]


@pytest.mark.parametrize(
    ("steps", "columns", "rows"),
    [
        ([dict(type="Resize", scale=(300, 160), keep_ratio=False)], (3, 0), (2, 0)),
        ([dict(type="Resize", scale_factor=0.5)], (0.5, 0), (0.5, 0)),
        ([dict(type="CenterCrop", crop_size=(60, 40))], (1, -20), (1, -20)),
        ([dict(type="RandomFlip", prob=1.0), dict(type="Pad", size=(110, 90))], (-1, 100), (1, 0)),
    ],
)
def test_pipelines_are_followed(steps: list[dict], columns: tuple, rows: tuple) -> None:
    steps = [
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations"),
        *steps,
        dict(type="PackDetInputs", meta_keys=()),
    ]
    for step in steps[2:-1]:
        step["type"] = f"mmcv.{step['type']}" if step["type"] in ("CenterCrop", "Pad") else step["type"]
    pipeline = prediction_pipeline(reassembly_view.Config(dict(default_scope="mmdet", test_pipeline=steps)))
    for axis, expected in ((1, columns), (0, rows)):
        found = reassembly_view._follow(pipeline, (80, 100), axis)
        assert (found.scale, found.shift) == pytest.approx(expected, abs=0.4)
        assert found.scale == pytest.approx(expected[0], rel=0.01)


def test_weights_are_drawn_where_the_sources_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that looks up and to the right, on a white image: one red square, of a known place and size."""
    monkeypatch.setattr(reassembly_pictures, "MAX_PART", 0)  # all of the image
    kernels = torch.zeros(1, 1, 3, 3, 20, 20)
    kernels[:, :, 0, 2] = 1
    chain = [Reassembly("delta", kernels, (10, 10), 2, 1)]
    axis = reassembly_view.Axis(1, 0)
    view = reassembly_view.View((160, 160), (160, 160), (160, 160), axis, axis, chain)
    shown = Shown((70, 100), *view.locate(70, 100, chain), compose(chain, 12, 8))
    assert (shown.row, shown.column) == (12, 8)
    reassembly_pictures.draw_reassembly(
        np.full((160, 160, 3), 255, np.uint8), view, dict(fpn=chain), dict(fpn=[shown]), tmp_path / "a.png"
    )
    picture = cv2.imread(str(tmp_path / "a.png")).astype(int)
    red = (picture[..., 2] > 180) & (picture[..., 1] < 80)
    pale = (picture == 237).all(-1)  # the panel's ground
    top, left = np.flatnonzero(pale.sum(1) > 100)[0], np.flatnonzero(pale.sum(0) > 100)[0]
    size = np.count_nonzero(pale.sum(0) > 100)
    rows, columns = np.nonzero(red)
    # Source (5, 5) of 10 x 10: half of the panel's width and height away from its corner, a tenth wide.
    assert [(rows.min() - top) / size, (columns.min() - left) / size] == pytest.approx([0.5, 0.5], abs=0.02)
    assert [np.ptp(rows) / size, np.ptp(columns) / size] == pytest.approx([0.1, 0.1], abs=0.02)
    assert not list(tmp_path.glob("*.partial*"))


def test_small_parts_of_large_images_are_shown_large() -> None:
    chain = [Reassembly("average", torch.full((1, 1, 3, 3, 100, 100), 1 / 9), (50, 50), 2, 1)]
    axis = reassembly_view.Axis(1, 0)

    def part(size: int, row: int, column: int) -> tuple:
        view = reassembly_view.View((size, 2 * size), (size, 2 * size), (size, 2 * size), axis, axis, chain)
        return reassembly_pictures._part(Shown((0, 0), row, column, compose(chain, row, column)), view, chain)

    # Sources 3 x 3 around (20, 30), of 16 x 32 pixels: a fifth more than they take up, in the middle.
    assert part(800, 40, 60) == pytest.approx((976 - 57.6, 328 - 28.8, 115.2, 57.6))
    assert part(800, 0, 99) == pytest.approx((1600 - 76.8, 0, 76.8, 38.4)), "not beyond the image"
    single = [Reassembly("all", torch.ones(1, 1, 3, 3, 4, 4), (2, 2), 2, 1)]
    view = reassembly_view.View((64, 64), (64, 64), (64, 64), axis, axis, single)
    assert reassembly_pictures._part(Shown((0, 0), 1, 1, compose(single, 1, 1)), view, single) == (0, 0, 64, 64)


def test_mistakes_end_in_one_line(
    show: Callable, models: Callable, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(image.read_bytes()[:3000])
    config, weights = models("mmdet")
    other = torch.load(weights)["state_dict"]
    torch.save({name: value for name, value in other.items() if "layer3" not in name}, tmp_path / "other.pth")
    other["backbone.conv1.weight"] = other["backbone.conv1.weight"][:8]
    torch.save(other, tmp_path / "narrow.pth")
    stock = tmp_path / "stock.py"
    changes = "model['neck'] = dict(type='FPN', in_channels=[16, 32, 64, 128], out_channels=channels, num_outs=4)\n"
    changes += "model['backbone']['type'], model['roi_head']['mask_head']['type'] = 'ResNet', 'FCNMaskHead'\n"
    stock.write_text(config.read_text() + changes)
    capsys.readouterr()
    for arguments, message in (
        (dict(points=("96,10",)), "point 96,10 is outside the image, which is 96 x 64 pixels"),
        (dict(points=("nan,10",)), "point nan,10 is outside the image"),
        (dict(points=("5,-1",)), "point 5,-1 is outside the image"),
        (dict(points=("-1,10",)), "point -1,10 is outside the image"),
        (dict(points=("30,40", "-.5,-2")), "point -0.5,-2 is outside the image"),
        (dict(path=tmp_path / "none.png"), f"no such image: {tmp_path}/none.png"),
        (dict(path=broken), f"cannot read image {broken}"),
        (["--modules", "neck.fpn"], f"neck.fpn is not a CARAFE++ of the model, which has {', '.join(BACKBONE[:1])}"),
        (["--modules", "roi_head.mask_head.upsample"], "roi_head.mask_head.upsample did not run on maps of the image"),
        (["--modules", *BACKBONE[:2], FPN[0]], "and neck.upsample_modules.2 do not follow one another"),
        (["--chain", "fuse"], "the model has no chain fuse: name some of its CARAFE++ with --modules"),
        (["--group", 1], "chain fpn: group must be from 0 to 0, got 1"),
        (["--checkpoint", tmp_path / "none.pth"], f"no such checkpoint: {tmp_path}/none.pth"),
        (["--checkpoint", tmp_path / "other.pth"], f"checkpoint {tmp_path}/other.pth is of another model:"),
        (["--checkpoint", tmp_path / "narrow.pth"], "size mismatch for backbone.conv1.weight"),
        (["--checkpoint", models("mmseg")[1]], "is of another model:"),
        (["--out", image], "--out is a folder"),
        (["--out", image.parent], f"--out would write over the image {image}: choose another place"),
        (["--config", tmp_path / "none.py"], "no such configuration file"),
        (["--config", stock], "the model has no CARAFE++"),
    ):
        given = arguments if isinstance(arguments, dict) else {}
        assert show("mmdet", *([] if given else arguments), **given) == 2, arguments
        assert message in one_line(capsys)
    for text in ("12", "-x,1"):
        assert show("mmdet", points=(text,)) == 2
        assert f"expected x,y in pixels of the image, such as 120,80; got {text}\n" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_image_that_opencv_does_not_read(show: Callable, image: Path, tmp_path: Path) -> None:
    assert show("mmdet", "--chain", "fpn") == 0
    seen = (tmp_path / "out/scene.png").read_bytes()
    Image.open(image).save(tmp_path / "scene.tga")
    assert show("mmdet", "--chain", "fpn", path=tmp_path / "scene.tga") == 0
    assert (tmp_path / "out/scene.png").read_bytes() == seen, "the same pixels"


def test_maps_without_a_whole_stride() -> None:
    assert reassembly_view._stride((161, 161), (41, 41), 0) == 4
    assert reassembly_view._stride((161, 175), (40, 43), 1) == 4, "rounded down"
    assert reassembly_view._stride((96, 96), (64, 64), 0) == 1.5


# -------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: the page is not tried in a browser")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        browser = Browser(Path(folder))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page(seen: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    reassembly_pictures.write_page(path, seen["data"])
    return path


def test_the_page_computes_what_the_library_does(browser: Browser, page: Path, seen: dict[str, Any]) -> None:
    browser.open(page)
    chain = seen["chains"]["fpn"]
    for output, row, column in ((2, 9, 13), (2, 0, 23), (1, 3, 3), (0, 0, 0)):
        found = browser.run(f"compose({output}, {row}, {column}).map((level) => Array.from(level.weights))")
        expected = compose(chain[: output + 1], row, column)
        assert len(found) == output + 1
        for weights, sources in zip(found, expected, strict=True):
            assert np.abs(np.reshape(weights, sources.size) - sources.to_map().numpy()).max() < 0.01


# Groups of two operators, and the group to show. The second chain's channels are divided into twice and once as many.
GROUPS = [((2, 2), None), ((1, 2), None), ((1, 2), 1), ((2, 3), 4)]


def grouped_chain(*groups: int) -> list[Reassembly]:
    """Two upsamplings of 3 x 4 locations, with kernels that differ from group to group."""
    generator, size, chain = torch.Generator().manual_seed(0), (3, 4), []
    for name, count in zip(("coarse", "fine"), groups, strict=True):
        out = 2 * size[0], 2 * size[1]
        kernels = (3 * torch.randn(1, count, 9, *out, generator=generator)).softmax(2).unflatten(2, (3, 3))
        chain.append(Reassembly(name, kernels, size, 2, 1))
        size = out
    return chain


@pytest.mark.parametrize(("groups", "group"), GROUPS)
def test_the_page_has_the_groups_of_the_library(
    browser: Browser, tmp_path: Path, groups: tuple[int, int], group: int | None
) -> None:
    """Also the table of the last kernel. The picture draws what the library composes."""
    chain = grouped_chain(*groups)
    axis = reassembly_view.Axis(1, 0)
    view = reassembly_view.View((48, 64), (48, 64), (48, 64), axis, axis, chain)
    data = reassembly_pictures.page_data("two", chain, view, np.zeros((48, 64, 3), np.uint8), (5, 7), group)
    reassembly_pictures.write_page(tmp_path / "page.html", data)
    browser.open(tmp_path / "page.html")
    for row, column in ((5, 7), (0, 15)):
        found = browser.run(f"compose(1, {row}, {column}).map((level) => Array.from(level.weights))")
        expected = compose(chain, row, column, group)
        for weights, sources in zip(found, expected, strict=True):
            assert np.abs(np.reshape(weights, sources.size) - sources.to_map().numpy()).max() < 0.004
    cells = browser.run("Array.from(document.querySelectorAll('td'), (cell) => Number(cell.textContent))")
    assert np.abs(np.reshape(cells, (3, 3)) - 100 * expected_kernel(chain, group, 5, 7)).max() < 0.4
    coarse = browser.run("compose(0, 2, 3).map((level) => Array.from(level.weights))")[0]
    if group is None:
        assert np.abs(np.reshape(coarse, (3, 4)) - compose(chain[:1], 2, 3)[0].to_map().numpy()).max() < 0.004


def expected_kernel(chain: list[Reassembly], group: int | None, row: int, column: int) -> np.ndarray:
    """Of the last operator."""
    kernels = chain[-1].kernels[0, ..., row, column]
    slots = np.lcm.reduce([reassembly.group_size for reassembly in chain])
    return (kernels.mean(0) if group is None else kernels[group * len(kernels) // slots]).numpy()


def test_the_page_answers_mouse_and_keys(browser: Browser, page: Path) -> None:
    browser.open(page)
    state = "[state.output, state.row, state.column, state.kept]"
    assert browser.run(state) == [2, 7, 5, False]

    def middle(row: int, column: int) -> tuple[float, float]:
        box = browser.run("(({x, y, width, height}) => [x, y, width, height])(byId('image').getBoundingClientRect())")
        return box[0] + box[2] * (column + 0.5) / 24, box[1] + box[3] * (row + 0.5) / 16

    browser.mouse("mouseMoved", *middle(3, 20))
    assert browser.run(state) == [2, 3, 20, False], "hovering"
    for kind in ("mousePressed", "mouseReleased"):
        browser.mouse(kind, *middle(10, 4))
    assert browser.run(state) == [2, 10, 4, True], "clicking keeps it"
    browser.mouse("mouseMoved", *middle(3, 20))
    assert browser.run(state) == [2, 10, 4, True]
    assert browser.run("document.activeElement.id") == "image"
    for key in ("ArrowUp", "ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft"):
        browser.press(key)
    assert browser.run(state) == [2, 10, 5, True]
    browser.press("ArrowRight", modifiers=8)
    browser.press("ArrowDown", modifiers=8)
    browser.press("ArrowDown", modifiers=8)
    assert browser.run(state) == [2, 15, 10, True], "five at a time, and not beyond the map"
    assert browser.run("location.hash") == "#output=2&row=15&column=10"
    assert browser.run("byId('summary').textContent") == "Row 15, column 10 of 16 x 24 (kept)"
    browser.press("Escape")
    browser.mouse("mouseMoved", *middle(0, 0))
    assert browser.run(state) == [2, 0, 0, False], "let go"

    browser.run("byId('output').value = '1'; byId('output').dispatchEvent(new Event('change'))")
    assert browser.run(state) == [1, 0, 0, False]
    captions = browser.run("Array.from(document.querySelectorAll('figcaption'), (caption) => caption.textContent)")
    assert [caption.partition(";")[0] for caption in captions] == [
        "Through 1 operator, neck.upsample_modules.1: from 4 x 6",
        "Through 2 operators, back to neck.upsample_modules.2: from 2 x 3",
    ]
    cells = browser.run("Array.from(document.querySelectorAll('td'), (cell) => Number(cell.textContent))")
    assert len(cells) == 25
    assert sum(cells) == pytest.approx(100, abs=1.5)


def test_the_page_draws_and_opens_at_a_place(browser: Browser, page: Path, seen: dict[str, Any]) -> None:
    browser.open(page, "#output=1&row=5&column=3")
    assert browser.run("[state.output, state.row, state.column, state.kept]") == [1, 5, 3, True]
    shot = browser.send("Page.captureScreenshot")["data"]
    picture = cv2.imdecode(np.frombuffer(base64.b64decode(shot), np.uint8), cv2.IMREAD_COLOR)
    assert picture.std() > 20, "not an empty page"
    # The colour under the middle of each source's square: redder, the greater its weight.
    script = """Array.from(document.querySelectorAll('#levels canvas'), (canvas, depth) => {
      const level = compose(1, 5, 3)[depth], [left, top, width, height] = level.cells;
      const part = partWith(compose(1, 5, 3)), scale = canvas.width / part[2];
      const pen = canvas.getContext('2d');
      return Array.from(level.weights, (_, place) => {
        const x = left + (place % level.size[1] + 0.85) * width;
        const y = top + (Math.floor(place / level.size[1]) + 0.85) * height;
        const [red, green] = pen.getImageData((x - part[0]) * scale, (y - part[1]) * scale, 1, 1).data;
        return red - green;
      });
    })"""
    for colours, sources in zip(browser.run(script), compose(seen["chains"]["fpn"][:2], 5, 3), strict=True):
        weights = sources.to_map().numpy().ravel()
        strong, none = weights > weights.max() / 2, weights == 0
        assert np.asarray(colours)[strong].min() > 100
        assert not none.any() or np.asarray(colours)[none].max() < 20
    for place in ("#output=99&row=99&column=99", "#output=x&row=-1&column="):
        browser.open(page, place)  # no matter what the address says
