"""What annotations in COCO's format must say: everything that would change an AP, or end a run, is found before it."""

import json
import os
from contextlib import nullcontext, suppress
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from carafe_plugin.engine.annotations import check_annotations, check_coco
from carafe_plugin.engine.errors import UsageError
from carafe_plugin.images import file_faults, sample

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


def duplicate(kind, **values):
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
        (
            changed(id=0),
            r"annotation 0 of image 0: id must be a positive integer \(pycocotools takes 0 for .*\), got 0",
        ),
        (duplicate("annotations", bbox=[9, 9, 2, 2]), "annotation 1 of image 0 occurs twice: ids must be unique"),
        (changed(without=["id"]), r"annotation number 0 \(from 0\) of image 0 has no id: {"),
        (changed(without=["area"]), "annotation 1 of image 0 has no area: {"),
        (changed(without=["iscrowd"]), "annotation 1 of image 0 has no iscrowd: {"),
        (
            changed(category_id=[1]),
            r"annotation 1 of image 0: category_id must be one of its categories \(1\), got \[1\]",
        ),
        (
            changed(image_id={}),
            "annotation 1 of image {}: image_id must be an image that the file lists",
        ),
    ],
)
def test_what_pycocotools_does_not_say(content, message):
    """Each is a wrong AP there, or an error after the last image."""
    assert average_precision(SOUND) == pytest.approx(1)
    with suppress(KeyError, TypeError):
        assert average_precision(content) < 0.6
    check_coco(SOUND, Path("a.json"), ["p"], masks=True)
    with pytest.raises(UsageError, match=f"^a.json: {message}"):
        check_coco(content, Path("a.json"), ["p"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(id="1"), "annotation 1 of image 0: id must be a positive integer .*, got '1'"),
        (changed(id=True), r"annotation number 0 \(from 0\) of image 0: id must be a positive integer .*, got True"),
        (changed(category_id=True), r"category_id must be one of its categories \(1\), got True"),
        (
            changed(area=NAN),
            "annotation 1 of image 0: area must be a finite number, at least 0 and below 1e10 .*, got nan",
        ),
        (changed(area=1e10), "area must be a finite number, .* below 1e10 .pycocotools leaves .*, got 10000000000.0"),
        (changed(id=2**63), "id must be a positive integer .*, got 9223372036854775808"),
        (changed(bbox=[1, 1, 1, 10**400]), "bbox must be four finite numbers of at most 1000000 .x, y, width, height"),
        (
            changed(segmentation=[[1, 1, 6, 1, 6, 1e9]]),
            "segmentation must be polygons of at least three points, or run lengths, got ",
        ),
        (changed(ignore="no"), "ignore must be 0 or 1, got 'no'"),
        (changed("images", file_name="a\0.jpg"), r"file_name must be a text, not empty and .*, got 'a\\x00.jpg'"),
        (changed("images", file_name="\ud800"), "file_name must be a text, not empty and .*, got "),
        (changed("images", width=20.0), "width must be a positive integer number of pixels, got 20.0"),
        (duplicate("images", id="1"), "ids of images must be all integers or all texts, got 0, '1'"),
        (duplicate("categories", id="1", name="q"), "ids of categories must be all integers or all texts, got 1, '1'"),
        (changed(area=-1), "area must be a finite number, at least 0 and below 1e10 .*, got -1"),
        (changed(iscrowd=[1]), r"iscrowd must be 0 or 1, got \[1\]"),
        (
            changed(bbox=[True, 1, 1, 1]),
            r"bbox must be four finite numbers .*, the last two positive, got \[True, 1, 1, 1\]",
        ),
        (changed(segmentation=[]), r"segmentation must be polygons of at least three points, or run lengths, got \[\]"),
        (
            changed(segmentation=[[1, 1, 6, 6]]),
            r"segmentation must be polygons of at least three points, or run lengths, got \[\[1, 1, 6, 6\]\]",
        ),
        (
            changed(segmentation=[[1, 1, 6, 1, 6, 6, 1]]),
            "segmentation must be polygons of at least three points, or run lengths, got ",
        ),
        (
            changed(segmentation=[[1, 1, 6, 1, 6, NAN]]),
            "segmentation must be polygons of at least three points, or run lengths, got ",
        ),
        (
            changed(segmentation=dict(size=[20, 20])),
            "segmentation must be polygons of at least three points, or run lengths, got ",
        ),
        (dict(SOUND, annotations=["x"]), r"annotation number 0 \(from 0\) is not a dictionary: 'x'"),
        (changed("images", without=["file_name"]), "image 0 has no file_name: {"),
        (changed("images", file_name=""), "image 0: file_name must be a text, not empty and .*, got ''"),
        (changed("images", width=0), "image 0: width must be a positive integer number of pixels, got 0"),
        (
            changed("images", id=[0]),
            r"image number 0 \(from 0\): id must be an integer of 64 bits or a text, got \[0\]",
        ),
        (duplicate("images"), "image 0 occurs twice: ids must be unique"),
        (duplicate("categories"), "category 1 occurs twice: ids must be unique"),
        (duplicate("categories", id=2), "several categories have the name of a class of the configuration: p"),
        (changed("categories", without=["name"]), "category 1 has no name: {"),
    ],
)
def test_what_else_is_refused(content, message):
    with pytest.raises(UsageError, match=message):
        check_coco(content, Path("a.json"), ["p"], masks=True)


