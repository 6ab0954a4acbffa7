"""Folders in ADE20k's style with something wrong: one line from the tools, before anything is built."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image
from tiny_models import write_config, write_scenes
from tool_runs import ROOT, call_tool, one_line

from studies.demo import generate_scenes

pytest.importorskip("mmseg", reason="label maps are mmseg's: it is not installed")

from carafe_plugin.engine.dataset_checks import check_not_empty, ignored_labels, label_map_fault
from carafe_plugin.engine.errors import UsageError
from carafe_plugin.images import list_images, read_header, sample

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
    # OpenCV turns no WebP, and mmseg no label map.
    dataset |= dict(img_suffix=".webp", ann_file=str(data / "listed.txt"))
    (data / "listed.txt").write_text("000001\n")
    Image.fromarray(np.zeros((40, 64, 3), np.uint8)).save(image.with_suffix(".webp"), exif=exif)
    assert "is 64 x 40, its image" in (label_map_fault(dataset) or "")
    Image.fromarray(np.ones((40, 64), np.uint8)).save(label_map.with_suffix(".png"), exif=exif)
    assert label_map_fault(dataset) is None


def test_broken_exif_data_are_passed_over(tmp_path: Path) -> None:
    """As OpenCV does, which loads the image."""
    for number, data in enumerate((b"Exif\0\0MMxx", b"Exif\0\0nothing of the kind", b"Exif\0\0II*\0")):
        Image.new("RGB", (6, 4)).save(tmp_path / f"{number}.jpg", exif=data)
        assert read_header(tmp_path / f"{number}.jpg") == ((4, 6), "RGB", "JPEG")


def test_lists_of_images_in_another_encoding(data: Path) -> None:
    listed = data / "listed.txt"
    dataset = dict(type="ADE20KDataset", data_root=str(data), data_prefix=FOLDERS, ann_file=str(listed))
    listed.write_bytes("\ufeff000001\n".encode())
    with pytest.raises(UsageError, match=f"^{listed} begins with a byte order mark"):
        label_map_fault(dataset)
    listed.write_bytes(b"000001\ncaf\xe9\n")
    with pytest.raises(UsageError, match=rf"^cannot read {listed} \(12 bytes; not UTF-8\)"):
        label_map_fault(dataset)


LOAD = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations")]


def judge(folder: Path, *maps: object, ignored: tuple = (255,), **settings: object) -> str:
    """What is wrong with some label maps (labels, of which each row counts twice, or images): '' or the message without
    the folder.
    """
    for number, labels in enumerate(maps):
        image = labels if isinstance(labels, Image.Image) else Image.fromarray(np.repeat(labels, 2, 0).astype(np.uint8))
        for part in ("images", "maps"):
            (folder / part).mkdir(exist_ok=True)
        Image.new("RGB", image.size).save(folder / f"images/{number}.png")
        image.save(folder / f"maps/{number}{settings.get('seg_map_suffix', '.png')}")
    dataset = dict(
        type="BaseSegDataset",
        data_root=str(folder),
        img_suffix=".png",
        data_prefix=dict(img_path="images", seg_map_path="maps"),
        metainfo=dict(classes=("ground", "red", "blue")),
        pipeline=LOAD,
    )
    return (label_map_fault({**dataset, **settings}, ignored) or "").replace(f"{folder}/", "")


def test_labels_are_classes_or_ignored(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """One that is neither is an IndexError in a training, and a wrong mIoU in a test."""
    assert judge(tmp_path, [[0, 1]], [[2, 255]]) == ""
    assert "looked at 2 of 2 label maps of BaseSegDataset\n" in capsys.readouterr().out
    assert judge(tmp_path, [[0, 2]], [[2, 2]]) == ""
    assert "looked at 2 of 2 label maps of BaseSegDataset, none of them with red\n" in capsys.readouterr().out
    classes = "which are no class: the 3 classes (ground, red, blue) are 0 to 2, and ignored is"
    assert judge(tmp_path, [[0, 1]], [[3, 200]]) == f"annotation maps/1.png holds the labels 3, 200, {classes} 255"
    assert judge(tmp_path, [[0, 255]], [[0, 1]], ignored=(9,)).endswith(f"holds the labels 255, {classes} 9")
    assert judge(tmp_path, [[0, 1]], [[3, 200]], ignored=tuple(range(256))) == "", "nobody reads them"


def test_loaders_inside_other_transforms(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """As in a test with augmentation, and beside transforms of the user's own, which may make other labels."""
    inside = [LOAD[0], dict(type="TestTimeAug", transforms=[[dict(type="Resize", scale=(8, 8))], [LOAD[1]]])]
    assert judge(tmp_path, [[0, 3]], pipeline=inside).startswith("annotation maps/0.png holds the labels 3, which are")
    assert judge(tmp_path, palette_of_three().convert("RGB"), pipeline=inside).endswith("got RGB")

    class Merge:
        """Makes class 2 of class 3."""

    capsys.readouterr()
    assert judge(tmp_path, [[0, 3]], pipeline=[*LOAD, dict(type=Merge)]) == ""
    assert f"did not look at the labels in {tmp_path}/maps: Merge may make others of them" in capsys.readouterr().out
    assert "holds the labels 3, " in judge(tmp_path, [[0, 3]], pipeline=[dict(type=Merge), *LOAD])


