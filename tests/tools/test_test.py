"""tools/test.py: the metrics of training again, and every option as the config's toolbox means it."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from tiny_models import SIZE, scene
from tool_runs import call_tool, forget_runs, last_metrics, one_line

from carafe_plugin.engine.evaluation import use_tta

pytest.importorskip("mmdet", reason="tools: mmdet is not installed")
pytest.importorskip("mmseg", reason="tools: mmseg is not installed")
pytest.importorskip("mmpretrain", reason="tools: mmpretrain is not installed")

SCOPES = ("mmdet", "mmseg", "mmpretrain")
NO_DRAWING = ["--cfg-options", "default_hooks.visualization=None"]
BOXES_ALONE = [
    "--cfg-options",
    "model.type=FasterRCNN",
    "model.roi_head.mask_head=None",
    "model.roi_head.mask_roi_extractor=None",
    "test_evaluator.metric=bbox",
]


@pytest.mark.parametrize("scope", SCOPES)
def test_metrics_out_and_show_dir(
    scope: str, trained: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every output is where it was asked for: relative paths are below the current folder, whatever the toolbox."""
    model = trained(scope)
    monkeypatch.chdir(tmp_path)
    out = Path("labels" if scope == "mmseg" else "predictions.pkl")
    options = ["--out", out, "--show-dir", "seen/shown", "--interval", 2]
    assert call_tool("test", model.config, model.checkpoint, "--work-dir", "test", *options) == 0
    tested = last_metrics(tmp_path / "test")
    assert tested == pytest.approx(model.metrics()), "the same as in the validation after the last epoch"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([str(out), "seen", "test"])

    pictures = sorted(path for path in tmp_path.rglob("*.png") if not path.is_relative_to(tmp_path / out))
    names = [f"{index:02d}.png" for index in range(7)]
    if scope == "mmpretrain":  # it draws every 2nd image, the classes one after the other
        names = ["blue/01.png", "blue/05.png", "red/02.png", "red/06.png"]
    assert [str(path.relative_to(tmp_path / "seen/shown")) for path in pictures] == names
    assert all(cv2.imread(str(path)).ndim == 3 for path in pictures)
    if scope == "mmseg":
        maps = {path.name: cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in out.iterdir()}
        assert sorted(maps) == [f"{index:02d}.png" for index in range(7)]
        assert all(label.shape == (SIZE, SIZE) and set(np.unique(label)) <= {0, 1, 2} for label in maps.values())
    else:
        predictions = pickle.loads(out.read_bytes())
        assert len(predictions) == 7
        key = "pred_instances" if scope == "mmdet" else "pred_score"
        assert all(key in prediction for prediction in predictions)


@pytest.mark.parametrize("scope", SCOPES)
def test_tta_without_a_word_in_the_configuration(scope: str, trained: Callable, tmp_path: Path) -> None:
    model = trained(scope)
    options = BOXES_ALONE if scope == "mmdet" else []  # mmdet merges boxes alone
    assert call_tool("test", model.config, model.checkpoint, "--work-dir", tmp_path, "--tta", *options) == 0
    metric = dict(mmdet="coco/bbox_mAP_50", mmseg="aAcc", mmpretrain="accuracy/top1")[scope]
    tested = last_metrics(tmp_path)[metric]
    # The scenes have no left and right: flips must not hurt, as they would if boxes or labels were not flipped back.
    assert tested >= 0.75 * model.metrics()[metric]


def test_tta_of_the_configuration_is_kept() -> None:
    cfg = Config(
        dict(
            default_scope="mmdet",
            model=dict(type="Net"),
            tta_model=dict(type="OwnTTA"),
            tta_pipeline=[dict(type="Own")],
            test_dataloader=dict(dataset=dict(type="RepeatDataset", dataset=dict(type="CocoDataset", pipeline=[]))),
        )
    )
    use_tta(cfg)
    assert cfg.model == dict(type="OwnTTA", module=dict(type="Net"))
    assert cfg.test_dataloader.dataset.dataset.pipeline == [dict(type="Own")]
    assert "pipeline" not in cfg.test_dataloader.dataset


