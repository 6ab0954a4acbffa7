"""Folders in ADE20k's style with something wrong: one line from the tools, before anything is built."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image
from tiny_runs import ROOT, call_tool, one_line

from studies.demo import generate_scenes

pytest.importorskip("mmseg", reason="label maps are mmseg's: it is not installed")

from carafe_plugin.engine.dataset_checks import check_not_empty, label_map_fault
from carafe_plugin.engine.errors import UsageError
from carafe_plugin.images import list_images

FOLDERS = {"img_path": "images/training", "seg_map_path": "annotations/training"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three images with annotations to train on, two to test on."""
    request = generate_scenes.Request(seed=0, train=3, val=2, size=64, format="ade20k")
    generate_scenes.generate(tmp_path / "data", request)
    return tmp_path / "data"


def remove(path: Path) -> str:
    path.unlink()
    return f"annotations are missing in {path.parent}: {path.name}"


def cut(path: Path) -> str:
    Image.open(path).crop((0, 0, 40, 64)).save(path)
    image = str(path).replace("annotations", "images").replace(".png", ".jpg")
    return f"annotation {path} is 64 x 40, its image {image} is 64 x 64"


def destroy(path: Path) -> str:
    path.write_text("no picture")
    return f"annotation {path} is not an image"


def remove_image(path: Path) -> str:
    image = Path(str(path).replace("annotations", "images").replace(".png", ".jpg"))
    image.unlink()
    return f"1 annotations in {path.parent} have no image in {image.parent}: 000002"


