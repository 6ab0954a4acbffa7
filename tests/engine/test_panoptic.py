"""Panoptic datasets: whatever would end a run, or change what is learnt or measured, is found before it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_models import SIZE, write_config, write_segments
from tool_runs import one_line

pytest.importorskip("mmdet", reason="panoptic datasets are mmdet's: it is not installed")

from mmengine.config import Config

from carafe_plugin.engine import panoptic
from carafe_plugin.engine.dataset_checks import check_dataset_files
from carafe_plugin.engine.errors import UsageError


@pytest.fixture(scope="module")
def stock(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return Config.fromfile(write_config(tmp_path_factory.mktemp("stock") / "panoptic.py", "panoptic", data))


@pytest.fixture
def copy(stock: Config, data: Path, tmp_path: Path) -> tuple[Config, Path]:
    """The configuration with a dataset of its own."""
    for name in ("images", "panoptic"):
        shutil.copytree(data / name, tmp_path / name)
    for name in ("panoptic.json", "instances.json"):
        shutil.copy(data / name, tmp_path)
    cfg = deepcopy(stock)
    for split in ("train", "val", "test"):
        cfg[f"{split}_dataloader"].dataset.data_root = str(tmp_path)
    cfg.test_evaluator.update(ann_file=str(tmp_path / "panoptic.json"), seg_prefix=str(tmp_path / "panoptic"))
    return cfg, tmp_path


def change(root: Path, edit: Callable[[dict], Any], name: str = "panoptic.json") -> None:
    content = json.loads((root / name).read_text())
    edit(content)
    (root / name).write_text(json.dumps(content))


def segment(content: dict, **values: Any) -> None:
    content["annotations"][1]["segments_info"][0].update(values)


def repaint(root: Path, edit: Callable[[np.ndarray], Any]) -> None:
    """Change the ids in the second image's PNG file."""
    path = root / "panoptic/01.png"
    ids = np.array(Image.open(path)).astype(int) @ [1, 256, 65536]
    edit(ids)
    write_segments(path, ids)


def resave(path: Path, **settings: Any) -> None:
    image = Image.open(path)
    (image.convert(settings["mode"]) if "mode" in settings else image.resize(settings["size"], 0)).save(path)