def test_pictures_of_the_same_name_are_all_there(trained: Callable, data: Path, tmp_path: Path) -> None:
    """In folders of their own, in two datasets, or with an ending that holds no colours."""
    model = trained("mmpretrain")
    for folder, name in (("a/red", "x.png"), ("a/blue", "x.png"), ("b/red", "x.png"), ("b/blue", "y.pgm")):
        (tmp_path / folder).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / folder / name), scene(0)[0][..., 0 if name.endswith("pgm") else slice(None)])
    config = tmp_path / "two.py"
    config.write_text(
        f"""_base_ = ["{model.config}"]
one = dict(type="CustomDataset", extensions=(".png", ".pgm"), pipeline={{{{_base_.test_dataloader.dataset.pipeline}}}})
both = [dict(**one, data_root="{tmp_path}", data_prefix=folder) for folder in "ab"]
test_dataloader = dict(dataset=dict(_delete_=True, type="ConcatDataset", datasets=both))
"""
    )
    command = (model.checkpoint, "--work-dir", tmp_path / "run", "--show-dir", tmp_path / "shown")
    assert call_tool("test", config, *command) == 0
    shown = sorted(str(path.relative_to(tmp_path / "shown")) for path in (tmp_path / "shown").rglob("*.*"))
    assert shown == ["blue/x.png", "blue/y.pgm.png", "red/_x.png", "red/x.png"]


def test_out_item_metrics(trained: Callable, tmp_path: Path) -> None:
    model = trained("mmpretrain")
    out = tmp_path / "metrics.json"
    command = (model.config, model.checkpoint, "--work-dir", tmp_path / "test", "--out", out, "--out-item", "metrics")
    assert call_tool("test", *command) == 0
    assert json.loads(out.read_text()) == pytest.approx(model.metrics())