def test_categories_in_another_order_than_the_classes():
    """mmdet numbers labels as the file does: such a test file gives an AP of 0.000 to a model that finds everything."""
    content = duplicate("categories", id=2, name="q")
    check_coco(content, Path("a.json"), ["p", "q"])
    check_coco(content, Path("a.json"), ["q"])
    message = r"a\.json: its categories come in the order p, q, the classes of the configuration in the order q, p"
    with pytest.raises(UsageError, match=message):
        check_coco(content, Path("a.json"), ["q", "p"])


def test_run_lengths_cover_their_image():
    """Others have the IoU -1 with everything in pycocotools, or show what happened to be in the memory."""
    coco_mask = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    pixels = np.random.default_rng(0).random((20, 20)) < np.linspace(0, 1, 20)
    whole, cut = (
        coco_mask.encode(np.asfortranarray(part, np.uint8))["counts"].decode() for part in (pixels, pixels[1:])
    )
    for counts, size in [
        ([10, 390], [20, 20]),
        (whole, [20, 20]),
        ([400, 1], [20, 20]),
        ([100, 299], [20, 20]),
        ([410, -10], [20, 20]),
        ([], [20, 20]),
        ([10, 370], [19, 20]),
        ([10.5, 389.5], [20, 20]),
        ([10, 390], [20.0, 20]),
        ("\ud800", [20, 20]),
        (cut, [19, 20]),
        (cut, [20, 20]),
        (whole[:-3], [20, 20]),
        (whole + "1", [20, 20]),
    ]:
        content = changed(segmentation=dict(counts=counts, size=size))
        for options in (dict(), dict(measured=False), dict(measured=False, training=True)):
            expected = (
                r"annotation 1 of image 0: segmentation must be run lengths that cover its image, 20 x 20 \(height x"
            )
            refused = counts not in ([10, 390], whole) or repr(size) != "[20, 20]"
            with pytest.raises(UsageError, match=expected) if refused else nullcontext():
                check_coco(content, Path("a.json"), masks=True, **options)


