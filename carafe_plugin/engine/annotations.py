"""Whether a detection dataset in COCO's format can be used: what its annotations say, and which images are there.

mmdet and pycocotools take both for granted: an unsound box, id or class costs an hour or gives a wrong AP, and a
missing key or image ends the run in the middle. Here it is one message before anything starts.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

from carafe_plugin.engine.config import pipeline_steps, type_name
from carafe_plugin.engine.errors import UsageError, note, read_json
from carafe_plugin.images import file_faults, read_header, sample, shorten


def read_coco(path: Path) -> dict[str, Any]:
    """Read an annotation file in COCO's format; one without annotations, as COCO's own of test images, gets an empty
    list of them. Raises UsageError where it cannot be read or lacks another list.
    """
    content = read_json(path)
    if isinstance(content, dict):
        content.setdefault("annotations", [])
    for name in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise UsageError(f"{path} is not an annotation file in COCO's format: it has no list of {name}")
    return content


def check_coco(
    content: Mapping[str, Any],
    path: Path,
    classes: Sequence[str] | None = None,
    *,
    measured: bool = True,
    masks: bool = False,
    training: bool = False,
) -> None:
    """Raise a UsageError where what :func:`read_coco` returned lacks what mmdet or pycocotools reads, or has an
    unsuitable value there, where an id occurs twice, or where ``classes`` are not each one category, in their order.

    ``path`` is for the messages. ``measured`` says that pycocotools measures predictions against the file: it needs
    ``iscrowd``, takes an object with the id 0 for one that nothing found, and boxes must have an area; mmdet leaves
    those without one out, which COCO's training annotations have. ``masks`` asks for a ``segmentation`` too; in a
    ``training``, mmdet leaves unsound ones out.
    """
    try:
        side = _PIXELS if masks else _WHOLE
        images = _by_id(content["images"], "image", id=_ID, file_name=_TEXT, width=side, height=side)
        categories = _by_id(content["categories"], "category", id=_ID, name=_TEXT)
        for kind, ids in (("images", images), ("categories", categories)):
            if len({type(number) for number in ids}) > 1:  # to numpy's sorting in pycocotools, 1 would be '1'
                raise UsageError(f"ids of {kind} must be all integers or all texts, got {shorten(map(repr, ids))}")
        _check_classes([category["name"] for category in categories.values()], classes or ())
        least, sides = (math.ulp(0), "positive") if measured else (0, "at least 0")
        checks: dict[str, _Check] = dict(
            id=_OBJECT_ID if measured else ("an integer of 64 bits", _is_integer),
            image_id=("an image that the file lists", lambda value: _is_id(value) and value in images),
            category_id=(
                f"one of its categories ({shorten(categories)})",
                lambda value: _is_id(value) and value in categories,
            ),
            bbox=(
                f"four finite numbers of at most {_MOST} (x, y, width, height), the last two {sides}",
                lambda value: _are_pixels(value) and len(value) == 4 and min(value[2:]) >= least,
            ),
            area=_AREA if measured else ("a finite number", _is_number),
            iscrowd=_FLAG,
            ignore=_FLAG,
        )
        optional = ("ignore",) if measured else ("iscrowd", "ignore")
        beside = 0
        for annotation in _by_id(content["annotations"], "annotation", optional, **checks).values():
            image = images[annotation["image_id"]]
            on_image = _lies_on(annotation, image)
            beside += not on_image
            if measured:
                _check_box(annotation, image, on_image)
            if masks and (measured or (on_image and _is_trained_on(annotation))):
                _check_mask(annotation, image, training)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    if beside:
        note(f"mmdet leaves out {beside} objects of {path}: their boxes lie beside their images")


#: The longest way in pixels: pycocotools walks along the edges of a polygon, and its memory is soon at an end.
_MOST = 10**6


def _is_integer(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63  # to isinstance, True would be a number


def _is_id(value: Any) -> bool:
    return _is_integer(value) or type(value) is str


def _is_number(value: Any, most: float = 1e10) -> bool:
    return type(value) in (int, float) and abs(value) < most


def _are_pixels(values: Any) -> bool:
    return isinstance(values, list) and all(_is_number(value, _MOST) for value in values)


def _are_integers(values: list) -> bool:
    return all(map(_is_integer, values))


def _is_text(value: Any) -> bool:
    with suppress(UnicodeError):
        return isinstance(value, str) and value != "" and b"\0" not in value.encode()
    return False


#: What a value must be, in words, and whether it is.
_Check = tuple[str, Callable[[Any], bool]]
_ID: _Check = ("an integer of 64 bits or a text", _is_id)
_TEXT: _Check = ("a text, not empty and without NUL or half characters", _is_text)
_WHOLE: _Check = (
    "a positive whole number of pixels",
    lambda value: _is_number(value) and value > 0 and value == int(value),  # 640.0, as pandas writes it
)
_PIXELS: _Check = ("a positive integer number of pixels", lambda value: _is_integer(value) and value > 0)
_AREA: _Check = (
    "a finite number, at least 0 and below 1e10 (pycocotools leaves out what is larger)",
    lambda value: _is_number(value) and value >= 0,
)
_OBJECT_ID: _Check = (
    "a positive integer (pycocotools takes 0 for 'not found')",
    lambda value: _is_integer(value) and value > 0,
)
_FLAG: _Check = ("0 or 1", lambda value: value in (0, 1))


def _by_id(entries: list, kind: str, optional: Collection[str] = (), **checks: _Check) -> dict[Any, dict]:
    """The entries of a list by their ids; each must have the keys ``checks``, with such values."""
    found: dict[Any, dict] = {}
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise UsageError(f"{kind} number {number} (from 0) is not a dictionary: {reprlib.repr(entry)}")
        for key, (expected, is_suitable) in checks.items():
            if key not in entry:
                if key in optional:
                    continue
                raise UsageError(f"{_name(kind, entry, number)} has no {key}: {reprlib.repr(entry)}")
            if not is_suitable(entry[key]):
                got = reprlib.repr(entry[key])
                raise UsageError(f"{_name(kind, entry, number)}: {key} must be {expected}, got {got}")
        if found.setdefault(entry["id"], entry) is not entry:
            raise UsageError(f"{_name(kind, entry, number)} occurs twice: ids must be unique")
    return found


def _name(kind: str, entry: Mapping[str, Any], number: int = -1) -> str:
    name = f"{kind} {entry['id']!s:.50}" if _is_id(entry.get("id")) else f"{kind} number {number} (from 0)"
    return name + (f" of image {reprlib.repr(entry['image_id'])}" if "image_id" in entry else "")


def _check_classes(names: Sequence[str], classes: Sequence[str]) -> None:
    if absent := [name for name in classes if name not in names]:
        raise UsageError(
            f"no category for {len(absent)} of the {len(classes)} classes of the configuration "
            f"({shorten(absent)}); its categories are {shorten(names)}"
        )
    if duplicate := [name for name in classes if names.count(name) > 1]:
        raise UsageError(f"several categories have the name of a class of the configuration: {shorten(duplicate)}")
    # mmdet numbers labels in the file's order, and names them in that of the classes.
    if (order := [name for name in names if name in set(classes)]) != list(classes):
        raise UsageError(
            f"its categories come in the order {shorten(order)}, the classes of the configuration in the order "
            f"{shorten(classes)}, and labels would be mixed up: bring both into one order"
        )


def _is_trained_on(annotation: Mapping[str, Any]) -> bool:
    """Whether mmdet keeps an object that is on its image; one that it leaves out needs no mask."""
    return min(annotation["bbox"][2:]) >= 1 and annotation["area"] > 0 and not annotation.get("ignore")


def _lies_on(annotation: Mapping[str, Any], image: Mapping[str, Any]) -> bool:
    x, y, width, height = annotation["bbox"]
    return min(width, height) <= 0 or _on(image, [x, y, x + width, y + height])


def _check_box(annotation: Mapping[str, Any], image: Mapping[str, Any], on_image: bool) -> None:
    """A box that is measured must lie on its image, at least in part, and an object's area, by which its size is called
    small, medium or large, in its box (with a pixel of rounding on each side).
    """
    width, height = annotation["bbox"][2:]
    if not on_image:
        _refuse(annotation, "bbox", f"on its image, {_size(image)}")
    if annotation["area"] > (width + 2) * (height + 2):
        _refuse(annotation, "area", f"at most that of its bbox, {width} x {height}")


def _on(image: Mapping[str, Any], points: Sequence[float]) -> bool:
    """Whether something with these points (x, y, x, y, ...) covers a part of an image."""
    xs, ys = points[::2], points[1::2]
    return min(xs) < image["width"] and max(xs) > 0 and min(ys) < image["height"] and max(ys) > 0


def _size(image: Mapping[str, Any]) -> str:
    return f"{image['height']} x {image['width']} (height x width)"


def _refuse(annotation: Mapping[str, Any], key: str, expected: str) -> NoReturn:
    got = reprlib.repr(annotation.get(key))
    raise UsageError(f"{_name('annotation', annotation)}: {key} must be {expected}, got {got}")


def _check_mask(annotation: Mapping[str, Any], image: Mapping[str, Any], training: bool) -> None:
    """A mask must be one that pycocotools decodes to the size of its image, with something in it.

    A polygon with NaN never ends there, run lengths of another size have the IoU -1 with everything, and where they
    cover too little of the image, the rest is whatever the memory holds.
    """
    mask = annotation.get("segmentation")
    sound, expected = False, "polygons of at least three points, or run lengths"
    if isinstance(mask, list) and mask:
        used = [polygon for polygon in mask if _are_pixels(polygon) and len(polygon) >= 6 and len(polygon) % 2 == 0]
        sound = len(used) == len(mask) or (training and all(map(_are_pixels, mask)))  # mmdet leaves them out
        if sound and used and not any(_on(image, polygon) for polygon in used):
            sound, expected = False, f"polygons on its image, {_size(image)}"
    elif isinstance(mask, dict) and mask.get("size") is not None and isinstance(mask.get("counts"), (str, list)):
        height, width = image["height"], image["width"]
        expected = f"run lengths that cover its image, {_size(image)}, with something in them"
        sound = mask["size"] == [height, width] and _are_integers(mask["size"])
        sound = sound and _cover(mask["counts"], height * width)
    elif isinstance(mask, dict) and mask:
        sound = training  # mmdet ignores it in a training
    if not sound:
        _refuse(annotation, "segmentation", expected)


def _cover(counts: str | list, pixels: int) -> bool:
    runs = _uncompress(counts) if isinstance(counts, str) else counts
    return _are_integers(runs) and min(runs, default=-1) >= 0 and sum(runs) == pixels and sum(runs[1::2]) > 0


def _uncompress(counts: str) -> list[int]:
    """COCO's compressed run lengths: five bits per character, and from the fourth on, differences to the last but one.

    pycocotools has no function for it, and its decoder does not notice what is missing.
    """
    runs: list[int] = []
    value = shift = 0
    for code in map(ord, counts):
        value |= (code - 48 & 31) << shift
        shift += 5
        if not code - 48 & 32:
            value -= (code - 48 & 16) >> 4 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def check_annotations(dataset: Mapping[str, Any], evaluators: Any = None, training: bool = False) -> None:
    """Raise a UsageError where an evaluation, or a training, cannot use one of mmdet's COCO datasets: faulty
    annotations, missing or empty images or such of another size, nothing to find, or a metric's file that is at fault
    or of other images.

    ``dataset`` is its configuration, not that of a wrapper; one that reads annotations in a way of its own is not
    looked at. ``evaluators`` is the configuration of the metric or metrics. In a training, boxes may be empty, as mmdet
    leaves them out, images that it leaves out may be missing, and no file is asked for its size.
    """
    from mmdet.datasets import CocoDataset, CocoPanopticDataset
    from mmdet.registry import DATASETS

    built = unread_dataset(dataset, DATASETS, CocoDataset)
    if built is None or isinstance(built, CocoPanopticDataset):
        return
    if not built.ann_file:
        raise UsageError("it has no ann_file, and MMDetection's datasets in COCO's format need one")
    if "://" in f"{built.ann_file}{built.data_prefix}":
        return
    path, classes = Path(built.ann_file).absolute(), built.metainfo.get("classes")
    metrics = [] if training else find_metrics(evaluators, "CocoMetric")
    others = truth_files(metrics)  # before the dataset's own file, half a gigabyte, is read
    masks = any("segm" in (metric.get("metric") or ()) for metric in metrics)
    if training:
        masks = any(step.get("with_mask") for step in pipeline_steps(dataset.get("pipeline")))

    content = read_coco(path)
    check_coco(content, path, classes, measured=path in others, masks=masks, training=training)
    wanted = {category["id"] for category in content["categories"] if category["name"] in set(classes or ())}
    objects = {annotation["image_id"] for annotation in content["annotations"] if annotation["category_id"] in wanted}
    alone = training and is_filtered(dataset)  # mmdet opens no other image
    if (alone or metrics) and content["images"] and not objects:
        raise UsageError(
            f"{path} holds {len(content['images'])} images and {len(content['annotations'])} annotations, none of the "
            f"classes of the configuration: nothing to {'train on' if training else 'measure'}"
        )
    # Of some of them ("indices"), counted after mmdet's own filters, nobody knows which will be opened.
    images = [] if dataset.get("indices") is not None else content["images"]
    used = [image for image in images if not alone or image["id"] in objects]
    names = [image["file_name"] for image in used]
    folder = Path(built.data_prefix.get("img") or built.data_root or "").absolute()
    if faults := file_faults(folder, names, f"images of {path}", sizes=not training):
        raise UsageError("; ".join(faults))
    _check_sizes(used, folder, path, is_turned(dataset))
    for other in others - {path}:
        truth = read_coco(other)
        check_coco(truth, other, classes, masks=masks)
        check_listed(content, path, truth, other)


def find_metrics(evaluators: Any, kind: str) -> list[Mapping[str, Any]]:
    """Those of the configured metrics whose type's name ends in ``kind``, and that measure."""
    if isinstance(evaluators, Mapping) and type_name(evaluators) == "Evaluator":
        evaluators = evaluators.get("metrics")
    metrics = evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]
    metrics = [metric for metric in metrics if isinstance(metric, Mapping) and not metric.get("format_only")]
    return [metric for metric in metrics if type_name(metric).endswith(kind)]


