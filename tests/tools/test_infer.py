"""tools/infer.py: pictures and COCO results of an image or a folder, and what happens with images that are none."""

from __future__ import annotations

import codecs
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import COLOURS, scene, write_config
from tool_runs import ROOT, call_tool, environment, one_line, run

from carafe_plugin.engine import memory
from carafe_plugin.engine.errors import UsageError
from carafe_plugin.engine.prediction import write_picture
from carafe_plugin.images import WRITTEN_ENDINGS

pytest.importorskip("mmdet", reason="tools: mmdet is not installed")
COCO = pytest.importorskip("pycocotools.coco", reason="tools: pycocotools is not installed").COCO
LYING = Image.Exif()
LYING[0x0112] = 6  # to be turned by 90 degrees clockwise


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


def test_a_folder_of_all_kinds(
    trained: Callable, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every image that can be read has its results and its picture, and what is left out is said; a second run, into
    the folder itself, takes none of the first one's pictures for an image.
    """
    photos = tmp_path / "photos"
    photos.mkdir()
    square = Image.fromarray(scene(0)[0][..., ::-1])
    for name in ("a.png", "a.pgm", "b.PGM", "b.tga", "deep.tif", "e.gif"):
        image = (
            Image.fromarray(np.asarray(square.convert("L")).astype(np.uint16) << 8) if name == "deep.tif" else square
        )
        image.save(photos / name, save_all=name == "e.gif", append_images=[square.rotate(90)])
    Image.new("RGB", (1, 1)).save(photos / "dot.png")
    for name in ("cut.png", "empty.png"):
        (photos / name).write_bytes((photos / "a.png").read_bytes()[: 4000 * (name == "cut.png")])
    square.crop((0, 0, 64, 48)).save(photos / "lying.webp", exif=LYING)
    (photos / "gone.jpg").symlink_to("nowhere")
    (photos / os.fsdecode(b"\xff.png")).write_bytes((photos / "a.png").read_bytes())
    for name in (".DS_Store", "._a.png", "notes.txt", "phone.heic"):
        (photos / name).write_text("")
    (photos / "more").mkdir()
    os.mkfifo(photos / "pipe.png")
    good = ["a.pgm", "a.png", "b.PGM", "b.tga", "deep.tif", "e.gif", "lying.webp", "\udcff.png"]
    drawn = ["a.pgm.png", "a.png", "b.png", "b.tga.png", "deep.tif", "e.png", "lying.webp", "\udcff.png"]
    capsys.readouterr()
    for _ in range(2):
        assert infer(photos, trained("mmdet"), photos, "--score-thr", 0.2) == 1
        said = capsys.readouterr().err.splitlines()
        listed = json.loads((photos / "results.json").read_text())
        assert [image["file_name"] for image in listed["images"]] == good
        assert sorted(path.name for path in (photos / "pictures").iterdir()) == drawn
        assert "the first of several pages: e.gif" in said
        assert "read as in tools/test.py, otherwise by Pillow: lying.webp" in said
        assert "passed over: more/, notes.txt, phone.heic, pipe.png" in said
        assert said[-1].startswith(
            "8 of 12 images done; not read: cut.png (image file is truncated), empty.png (the file"
        )
        assert "gone.jpg ([Errno 2] No such file or directory: " in said[-1]
        assert "; not predicted: dot.png (IndexError in " in said[-1]
    for name in drawn:
        picture = Image.open(photos / "pictures" / name)
        assert (picture.mode, picture.format) == ("RGB", {"tif": "TIFF", "ebp": "WEBP"}.get(name[-3:], "PNG"))
    found = {image["file_name"]: image["id"] for image in listed["images"]}
    boxes = {name: [one["bbox"] for one in listed["annotations"] if one["image_id"] == found[name]] for name in good}
    assert boxes["a.png"]
    assert boxes["a.png"] == boxes["b.tga"] == boxes["\udcff.png"], "the same pixels"
    ids = [one["id"] for one in listed["annotations"]]
    assert ids == list(range(1, len(ids) + 1))


def test_results_are_those_of_a_test(trained: Callable, data: Path, tmp_path: Path) -> None:
    """The same boxes and scores from tools/test.py for the same files."""
    model = trained("mmdet")
    folder = tmp_path / "images"
    folder.mkdir()
    square = Image.fromarray(scene(2)[0][..., ::-1])
    files = {"cmyk.jpg": square.convert("CMYK"), "lying.webp": square, "palette.png": square.quantize(200)}
    if cv2.haveImageWriter("a.gif"):  # from OpenCV 4.12 on
        files["palette.gif"] = files.pop("palette.png")
    for name, image in files.items():
        image.save(folder / name, exif=LYING if name == "lying.webp" else b"")
    for name in ("deep.png", "deep.ppm"):
        files[name] = cv2.imwrite(str(folder / name), scene(2)[0].astype(np.uint16) << 8 | 77)
    files = dict(sorted(files.items()))
    content = json.loads((data / "instances.json").read_text())
    truth = content["annotations"][2]
    content["images"] = [dict(id=k, file_name=name, width=64, height=64) for k, name in enumerate(files, 1)]
    content["annotations"] = [truth | dict(id=k, image_id=k) for k in range(1, len(files) + 1)]
    (tmp_path / "a.json").write_text(json.dumps(content))
    options = [f"test_dataloader.dataset.ann_file={tmp_path}/a.json", f"test_evaluator.ann_file={tmp_path}/a.json"]
    options += [f"test_dataloader.dataset.data_prefix.img={folder}"]
    out = ("--work-dir", tmp_path / "test", "--out", tmp_path / "a.pkl", "--cfg-options", *options)
    assert call_tool("test", model.config, model.checkpoint, *out) == 0
    assert infer(folder, model, tmp_path / "out", "--score-thr", 0) == 0
    listed = json.loads((tmp_path / "out/results.json").read_text())
    assert [image["file_name"] for image in listed["images"]] == list(files)
    assert {one["image_id"] for one in listed["annotations"]} == {1, 2, 3, 4, 5}
    for sample in pickle.loads((tmp_path / "a.pkl").read_bytes()):
        expected = sample["pred_instances"]
        got = [one for one in listed["annotations"] if one["image_id"] == sample["img_id"]]
        assert len(got) == len(expected["scores"])
        assert [one["score"] for one in got] == [round(float(score), 5) for score in expected["scores"]]
        x1, y1, x2, y2 = np.transpose([one["bbox"] for one in got])
        assert np.allclose(np.transpose([x1, y1, x1 + x2, y1 + y2]), expected["bboxes"].numpy(), atol=0.02)


def test_what_cannot_be_written(trained: Callable, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A picture's results are kept; without a place for the results nothing is begun; images are not written over."""
    model = trained("mmdet")
    (tmp_path / "out/pictures/03.png").mkdir(parents=True)
    capsys.readouterr()
    assert infer(data / "images", model, tmp_path / "out") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"6 of 7 images done; not written: 03.png (cannot write {tmp_path}/out/pictures/03.png: ")
    assert len(json.loads((tmp_path / "out/results.json").read_text())["images"]) == 7

    (tmp_path / "taken/results.json").mkdir(parents=True)
    assert infer(data / "images", model, tmp_path / "taken") == 2
    assert f"cannot write {tmp_path}/taken/results.json: " in one_line(capsys)
    assert not (tmp_path / "taken/pictures").exists()
    (tmp_path / "file/pictures").parent.mkdir()
    (tmp_path / "file/pictures").write_text("")
    assert infer(data / "images", model, tmp_path / "file") == 2
    assert f"--out-dir is a folder; {tmp_path}/file/pictures is a file" in one_line(capsys)
    shutil.copytree(data / "images", tmp_path / "own/pictures")
    assert infer(tmp_path / "own/pictures", model, tmp_path / "own") == 2
    assert f"--out-dir would write over the image {tmp_path}/own/pictures/00.png" in one_line(capsys)
    assert sorted(path.name for path in (tmp_path / "own").rglob("*.json")) == []
    (tmp_path / "cut.png").write_bytes((data / "images/00.png").read_bytes()[:4000])
    assert infer(tmp_path / "cut.png", model, tmp_path / "none") == 2
    assert one_line(capsys) == "error: 0 of 1 images done; not read: cut.png (image file is truncated)"


