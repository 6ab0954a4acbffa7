"""Whether a detection dataset in COCO's format can be evaluated: what its annotations say, and which images are there.

mmdet and pycocotools take both for granted. An unknown category is left out, a class that the file does not name makes
the others' numbers shift, a box that is empty or NaN is an object that nothing can find, and an image that is missing
ends the run in the middle. All of it would cost an hour, or a wrong AP; here it is one message before anything starts.
"""

from __future__ import annotations

import json
import math
import os
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
    content: Mapping[str, Any], path: Path, classes: Sequence[str] | None = None, empty_boxes: bool = False
) -> None:
    """Check what an annotation file says.

    Args:
        content: What :func:`read_coco` returned.
        path: The file, for the messages.
        classes: Names that its categories must include.
        empty_boxes: Whether boxes without an area may occur; COCO's training annotations have some.

    Raises:
        AnnotationError: An annotation is of a category or image that the file does not list, or its box is no four
            numbers, not finite, or empty; or a class has no category.

    Example:
        >>> from pathlib import Path
        >>> content = dict(images=[dict(id=1)], categories=[dict(id=7, name="cat")], annotations=[])
        >>> check_coco(content, Path("a.json"), ["cat"])
        >>> content["annotations"] = [dict(id=5, image_id=1, category_id=8, bbox=[0, 0, 2, 2])]
        >>> check_coco(content, Path("a.json"))
        Traceback (most recent call last):
        ...
        carafe_plugin.openmmlab.annotations.AnnotationError: a.json: annotation 5 is of the category 8, not one of 7
    """
    try:
        names = {category["id"]: category["name"] for category in content["categories"]}
        images = {image["id"] for image in content["images"]}
    except (KeyError, TypeError) as error:
        raise AnnotationError(f"{path}: every image needs an id, every category an id and a name") from error
    if absent := [name for name in classes or () if name not in set(names.values())]:
        raise AnnotationError(
            f"{path} has no category for {len(absent)} of the {len(classes or ())} classes of the configuration "
            f"({_some(absent)}); its categories are {_some(list(names.values()))}"
        )
    for annotation in content["annotations"]:
        which = f"{path}: annotation {annotation.get('id')}" if isinstance(annotation, dict) else str(path)
        if not isinstance(annotation, dict) or not {"image_id", "category_id", "bbox"} <= annotation.keys():
            raise AnnotationError(f"{which}: every annotation needs image_id, category_id and bbox, got {annotation}")
        if annotation["category_id"] not in names:
            raise AnnotationError(f"{which} is of the category {annotation['category_id']}, not one of {_some(names)}")
        if annotation["image_id"] not in images:
            raise AnnotationError(f"{which} is of the image {annotation['image_id']}, which the file does not list")
        if fault := _box_fault(annotation["bbox"], empty_boxes):
            raise AnnotationError(f"{which} of the image {annotation['image_id']} has {fault}")


def _box_fault(box: Any, empty: bool) -> str | None:
    numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(value, (int, float)) for value in box)
    if not numbers:
        return f"a bbox that is no list of four numbers: {box}"
    if not all(map(math.isfinite, box)):
        return f"a bbox that is not finite: {box}"
    if min(box[2:]) < 0 or (min(box[2:]) == 0 and not empty):
        return f"an empty bbox (x, y, width, height): {box}"
    return None


def missing_files(folder: Path, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Which files a folder lacks, and which are there with nothing in them.

    Args:
        folder: Where to look.
        names: Paths below it.

    Returns:
        The missing and the empty ones, in the order of ``names``. Each folder is listed once, so that this takes
        seconds for a hundred thousand images.
    """
    by_folder: dict[str, list[str]] = defaultdict(list)
    for name in names:
        by_folder[os.path.dirname(name)].append(name)  # noqa: PTH120 (a hundred thousand Path objects take longer)
    missing, empty = [], []
    for below, listed in by_folder.items():
        try:
            with os.scandir(folder / below) as entries:
                sizes = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except (FileNotFoundError, NotADirectoryError):
            sizes = {}
        for name in listed:
            size = sizes.get(os.path.basename(name))  # noqa: PTH119
            if size is None:
                missing.append(name)
            elif size == 0:
                empty.append(name)
    return missing, empty


def check_annotations(dataset: Mapping[str, Any], evaluators: Any = None) -> None:
    """Check one of mmdet's COCO datasets on this machine, as an evaluation will use it.

    A dataset that reads its annotations in a way of its own is not looked at.

    Args:
        dataset: The configuration of the dataset.
        evaluators: The configuration of the metric or the metrics.

    Raises:
        AnnotationError: Its annotations are at fault (:func:`check_coco`), an image is missing or empty, there is
            nothing to find in any image, or the metric's file is of other images.
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
    check_coco(content, path, classes)
    try:
        names = [image["file_name"] for image in content["images"]]
    except KeyError as error:
        raise AnnotationError(f"{path}: an image has no file_name") from error
    for fault, files in zip(("missing", "empty"), missing_files(Path(root, folder), names), strict=True):
        if files:
            first = Path(root, folder, files[0]).absolute()
            raise AnnotationError(f"{len(files)} of the {len(names)} images of {path} are {fault}, the first: {first}")
    _check_metrics(content, path, evaluators)


def _check_metrics(content: Mapping[str, Any], path: Path, evaluators: Any) -> None:
    metrics = evaluators if isinstance(evaluators, (list, tuple)) else [evaluators] if evaluators else []
    for metric in metrics:
        measures = str(metric.get("type")).endswith("CocoMetric") and not metric.get("format_only")
        if measures and content["images"] and not content["annotations"]:
            raise AnnotationError(f"{path} holds {len(content['images'])} images and no annotation: nothing to measure")
        other = metric.get("ann_file")
        if not measures or not other or "://" in other or Path(other).absolute() == path or metric.get("backend_args"):
            continue
        known = {image["id"] for image in read_coco(Path(other).absolute())["images"]}
        strangers = [image["id"] for image in content["images"] if image["id"] not in known]
        if strangers:
            raise AnnotationError(
                f"the evaluator's {Path(other).absolute()} does not list {len(strangers)} of the "
                f"{len(content['images'])} images of {path}, the first: id {strangers[0]}"
            )


def _some(values: Iterable[Any], most: int = 8) -> str:
    listed = [str(value) for value in values]
    return ", ".join(listed[:most]) + (f", ... ({len(listed)})" if len(listed) > most else "") or "none"