def truth_files(metrics: Sequence[Mapping[str, Any]]) -> set[Path]:
    """The annotation files on this machine that metrics measure against. Raises UsageError where one is missing."""
    files = [metric["ann_file"] for metric in metrics if metric.get("ann_file") and not metric.get("backend_args")]
    found = {Path(file).absolute() for file in files if "://" not in file}
    for file in sorted(found):
        if not file.is_file():
            raise UsageError(f"no such annotation file of the evaluator: {file}")
    return found


def check_listed(content: Mapping[str, Any], path: Path, truth: Mapping[str, Any], other: Path) -> None:
    """Raise a UsageError where the metric's file lacks images of the dataset's."""
    known = {image["id"] for image in truth["images"]}
    if unknown := [image["id"] for image in content["images"] if image["id"] not in known]:
        raise UsageError(
            f"the evaluator's {other} does not list {len(unknown)} of the {len(content['images'])} images of "
            f"{path}, the first: id {unknown[0]}"
        )


def _check_sizes(images: Sequence[Mapping[str, Any]], folder: Path, path: Path, turned: bool) -> None:
    """Raise a UsageError for an image whose file has another size than the annotation file says: pycocotools would find
    masks of two sizes, and boxes of a lying image would be sought in an upright one.
    """
    looked_at = 0
    for image in sample(images):
        looked_at += 1
        try:
            found, *_ = read_header(folder / image["file_name"], turned)
        except (OSError, Image.DecompressionBombError):  # of a format that another reader may know
            continue
        if found != (image["height"], image["width"]):
            manner = "turned as its EXIF data say" if turned else "as it is stored"
            raise UsageError(
                f"{path}: image {image['id']} is {_size(image)}, and its file {folder / image['file_name']}, {manner}, "
                f"{found[0]} x {found[1]}"
            )
    print(f"looked at {looked_at} of {len(images)} images of {path}: each has the size that is annotated")