def test_objects_lie_on_their_image(capsys):
    """mmdet leaves out a box beside the image without a word, and pycocotools counts it as one that nothing found."""
    for training in (False, True):
        for box in ([20, 1, 5, 5], [1, 20, 5, 5], [-5, 1, 5, 5], [1, -9, 5, 5]):
            message = r"annotation 1 of image 0: bbox must be on its image, 20 x 20 \(height x width\), got \["
            with nullcontext() if training else pytest.raises(UsageError, match=message):
                check_coco(changed(bbox=box), Path("a.json"), measured=not training)
            left_out = "note: mmdet leaves out 1 objects of a.json: their boxes lie beside their images\n"
            assert capsys.readouterr().err == left_out * training
        check_coco(changed(bbox=[-4, 18, 5, 5]), Path("a.json"), measured=not training)  # cut off by its border
        outside, inside = [20, 0, 30, 0, 30, 10], [-5, 5, 5, 5, 5, 9]
        check_coco(changed(segmentation=[outside, inside]), Path("a.json"), measured=not training, masks=True)
        with pytest.raises(UsageError, match=r"segmentation must be polygons on its image, 20 x 20 \(height x width\)"):
            check_coco(changed(segmentation=[outside]), Path("a.json"), measured=not training, masks=True)
        empty = changed(segmentation=dict(counts=[400], size=[20, 20]))
        with pytest.raises(UsageError, match=r"segmentation must be run lengths .*, with something in them, got "):
            check_coco(empty, Path("a.json"), measured=not training, masks=True)


def test_whole_sizes_as_pandas_writes_them():
    """Boxes alone need no integers; pycocotools' masks do."""
    check_coco(changed("images", width=20.0, height=20.0), Path("a.json"))
    with pytest.raises(UsageError, match=r"width must be a positive integer number of pixels, got 20.0"):
        check_coco(changed("images", width=20.0, height=20.0), Path("a.json"), masks=True)
    with pytest.raises(UsageError, match=r"width must be a positive whole number of pixels, got 20.5"):
        check_coco(changed("images", width=20.5), Path("a.json"))


def test_an_area_is_at_most_that_of_its_box():
    """By it pycocotools calls an object small, medium or large; a box of corners makes it too large."""
    check_coco(changed(area=36), Path("a.json"))
    check_coco(changed(area=50), Path("a.json"), measured=False)
    with pytest.raises(UsageError, match="image 0: area must be at most that of its bbox, 5 x 5, got 50"):
        check_coco(changed(area=50), Path("a.json"))


@pytest.mark.parametrize("training", [True, False])
def test_sizes_are_those_of_the_files(training, tmp_path, capsys, monkeypatch):
    """As the pipeline loads them: a photograph of a camera on its side is turned unless it is told not to."""
    pytest.importorskip("mmdet", reason="mmdet is not installed")
    content = changed("images", width=30)
    (tmp_path / "a.json").write_text(json.dumps(content))
    dataset = dict(type="CocoDataset", data_root=str(tmp_path), ann_file="a.json", metainfo=dict(classes=("p",)))

    def check(size, orientation=None, **load):
        exif = Image.Exif()
        if orientation:
            exif[0x0112] = orientation
        Image.new("RGB", size).save(tmp_path / "a.jpg", exif=exif)
        pipeline = [dict(type="LoadImageFromFile", **load)]
        check_annotations(dict(dataset, pipeline=pipeline), dict(type="CocoMetric"), training=training)

    check((30, 20))
    assert (
        f"looked at 1 of 1 images of {tmp_path}/a.json: each has the size that is annotated" in capsys.readouterr().out
    )
    check((20, 30), orientation=6)
    check((30, 20), orientation=6, color_type="color_ignore_orientation")
    for arguments, found in (
        (((20, 30),), "turned as its EXIF data say, 30 x 20"),
        (((30, 20), 6), "turned as its EXIF data say, 30 x 20"),
        (((60, 40),), "turned as its EXIF data say, 40 x 60"),
    ):
        with pytest.raises(
            UsageError, match=rf"a.json: image 0 is 20 x 30 \(height x width\), and its file .*, {found}"
        ):
            check(*arguments)
    with pytest.raises(UsageError, match="as it is stored, 30 x 20"):
        check((20, 30), 6, color_type="unchanged")
    # Many are sampled, always the same ones.
    content["images"] = [dict(content["images"][0], id=index) for index in range(30)]
    (tmp_path / "a.json").write_text(json.dumps(content))
    monkeypatch.setattr("carafe_plugin.engine.annotations.sample", partial(sample, least=5, seconds=-1))
    capsys.readouterr()
    check((30, 20))
    assert "looked at 5 of 30 images of " in capsys.readouterr().out
    assert list(sample(range(9), seconds=-1)) == list(sample(range(9), seconds=-1))