@pytest.mark.parametrize("damage", [remove, cut, destroy, remove_image])
@pytest.mark.parametrize("tool", ["train", "test"])
def test_damaged_annotation_is_named(
    tool: str, damage: Callable[[Path], str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ROOT / "configs/demo/upernet_r18_scenes.py"
    options = [f"{split}_dataloader.dataset.data_root={data}" for split in ("train", "test")]
    expected = damage(data / "annotations" / {"train": "training", "test": "validation"}[tool] / "000002.png")
    checkpoint = [tmp_path / "not_loaded.pth"] if tool == "test" else []
    for path in checkpoint:
        path.touch()
    assert call_tool(tool, config, *checkpoint, "--work-dir", tmp_path / "run", "--cfg-options", *options) == 2
    message = one_line(capsys)
    assert expected in message
    assert f"{tool}_dataloader (BaseSegDataset): " in message
    assert not (tmp_path / "run").exists(), "found out before anything was written"


def test_how_many_annotations_are_missing(data: Path) -> None:
    dataset = dict(type="ADE20KDataset", data_root=str(data), data_prefix=FOLDERS)
    assert label_map_fault(dataset) is None
    for number in (3, 2):
        (data / "annotations/training" / f"{number:06d}.png").unlink()
    assert (label_map_fault(dataset) or "").startswith("2 of the 3 annotations are missing in ")
    # What is listed counts, not what lies there.
    listed = dataset | dict(ann_file="listed.txt")
    (data / "listed.txt").write_text("000001\n")
    assert label_map_fault(listed) is None
    (data / "images/training/000001.jpg").write_bytes(b"")
    assert (label_map_fault(listed) or "").startswith("1 of the 1 images are empty in ")
    (data / "images/training/000001.jpg").unlink()
    assert (label_map_fault(listed) or "").startswith("1 of the 1 images are missing in ")


def test_images_are_found_as_mmseg_finds_them(data: Path) -> None:
    """In subfolders too, with the endings of the configuration or of the type, and no hidden files."""
    from mmseg.datasets import ADE20KDataset

    inner = data / "images/training/inner"
    inner.mkdir()
    (data / "images/training/000001.jpg").rename(inner / "town.jpg")
    (data / "images/training/000003.jpg").rename(data / "village.jpg")
    (data / "images/elsewhere").mkdir()
    (data / "village.jpg").rename(data / "images/elsewhere/village.jpg")
    (data / "images/training/linked").symlink_to(data / "images/elsewhere")
    (data / "images/training/000002.JPG").write_text("another ending than the dataset's")
    (data / "images/training/.hidden.jpg").write_text("")
    found = [info["img_path"] for info in ADE20KDataset(data_root=str(data), data_prefix=FOLDERS).load_data_list()]
    names = list_images(data / "images/training", ".jpg")
    assert sorted(found) == sorted(f"{data}/images/training/{name}" for name in names)
    assert "inner/town.jpg" in names
    dataset = dict(type=ADE20KDataset, data_root=str(data), data_prefix=FOLDERS)
    missing = data / "annotations/training/inner/town.png"
    (data / "annotations/training/linked").mkdir()
    (data / "annotations/training/000003.png").rename(data / "annotations/training/linked/village.png")
    assert f"{missing.parents[1]}: inner/town.png" in (label_map_fault(dataset) or "")
    missing.parent.mkdir()
    (data / "annotations/training/000001.png").rename(missing)
    assert label_map_fault(dataset) is None
    assert "000002_labels.png" in (label_map_fault(dataset | dict(seg_map_suffix="_labels.png")) or "")
    (data / "images/training/rome_leftImg8bit.png").write_text("")
    own = dict(dataset, type="CityscapesDataset")
    assert ": rome_gtFine_labelTrainIds.png" in (label_map_fault(own) or "")


def test_what_cannot_be_judged_is_left_alone(data: Path) -> None:
    (data / "annotations/training/000001.png").unlink()
    dataset = dict(type="ADE20KDataset", data_root=str(data), data_prefix=FOLDERS)
    assert label_map_fault(dataset)
    assert label_map_fault(dataset | dict(data_prefix=dict(img_path=FOLDERS["img_path"]))) is None
    assert label_map_fault(dataset | dict(data_prefix="images/training")) is None
    assert label_map_fault(dataset | dict(no_argument_of_it=1)) is None, "whoever builds it says so"
    assert label_map_fault(dataset | dict(ann_file=None))
    assert label_map_fault(dataset | dict(data_root="s3://bucket/ade20k")) is None
    assert label_map_fault(dataset | dict(type="NobodysDataset")) is None
    assert label_map_fault(dataset | dict(type="LEVIRCDDataset")) is None, "two images for each label map"


def test_label_maps_of_colours(data: Path) -> None:
    """mmseg's own reader makes three labels of each; another may know what to do with them."""
    coloured = data / "annotations/training/000002.png"
    Image.open(coloured).convert("RGB").save(coloured)
    dataset = dict(type="ADE20KDataset", data_root=str(data), data_prefix=FOLDERS)
    fault = label_map_fault(dataset | dict(pipeline=[dict(type="mmseg.LoadAnnotations")])) or ""
    assert fault.startswith(f"annotation {coloured} must hold one label per pixel (Pillow's mode ")
    assert fault.endswith(", got RGB")
    assert label_map_fault(dataset | dict(pipeline=[dict(type="LoadColours")])) is None


def test_photograph_that_was_turned_fits(data: Path) -> None:
    """A camera on its side stores the image lying, and its readers turn it."""
    image, label_map = (data / FOLDERS[key] / "000001" for key in ("img_path", "seg_map_path"))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((40, 64, 3), np.uint8)).save(image.with_suffix(".jpg"), exif=exif)
    Image.fromarray(np.ones((64, 40), np.uint8)).save(label_map.with_suffix(".png"))
    dataset = dict(type="ADE20KDataset", data_root=str(data), data_prefix=FOLDERS)
    assert label_map_fault(dataset) is None
    Image.fromarray(np.zeros((40, 64, 3), np.uint8)).save(image.with_suffix(".jpg"))
    assert "is 64 x 40" in (label_map_fault(dataset) or "")


class Run:
    """As much of a runner as the checks ask for: a configuration, and one data loader."""

    def __init__(self, scope: str, dataset: object) -> None:
        self.cfg = Config(dict(default_scope=scope, train_dataloader=dict(dataset=dict(type="Own"))))
        self.train_dataloader = SimpleNamespace(dataset=dataset)


def test_kinds_that_are_not_known_are_passed_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pascal VOC's, in a wrapper: one line, and whether the files are there that they list."""
    pytest.importorskip("mmdet", reason="mmdet is not installed")
    from mmdet.datasets import VOCDataset
    from mmengine.dataset import RepeatDataset

    box = "<bndbox><xmin>2</xmin><ymin>2</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    size = "<size><width>16</width><height>16</height></size>"
    for folder in ("JPEGImages", "Annotations"):
        (tmp_path / folder).mkdir()
    for name in ("a", "b"):
        content = f"<annotation>{size}<object><name>cat</name>{box}</object></annotation>"
        (tmp_path / f"Annotations/{name}.xml").write_text(content)
        Image.new("RGB", (16, 16)).save(tmp_path / f"JPEGImages/{name}.jpg")
    (tmp_path / "list.txt").write_text("a\nb\n")
    voc = VOCDataset(data_root=str(tmp_path), ann_file="list.txt", data_prefix=dict(sub_data_root=""))
    assert len(voc) == 2
    run = Run("mmdet", RepeatDataset(voc, 2))
    check_not_empty(run, "train")
    place = "train_dataloader (VOCDataset)"
    expected = f"note: {place}: annotations are of a kind that is not checked before the run; 2 files"
    assert capsys.readouterr().err.splitlines() == [f"{expected} that it lists are there"]
    (tmp_path / "JPEGImages/b.jpg").unlink()
    message = re.escape(f"{place}: 1 of the 2 files that it lists are missing in {tmp_path}: JPEGImages/b.jpg")
    with pytest.raises(UsageError, match=f"^{message}$"):
        check_not_empty(run, "train")


def test_images_of_a_list_for_a_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """mmpretrain opens the first that is missing in the middle of an epoch; those of a folder are there."""
    pytest.importorskip("mmpretrain", reason="mmpretrain is not installed")
    from mmpretrain.datasets import CustomDataset, MultiLabelDataset

    for name in ("cat/a.png", "dog/b.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / name)
    check_not_empty(Run("mmpretrain", CustomDataset(data_root=str(tmp_path))), "train")
    assert capsys.readouterr().err == ""
    listed = [dict(img_path=name, gt_label=[0]) for name in ("cat/a.png", "dog/c.png")]
    (tmp_path / "list.json").write_text(json.dumps(dict(metainfo=dict(classes=["x"]), data_list=listed)))
    (tmp_path / "list.txt").write_text("cat/a.png 0\ndog/c.png 1\n")
    for kind, file in ((MultiLabelDataset, "list.json"), (CustomDataset, "list.txt")):
        dataset = kind(data_root=str(tmp_path), ann_file=file)
        with pytest.raises(UsageError, match=r"1 of the 2 files that it lists are missing in .*: dog/c\.png"):
            check_not_empty(Run("mmpretrain", dataset), "train")
