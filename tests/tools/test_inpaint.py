"""tools/inpaint.py, and tools/train.py and test.py on an inpainting configuration."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from tool_runs import ROOT, call_tool, one_line, run

from carafe_plugin.engine import memory, prediction
from carafe_plugin.engine.config import load_config

pytest.importorskip("skimage", reason="tools: the metrics need scikit-image")

CONFIG = ROOT / "configs/inpainting/partial-conv-carafe_scenes-64x64.py"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tiny Partial Conv with CARAFE++ that tools/train.py trained for two steps, and its command line options."""
    folder = tmp_path_factory.mktemp("inpainting")
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 3)):
        (folder / "data" / split).mkdir(parents=True)
        for index in range(count):
            small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            small.resize((40, 36), Image.Resampling.BICUBIC).save(folder / "data" / split / f"{index}.png")
    options = ["model.generator.base_channels=4", "model.discriminator.base_channels=4"]
    for split in ("train", "val", "test"):
        dataset = f"{split}_dataloader.dataset"
        options += [f"{dataset}.data_root={folder / 'data'}", f"{dataset}.size=32", f"{split}_dataloader.batch_size=2"]
    options += ["train_cfg.max_iters=2", "default_hooks.logger.interval=1", "default_hooks.checkpoint.interval=1"]
    assert call_tool("train", CONFIG, "--work-dir", folder / "run", "--cfg-options", *options) == 0
    return SimpleNamespace(folder=folder, checkpoint=folder / "run" / "iter_2.pth", options=options)


@pytest.fixture
def picture(tmp_path: Path) -> SimpleNamespace:
    """A picture whose size is no multiple of 4, and a mask whose hole reaches its corner."""
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (37, 50, 3), dtype=np.uint8)
    holes = np.zeros((37, 50), np.uint8)
    holes[20:, 30:], holes[2:5, 2:6] = 255, 128
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    Image.fromarray(holes).save(tmp_path / "mask.png")
    return SimpleNamespace(pixels=pixels, holes=holes >= 128, folder=tmp_path)


def inpaint(trained: SimpleNamespace, picture: SimpleNamespace, out: Path, **changes: object) -> int:
    given = {"image": picture.folder / "picture.png", "mask": picture.folder / "mask.png", "config": CONFIG}
    given |= {"checkpoint": trained.checkpoint, "cfg_options": trained.options} | changes
    command = [given.pop("image"), given.pop("mask"), "--out", out]
    for name, value in given.items():
        command += [f"--{name.replace('_', '-')}", *(value if isinstance(value, list) else [value])]
    return call_tool("inpaint", *command, "--device", changes.get("device", "cpu"))


def test_fills_the_hole_and_nothing_else(
    trained: SimpleNamespace, picture: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "new" / "filled.png"
    capsys.readouterr()
    assert inpaint(trained, picture, out) == 0
    assert "filled.png: 352 of 50 x 37 pixels filled" in capsys.readouterr().out
    filled = np.asarray(Image.open(out))
    assert filled.shape == (37, 50, 3)
    assert np.array_equal(filled[~picture.holes], picture.pixels[~picture.holes])
    assert (filled[picture.holes] != picture.pixels[picture.holes]).mean() > 0.9

    # What lies in the hole, and in the rows and columns that are added to it, is not looked at.
    hidden = picture.pixels.copy()
    hidden[picture.holes] = 0
    Image.fromarray(hidden).save(tmp_path / "hidden.png")
    assert inpaint(trained, picture, tmp_path / "again.bmp", image=tmp_path / "hidden.png") == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "again.bmp")), filled)
    assert not list(tmp_path.rglob("*.tmp"))


def test_it_is_the_models_prediction(trained: SimpleNamespace, picture: SimpleNamespace) -> None:
    options = dict(option.split("=") for option in trained.options if option.startswith("model."))
    cfg = load_config(str(CONFIG), {name: int(value) for name, value in options.items()})
    model = prediction.load_inpainting_model(cfg, str(trained.checkpoint), "cpu")
    assert not model.training
    saved = torch.load(trained.checkpoint, weights_only=False)["state_dict"]
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    pixels, holes = picture.pixels[:36, :48], picture.holes[:36, :48]  # nothing to add
    filled = prediction.fill(model, pixels, holes)
    with torch.no_grad():
        images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
        predicted = model.generator(images, torch.from_numpy(holes)[None, None].float())
    expected = ((predicted[0].permute(1, 2, 0).numpy() + 1) * 127.5).round()
    assert np.array_equal(filled[holes], expected[holes])


