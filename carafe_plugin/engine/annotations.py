"""Whether a detection dataset in COCO's format can be used: what its annotations say, and which images are there.

mmdet and pycocotools take both for granted. An unknown category is left out, a class that the file does not name makes
the others' numbers shift, a box that is empty or NaN is an object that nothing can find, as is one whose annotation has
the id 0 or another's; a key that is missing ends an evaluation after its last image, and an image that is missing ends
the run in the middle. All of it would cost an hour, or a wrong AP; here it is one message before anything starts.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["AnnotationError", "check_annotations", "check_coco", "missing_files", "read_coco"]


class AnnotationError(ValueError):
    """Annotations cannot be used; the message names the file and the value."""


def read_coco(path: Path) -> dict[str, Any]:
    """Read an annotation file.

    Args:
        path: A JSON file with the lists ``images``, ``annotations`` and ``categories``, as COCO's are. COCO's own
            files of test images have no annotations: then the list is empty.

    Raises:
        AnnotationError: It is truncated, no JSON, or lacks one of the lists.
        OSError: It cannot be read.
    """
    try:
        content = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        size = path.stat().st_size
        raise AnnotationError(f"cannot read {path} ({size} bytes; truncated, or no JSON): {error}") from error
    if isinstance(content, dict):
        content.setdefault("annotations", [])
    for name in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise AnnotationError(f"{path} is no annotation file in COCO's format: it has no list of {name}")
    return content


def check_coco(
    content: Mapping[str, Any],
    path: Path,
    classes: Sequence[str] | None = None,
    *,
    empty_boxes: bool = False,
    measured: bool = True,
    masks: bool = False,
) -> None:
    """Check what an annotation file says.

    Args:
        content: What :func:`read_coco` returned.
        path: The file, for the messages.
        classes: Names that its categories must include.
        empty_boxes: Whether boxes without an area may occur; COCO's training annotations have some.
        measured: Whether pycocotools measures predictions against the file. It needs ``iscrowd``, and it takes an
            object with the id 0 for one that nothing found. A training needs neither.
        masks: Whether annotations need a ``segmentation``.

    Raises:
        AnnotationError: An image, a category or an annotation lacks a key that mmdet or pycocotools reads, or has a
            value of another type there; an id occurs twice; an annotation is of a category or image that the file does
            not list, or its box is no four numbers, not finite, or empty; or a class has no category, or several.

    Example:
        >>> from pathlib import Path
        >>> image = dict(id=1, file_name="a.jpg", width=9, height=9)
        >>> content = dict(images=[image], categories=[dict(id=7, name="cat")], annotations=[])
        >>> check_coco(content, Path("a.json"), ["cat"])
        >>> object_ = dict(id=5, image_id=1, category_id=8, bbox=[0, 0, 2, 2], area=4, iscrowd=0)
        >>> check_coco(content | dict(annotations=[object_]), Path("a.json"))
        Traceback (most recent call last):
        ...
        carafe_plugin.engine.annotations.AnnotationError: a.json: annotation 5 is of the category 8, not one of 7
    """
    try:
        images = _by_id(content["images"], "image", ("file_name",), ("width", "height"))
        categories = _by_id(content["categories"], "category", ("name",))
        _check_classes([category["name"] for category in categories.values()], classes or ())
        needed = ["id", "image_id", "category_id", "bbox", "area"] + ["iscrowd"] * measured
        seen: set[Any] = set()
        for number, annotation in enumerate(content["annotations"]):
            which = _which("annotation", number, annotation, needed)
            identity, image, category = (annotation[key] for key in ("id", "image_id", "category_id"))
            if type(identity) is not int or (measured and identity < 1):
                expected = "a whole number from 1 on (pycocotools reads 0 as 'not found')" if measured else "an integer"
                raise _Fault(f"{which} must have as id {expected}, got {identity!r}")
            if identity in seen:
                raise _Fault(f"{which} occurs twice: the ids of annotations must differ")
            seen.add(identity)
            if type(category) not in _IDS or category not in categories:
                raise _Fault(f"{which} is of the category {category}, not one of {_some(categories)}")
            if type(image) not in _IDS or image not in images:
                raise _Fault(f"{which} is of the image {image}, which the file does not list")
            fault = _box_fault(annotation["bbox"], empty_boxes) or _area_fault(annotation["area"], measured)
            if measured and annotation["iscrowd"] not in (0, 1):
                fault = fault or f"an iscrowd that is neither 0 nor 1: {annotation['iscrowd']!r}"
            if masks and not fault and (measured or _is_trained_on(annotation)):
                fault = _mask_fault(annotation.get("segmentation"), measured)
            if fault:
                raise _Fault(f"{which} of the image {image} has {fault}")
    except _Fault as error:
        raise AnnotationError(f"{path}: {error}") from None


class _Fault(Exception):
    """What is wrong with a file, without its name."""


#: Types, compared with ``type(value)``: to isinstance True would be a number.
_IDS, _NUMBERS = (int, str), (int, float)


def _which(kind: str, number: int, entry: Any, needed: Iterable[str]) -> str:
    """How to call an entry of a list; it must be a dictionary with the keys ``needed``."""
    if not isinstance(entry, dict):
        raise _Fault(f"{kind} number {number} (from 0) is no dictionary: {reprlib.repr(entry)}")
    which = f"{kind} {entry['id']}" if "id" in entry else f"{kind} number {number} (from 0)"
    for key in needed:
        if key not in entry:
            raise _Fault(f"{which} has no {key}: {reprlib.repr(entry)}")
    return which


def _by_id(entries: list, kind: str, texts: tuple[str, ...], sizes: tuple[str, ...] = ()) -> dict[Any, dict]:
    found: dict[Any, dict] = {}
    for number, entry in enumerate(entries):
        which = _which(kind, number, entry, ("id", *texts, *sizes))
        identity = entry["id"]
        if type(identity) not in _IDS:
            raise _Fault(f"{kind} number {number} (from 0) must have an integer or a text as id, got {identity!r}")
        if identity in found:
            raise _Fault(f"{which} occurs twice: the ids must differ")
        found[identity] = entry
        for key in texts:
            if not isinstance(entry[key], str) or not entry[key]:
                raise _Fault(f"{which} must have a text as {key}, got {entry[key]!r}")
        for key in sizes:
            if type(entry[key]) not in _NUMBERS or not 0 < entry[key] < math.inf:
                raise _Fault(f"{which} must have a positive number of pixels as {key}, got {entry[key]!r}")
    return found


def _check_classes(names: Sequence[str], classes: Sequence[str]) -> None:
    known = set(names)
    if absent := [name for name in classes if name not in known]:
        raise _Fault(
            f"no category for {len(absent)} of the {len(classes)} classes of the configuration "
            f"({_some(absent)}); its categories are {_some(names)}"
        )
    if len(known) < len(names) and (twice := [name for name in classes if names.count(name) > 1]):
        raise _Fault(f"several categories have the name of one class of the configuration: {_some(twice)}")


def _box_fault(box: Any, empty: bool) -> str | None:
    if not isinstance(box, list) or len(box) != 4 or any(type(value) not in _NUMBERS for value in box):
        return f"a bbox that is no list of four numbers: {reprlib.repr(box)}"
    if not all(map(math.isfinite, box)):
        return f"a bbox that is not finite: {box}"
    if min(box[2:]) < 0 or (min(box[2:]) == 0 and not empty):
        return f"an empty bbox (x, y, width, height): {box}"
    return None


def _area_fault(area: Any, measured: bool) -> str | None:
    if type(area) not in _NUMBERS or not math.isfinite(area) or (measured and area < 0):
        return f"an area that is no finite number from 0 on: {area!r}"
    return None


def _is_trained_on(annotation: Mapping[str, Any]) -> bool:
    """Whether mmdet keeps an object; one that it leaves out needs no mask."""
    return min(annotation["bbox"][2:]) >= 1 and annotation["area"] > 0 and not annotation.get("ignore")


def _mask_fault(mask: Any, measured: bool) -> str | None:
    """An empty mask has no key in mmdet, and a polygon with NaN never ends in pycocotools."""
    if isinstance(mask, dict):
        sound = not measured or (len(mask.get("size") or ()) == 2 and isinstance(mask.get("counts"), (str, list)))
    else:
        least = 6 if measured else 0  # mmdet leaves shorter ones out of a training
        sound = isinstance(mask, list) and all(
            isinstance(polygon, list)
            and len(polygon) >= least
            and all(type(value) in _NUMBERS for value in polygon)
            and math.isfinite(sum(polygon))
            for polygon in mask
        )
    return None if mask and sound else f"no segmentation of polygons or run lengths: {reprlib.repr(mask)}"


def missing_files(folder: Path, names: Iterable[str], sizes: bool = True) -> tuple[list[str], list[str]]:
    """Which files a folder lacks, and which are there with nothing in them.

    Args:
        folder: Where to look.
        names: Paths below it.
        sizes: Whether to look for empty ones. This asks for every file's size: on a network's file system minutes for
            a hundred thousand, while listing each folder once, as is done for the missing ones, takes seconds.

    Returns:
        The missing and the empty ones, folder by folder.
    """
    by_folder: dict[str, list[str]] = defaultdict(list)
    for name in names:
        by_folder[os.path.dirname(name)].append(name)  # noqa: PTH120 (a hundred thousand Path objects take longer)
    missing, empty = [], []
    for below, listed in by_folder.items():
        try:
            with os.scandir(folder / below) as entries:
                found = {entry.name: entry.stat().st_size if sizes else None for entry in entries if entry.is_file()}
        except (FileNotFoundError, NotADirectoryError):
            found = {}
        for name in listed:
            base = os.path.basename(name)  # noqa: PTH119
            if base not in found:
                missing.append(name)
            elif found[base] == 0:
                empty.append(name)
    return missing, empty


def check_annotations(dataset: Mapping[str, Any], evaluators: Any = None, training: bool = False) -> None:
    """Check one of mmdet's COCO datasets on this machine, as an evaluation or a training will use it.

    A dataset that reads its annotations in a way of its own is not looked at.

    Args:
        dataset: The configuration of the dataset, not of a wrapper around it.
        evaluators: The configuration of the metric or the metrics.
        training: Whether it is trained on. Then boxes may be empty, as mmdet leaves them out, images that it leaves
            out may be missing, and no file's size is asked for.

    Raises:
        AnnotationError: Its annotations are at fault (:func:`check_coco`), an image is missing or empty, there is
            nothing to find in any image, or the metric's file is at fault or of other images.
    """
    from mmdet.datasets import CocoDataset
    from mmdet.registry import DATASETS

    kind = dataset.get("type")
    with suppress(ImportError, KeyError, RuntimeError):  # whoever builds the dataset says what is wrong with its type
        kind = DATASETS.get(kind) if isinstance(kind, str) else kind
    if getattr(kind, "load_data_list", None) is not CocoDataset.load_data_list:
        return
    root, ann_file = dataset.get("data_root") or "", dataset.get("ann_file") or ""
    folder = (dataset.get("data_prefix") or {}).get("img") or ""
    if not ann_file or "://" in f"{root}{ann_file}{folder}":
        return
    path = Path(root, ann_file).absolute()
    content = read_coco(path)
    classes = (dataset.get("metainfo") or {}).get("classes") or (getattr(kind, "METAINFO", None) or {}).get("classes")
    if isinstance(classes, str):  # mmengine takes a file of names as well
        classes = Path(classes).read_text().splitlines() if Path(classes).is_file() else [classes]
    metrics = [] if training else _coco_metrics(evaluators)
    if training:
        masks = any(isinstance(step, Mapping) and step.get("with_mask") for step in dataset.get("pipeline") or ())
    else:
        masks = any("segm" in (metric.get("metric") or ()) for metric in metrics)
    files = _files_of(metrics)
    check_coco(content, path, classes, empty_boxes=training, measured=path in files, masks=masks)
    names = [image["file_name"] for image in _used_images(content, dataset, classes, training)]
    for fault, faulty in zip(("missing", "empty"), missing_files(Path(root, folder), names, not training), strict=True):
        if faulty:
            first = Path(root, folder, faulty[0]).absolute()
            raise AnnotationError(f"{len(faulty)} of the {len(names)} images of {path} are {fault}, the first: {first}")
    if metrics and content["images"] and not content["annotations"]:
        raise AnnotationError(f"{path} holds {len(content['images'])} images and no annotation: nothing to measure")
    for other in files - {path}:
        truth = read_coco(other)
        check_coco(truth, other, classes, masks=masks)
        known = {image["id"] for image in truth["images"]}
        if strangers := [image["id"] for image in content["images"] if image["id"] not in known]:
            raise AnnotationError(
                f"the evaluator's {other} does not list {len(strangers)} of the {len(content['images'])} images of "
                f"{path}, the first: id {strangers[0]}"
            )


def _used_images(content: Mapping[str, Any], dataset: Mapping[str, Any], classes: Any, training: bool) -> list[dict]:
    """The images that mmdet will open, as far as the configuration says."""
    if dataset.get("indices") is not None:  # some of them, counted after mmdet's own filters
        return []
    filters = dataset.get("filter_cfg") or {}
    if not (training and filters.get("filter_empty_gt") and not dataset.get("test_mode")):
        return content["images"]
    wanted = {category["id"] for category in content["categories"] if category["name"] in set(classes or ())}
    used = {annotation["image_id"] for annotation in content["annotations"] if annotation["category_id"] in wanted}
    return [image for image in content["images"] if image["id"] in used]


def _coco_metrics(evaluators: Any) -> list[Mapping[str, Any]]:
    """Those of the metrics that measure against COCO's format."""
    metrics = evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]
    metrics = [metric for metric in metrics if isinstance(metric, Mapping) and not metric.get("format_only")]
    names = [getattr(metric.get("type"), "__name__", str(metric.get("type"))) for metric in metrics]
    return [metric for metric, name in zip(metrics, names, strict=True) if name.endswith("CocoMetric")]


def _files_of(metrics: Iterable[Mapping[str, Any]]) -> set[Path]:
    """The annotation files on this machine that metrics read."""
    files = [metric.get("ann_file") for metric in metrics if not metric.get("backend_args")]
    return {Path(file).absolute() for file in files if file and "://" not in file}


def _some(values: Iterable[Any], most: int = 8) -> str:
    listed = [str(value) for value in values]
    return ", ".join(listed[:most]) + (f", ... ({len(listed)})" if len(listed) > most else "") or "none"
