"""What annotations in COCO's format must say: everything that would change an AP, or end a run, is found before it."""

import json
import os
from contextlib import suppress
from copy import deepcopy
from pathlib import Path

import pytest

from carafe_plugin.engine.annotations import AnnotationError, check_annotations, check_coco, missing_files

NAN = float("nan")
OBJECT = dict(id=1, image_id=0, category_id=1, bbox=[1, 1, 5, 5], area=25, iscrowd=0, segmentation=[[1, 1, 6, 1, 6, 6]])
SOUND = dict(
    images=[dict(id=0, file_name="a.jpg", width=20, height=20)],
    categories=[dict(id=1, name="p")],
    annotations=[OBJECT],
)


def changed(kind="annotations", without=(), **values):
    """The sound file with another first entry in one of its lists."""
    content = deepcopy(SOUND)
    content[kind][0].update(values)
    for key in without:
        del content[kind][0][key]
    return content


def doubled(kind, **values):
    content = deepcopy(SOUND)
    content[kind].append({**content[kind][0], **values})
    return content


def average_precision(content):
    """Of a perfect detection, by pycocotools itself."""
    coco, evaluation = (
        pytest.importorskip(f"pycocotools.{name}", reason="pycocotools is not installed")
        for name in ("coco", "cocoeval")
    )
    truth = coco.COCO()
    truth.dataset = deepcopy(content)
    truth.createIndex()
    box = OBJECT["bbox"]
    found = truth.loadRes([dict(image_id=0, category_id=1, bbox=box, score=0.9)])
    run = evaluation.COCOeval(truth, found, "bbox")
    run.evaluate()
    run.accumulate()
    run.summarize()
    return run.stats[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(id=0), "annotation 0 must have as id a whole number from 1 on .*, got 0"),
        (doubled("annotations", bbox=[9, 9, 2, 2]), "annotation 1 occurs twice: the ids of annotations must differ"),
        (changed(without=["id"]), r"annotation number 0 \(from 0\) has no id: {"),
        (changed(without=["area"]), "annotation 1 has no area: {"),
        (changed(without=["iscrowd"]), "annotation 1 has no iscrowd: {"),
        (changed(category_id=[1]), r"annotation 1 is of the category \[1\], not one of 1"),
        (changed(image_id={}), "annotation 1 is of the image {}, which the file does not list"),
    ],
)
def test_what_pycocotools_does_not_say(content, message):
    """Each is a wrong AP there, or an error after the last image."""
    assert average_precision(SOUND) == pytest.approx(1)
    with suppress(KeyError, TypeError):
        assert average_precision(content) < 0.6
    check_coco(SOUND, Path("a.json"), ["p"], masks=True)
    with pytest.raises(AnnotationError, match=f"^a.json: {message}"):
        check_coco(content, Path("a.json"), ["p"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(id="1"), "annotation 1 must have as id a whole number .*, got '1'"),
        (changed(id=True), "annotation True must have as id a whole number .*, got True"),
        (changed(category_id=True), "is of the category True, not one of 1"),
        (changed(area=NAN), "annotation 1 of the image 0 has an area that is no finite number from 0 on: nan"),
        (changed(area=-1), "has an area that is no finite number from 0 on: -1"),
        (changed(iscrowd=[1]), r"has an iscrowd that is neither 0 nor 1: \[1\]"),
        (changed(bbox=[True, 1, 1, 1]), r"has a bbox that is no list of four numbers: \[True, 1, 1, 1\]"),
        (changed(segmentation=[]), r"has no segmentation of polygons or run lengths: \[\]"),
        (changed(segmentation=[[1, 1, 6, 6]]), r"has no segmentation of polygons or run lengths: \[\[1, 1, 6, 6\]\]"),
        (changed(segmentation=[[1, 1, 6, 1, 6, NAN]]), "has no segmentation of polygons or run lengths: "),
        (changed(segmentation=dict(size=[20, 20])), "has no segmentation of polygons or run lengths: "),
        (dict(SOUND, annotations=["x"]), r"annotation number 0 \(from 0\) is no dictionary: 'x'"),
        (changed("images", without=["file_name"]), "image 0 has no file_name: {"),
        (changed("images", file_name=""), "image 0 must have a text as file_name, got ''"),
        (changed("images", width=0), "image 0 must have a positive number of pixels as width, got 0"),
        (changed("images", id=[0]), r"image number 0 \(from 0\) must have an integer or a text as id, got \[0\]"),
        (doubled("images"), "image 0 occurs twice: the ids must differ"),
        (doubled("categories"), "category 1 occurs twice: the ids must differ"),
        (doubled("categories", id=2), "several categories have the name of one class of the configuration: p"),
        (changed("categories", without=["name"]), "category 1 has no name: {"),
    ],
)
def test_what_else_is_refused(content, message):
    with pytest.raises(AnnotationError, match=message):
        check_coco(content, Path("a.json"), ["p"], masks=True)


