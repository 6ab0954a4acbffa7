"""Whether images and label maps of a local segmentation dataset in ADE20k's style belong together.

mmseg takes that for granted. Without a label map a training ends in the middle, in a data loader; with one of another
size, in the loss or, where images are cropped first, never. A missing image goes unnoticed there, too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from carafe_plugin.engine.annotations import unread_dataset
from carafe_plugin.images import file_faults, list_images, shorten

__all__ = ["find_fault", "pair_faults"]

_ORIENTATION, _TRANSPOSED = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values that swap height and width
_ONE_BAND = ("1", "L", "P", "I", "I;16", "I;16B", "F")  # Pillow's modes that mmseg reads as one label per pixel


def find_fault(dataset: Mapping[str, Any]) -> str | None:
    """The first thing that is wrong with the files of one of mmseg's datasets, given its configuration, as a message,
    or None. Its folders must be there; only headers are read.

    One that lists its files in a way of its own, names no folder of label maps or lies on another machine is left out.
    """
    from mmseg.datasets import BaseSegDataset
    from mmseg.registry import DATASETS

    prefix = dataset.get("data_prefix")
    if not isinstance(prefix, Mapping) or not (prefix.get("img_path") and prefix.get("seg_map_path")):
        return None
    built = unread_dataset(dataset, DATASETS, BaseSegDataset)
    if built is None or "://" in f"{built.data_prefix}":
        return None
    images, maps = (Path(built.data_prefix[key]).absolute() for key in ("img_path", "seg_map_path"))
    names, ann_file = None, Path(built.ann_file or "")
    if ann_file.is_file():
        names = [line.strip() for line in ann_file.read_text().splitlines() if line.strip()]
    steps = [step.get("type") for step in dataset.get("pipeline") or () if isinstance(step, Mapping)]
    usual = any(getattr(kind, "__name__", str(kind)).rpartition(".")[2] == "LoadAnnotations" for kind in steps)
    suffixes = built.img_suffix, built.seg_map_suffix
    return next(pair_faults(images, maps, suffixes, names, _ONE_BAND if usual else ()), None)


def pair_faults(
    images: Path,
    maps: Path,
    suffixes: tuple[str, str] = (".jpg", ".png"),
    listed: Sequence[str] | None = None,
    modes: Collection[str] = (),
) -> Iterator[str]:
    """What is wrong with a folder of images and their label maps, as messages: first what takes the least to find.

    ``suffixes`` are the endings of images and label maps, ``listed`` the images that are used, without ending (default:
    all, as mmseg finds them), ``modes`` Pillow's modes that a label map may have (default: any).
    """
    found, labelled = (
        [name.removesuffix(suffix) for name in list_images(folder, suffix)]
        for folder, suffix in zip((images, maps), suffixes, strict=True)
    )
    names = found if listed is None else listed
    files = [[name + suffix for name in names] for suffix in suffixes]
    faults = file_faults(maps, files[1], "annotations") + file_faults(images, files[0], "images")
    if listed is None and (extra := sorted(set(labelled) - set(found))):  # who lists images may leave some out
        faults.append(f"{len(extra)} annotations in {maps} have no image in {images}: {shorten(extra)}")
    yield from faults
    for image, label_map in zip(*files, strict=True):
        if fault := _compare(images / image, maps / label_map, modes):
            yield fault


def _compare(image: Path, label_map: Path, modes: Collection[str]) -> str | None:
    try:
        expected, _ = _size_and_mode(image)
    except (OSError, Image.DecompressionBombError):  # missing, or of a format that another reader may know
        return None
    try:
        found, mode = _size_and_mode(label_map)
    except FileNotFoundError:
        return None
    except UnidentifiedImageError:
        return f"annotation {label_map} is not an image"
    if found != expected:
        sizes = "annotation {} is {} x {}, its image {} is {} x {} (height x width)"
        return sizes.format(label_map, *found, image, *expected)
    if modes and mode not in modes:
        return f"annotation {label_map} must hold one label per pixel (Pillow's mode {' or '.join(modes)}), got {mode}"
    return None


def _size_and_mode(path: Path) -> tuple[tuple[int, int], str]:
    with Image.open(path) as image:
        width, height = image.size
        # Readers turn the image as the camera was held.
        size = (width, height) if image.getexif().get(_ORIENTATION) in _TRANSPOSED else (height, width)
        return size, image.mode