def palette_of_three() -> Image.Image:
    palette = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), mode="P")
    palette.putpalette([0, 0, 0, 220, 40, 40, 40, 40, 220])
    return palette


def test_labels_as_mmseg_changes_them(tmp_path: Path) -> None:
    assert judge(tmp_path, [[0, 1]], [[2, 3]], reduce_zero_label=True) == ""
    fault = judge(tmp_path, [[0, 1]], [[2, 4]], reduce_zero_label=True)
    assert fault.startswith("annotation maps/1.png holds the labels 3 after reduce_zero_label, which are no class")
    few = dict(type="ADE20KDataset", metainfo=dict(classes=("building", "wall")), seg_map_suffix=".png")
    assert judge(tmp_path, [[0, 1]], [[2, 150]], **few) == "", "wall, building, and one of those that are left out"
    fault = judge(tmp_path, [[1, 2]], [[2, 151]], **few)
    assert "holds the labels 150 after reduce_zero_label after label_map, which are no class: the 2 classes" in fault


def test_masks_in_black_and_white(tmp_path: Path) -> None:
    """255 is ignored, so a training would see ground alone."""
    two = dict(classes=("ground", "road"))
    fault = judge(tmp_path, [[0, 255]], [[255, 255]], metainfo=two)
    assert fault.endswith("hold 0 and the ignored 255 alone: the class road must have the label 1")
    assert judge(tmp_path, [[0, 255]], [[0, 1]], metainfo=two) == ""
    assert judge(tmp_path, [[0, 0]], [[0, 0]], metainfo=two) == "", "there may be no road"
    assert judge(tmp_path, [[0, 1]], [[1, 1]], metainfo=two, reduce_zero_label=True) == "", "nor here"


def test_forms_that_are_not_one_label_per_pixel(tmp_path: Path) -> None:
    palette = palette_of_three()
    assert judge(tmp_path, palette) == "", "mmseg reads its numbers"
    by_opencv = [LOAD[0], dict(LOAD[1], imdecode_backend="cv2")]
    fault = judge(tmp_path, palette, pipeline=by_opencv)
    assert fault == "annotation maps/0.png must hold one label per pixel, and mmseg reads it as an array (2, 2, 3)"
    for mode in ("RGB", "RGBA", "LA"):
        fault = judge(tmp_path, palette.convert("RGBA").convert(mode))
        assert fault.startswith("annotation maps/0.png must hold one label per pixel (Pillow's mode ")
        assert fault.endswith(f"got {mode}")
    deep = np.array([[0, 1], [2, 2]], np.uint16)
    assert judge(tmp_path, Image.fromarray(deep)) == ""
    fault = judge(tmp_path, Image.fromarray(deep + np.uint16(256)))  # mmseg would make 0, 1, 2 of them
    assert fault == "annotation maps/0.png holds labels from 256 to 258; mmseg keeps 8 bits"
    fault = judge(tmp_path, Image.fromarray(np.array([[0.5, 1]], np.float32)), seg_map_suffix=".tiff")
    assert fault == "annotation maps/0.tiff holds labels from 0.5 to 1.0; mmseg keeps 8 bits"
    fault = judge(tmp_path, Image.new("L", (8, 8)), seg_map_suffix=".jpg")
    assert fault == "annotation maps/0.jpg is a JPEG, whose compression changes labels: write label maps as PNG"
    noise = np.random.default_rng(0).integers(0, 3, (64, 64))
    assert judge(tmp_path, noise) == ""
    (tmp_path / "maps/0.png").write_bytes((tmp_path / "maps/0.png").read_bytes()[:400])
    assert judge(tmp_path).startswith("annotation maps/0.png cannot be read: ")