def test_pictures_of_other_kinds(trained: SimpleNamespace, picture: SimpleNamespace, tmp_path: Path) -> None:
    turned = Image.fromarray(np.rot90(picture.pixels).copy())
    exif = turned.getexif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise to look at it"
    turned.save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(picture.pixels[..., 0]).convert("LA").save(tmp_path / "grey.png")
    Image.fromarray(picture.holes).save(tmp_path / "mask.png")  # one bit a pixel
    for name in ("turned", "grey"):
        assert inpaint(trained, picture, tmp_path / f"{name}-filled.png", image=tmp_path / f"{name}.png") == 0
    filled = np.asarray(Image.open(tmp_path / "turned-filled.png"))
    assert np.array_equal(filled[~picture.holes], picture.pixels[~picture.holes])
    assert np.asarray(Image.open(tmp_path / "grey-filled.png")).shape == (37, 50, 3)


def test_the_first_of_several_pages(
    trained: SimpleNamespace, picture: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    first = Image.fromarray(picture.pixels)
    first.save(tmp_path / "scan.tif", save_all=True, append_images=[first.rotate(180)])
    capsys.readouterr()
    assert inpaint(trained, picture, tmp_path / "out.tif", image=tmp_path / "scan.tif") == 0
    assert capsys.readouterr().err == f"{tmp_path}/scan.tif: the first of 2 pages\n"
    filled = np.asarray(Image.open(tmp_path / "out.tif"))
    assert np.array_equal(filled[~picture.holes], picture.pixels[~picture.holes])


def test_mistakes(
    trained: SimpleNamespace, picture: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    Image.fromarray(picture.holes[:, :-1]).save(tmp_path / "narrow.png")
    Image.fromarray(np.zeros((37, 50), np.uint8)).save(tmp_path / "black.png")
    Image.fromarray(np.full((37, 50), 255, np.uint8)).save(tmp_path / "white.png")
    Image.fromarray(np.zeros((37, 50), np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "picture.png").read_bytes()[:900])
    detector = ROOT / "configs/demo/mask-rcnn_r18_fpn_scenes.py"
    whole_size = [option for option in trained.options if "base_channels" not in option]
    cases = [
        (dict(image=tmp_path / "absent.png"), f"no such image: {tmp_path}/absent.png"),
        (dict(image=tmp_path / "broken.png"), f"cannot read image {tmp_path}/broken.png"),
        (dict(image=tmp_path / "deep.png"), "more than 8 bits"),
        (dict(mask=tmp_path / "narrow.png"), "must have the size of the image, 50 x 37, got 49 x 37"),
        (dict(mask=tmp_path / "black.png"), "nowhere white"),
        (dict(mask=tmp_path / "white.png"), "white everywhere"),
        (dict(config=tmp_path / "absent.py"), "no such configuration file"),
        (dict(config=detector, cfg_options=["a=1"]), "describes no inpainting model"),
        (dict(checkpoint=tmp_path / "absent.pth"), "no such checkpoint"),
        (dict(cfg_options=whole_size), "is of another model: it fits InpaintingGAN in name alone, "),
        (dict(cfg_options=[*trained.options, "model.generator.dilations=[2]"]), "have no place in it (the first: "),
        (dict(cfg_options=[*trained.options, "model.generator.upsampling=bicubic"]), "cannot build the model"),
        (dict(device="cuda:99"), "--device cuda:99 cannot be used here"),
    ]
    for changes, message in cases:
        capsys.readouterr()
        assert inpaint(trained, picture, tmp_path / "out.png", **changes) == 2, changes
        assert message in one_line(capsys)
    assert inpaint(trained, picture, tmp_path / "out.gif") == 2
    assert "--out must end in one of .jpg" in one_line(capsys)
    (tmp_path / "folder.png").mkdir()
    for out, message in (
        (tmp_path / "folder.png", "it is a folder"),
        (tmp_path / "picture.png" / "out.png", "cannot write --out"),
        (tmp_path / f"{'n' * 300}.png", "cannot write --out"),
    ):
        assert inpaint(trained, picture, out, checkpoint=tmp_path / "not-looked-at.pth") == 2
        assert message in one_line(capsys)
    for own in ("picture", "mask"):
        before = (tmp_path / f"{own}.png").read_bytes()
        assert inpaint(trained, picture, tmp_path / f"folder.png/../{own}.png") == 2
        assert f"--out would write over the image {tmp_path}/folder.png/../{own}.png" in one_line(capsys)
        assert (tmp_path / f"{own}.png").read_bytes() == before
    assert inpaint(trained, picture, tmp_path / "out.png", image=tmp_path / f"{'n' * 300}.png") == 2
    assert "cannot read" in one_line(capsys)
    assert not list(tmp_path.glob("out*"))


def test_colours_are_the_pictures_own(trained: SimpleNamespace, picture: SimpleNamespace, tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.fromarray(picture.pixels)
    image.save(tmp_path / "profiled.png", icc_profile=profile)
    image.convert("CMYK").save(tmp_path / "cmyk.tif", icc_profile=profile)
    for name, ending, expected in (
        ("profiled.png", ".jpg", profile),
        ("profiled.png", ".tif", profile),
        ("cmyk.tif", ".png", None),
    ):
        out = tmp_path / f"out{ending}"
        assert inpaint(trained, picture, out, image=tmp_path / name) == 0
        assert Image.open(out).info.get("icc_profile") == expected, name


def test_train_and_test(trained: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The common tools: a test with dumped predictions, resuming, and folders that hold no images."""
    options = ["--cfg-options", *trained.options]
    out = tmp_path / "predictions.pkl"
    written = [*options, f"test_evaluator.folder={tmp_path / 'completed'}"]
    assert call_tool("test", CONFIG, trained.checkpoint, "--work-dir", tmp_path / "t", "--out", out, *written) == 0
    assert [path.name for path in sorted((tmp_path / "completed").iterdir())] == ["0.png.png", "1.png.png", "2.png.png"]
    samples = pickle.loads(out.read_bytes())
    # Each sample's own numbers, not its batch's too; this pickle writes bytes as text, up to two for one.
    assert out.stat().st_size < 2.2 * 3 * 7 * 32 * 32 * 4
    assert [Path(sample["path"]).name for sample in samples] == ["0.png", "1.png", "2.png"]
    for sample in samples:
        same = sample["completed"] == sample["original"]
        assert bool((same | (sample["holes"] > 0)).all())
        assert not bool(same.all())

    resume = ["--resume", "--work-dir", trained.folder / "run", *options, "train_cfg.max_iters=3"]
    assert call_tool("train", CONFIG, *resume) == 0
    assert (trained.folder / "run" / "iter_3.pth").is_file()

    (tmp_path / "empty").mkdir()
    for folder, message in (("empty", "no image that can be read in folder"), ("absent", "no such folder")):
        elsewhere = [f"train_dataloader.dataset.data_root={tmp_path}", f"train_dataloader.dataset.data_prefix={folder}"]
        capsys.readouterr()
        assert call_tool("train", CONFIG, "--work-dir", tmp_path / "e", *options, *elsewhere) == 2
        assert message in (printed := capsys.readouterr().err.strip().splitlines()[-1])
        assert f"{tmp_path}/{folder}" in printed


def test_command_line(trained: SimpleNamespace, picture: SimpleNamespace, tmp_path: Path) -> None:
    """In a process of its own, as a user runs it."""
    given = [picture.folder / "picture.png", picture.folder / "mask.png", "--out", tmp_path / "filled.jpg"]
    given += ["--config", CONFIG, "--checkpoint", trained.checkpoint, "--cfg-options", *trained.options]
    done = run("inpaint.py", *given)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "pixels filled" in done.stdout
    assert done.stdout.count("Freed memory is") == (1 if memory._glibc() else 0)
    assert Image.open(tmp_path / "filled.jpg").size == (50, 37)