def test_interrupted(
    trained: Callable, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With Ctrl-C, and by a bug, when three pictures are done."""

    class Bug(BaseException):
        pass

    for stop in (KeyboardInterrupt, Bug):
        out = tmp_path / stop.__name__

        def write(path: Path, *rest: object, stop: type = stop) -> None:
            if path.name == "03.png":
                raise stop
            write_picture(path, *rest)

        monkeypatch.setattr("carafe_plugin.engine.prediction.write_picture", write)
        capsys.readouterr()
        if stop is KeyboardInterrupt:
            assert infer(data / "images", trained("mmdet"), out) == 130
            assert capsys.readouterr().err.splitlines()[-1] == "interrupted: 3 of 7 images done"
        else:
            with pytest.raises(Bug):
                infer(data / "images", trained("mmdet"), out)
        listed = json.loads((out / "results.json").read_text())
        assert [image["file_name"] for image in listed["images"]] == ["00.png", "01.png", "02.png"]
        assert COCO(str(out / "results.json")).getImgIds() == [1, 2, 3]


def test_killed(trained: Callable, data: Path, tmp_path: Path) -> None:
    """At any moment, the results that were written are whole."""
    model = trained("mmdet")
    photos, results = tmp_path / "photos", tmp_path / "out/results.json"
    photos.mkdir()
    for index in range(300):
        (photos / f"{index:03d}.png").symlink_to(data / "images/00.png")
    command = [sys.executable, ROOT / "tools/infer.py", photos, "--config", model.config, "--device", "cpu"]
    command += ["--checkpoint", model.checkpoint, "--out-dir", results.parent]
    process = subprocess.Popen(list(map(str, command)), env=environment(), stderr=subprocess.DEVNULL)
    reads, images = 0, []
    try:
        while process.poll() is None and len(images) < 5:
            time.sleep(0.01)
            if results.is_file():
                images = json.loads(results.read_text())["images"]
                reads += 1
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL, "before its end"
    images = [image["file_name"] for image in json.loads(results.read_text())["images"]]
    assert 5 <= len(images) < 300
    assert reads > 2
    assert images == [f"{index:03d}.png" for index in range(len(images))]
    assert {path.name for path in (results.parent / "pictures").glob("*.png")} >= set(images)


def test_category_ids_of_a_faulty_file(
    trained: Callable, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for number, (content, expected) in enumerate(
        [
            (b'{"categories": [', "truncated, or not JSON): Expecting value: line 1 column 17"),
            (codecs.BOM_UTF8 + b"{}", "begins with a byte order mark: save it as UTF-8 without one"),
            (b'{"categories": [{"id": 1}]}', "categories must be a list of dictionaries with id and name"),
            (b'{"categories": 5}', "categories must be a list of dictionaries with id and name"),
        ]
    ):
        path = tmp_path / f"{number}.json"
        path.write_bytes(content)
        option = f"test_dataloader.dataset.ann_file={path}"
        assert infer(data / "images", trained("mmdet"), tmp_path / "out", "--cfg-options", option) == 2
        message = one_line(capsys)
        assert str(path) in message
        assert expected in message
        assert not (tmp_path / "out").exists()


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
    assert one_line(capsys) == f"error: no images directly in folder {tmp_path}/empty, by their names; it has none"
    assert infer(tmp_path / "absent", model, tmp_path / "out") == 2
    assert f"no such image or folder: {tmp_path}/absent" in one_line(capsys)
    assert infer(tmp_path / ("n" * 300), model, tmp_path / "out") == 2
    assert one_line(capsys).endswith(f"{'n' * 300}: File name too long")
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
    assert done.stdout.count("Freed memory is") == (1 if memory._glibc() else 0)
    assert (tmp_path / "pictures/00.png").is_file()


@pytest.mark.parametrize("ending", WRITTEN_ENDINGS)
def test_pictures_of_every_kind_hold_their_colours(ending: str, tmp_path: Path) -> None:
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[..., 0] = 200
    write_picture(tmp_path / f"red{ending}", pixels)
    red, green, blue = cv2.imread(str(tmp_path / f"red{ending}"))[..., ::-1].mean(axis=(0, 1))
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
