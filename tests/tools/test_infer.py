"""tools/infer.py: pictures and COCO results of an image or a folder, and what happens with images that are none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from tiny_runs import COLOURS, call_tool, one_line, run, scene, write_config

from carafe_plugin.engine.errors import UsageError
from carafe_plugin.engine.prediction import write_picture
from carafe_plugin.images import IMAGE_ENDINGS, read_image

pytest.importorskip("mmdet", reason="tools: mmdet is not installed")
COCO = pytest.importorskip("pycocotools.coco", reason="tools: pycocotools is not installed").COCO


def infer(images: Path, model, out_dir: Path, *options: object) -> int:
    command = (images, "--config", model.config, "--checkpoint", model.checkpoint, "--out-dir", out_dir)
    return call_tool("infer", *command, "--device", "cpu", *options)


def test_folder(trained: Callable, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert infer(data / "images", trained("mmdet"), out, "--score-thr", 0.2) == 0
    listed = json.loads((out / "results.json").read_text())
    names = [f"{index:02d}.png" for index in range(7)]
    assert [image["file_name"] for image in listed["images"]] == names
    assert listed["categories"] == [dict(id=7, name="red"), dict(id=8, name="blue")], "the ids of the annotations"
    assert sorted(path.name for path in (out / "pictures").iterdir()) == names
    assert not list(out.rglob("*.tmp"))

    dataset = COCO(str(out / "results.json"))
    results = dataset.loadRes(listed["annotations"])
    assert all(dataset.annToMask(result).sum() == result["area"] for result in dataset.anns.values())
    found = 0
    for index in range(7):
        _, square = scene(index)
        truth = np.zeros((64, 64), bool)
        truth[square.y : square.y + square.side, square.x : square.x + square.side] = True
        for result in results.loadAnns(results.getAnnIds(imgIds=index + 1)):
            assert 0.2 <= result["score"] <= 1
            mask = results.annToMask(result).astype(bool)
            x, y, width, height = result["bbox"]
            overlap_x = min(x + width, square.x + square.side) - max(x, square.x)
            overlap_y = min(y + height, square.y + square.side) - max(y, square.y)
            overlap = max(overlap_x, 0) * max(overlap_y, 0)
            box_iou = overlap / (width * height + square.side**2 - overlap)
            mask_iou = (mask & truth).sum() / (mask | truth).sum()
            right_class = result["category_id"] == 7 + list(COLOURS).index(square.name)
            found += box_iou > 0.5 and mask_iou > 0.5 and right_class
        drawn = cv2.imread(str(out / "pictures" / f"{index:02d}.png"))
        assert drawn.shape == (64, 64, 3)
        if results.getAnnIds(imgIds=index + 1):
            assert not np.array_equal(drawn, scene(index)[0]), "something is drawn"
    assert found >= 4, "the model has learnt, and its boxes, masks and classes come out in the right places"


def test_score_threshold_and_single_image(trained: Callable, data: Path, tmp_path: Path) -> None:
    assert infer(data / "images/03.png", trained("mmdet"), tmp_path, "--score-thr", 1) == 0
    listed = json.loads((tmp_path / "results.json").read_text())
    assert listed["images"] == [dict(id=1, file_name="03.png", width=64, height=64)]
    assert listed["annotations"] == []
    assert np.array_equal(cv2.imread(str(tmp_path / "pictures/03.png")), scene(3)[0]), "nothing to draw"


def test_images_that_cannot_be_read_are_named(
    trained: Callable, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    shutil.copy(data / "images/00.png", photos / "good.PNG")
    (photos / "truncated.png").write_bytes((data / "images/01.png").read_bytes()[:4000])
    cv2.imwrite(str(photos / "half.jpg"), scene(1)[0])
    (photos / "half.jpg").write_bytes((photos / "half.jpg").read_bytes()[:-700])
    (photos / "text.jpg").write_text("no image")
    (photos / "notes.txt").write_text("ignored: not the name of an image")
    capsys.readouterr()
    assert infer(photos, trained("mmdet"), tmp_path / "out") == 1
    error = capsys.readouterr().err
    for name in ("truncated.png", "half.jpg", "text.jpg"):
        assert f"skipped, cannot be read: {photos}/{name}" in error
    assert "3 of 4 images could not be read" in error
    assert "notes.txt" not in error
    listed = json.loads((tmp_path / "out/results.json").read_text())
    assert [image["file_name"] for image in listed["images"]] == ["good.PNG"]
    assert [path.name for path in (tmp_path / "out/pictures").iterdir()] == ["good.PNG"]


def test_a_model_without_masks_and_annotations(data: Path, trained: Callable, tmp_path: Path) -> None:
    model = trained("mmdet")
    options = ["model.roi_head.mask_head=None", "model.roi_head.mask_roi_extractor=None", "model.type=FasterRCNN"]
    options += ["test_dataloader.dataset.ann_file=elsewhere.json"]
    assert infer(data / "images", model, tmp_path, "--score-thr", 0.1, "--cfg-options", *options) == 0
    listed = json.loads((tmp_path / "results.json").read_text())
    assert listed["categories"] == [dict(id=1, name="red"), dict(id=2, name="blue")]
    assert listed["annotations"]
    assert all("segmentation" not in result for result in listed["annotations"])


def test_mistakes(trained: Callable, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = trained("mmdet")
    images = data / "images"
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    capsys.readouterr()
    assert infer(tmp_path / "empty", model, tmp_path / "out") == 2
    assert "no images (.jpg" in (message := one_line(capsys))
    assert f"in folder {tmp_path}/empty" in message
    assert infer(tmp_path / "absent", model, tmp_path / "out") == 2
    assert f"no such image or folder: {tmp_path}/absent" in one_line(capsys)
    assert infer(images, model, tmp_path / "file") == 2
    assert "--out-dir is a folder" in one_line(capsys)
    assert infer(images, model, tmp_path / "out", "--device", "cuda:99") == 2
    assert "--device cuda:99 cannot be used here" in one_line(capsys)
    assert infer(images, model, tmp_path / "out", "--checkpoint", tmp_path / "absent.pth") == 2
    assert f"no such checkpoint: {tmp_path}/absent.pth" in one_line(capsys)
    weights = torch.load(model.checkpoint, weights_only=False)["state_dict"]
    torch.save({name: value for name, value in weights.items() if "neck" not in name}, tmp_path / "other.pth")
    assert infer(images, model, tmp_path / "out", "--checkpoint", tmp_path / "other.pth") == 2
    assert f"checkpoint {tmp_path}/other.pth is of another model: it lacks" in one_line(capsys)
    assert infer(images, model, tmp_path / "out", "--config", tmp_path / "absent.py") == 2
    assert "no such configuration file" in one_line(capsys)
    segmentation = write_config(tmp_path / "segmentation.py", "mmseg", data)
    assert infer(images, model, tmp_path / "out", "--config", segmentation) == 2
    assert "of the scope mmseg" in one_line(capsys)
    assert infer(images, model, tmp_path / "out", "--score-thr", 2) == 2
    assert "expected a number from 0 to 1, got 2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_classes_that_are_written(trained: Callable, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """tools/infer.py: the checkpoint's, else the configuration's, never COCO's; as many as the model has."""
    path = tmp_path / "other.pth"

    def infer_with(classes: tuple | None) -> int:
        checkpoint = trained("mmdet").recorded_with(classes, path)
        capsys.readouterr()
        return infer(data / "images/00.png", trained("mmdet"), tmp_path / "out", "--checkpoint", checkpoint)

    for classes, written in (
        (None, ["red", "blue"]),
        (("bird", "blue"), ["bird", "blue"]),
        (("blue", "red"), ["blue", "red"]),
    ):
        assert infer_with(classes) == 0
        warned = "warning: checkpoint " in capsys.readouterr().err
        assert warned == (classes is not None)
        results = json.loads((tmp_path / "out/results.json").read_text())
        assert [category["name"] for category in results["categories"]] == written
    assert infer_with(("red",)) == 2
    assert (
        f"roi_head.bbox_head (Shared2FCBBoxHead) has num_classes=2, and checkpoint {path} 1 classes: red"
        in one_line(capsys)
    )