def test_a_training_needs_less():
    """What mmdet does not read, or leaves out on purpose."""
    for content in (
        changed(id=0, without=["iscrowd"]),
        changed(segmentation=[[1, 1, 6, 6]]),
        changed(bbox=[1, 1, 0, 5], without=["segmentation"]),
    ):
        check_coco(content, Path("a.json"), ["p"], empty_boxes=True, measured=False, masks=True)
        with pytest.raises(AnnotationError):
            check_coco(content, Path("a.json"), ["p"], masks=True)
    for content in (doubled("annotations"), changed(bbox=[1, 1, -1, 5]), changed(without=["segmentation"])):
        with pytest.raises(AnnotationError):
            check_coco(content, Path("a.json"), ["p"], empty_boxes=True, measured=False, masks=True)


def test_no_size_is_asked_for_in_a_training(tmp_path, monkeypatch):
    """A stat a file would take minutes on a network's file system: each folder is listed, once."""
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    listed, scan = [], os.scandir

    class Entry:
        def __init__(self, entry):
            self.name, self.is_file = entry.name, entry.is_file  # and no stat

    class Listing:
        def __init__(self, folder):
            listed.append(Path(folder).name)
            self.entries = [Entry(entry) for entry in scan(folder)]

        def __enter__(self):
            return self.entries

        def __exit__(self, *args):
            pass

    names = ["a/1.jpg", "b/1.jpg", "a/2.jpg", "a/3.jpg", "c/1.jpg"]
    assert missing_files(tmp_path, names) == (["a/3.jpg", "c/1.jpg"], ["a/1.jpg", "a/2.jpg", "b/1.jpg"])
    monkeypatch.setattr("carafe_plugin.engine.annotations.os.scandir", Listing)
    (tmp_path / "c").mkdir()
    assert missing_files(tmp_path, names, sizes=False) == (["a/3.jpg", "c/1.jpg"], [])
    assert listed == ["a", "b", "c"]


def test_images_that_a_training_leaves_out_may_be_missing(tmp_path):
    pytest.importorskip("mmdet", reason="mmdet is not installed")
    content = deepcopy(SOUND)
    content["images"].append(dict(id=1, file_name="background.jpg", width=20, height=20))
    (tmp_path / "a.json").write_text(json.dumps(content))
    (tmp_path / "a.jpg").write_bytes(b"")
    dataset = dict(type="CocoDataset", data_root=str(tmp_path), ann_file="a.json", metainfo=dict(classes=("p",)))
    check_annotations(dict(dataset, filter_cfg=dict(filter_empty_gt=True)), training=True)
    check_annotations(dict(dataset, indices=1), training=True)
    for settings, training in (
        (dict(filter_cfg=dict(filter_empty_gt=False)), True),
        (dict(filter_cfg=dict(filter_empty_gt=True)), False),
        (dict(filter_cfg=dict(filter_empty_gt=True), test_mode=True), True),
    ):
        with pytest.raises(AnnotationError, match=r"1 of the 2 images of .*a.json are missing, .*background.jpg"):
            check_annotations({**dataset, **settings}, training=training)


def test_the_metrics_own_file_is_checked(tmp_path):
    pytest.importorskip("mmdet", reason="mmdet is not installed")
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "a.json").write_text(json.dumps(SOUND))
    (tmp_path / "zero.json").write_text(json.dumps(changed(id=0, without=["iscrowd"])))
    dataset = dict(type="CocoDataset", data_root=str(tmp_path), ann_file="a.json", metainfo=dict(classes=("p",)))
    metric = dict(type="CocoMetric", metric=["bbox", "segm"], ann_file=str(tmp_path / "a.json"))
    check_annotations(dataset, metric)
    check_annotations(dict(dataset, ann_file="zero.json"), metric)  # pycocotools reads the metric's alone
    check_annotations(dict(dataset, ann_file="zero.json"), [dict(type="CocoMetric")])  # mmdet numbers them anew
    for ann_file in ("a.json", "zero.json"):
        with pytest.raises(AnnotationError, match=r"zero.json: annotation 0 has no iscrowd"):
            check_annotations(dict(dataset, ann_file=ann_file), dict(metric, ann_file=str(tmp_path / "zero.json")))