def test_a_training_needs_less():
    """What mmdet does not read, or leaves out on purpose."""
    for content in (
        changed(id=0, without=["iscrowd"]),
        changed(segmentation=[[1, 1, 6, 6]]),
        changed(segmentation=dict(size=[20, 20])),
        changed(bbox=[1, 1, 0, 5], without=["segmentation"]),
    ):
        check_coco(content, Path("a.json"), ["p"], measured=False, masks=True, training=True)
        with pytest.raises(UsageError):
            check_coco(content, Path("a.json"), ["p"], masks=True)
    for content in (duplicate("annotations"), changed(bbox=[1, 1, -1, 5]), changed(without=["segmentation"])):
        with pytest.raises(UsageError):
            check_coco(content, Path("a.json"), ["p"], measured=False, masks=True, training=True)


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
    missing = f"2 of the 5 images are missing in {tmp_path}: a/3.jpg, c/1.jpg"
    empty = f"3 of the 5 images are empty in {tmp_path}: a/1.jpg, a/2.jpg, b/1.jpg"
    assert file_faults(tmp_path, names, "images") == [missing, empty]
    monkeypatch.setattr("carafe_plugin.images.os.scandir", Listing)
    (tmp_path / "c").mkdir()
    assert file_faults(tmp_path, names, "images", sizes=False) == [missing]
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
        with pytest.raises(UsageError, match=r"1 of the 2 images of .*a.json are missing in .*: background.jpg"):
            check_annotations({**dataset, **settings}, training=training)


def test_the_metrics_own_file_is_missed_before_another_is_read(tmp_path):
    pytest.importorskip("mmdet", reason="mmdet is not installed")
    metric = dict(type="CocoMetric", ann_file=str(tmp_path / "absent.json"))
    with pytest.raises(UsageError, match=r"no such annotation file of the evaluator: .*absent.json"):
        check_annotations(dict(type="CocoDataset", ann_file=str(tmp_path / "never_read.json")), metric)
    with pytest.raises(UsageError, match=r"cannot read .*never_read.json: No such file"):
        check_annotations(dict(type="CocoDataset", ann_file=str(tmp_path / "never_read.json")))


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
        with pytest.raises(UsageError, match=r"zero.json: annotation 0 of image 0: id must be a positive"):
            check_annotations(dict(dataset, ann_file=ann_file), dict(metric, ann_file=str(tmp_path / "zero.json")))


def test_nothing_to_train_on(tmp_path):
    pytest.importorskip("mmdet", reason="mmdet is not installed")
    content = duplicate("categories", id=2, name="q")
    (tmp_path / "a.json").write_text(json.dumps(content))
    (tmp_path / "a.jpg").write_bytes(b"x")
    dataset = dict(type="CocoDataset", data_root=str(tmp_path), ann_file="a.json", metainfo=dict(classes=("q",)))
    message = "holds 1 images and 1 annotations, none of the classes of the configuration: nothing to "
    with pytest.raises(UsageError, match=message + "train on"):
        check_annotations(dict(dataset, filter_cfg=dict(filter_empty_gt=True)), training=True)
    with pytest.raises(UsageError, match=message + "measure"):
        check_annotations(dataset, dict(type="CocoMetric"))
    check_annotations(dataset, training=True)  # background alone, on purpose