BOTH, TEST = ("train", "test"), ("test",)
FAULTS: dict[str, tuple[Callable[[Path], Any], str, tuple[str, ...]]] = {
    "no images": (lambda r: change(r, lambda c: c.pop("images")), "{json} is not an annotation file in COCO's", BOTH),
    "an image of no size": (lambda r: change(r, lambda c: c["images"][0].pop("width")), "image 0 has no width", BOTH),
    "no isthing": (lambda r: change(r, lambda c: c["categories"][0].pop("isthing")), "category 7 has no isthing", BOTH),
    "another isthing": (
        lambda r: change(r, lambda c: c["categories"][1].update(isthing=0)),
        "category blue has isthing 0, and it is among the thing_classes of the configuration's metainfo (red, blue)",
        BOTH,
    ),
    "stuff first": (
        lambda r: change(r, lambda c: c["categories"].insert(0, c["categories"].pop())),
        "{json}: its categories come in the order ground, red, blue, the classes of the configuration in the order red",
        BOTH,
    ),
    "no such class": (
        lambda r: change(r, lambda c: c["categories"][2].update(name="grass")),
        "{json}: no category for 1 of the 3 classes of the configuration (ground)",
        BOTH,
    ),
    "an instance file": (
        lambda r: shutil.copy(r / "instances.json", r / "panoptic.json"),
        "{json}: category 7 has no isthing",
        BOTH,
    ),
    "no segments_info": (
        lambda r: change(r, lambda c: c["annotations"][1].pop("segments_info")),
        "{json}: annotation of image 1 has no segments_info",
        BOTH,
    ),
    "segments_info of text": (
        lambda r: change(r, lambda c: c["annotations"][1].update(segments_info="none")),
        "annotation of image 1: segments_info must be a list, got 'none'",
        BOTH,
    ),
    "an annotation of text": (
        lambda r: change(r, lambda c: c["annotations"].append("none")),
        "annotation of image number 7 (from 0) is not a dictionary: 'none'",
        BOTH,
    ),
    "of no image": (
        lambda r: change(r, lambda c: c["annotations"][1].update(image_id=70)),
        "{json}: annotation of image 70: id must be an image that the file lists, got 70",
        BOTH,
    ),
    "an image twice": (
        lambda r: change(r, lambda c: c["annotations"].append(c["annotations"][1])),
        "{json}: annotation of image 1 occurs twice: ids must be unique",
        BOTH,
    ),
    "an id twice": (
        lambda r: change(r, lambda c: segment(c, id=70001)),
        "{json}: image 1: segment 70001 occurs twice: ids must be unique",
        BOTH,
    ),
    "the id of no segment": (
        lambda r: change(r, lambda c: segment(c, id=0)),
        "segment 0: id must be an integer from 1 to 16777215 (a colour of the PNG; 0 is for no segment), got 0",
        BOTH,
    ),
    "an id beyond colours": (lambda r: change(r, lambda c: segment(c, id=256**3)), "got 16777216", BOTH),
    "an id of text": (lambda r: change(r, lambda c: segment(c, id="301")), "16777215", BOTH),
    "no such category": (
        lambda r: change(r, lambda c: segment(c, category_id=1)),
        "segment 301: category_id must be the category of a class of the configuration (7, 8, 99), got 1",
        BOTH,
    ),
    "of a category without a class": (
        lambda r: change(
            r, lambda c: (c["categories"].append(dict(id=1, name="x", isthing=0)), segment(c, category_id=1))
        ),
        "must be the category of a class of the configuration (7, 8, 99), got 1",
        BOTH,
    ),
    "no bbox": (
        lambda r: change(r, lambda c: c["annotations"][1]["segments_info"][0].pop("bbox")),
        "{json}: image 1: segment 301 has no bbox",
        BOTH,
    ),
    "a bbox of three": (lambda r: change(r, lambda c: segment(c, bbox=[1, 2, 3])), "bbox must be four finite", BOTH),
    "a bbox of NaN": (lambda r: change(r, lambda c: segment(c, bbox=[1, 2, 3, float("nan")])), "four finite", BOTH),
    "an area of text": (lambda r: change(r, lambda c: segment(c, area="9")), "area must be a finite number", BOTH),
    "no iscrowd": (
        lambda r: change(r, lambda c: c["annotations"][1]["segments_info"][0].pop("iscrowd")),
        "segment 301 has no iscrowd",
        TEST,
    ),
    "no segment": (
        lambda r: change(r, lambda c: [entry.update(segments_info=[]) for entry in c["annotations"]]),
        "{json}: no segment is a thing or stuff: mmdet divides panoptic quality by how many classes have one",
        TEST,
    ),
    "no stuff": (
        lambda r: change(r, lambda c: [entry["segments_info"].pop() for entry in c["annotations"]]),
        "{json}: no segment is a stuff",
        TEST,
    ),
    "no image file": (
        lambda r: (r / "images/01.png").unlink(),
        "1 of the 7 images of {json} are missing in {root}/images: 01.png",
        BOTH,
    ),
    "no PNG file": (
        lambda r: (r / "panoptic/01.png").unlink(),
        "1 of the 7 PNG files (named as the images, .png for .jpg) of {json} are missing in {root}/panoptic: 01.png",
        BOTH,
    ),
    "an empty PNG file": (
        lambda r: (r / "panoptic/01.png").write_bytes(b""),
        "PNG files (named as the images, .png for .jpg) of {json} are empty in {root}/panoptic: 01.png",
        TEST,
    ),
    "half a PNG file": (
        lambda r: (r / "panoptic/01.png").write_bytes((r / "panoptic/01.png").read_bytes()[:60]),
        "{png}: it cannot be read: ",
        BOTH,
    ),
    "a PNG file of grey": (
        lambda r: resave(r / "panoptic/01.png", mode="L"),
        "of its pixels (of the mode L, where an id is R + 256 G + 65536 B) (image 1 of {json})",
        BOTH,
    ),
    "an image in its place": (
        lambda r: shutil.copy(r / "images/01.png", r / "panoptic/01.png"),
        "{png}: it has over 1002 ids, and there are 2 segments: is it a photograph? (image 1 of {json})",
        BOTH,
    ),
    "a PNG file of another size": (
        lambda r: resave(r / "panoptic/01.png", size=(32, 64)),
        "{png}: sizes differ (height x width): it 64 x 32, the annotations 64 x 64, its image {root}/images/01.png 64",
        BOTH,
    ),
    "an image of another size": (
        lambda r: resave(r / "images/01.png", size=(64, 32)),
        "sizes differ (height x width): it 64 x 64, the annotations 64 x 64, its image {root}/images/01.png 32 x 64",
        BOTH,
    ),
    "a size that no file has": (
        lambda r: change(r, lambda c: c["images"][1].update(height=65)),
        "sizes differ (height x width): it 64 x 64, the annotations 65 x 64",
        BOTH,
    ),
    "pixels of no segment": (
        lambda r: repaint(r, lambda ids: ids.__setitem__((slice(2), slice(2)), 5)),
        "{png}: no segment has the ids 5 of its pixels (image 1 of {json})",
        BOTH,
    ),
    "a segment of no pixel": (
        lambda r: repaint(r, lambda ids: ids.__setitem__(ids == 301, 0)),
        "{png}: no pixel of it has the ids 301 of segments (image 1 of {json})",
        BOTH,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_files(name: str, copy: tuple[Config, Path]) -> None:
    cfg, root = copy
    for split in BOTH:
        check_dataset_files(cfg, split)
    damage, expected, found_in = FAULTS[name]
    damage(root)
    for split in found_in:
        with pytest.raises(UsageError) as caught:
            check_dataset_files(cfg, split)
        message = str(caught.value)
        places = dict(json=root / "panoptic.json", png=root / "panoptic/01.png", root=root)
        for key, place in places.items():
            expected = expected.replace(f"{{{key}}}", str(place))
        assert message.startswith(f"{split}_dataloader (CocoPanopticDataset): ")
        assert expected in message
        assert "\n" not in message


@pytest.mark.parametrize(
    ("options", "split", "expected"),
    [
        ({"train_dataloader.dataset.ann_file": ""}, "train", "a panoptic dataset needs ann_file, and in data_prefix"),
        ({"train_dataloader.dataset.data_prefix": None}, "train", "needs ann_file, and in data_prefix the folders of"),
        ({"train_dataloader.dataset.data_prefix": dict(_delete_=True, img="images")}, "train", "{'img': 'images'}"),
        ({"train_dataloader.dataset.data_prefix.seg": None}, "train", "'seg': None"),
        ({"train_dataloader.dataset.data_prefix.seg": "absent"}, "train", "no such folder for train_dataloader"),
        ({"test_evaluator.seg_prefix": None}, "test", "CocoPanopticMetric needs the folder of the segments' PNG files"),
        ({"test_evaluator.seg_prefix": "absent"}, "test", "as seg_prefix, got 'absent'"),
        ({"test_evaluator.ann_file": None}, "test", "CocoPanopticMetric needs ann_file, or 'segments_info' among"),
        ({"test_evaluator.ann_file": "absent.json"}, "test", "no such annotation file of the evaluator: "),
        (
            {"model.panoptic_fusion_head.num_things_classes": 80},
            "train",
            "model.panoptic_fusion_head.num_things_classes is 80, and the classes of the dataset's metainfo are 2: red",
        ),
        ({"model.semantic_head.num_stuff_classes": 2}, "test", "are 1: ground"),
        (
            {"train_dataloader.dataset.metainfo": dict(_delete_=True, classes=("red", "blue", "ground"))},
            "train",
            "category red has isthing 1, and it is not among the thing_classes of the configuration's metainfo (person",
        ),
    ],
)
def test_faults_of_settings(options: dict, split: str, expected: str, copy: tuple[Config, Path]) -> None:
    cfg, _ = copy
    cfg.merge_from_dict(options)
    with pytest.raises(UsageError) as caught:
        check_dataset_files(cfg, split)
    assert expected in str(caught.value)


def test_things_after_stuff(copy: tuple[Config, Path]) -> None:
    """Even where the classes are in the same order: a model takes its first labels for the things."""
    cfg, root = copy
    change(root, lambda content: content["categories"].insert(0, content["categories"].pop()))
    cfg.train_dataloader.dataset.metainfo.classes = ("ground", "red", "blue")
    with pytest.raises(UsageError, match=r"the first classes for the things, and the order here .*: ground, red, blue"):
        check_dataset_files(cfg, "train")


def test_what_mmdet_needs_no_annotations_for(copy: tuple[Config, Path]) -> None:
    cfg, root = copy
    dataset = cfg.test_dataloader.dataset
    change(root, lambda content: content["annotations"][1]["segments_info"][0].pop("iscrowd"))
    check_dataset_files(cfg, "train")
    change(root, lambda content: content.pop("annotations"))  # test images, to submit predictions
    panoptic.check_panoptic_dataset(dataset, dict(type="CocoPanopticMetric", format_only=True))
    panoptic.check_panoptic_dataset(dict(dataset, data_prefix=dict(img="images")))
    with pytest.raises(UsageError, match="no segment is a thing or stuff"):
        check_dataset_files(cfg, "test")
    panoptic.check_panoptic_dataset(dict(dataset, ann_file="s3://bucket/panoptic.json"))
    panoptic.check_panoptic_dataset(dict(type="CocoDataset", ann_file="absent.json"))


def test_images_that_a_training_leaves_out_may_be_missing(copy: tuple[Config, Path]) -> None:
    """Those without a thing, as mmdet's own configurations ask for."""
    cfg, root = copy
    change(root, lambda content: content["annotations"][1]["segments_info"].pop(0))
    for path in ("images/01.png", "panoptic/01.png"):
        (root / path).unlink()
    dataset = dict(cfg.train_dataloader.dataset, filter_cfg=dict(filter_empty_gt=True))
    panoptic.check_panoptic_dataset(dataset, training=True)
    panoptic.check_panoptic_dataset({**dataset, "filter_cfg": None, "indices": [0]}, training=True)
    for filters in (None, dict(filter_empty_gt=False)):
        with pytest.raises(UsageError, match=r"1 of the 7 images of .* are missing in .*: 01\.png"):
            panoptic.check_panoptic_dataset(dataset | dict(filter_cfg=filters), training=True)


def test_the_metrics_files(copy: tuple[Config, Path]) -> None:
    """The panoptic one, and one of instances beside it, as Mask2Former's: it lists the things alone."""
    cfg, root = copy
    cfg.test_evaluator = [cfg.test_evaluator, dict(type="CocoMetric", ann_file=str(root / "instances.json"))]
    check_dataset_files(cfg, "test")
    change(root, lambda content: content["categories"].reverse(), "instances.json")
    with pytest.raises(UsageError, match=r"instances\.json: its categories come in the order blue, red"):
        check_dataset_files(cfg, "test")
    for metric in (dict(type="Evaluator", metrics=cfg.test_evaluator[:1]), cfg.test_evaluator[0]):
        other = root / "other.json"
        shutil.copy(root / "panoptic.json", other)
        cfg.test_evaluator = deepcopy(metric)
        (metric["metrics"][0] if "metrics" in metric else metric)["ann_file"] = str(other)
        cfg.test_evaluator = metric
        check_dataset_files(cfg, "test")
        change(root, lambda content: segment(content, id=5), "other.json")
        with pytest.raises(UsageError, match=r"no segment has the ids 301 of its pixels \(image 1 of .*other\.json\)"):
            check_dataset_files(cfg, "test")
        change(root, lambda content: (content["images"].pop(), content["annotations"].pop()), "other.json")
        with pytest.raises(
            UsageError, match=r"other.json does not list 1 of the 7 images of .*panoptic.json, the first"
        ):
            check_dataset_files(cfg, "test")


def test_what_a_run_goes_on_with(
    copy: tuple[Config, Path], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As mmdet's own converter of ADE20k writes them."""
    cfg, root = copy
    change(root, lambda content: segment(content, bbox=[5, 5, -3, 8]))
    change(root, lambda content: content["annotations"][2]["segments_info"][1].update(area=7))
    check_dataset_files(cfg, "test")
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"note: mmdet leaves out 1 of the 14 segments of {root}/panoptic.json: boxes or areas without extent",
        f"note: in 1 of 7 images of {root}/panoptic.json segments have another area than pixels in {root}/panoptic; "
        "panoptic quality takes the former",
    ]
    monkeypatch.setattr(panoptic, "SAMPLE", 3)
    read = []
    monkeypatch.setattr(panoptic, "decode", lambda path: read.append(path.name) or Image.open(path))
    check_dataset_files(cfg, "train")
    assert read == ["00.png", "03.png", "06.png"]
    assert f"note: looked into 3 of the 7 PNG files in {root}/panoptic" in capsys.readouterr().err.splitlines()


def test_panopticapi_is_missing(
    stock: Config, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tool_runs import call_tool

    monkeypatch.setitem(sys.modules, "panopticapi", None)
    expected = "needs the package panopticapi, which is not installed: pip install git+"
    assert call_tool("train", stock.filename, "--work-dir", tmp_path / "run") == 2
    assert f"train_dataloader (CocoPanopticDataset): mmdet's LoadPanopticAnnotations {expected}" in one_line(capsys)
    with pytest.raises(UsageError, match=f"mmdet's CocoPanopticMetric {expected}".replace("+", r"\+")):
        check_dataset_files(stock, "test")


def test_sizes_are_those_of_the_image_as_it_is_held(copy: tuple[Config, Path]) -> None:
    """A camera on its side: MMCV turns the image, and the annotations are of what it shows."""
    cfg, root = copy
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(root / "images/01.png").resize((SIZE, 32)).save(root / "images/01.png", exif=exif)
    resave(root / "panoptic/01.png", size=(32, SIZE))
    change(root, lambda content: content["images"][1].update(width=32))
    check_dataset_files(cfg, "train")