def test_pictures_keep_their_format(tmp_path: Path) -> None:
    pixels = scene(0)[0][..., ::-1]
    for ending in (".png", ".bmp", ".tiff", ".webp", ".jpg"):
        write_picture(tmp_path / f"picture{ending}", pixels)
        again = cv2.imread(str(tmp_path / f"picture{ending}"))[..., ::-1]
        assert np.abs(again.astype(int) - pixels).mean() < (25 if ending in (".jpg", ".webp") else 1e-6)


def test_command_line(trained: Callable, data: Path, tmp_path: Path) -> None:
    """In a process of its own, as a user runs it."""
    model = trained("mmdet")
    arguments = ("--config", model.config, "--checkpoint", model.checkpoint, "--out-dir", tmp_path)
    done = run("infer.py", data / "images/00.png", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{tmp_path}/results.json" in done.stdout
    assert (tmp_path / "pictures/00.png").is_file()


@pytest.mark.parametrize("ending", IMAGE_ENDINGS)
def test_pictures_of_every_kind_hold_their_colours(ending: str, tmp_path: Path) -> None:
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[..., 0] = 200
    write_picture(tmp_path / f"red{ending}", pixels)
    red, green, blue = read_image(tmp_path / f"red{ending}").mean(axis=(0, 1))
    assert abs(red - 200) < 5
    assert max(green, blue) < 5


def test_pictures_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"^cannot write {tmp_path}/wide\.webp: "):
        write_picture(tmp_path / "wide.webp", np.zeros((1, 16384, 3), np.uint8))
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=rf"^cannot write {tmp_path}/file/a\.png: "):
        write_picture(tmp_path / "file" / "a.png", np.zeros((1, 1, 3), np.uint8))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_help_has_an_example(capsys: pytest.CaptureFixture) -> None:
    assert call_tool("infer", "--help") == 0
    assert "\nExample:\n    $ python tools/infer.py photos/ --config CONFIG" in capsys.readouterr().out
