"""Whether images and label maps of a local segmentation dataset in ADE20k's style belong together.

mmseg lists the images of a folder (or of a text file) and takes for granted that each has a label map of the same name
beside it. Without one a training ends in the middle, in a data loader; with one of another size, in the loss or, where
images are cropped first, never. An image that is missing goes unnoticed there, too.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

__all__ = ["find_fault"]

_ORIENTATION, _TRANSPOSED = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values that swap height and width


def find_fault(dataset: Mapping[str, Any]) -> str | None:
    """The first thing that is wrong with a dataset's files, as a message, or None.

    Only headers are read. A dataset is not looked at if it lists its files in a way of its own, names no folder of
    label maps or lies on another machine.

    Args:
        dataset: the configuration of one of mmseg's datasets. Its folders must be there.
    """
    prefix, root = dataset.get("data_prefix"), dataset.get("data_root") or ""
    if not isinstance(prefix, Mapping) or not (prefix.get("img_path") and prefix.get("seg_map_path")):
        return None
    suffixes = _suffixes(dataset)
    if suffixes is None or "://" in f"{root}{prefix['img_path']}{prefix['seg_map_path']}":
        return None
    images, maps = (Path(root, prefix[key]).absolute() for key in ("img_path", "seg_map_path"))
    ann_file = dataset.get("ann_file")
    names = list(_names(images, suffixes[0], Path(root, ann_file) if ann_file else None))
    if absent := [name for name in names if not (maps / (name + suffixes[1])).is_file()]:
        first = maps / (absent[0] + suffixes[1])
        return f"{len(absent)} of {len(names)} images have no annotation; the first that is missing: {first}"
    if not ann_file:  # a file may list a part on purpose
        extra = sorted(set(_names(maps, suffixes[1], None)) - set(names))
        if extra:
            first = images / (extra[0] + suffixes[0])
            return f"{len(extra)} annotations have no image (half copied?); the first that is missing: {first}"
    for name in names:
        if fault := _compare_sizes(images / (name + suffixes[0]), maps / (name + suffixes[1])):
            return fault
    return None


def _suffixes(dataset: Mapping[str, Any]) -> tuple[str, str] | None:
    """The endings of images and label maps, None for a dataset that does not find its files by endings."""
    registry = importlib.import_module("mmseg.registry").DATASETS
    base = importlib.import_module("mmseg.datasets").BaseSegDataset
    kind = dataset.get("type")
    if isinstance(kind, str):
        try:
            kind = registry.get(kind)
        except (ImportError, KeyError, RuntimeError):
            return None  # whoever builds the dataset says what is wrong with its type
    if getattr(kind, "load_data_list", None) is not base.load_data_list:
        return None
    image, label_map = (dataset.get(name) or _default(kind, name) for name in ("img_suffix", "seg_map_suffix"))
    return image, label_map


def _default(kind: Any, argument: str) -> str:
    """The default of a constructor's argument: the nearest ancestor's that names it."""
    for ancestor in kind.__mro__:
        parameter = inspect.signature(ancestor.__init__).parameters.get(argument)
        if parameter is not None and isinstance(parameter.default, str):
            return parameter.default
    raise AssertionError(f"no ancestor of {kind} has a default for {argument}")


def _names(images: Path, suffix: str, ann_file: Path | None) -> Iterator[str]:
    """The images' paths below their folder, without ending, as mmseg lists them."""
    if ann_file is not None and ann_file.is_file():
        yield from (line.strip() for line in ann_file.read_text().splitlines() if line.strip())
        return
    for path in sorted(images.rglob(f"*{suffix}")):
        if not path.name.startswith("."):
            yield path.relative_to(images).as_posix()[: -len(suffix)]


def _compare_sizes(image: Path, label_map: Path) -> str | None:
    try:
        expected = _height_and_width(image)
    except (UnidentifiedImageError, Image.DecompressionBombError):
        return None  # a format that another reader may know
    try:
        found = _height_and_width(label_map)
    except UnidentifiedImageError:
        return f"annotation {label_map} is no image"
    if found == expected:
        return None
    sizes = "annotation {} is {} x {}, its image {} is {} x {} (height x width)"
    return sizes.format(label_map, *found, image, *expected)


def _height_and_width(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        width, height = image.size
        # Readers turn the image as the camera was held.
        return (width, height) if image.getexif().get(_ORIENTATION) in _TRANSPOSED else (height, width)