def test_label_maps_are_not_turned(tmp_path: Path) -> None:
    """mmseg reads them as they are stored, whatever their EXIF data say."""
    exif = Image.Exif()
    exif[0x0112] = 6
    assert judge(tmp_path, Image.new("L", (2, 4))) == ""
    Image.new("L", (4, 2)).save(tmp_path / "maps/0.png", exif=exif)
    assert judge(tmp_path) == "annotation maps/0.png is 2 x 4, its image images/0.png is 4 x 2 (height x width)"
    Image.new("RGB", (2, 4)).save(tmp_path / "images/0.png", exif=exif)
    assert judge(tmp_path) == ""
    kept = [dict(LOAD[0], color_type="color_ignore_orientation"), LOAD[1]]
    assert judge(tmp_path, pipeline=kept).endswith("is 2 x 4, its image images/0.png is 4 x 2 (height x width)")


def test_of_many_label_maps_a_sample_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("carafe_plugin.engine.dataset_checks.sample", partial(sample, least=4, seconds=-1))
    assert judge(tmp_path, *[[[0, 1, 2]]] * 9) == ""
    assert "looked at 4 of 9 label maps of BaseSegDataset\n" in capsys.readouterr().out


def test_labels_that_nobody_reads() -> None:
    """What the losses ignore in a training, the metrics in a test."""
    heads = dict(decode_head=[dict(), dict(ignore_index=254)], auxiliary_head=dict(ignore_index=254))
    cfg = Config(dict(model=heads, val_evaluator=dict(ignore_index=0), test_evaluator=[dict(format_only=True)]))
    assert ignored_labels(cfg, "train") == set(), "one head reads 255, the others 254"
    assert ignored_labels(cfg, "val") == {0}
    assert ignored_labels(cfg, "test") == set(range(256))
    assert ignored_labels(Config(dict(model=dict(type="Distiller"))), "train") == {255}
    wrapped = dict(type="Evaluator", metrics=[dict(type="IoUMetric", ignore_index=0)])
    assert ignored_labels(Config(dict(test_evaluator=wrapped)), "test") == {0}
    assert ignored_labels(Config(dict(model=dict(decode_head=dict(ignore_index=None)))), "train") == {255}


@pytest.mark.parametrize("tool", ["train", "test"])
def test_a_label_beyond_the_classes_ends_a_run(tool: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = write_scenes(tmp_path / "data", 3)
    config = write_config(tmp_path / "tiny.py", "mmseg", data)
    (tmp_path / "not_loaded.pth").touch()
    labels = np.array(Image.open(data / "labels/01.png"))
    labels[0, 0] = 3
    Image.fromarray(labels).save(data / "labels/01.png")
    checkpoint = [tmp_path / "not_loaded.pth"] if tool == "test" else []
    assert call_tool(tool, config, *checkpoint, "--work-dir", tmp_path / "run") == 2
    message = (
        f"{tool}_dataloader (BaseSegDataset): annotation {data}/labels/01.png holds the labels 3, which are no class"
    )
    assert message in one_line(capsys)
    assert not (tmp_path / "run").exists(), "found out before anything was built"


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