def is_turned(dataset: Mapping[str, Any]) -> bool:
    """Whether a dataset's pipeline loads images as their EXIF data say that the camera was held, as it does unless
    told otherwise.
    """
    for step in pipeline_steps(dataset.get("pipeline")):
        if "LoadImage" in type_name(step):
            colours, backend = step.get("color_type", "color"), step.get("imdecode_backend", "cv2")
            return not (colours == "unchanged" or "ignore" in colours or backend in ("turbojpeg", "tifffile"))
    return True


def unread_dataset(dataset: Mapping[str, Any], registry: Any, base: type) -> Any:
    """Build a toolbox's dataset without files and transforms, to see where it looks for what.

    None if it does not list its files as the class ``base`` does, or cannot be built.
    """
    with suppress(Exception):  # whoever builds it in earnest says what is wrong with it
        kind = dataset["type"]
        kind = registry.get(kind) if isinstance(kind, str) else kind
        if kind.load_data_list is base.load_data_list:  # type: ignore[attr-defined]
            return registry.build({**dataset, "lazy_init": True, "pipeline": []})
    return None


def is_filtered(dataset: Mapping[str, Any]) -> bool:
    """Whether mmdet leaves images without objects out of a training."""
    return bool((dataset.get("filter_cfg") or {}).get("filter_empty_gt") and not dataset.get("test_mode"))


