"""BCCD as its repository distributes it: 364 photographs of blood, and boxes of cells in PASCAL VOC's XML."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from PIL import Image
from rich.progress import Progress

from carafe_plugin.engine.dataset_layout import Dataset, Folder, Source, check_splits, link, write_labels
from carafe_plugin.engine.errors import UsageError, note, read_text
from carafe_plugin.images import read_header, shorten

CLASSES = ("RBC", "WBC", "Platelets")
SPLITS = ("train", "val", "test")
_FILES = {split: f"instances_{split}.json" for split in SPLITS}
_CLIPPED, _TINY = "reach beyond their images and are clipped", "have at most a pixel on their image and are left out"


def convert(source: Path, out: Path, progress: Progress) -> Iterator[str]:
    """Link the images of a download, and write its boxes in COCO's format; yields what is wrong with it.

    A box that reaches beyond its image is clipped, and one that is at most a pixel wide or high then is left out, as a
    click that was no box: a line on stderr says how many.
    """
    link(source / "JPEGImages", out / "images")
    for split, name in _FILES.items():
        listing = source / "ImageSets" / "Main" / f"{split}.txt"
        stems = read_text(listing).split()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        changed: Counter[str] = Counter()
        faulty = False
        for stem in progress.track(sorted(dict.fromkeys(stems)), description=f"boxes of {split}"):
            file, picture = source / "Annotations" / f"{stem}.xml", source / "JPEGImages" / f"{stem}.jpg"
            try:
                (height, width), *_ = read_header(picture, turned=False)
                image = dict(id=len(images) + 1, file_name=picture.name, width=width, height=height)
                found = _read_boxes(file, width, height, changed)
            except (OSError, Image.DecompressionBombError) as error:
                yield f"cannot read {picture}: {getattr(error, 'strerror', None) or error}"
                faulty = True
            except UsageError as error:
                yield str(error)
                faulty = True
            else:
                images.append(image)
                annotations += [dict(image_id=image["id"], **box) for box in found]
        for change, number in (+changed).items():
            note(f"{number} of the {len(annotations) + changed[_TINY]} boxes of {listing} {change}")
        if not faulty:
            categories = [dict(id=number, name=name) for number, name in enumerate(CLASSES, 1)]
            numbered = [dict(id=number, **annotation) for number, annotation in enumerate(annotations, 1)]
            content = dict(images=images, annotations=numbered, categories=categories)
            write_labels(content, out / "annotations" / name)


def _read_boxes(file: Path, width: int, height: int, changed: Counter[str]) -> list[dict[str, Any]]:
    """The boxes of a VOC file as COCO's annotations. Raises UsageError where it is no such file, or is of an
    image of another size.
    """
    try:
        root = ElementTree.fromstring(read_text(file))
    except ElementTree.ParseError as error:
        raise UsageError(f"cannot read {file} (truncated, or not XML): {error}") from error
    size = [_number(root, f"size/{name}", file) for name in ("height", "width")]
    if size != [height, width]:
        raise UsageError(f"{file} is of an image of {size[0]:g} x {size[1]:g}, which is {height} x {width}")
    boxes = []
    for entry in root.iter("object"):
        name = (entry.findtext("name") or "").strip()
        if name not in CLASSES:
            raise UsageError(f"{file}: an object must be one of {shorten(CLASSES)}, got {name!r}")
        left, top, right, bottom = (_number(entry, f"bndbox/{side}", file) for side in ("xmin", "ymin", "xmax", "ymax"))
        clipped = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
        sides = clipped[2] - clipped[0], clipped[3] - clipped[1]
        if min(sides) <= 1:
            changed[_TINY] += 1
            continue
        changed[_CLIPPED] += clipped != (left, top, right, bottom)
        box = dict(bbox=[*clipped[:2], *sides], area=sides[0] * sides[1], iscrowd=0)
        boxes.append(dict(category_id=CLASSES.index(name) + 1, **box))
    return boxes


def _number(entry: ElementTree.Element, path: str, file: Path) -> float:
    text = entry.findtext(path)
    try:
        number = float(text or "")
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{file}: {path} must be a finite number, got {text!r}")
    return number


BCCD = Dataset(
    "data/bccd",
    (Folder("images", 364), Folder("annotations", len(SPLITS), files=tuple(_FILES.values()))),
    partial(
        check_splits, splits={split: (f"annotations/{name}", "images") for split, name in _FILES.items()}, masks=False
    ),
    source=Source(
        (".", "BCCD", "BCCD_Dataset/BCCD", "BCCD_Dataset-master/BCCD"),
        ("Annotations", "JPEGImages", *(f"ImageSets/Main/{split}.txt" for split in SPLITS)),
        "BCCD_Dataset-master.zip",
        "BCCD_Dataset-master/BCCD",
    ),
    convert=convert,
)
