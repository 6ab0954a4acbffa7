"""The datasets of a configuration, checked before anything is built, and before anything runs.

mmseg takes it for granted that images and label maps belong together. Without a label map a training ends in the
middle, in a data loader; with one of another size, in the loss or, where images are cropped first, never. A missing
image goes unnoticed there, too.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner
from PIL import Image, UnidentifiedImageError

from carafe_plugin.engine.annotations import check_annotations, unread_dataset
from carafe_plugin.engine.config import ADAPTERS, dataset_configs, leaves, require_settings, toolbox, type_name
from carafe_plugin.engine.errors import UsageError, note, reading_named_files
from carafe_plugin.engine.panoptic import check_panoptic_dataset
from carafe_plugin.engine.processes import process_rank
from carafe_plugin.images import file_faults, list_images, shorten

_ORIENTATION, _TRANSPOSED = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values that swap height and width
_ONE_BAND = ("1", "L", "P", "I", "I;16", "I;16B", "F")  # Pillow's modes that mmseg reads as one label per pixel


def check_dataset_files(cfg: Config, *splits: str) -> None:
    """Raise a UsageError where an annotation file or image folder of ``cfg`` is missing, before anything is built.

    Then, in mmseg, every image must have its annotation, of the same size; in mmdet, annotations must be sound and
    their images there (:func:`~carafe_plugin.engine.annotations.check_annotations`, and
    :func:`~carafe_plugin.engine.panoptic.check_panoptic_dataset`). ``splits`` are the data loaders
    that the run needs: 'train', 'val', 'test'; only 'val' may be absent from ``cfg``.
    """
    require_settings(cfg, *(f"{split}_dataloader" for split in splits if split != "val"))
    datasets = []
    for split in splits:
        for dataset in dataset_configs((cfg.get(f"{split}_dataloader") or {}).get("dataset")):
            if not dataset.get("backend_args"):  # else the files are not on this machine
                place = f"{split}_dataloader ({type_name(dataset)})"
                _check_exists(dataset, place)
                datasets.append((split, place, dataset))
    # One process reads the headers of all images, or all annotations; where it ends, its launcher ends the others.
    if process_rank(cfg.get("launcher")) != 0:
        return
    scope = toolbox(cfg)
    for split, place, dataset in datasets:
        if scope == "mmseg" and (fault := label_map_fault(dataset)):
            raise UsageError(f"{place}: {fault}")
        if scope == "mmdet":
            try:
                evaluators, training = cfg.get(f"{split}_evaluator"), split == "train"
                check_annotations(dataset, evaluators, training)
                check_panoptic_dataset(dataset, evaluators, training, cfg.get("model"))
            except UsageError as error:
                raise UsageError(f"{place}: {error}") from error


def _check_exists(dataset: Any, place: str) -> None:
    prefix = dataset.get("data_prefix") or {}
    parts = {"": dataset.get("ann_file"), **(prefix if isinstance(prefix, Mapping) else {"data_prefix": prefix})}
    for key, part in parts.items():
        if not isinstance(part, str) or not part or "://" in (dataset.get("data_root") or "") + part:
            continue  # nothing, or not on this machine
        path = _path(dataset, part)
        if key and not path.is_dir():
            raise UsageError(f"no such folder for {place}, {key}: {path}")
        if not path.exists():
            raise UsageError(f"no such annotation file for {place}: {path}")


def _path(dataset: Any, part: str) -> Path:
    return Path(dataset.get("data_root") or "", part).absolute()


def check_not_empty(runner: Runner, *splits: str) -> None:
    """Build a run's datasets for ``splits`` ('train', 'val', 'test'), skipping those without a data loader. Raises
    UsageError where one holds no image, or a file that it names is missing; of one whose annotations
    :func:`check_dataset_files` does not know, a line on stderr says so.
    """
    for split in splits:
        if not runner.cfg.get(f"{split}_dataloader"):
            continue
        try:
            with reading_named_files():
                images = len(getattr(runner, f"{split}_dataloader").dataset)
        except ValueError as error:
            if "need at least one array" not in str(error):  # what becomes of mmengine's packing of an empty list
                raise
            images = 0
        if images == 0:
            datasets = list(dataset_configs(runner.cfg[f"{split}_dataloader"].dataset))
            sources = ", ".join(str(_path(dataset, dataset.get("ann_file") or "")) for dataset in datasets)
            types = ", ".join(map(type_name, datasets))
            raise UsageError(f"no images in {split}_dataloader ({types}): looked in {sources}")
        if process_rank(runner.cfg.get("launcher")) == 0:
            for dataset in leaves(getattr(runner, f"{split}_dataloader").dataset):
                _check_listed_files(dataset, f"{split}_dataloader ({type(dataset).__name__})", toolbox(runner.cfg))


def _check_listed_files(dataset: Any, place: str, scope: str | None) -> None:
    """Of a dataset that nothing looked at before it was built: whether the files are there that it lists."""
    known = {"mmdet": ("CocoDataset",), "mmseg": ("BaseSegDataset",)}.get(scope or "", ())
    lists = getattr(type(dataset), "load_data_list", None)
    if scope not in ADAPTERS or getattr(lists, "__qualname__", "").partition(".")[0] in known:
        return
    if not getattr(dataset, "ann_file", None) or not hasattr(dataset, "get_data_info"):
        return  # its files are those that it has just found in a folder, or no images
    infos = [info for info in map(dataset.get_data_info, range(len(dataset))) if isinstance(info, Mapping)]
    paths = [info[key] for info in infos for key in ("img_path", "seg_map_path") if isinstance(info.get(key), str)]
    paths = [] if getattr(dataset, "backend_args", None) else [path for path in paths if "://" not in path]
    root = Path(getattr(dataset, "data_root", None) or "").absolute()
    names = [os.path.relpath(path, root) for path in paths]
    if faults := file_faults(root, names, "files that it lists", sizes=False):
        raise UsageError(f"{place}: {'; '.join(faults)}")
    there = f"; {len(paths)} files that it lists are there" if paths else ""
    note(f"{place}: annotations are of a kind that is not checked before the run{there}")


def label_map_fault(dataset: Mapping[str, Any]) -> str | None:
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
    steps = [step for step in dataset.get("pipeline") or () if isinstance(step, Mapping)]
    usual = any(type_name(step) == "LoadAnnotations" for step in steps)
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