#: In COCO's panoptic format, the checks of a segment; of one that is measured, ``iscrowd`` too.
_SEGMENT: dict[str, _Check] = dict(
    id=(
        "an integer from 1 to 16777215 (a colour of the PNG; 0 is for no segment)",
        lambda value: type(value) is int and 0 < value < 256**3,
    ),
    bbox=("four finite numbers (x, y, width, height)", lambda value: _are_pixels(value) and len(value) == 4),
    area=_AREA,
)


def check_panoptic(
    content: Mapping[str, Any], path: Path, metainfo: Mapping[str, Any], *, measured: bool = True
) -> None:
    """Raise a UsageError where a file in COCO's panoptic format, as :func:`read_coco` returns it, lacks what mmdet or
    panopticapi reads, or where its categories are not the classes of ``metainfo`` in their order, things first.

    ``path`` is for the messages; ``measured`` says that panoptic quality is measured against the file.
    """
    try:
        images = _by_id(content["images"], "image", id=_ID, file_name=_TEXT, width=_PIXELS, height=_PIXELS)
        flag: _Check = ("0 or 1", lambda value: value in (0, 1))
        categories = _by_id(content["categories"], "category", id=_ID, name=_TEXT, isthing=flag)
        classes = metainfo.get("classes") or ()
        _check_classes([category["name"] for category in categories.values()], classes)
        used = {key: category for key, category in categories.items() if category["name"] in set(classes)}
        _check_kinds(list(used.values()), metainfo.get("thing_classes") or ())
        category: _Check = (
            f"the category of a class of the configuration ({shorten(used)})",
            lambda value: _is_id(value) and value in used,
        )
        known: _Check = ("an image that the file lists", lambda value: _is_id(value) and value in images)
        checks = {**_SEGMENT, "category_id": category, **(dict(iscrowd=flag) if measured else {})}
        entries = [  # one for each image: its id stands for that of the entry
            dict(id=entry.get("image_id"), **{key: entry[key] for key in entry.keys() & {"segments_info"}})
            if isinstance(entry, dict)
            else entry
            for entry in content["annotations"]
        ]
        segments = ("a list", lambda value: isinstance(value, list))
        found = [
            categories[segment["category_id"]]["isthing"]
            for entry in _by_id(entries, "annotation of image", id=known, segments_info=segments).values()
            for segment in _by_id(entry["segments_info"], f"image {entry['id']}: segment", (), **checks).values()
        ]
        if measured and not {0, 1} <= set(found):
            kind = "thing" if 0 in found else "stuff" if found else "thing or stuff"
            raise UsageError(f"no segment is a {kind}: mmdet divides panoptic quality by how many classes have one")
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _check_kinds(categories: Sequence[Mapping[str, Any]], things: Sequence[str]) -> None:
    """The file says what is a thing in a training, the configuration in a metric, the label's number in a model."""
    for category in categories:
        name, isthing = category["name"], category["isthing"]
        if bool(isthing) != (name in things):
            place = "among" if name in things else "not among"
            raise UsageError(
                f"category {name} has isthing {isthing}, and it is {place} the thing_classes of the configuration's "
                f"metainfo ({shorten(things)})"
            )
    if (order := [bool(category["isthing"]) for category in categories]) != sorted(order, reverse=True):
        names = shorten(category["name"] for category in categories)
        raise UsageError(f"mmdet takes the first classes for the things, and the order here mixes both kinds: {names}")