@pytest.mark.parametrize(
    ("scope", "options", "expected"),
    [
        ("mmdet", ["--out", "predictions.json"], "--out must end in .pkl or .pickle, got predictions.json"),
        ("mmdet", ["--out-item", "metrics"], "give --out as well"),
        ("mmdet", ["--out", "a.pkl", "--out-item", "metrics"], "for mmpretrain configurations"),
        ("mmpretrain", ["--out", "a.txt", "--out-item", "metrics"], "--out must end in .json"),
        ("mmdet", ["--show-dir", "x", *NO_DRAWING], "default_hooks.visualization"),
        ("mmdet", ["--show"], "needs a display"),
        ("mmdet", ["--tta"], "mmdet merges boxes, not masks"),
        ("mmdet", ["--cfg-options", "test_dataloader.dataset.ann_file=absent.json"], "/absent.json"),
        ("mmseg", ["--cfg-options", "test_dataloader.dataset.data_prefix.img_path=absent"], "/absent"),
        ("mmseg", ["--out", __file__], "is a file"),
        ("mmpretrain", ["--show-dir", __file__], f"--show-dir is a folder for pictures; {__file__} is a file"),
        (
            "mmdet",
            ["--cfg-options", "test_dataloader.dataset.ann_file="],
            "test_dataloader (CocoDataset): it has no ann_file",
        ),
    ],
)
def test_mistakes(
    scope: str,
    options: list,
    expected: str,
    trained: Callable,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if options[0] != "--cfg-options":  # an option is refused before the dataset is looked at
        given = [] if "--cfg-options" in options else ["--cfg-options"]
        options = [*options, *given, "test_dataloader.dataset.data_root=absent"]
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    model = trained(scope)
    capsys.readouterr()
    assert call_tool("test", model.config, model.checkpoint, "--work-dir", tmp_path / "test", *options) == 2
    assert expected in one_line(capsys)


def test_checkpoints_that_cannot_be_tested(trained: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = trained("mmdet")
    content = model.checkpoint.read_bytes()
    (tmp_path / "truncated.pth").write_bytes(content[: len(content) // 2])
    (tmp_path / "page.pth").write_text("<html>404</html>")
    torch.save(dict(state_dict=dict(other=torch.zeros(1))), tmp_path / "other.pth")
    expected = {
        "absent.pth": f"no such checkpoint: {tmp_path}/absent.pth",
        "truncated.pth": f"cannot read checkpoint {tmp_path}/truncated.pth ({len(content) // 2} bytes",
        "page.pth": f"cannot read checkpoint {tmp_path}/page.pth",
        "other.pth": "holds no parameter of MaskRCNN (its first: other)",
    }
    capsys.readouterr()
    for name, message in expected.items():
        assert call_tool("test", model.config, tmp_path / name, "--work-dir", tmp_path / "test") == 2
        assert message in one_line(capsys)


def test_a_checkpoint_is_loaded_once(trained: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, load, loaded = trained("mmseg"), torch.load, []
    monkeypatch.setattr(torch, "load", lambda path, *a, **k: loaded.append(Path(path)) or load(path, *a, **k))
    assert call_tool("test", model.config, model.checkpoint, "--work-dir", tmp_path) == 0
    assert loaded == [model.checkpoint]


def test_bare_weights_can_be_tested(trained: Callable, tmp_path: Path) -> None:
    """A checkpoint as published by others: the state dict alone, its names with the prefix of a wrapped model."""
    model = trained("mmpretrain")
    weights = torch.load(model.checkpoint, weights_only=False)["state_dict"]
    torch.save({f"module.{name}": value for name, value in weights.items()}, tmp_path / "bare.pth")
    assert call_tool("test", model.config, tmp_path / "bare.pth", "--work-dir", tmp_path / "test") == 0
    assert last_metrics(tmp_path / "test") == pytest.approx(model.metrics())


def test_no_images_is_an_error(trained: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = trained("mmdet")
    empty = dict(images=[], annotations=[], categories=[dict(id=7, name="red"), dict(id=8, name="blue")])
    (tmp_path / "empty.json").write_text(json.dumps(empty))
    option = f"test_dataloader.dataset.ann_file={tmp_path}/empty.json"
    capsys.readouterr()
    command = (model.config, model.checkpoint, "--work-dir", tmp_path / "test", "--cfg-options", option)
    assert call_tool("test", *command) == 2
    message = one_line(capsys)
    assert "no images in test_dataloader (CocoDataset)" in message
    assert f"{tmp_path}/empty.json" in message


def _first(content: dict, **values: object) -> None:
    content["annotations"][0].update(values)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda c: _first(c, category_id=99),
            "image 0: category_id must be one of its categories (7, 8), got 99",
        ),
        (lambda c: _first(c, image_id=70), "image_id must be an image that the file lists, got 70"),
        (
            lambda c: _first(c, bbox=[1, 2, float("nan"), 4]),
            "image 0: bbox must be four finite numbers of at most 1000000 (x, y, width, height)",
        ),
        (lambda c: _first(c, bbox=[1, 2, 3, 0]), "the last two positive, got [1, 2, 3, 0]"),
        (
            lambda c: _first(c, bbox=[1, 2, 3]),
            "(x, y, width, height), the last two positive, got [1, 2, 3]",
        ),
        (lambda c: c["annotations"][0].pop("bbox"), "annotation 1 of image 0 has no bbox: {"),
        (lambda c: c["categories"][1].update(name="green"), "for 1 of the 2 classes of the configuration (blue)"),
        (lambda c: _first(c, id=0), "id must be a positive integer"),
        (lambda c: c["annotations"][0].pop("iscrowd"), "annotation 1 of image 0 has no iscrowd: {"),
        (
            lambda c: c["annotations"][0].pop("segmentation"),
            "segmentation must be polygons of at least three points, or run lengths, got None",
        ),
        (
            lambda c: c["annotations"].clear(),
            "holds 7 images and 0 annotations, none of the classes of the configuration: nothing to measure",
        ),
        (
            lambda c: c.pop("annotations"),
            "holds 7 images and 0 annotations, none of the classes of the configuration: nothing to measure",
        ),
        (lambda c: c.pop("images"), "is not an annotation file in COCO's format: it has no list of images"),
        (
            lambda c: c["images"][3].update(file_name="gone.png"),
            "1 of the 7 images of {file} are missing in {data}/images: gone.png",
        ),
    ],
)
def test_annotations_that_cannot_be_evaluated(
    change: Callable, expected: str, trained: Callable, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = trained("mmdet")
    content = json.loads((data / "instances.json").read_text())
    change(content)
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(content))
    options = [f"test_dataloader.dataset.ann_file={path}", f"test_evaluator.ann_file={path}"]
    capsys.readouterr()
    command = (model.config, model.checkpoint, "--work-dir", tmp_path / "test", "--cfg-options", *options)
    assert call_tool("test", *command) == 2
    message = one_line(capsys)
    assert str(path) in message
    assert expected.replace("{file}", str(path)).replace("{data}", str(data)) in message
    assert not (tmp_path / "test").exists(), "refused before anything is built"


def test_what_is_not_measured_needs_no_annotations(trained: Callable, data: Path, tmp_path: Path) -> None:
    """Test images, as COCO's test-dev: predictions to submit. The classes' names may be in a file."""
    from carafe_plugin.engine.annotations import check_annotations
    from carafe_plugin.engine.errors import UsageError

    cfg = Config.fromfile(trained("mmdet").config)
    content = json.loads((data / "instances.json").read_text())
    del content["annotations"]
    (tmp_path / "test.json").write_text(json.dumps(content))
    (tmp_path / "names.txt").write_text("red\nblue\n")
    dataset = cfg.test_dataloader.dataset
    dataset.ann_file = str(tmp_path / "test.json")
    dataset.metainfo.classes = str(tmp_path / "names.txt")
    check_annotations(dataset, [dict(type="CocoMetric", format_only=True, outfile_prefix="x")])
    with pytest.raises(UsageError, match="nothing to measure"):
        check_annotations(dataset, [dict(type="CocoMetric")])
    check_annotations(dict(type="NoSuchDataset", ann_file="absent.json"))


def test_datasets_half_copied(trained: Callable, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = trained("mmdet")
    shutil.copytree(data, tmp_path / "data")
    annotations, images = tmp_path / "data" / "instances.json", tmp_path / "data" / "images"
    root = f"test_dataloader.dataset.data_root={tmp_path}/data"
    own = [root, f"test_evaluator.ann_file={annotations}"]
    content = annotations.read_text()

    def refusal(*options: str) -> str:
        capsys.readouterr()
        command = (model.config, model.checkpoint, "--work-dir", tmp_path / "test", "--cfg-options", *options)
        assert call_tool("test", *command) == 2
        return one_line(capsys)

    (images / "05.png").write_bytes(b"")
    assert f"1 of the 7 images of {annotations} are empty in {images}: 05.png" in refusal(*own)
    shutil.rmtree(images)
    images.mkdir()
    assert f"7 of the 7 images of {annotations} are missing in {images}: 00.png" in refusal(*own)
    annotations.write_text(content[:999])
    assert f"cannot read {annotations} (999 bytes; truncated, or not JSON): " in refusal(*own)
    # Of a dataset that is not COCO's, too, and by the only line that finds it: MMEngine's error names no file.
    line = refusal(*own, "test_dataloader.dataset.type=BaseDetDataset")
    assert f"cannot read the annotations of test_dataloader (BaseDetDataset): looked in {annotations}: " in line
    assert "line 1 column " in line
    for kind in ("CocoDataset", "BaseDetDataset"):
        annotations.write_text(content, encoding="utf-8-sig")
        line = refusal(*own, f"test_dataloader.dataset.type={kind}")
        assert line.endswith(f"{annotations} begins with a byte order mark: save it as UTF-8 without one")
    # The images are there, and the metric knows of others alone.
    other = json.loads(content)
    for image in other["images"]:
        image["id"] += 3
    for annotation in other["annotations"]:
        annotation["image_id"] += 3
    annotations.write_text(json.dumps(other))
    line = refusal(f"test_evaluator.ann_file={annotations}")
    assert (
        f"the evaluator's {annotations} does not list 3 of the 7 images of {data}/instances.json, the first: id 0"
        in line
    )


def test_checkpoints_of_another_model(trained: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Weights that fit in part: mmengine warns, and the rest stays random."""
    model = trained("mmdet")
    weights = torch.load(model.checkpoint, weights_only=False)["state_dict"]
    headless = {name: value for name, value in weights.items() if not name.startswith("rpn_head.")}
    other = weights | {"neck.fpn_convs.0.conv.bias": torch.zeros(16)}
    path, command = tmp_path / "other.pth", (model.config, tmp_path / "other.pth", "--work-dir", tmp_path / "test")
    for state, message in (
        (headless, "parameters of MaskRCNN, the first: rpn_head.rpn_conv.weight"),
        (other, "1 parameters differ in shape: size mismatch for neck.fpn_convs.0.conv.bias: "),
    ):
        torch.save(dict(state_dict=state), path)
        capsys.readouterr()
        assert call_tool("test", *command) == 2
        line = one_line(capsys)
        assert f"checkpoint {path}" in line
        assert message in line
    torch.save(dict(state_dict=headless), path)
    assert call_tool("test", *command, "--allow-mismatch") == 0
    assert "rpn_head.rpn_conv.weight" in max((tmp_path / "test").glob("*/*.log")).read_text()


@pytest.mark.parametrize("scope", ["mmdet", "mmseg", "mmpretrain"])
def test_a_checkpoint_of_other_classes(
    scope: str, trained: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """In another order it is refused, since every figure would be wrong; with other names it is a warning."""
    names = dict(mmdet=("red", "blue"), mmseg=("ground", "red", "blue"), mmpretrain=("blue", "red"))[scope]
    mixed, path = names[::-1], tmp_path / "other.pth"
    model = trained(scope)
    command = model.config, model.recorded_with(mixed, path)
    capsys.readouterr()
    assert call_tool("test", *command, "--work-dir", tmp_path / "a") == 2
    expected = f"checkpoint {path} has the classes {', '.join(mixed)}, the test's dataset {', '.join(names)}"
    assert expected in one_line(capsys)
    assert call_tool("test", *command, "--work-dir", tmp_path / "a", "--allow-mismatch") == 0
    model.recorded_with(("bird", *names[1:]), path)
    forget_runs()
    assert call_tool("test", *command, "--work-dir", tmp_path / "b") == 0
    log = max((tmp_path / "b").glob("*/*.log")).read_text()
    renamed = ", ".join(("bird", *names[1:]))
    first = f"(the first to differ: bird, {names[0]})"
    assert f"checkpoint {path} has the classes {renamed}, the test's dataset {', '.join(names)} {first}" in log
    model.recorded_with(None, path)
    if scope != "mmpretrain":  # whose classes are folders, known to a run alone
        options = [f"train_dataloader.dataset.metainfo.classes=[{','.join(mixed)}]"]
        assert call_tool("test", *command, "--work-dir", tmp_path / "c", "--cfg-options", *options) == 2
        assert expected in one_line(capsys)


def test_scene_is_reproducible() -> None:
    """The numbers above rest on it."""
    (first, square), (second, again) = scene(3), scene(3)
    assert np.array_equal(first, second)
    assert square == again
    assert square.name == "blue"


def test_hooks_that_prepare_for_a_checkpoint(trained: Callable, tmp_path: Path) -> None:
    """EMAHook builds its model before the run, and loads the checkpoint into it as well."""
    model = trained("mmpretrain")
    config = tmp_path / "averaged.py"
    config.write_text(f'_base_ = ["{model.config}"]\ncustom_hooks = [dict(type="EMAHook")]\n')
    assert call_tool("test", config, model.checkpoint, "--work-dir", tmp_path / "averaged") == 0
    assert last_metrics(tmp_path / "averaged") == pytest.approx(model.metrics())


@pytest.mark.parametrize("scope", SCOPES)
def test_with_flexible_runner(scope: str, trained: Callable, tmp_path: Path) -> None:
    model = trained(scope)
    out = tmp_path / ("maps" if scope == "mmseg" else "out.pkl")
    options = ["--out", out, "--cfg-options", "runner_type=FlexibleRunner", "env_cfg=None"]
    assert call_tool("test", model.config, model.checkpoint, "--work-dir", tmp_path / "test", *options) == 0
    assert last_metrics(tmp_path / "test") == pytest.approx(model.metrics())
    assert out.exists()
    if scope != "mmdet":  # whose model here has masks
        command = ("--work-dir", tmp_path / "flips", "--tta", *options)
        assert call_tool("test", model.config, model.checkpoint, *command) == 0
        assert call_tool("test", model.config, model.checkpoint, "--work-dir", tmp_path / "runner", "--tta") == 0
        assert last_metrics(tmp_path / "flips") == pytest.approx(last_metrics(tmp_path / "runner"))


def test_flexible_runner_needs_no_pretrained_backbone(trained: Callable, tmp_path: Path) -> None:
    model = trained("mmpretrain")
    absent = ["model.backbone.init_cfg.type=Pretrained", f"model.backbone.init_cfg.checkpoint={tmp_path}/absent.pth"]
    options = ("--cfg-options", "runner_type=FlexibleRunner", *absent)
    assert call_tool("test", model.config, model.checkpoint, "--work-dir", tmp_path, *options) == 0
