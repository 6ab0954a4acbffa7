"""The datasets of a configuration, checked before anything is built, and before anything runs.

mmseg takes it for granted that images and label maps belong together. Without a label map a training ends in the
middle, in a data loader; with one of another size, in the loss or, where images are cropped first, never. A missing
image goes unnoticed there, too, and a label that is no class changes every IoU of a test.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.runner import Runner
from PIL import Image, UnidentifiedImageError

from carafe_plugin.engine.annotations import check_annotations, find_metrics, is_turned, unread_dataset
from carafe_plugin.engine.config import (
    ADAPTERS,
    dataset_configs,
    leaves,
    pipeline_steps,
    require_settings,
    toolbox,
    type_name,
)
from carafe_plugin.engine.errors import UsageError, check_no_mark, note, read_text, reading_named_files
from carafe_plugin.engine.panoptic import check_panoptic_dataset
from carafe_plugin.engine.processes import process_rank
from carafe_plugin.images import decode, file_faults, list_images, read_header, sample, shorten

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
        if scope == "mmseg" and (fault := label_map_fault(dataset, ignored_labels(cfg, split))):
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
        if path.is_file():
            check_no_mark(path)


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
        except (json.JSONDecodeError, UnicodeDecodeError) as error:  # of a dataset that reads files in its own way
            raise UsageError(f"cannot read the annotations of {_sources(runner.cfg, split)}: {error}") from error
        except ValueError as error:
            if "need at least one array" not in str(error):  # what becomes of mmengine's packing of an empty list
                raise
            images = 0
        if images == 0:
            raise UsageError(f"no images in {_sources(runner.cfg, split)}")
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


def _sources(cfg: Config, split: str) -> str:
    datasets = list(dataset_configs(cfg[f"{split}_dataloader"].dataset))
    paths = ", ".join(str(_path(dataset, dataset.get("ann_file") or "")) for dataset in datasets)
    return f"{split}_dataloader ({', '.join(map(type_name, datasets))}): looked in {paths}"


def ignored_labels(cfg: Config, split: str) -> set[int]:
    """The labels that all heads of an mmseg model leave out of their losses ('train'), or all metrics out of theirs
    ('val', 'test'); every label, where no metric reads them, and 255, where the heads are elsewhere.
    """
    if split == "train":
        heads = [(cfg.get("model") or {}).get(name) for name in ("decode_head", "auxiliary_head")]
        listed = [part for entry in heads for part in (entry if isinstance(entry, (list, tuple)) else [entry])]
        readers = [part for part in listed if isinstance(part, Mapping)]
    else:
        readers = find_metrics(cfg.get(f"{split}_evaluator"), "")  # of any kind
    labels = set(range(256)) if readers or split != "train" else {255}
    for part in readers:
        ignored = part.get("ignore_index", 255)
        labels &= {255 if ignored is None else ignored}
    return labels


def label_map_fault(dataset: Mapping[str, Any], ignored: Collection[int] = (255,)) -> str | None:
    """The first thing that is wrong with the files of one of mmseg's datasets, given its configuration, as a message,
    or None. Its folders must be there. All headers are read, and a sample of label maps as mmseg reads them, after
    reduce_zero_label and label_map: each label must be a class or ``ignored``. How many were looked at is printed.

    One that lists its files in a way of its own, names no folder of label maps or lies on another machine is left out.
    """
    from mmcv.transforms import LoadAnnotations
    from mmseg.datasets import BaseSegDataset
    from mmseg.registry import DATASETS, TRANSFORMS

    prefix = dataset.get("data_prefix")
    if not isinstance(prefix, Mapping) or not (prefix.get("img_path") and prefix.get("seg_map_path")):
        return None
    built = unread_dataset(dataset, DATASETS, BaseSegDataset)
    if built is None or "://" in f"{built.data_prefix}":
        return None
    images, maps = (Path(built.data_prefix[key]).absolute() for key in ("img_path", "seg_map_path"))
    names, ann_file = None, Path(built.ann_file or "")
    if ann_file.is_file():
        names = [line.strip() for line in read_text(ann_file).splitlines() if line.strip()]
    steps = list(pipeline_steps(dataset.get("pipeline")))
    usual = any(type_name(step) == "LoadAnnotations" for step in steps)
    suffixes = built.img_suffix, built.seg_map_suffix
    if fault := next(pair_faults(images, maps, suffixes, names, _ONE_BAND if usual else (), is_turned(dataset)), None):
        return fault
    kinds: list[Any] = [TRANSFORMS.get(kind) if isinstance(kind := step.get("type"), str) else kind for step in steps]
    loaders = [i for i, kind in enumerate(kinds) if isinstance(kind, type) and issubclass(kind, LoadAnnotations)]
    if not loaders or not built.metainfo.get("classes"):
        return None
    # Of the unknown, those of Albumentations keep labels, and others end the run as it is built.
    later = [kind for kind in kinds[loaders[0] + 1 :] if kind]
    if own := [kind.__name__ for kind in later if kind.__module__.partition(".")[0] not in ("mmcv", "mmseg")]:
        print(f"did not look at the labels in {maps}: {shorten(own)} may make others of them")
        return None
    if names is None:
        names = [name.removesuffix(suffixes[0]) for name in list_images(images, suffixes[0])]
    files = [maps / (name + suffixes[1]) for name in names]
    return _content_fault(files, built, TRANSFORMS.build(steps[loaders[0]]), ignored)


def _content_fault(files: Sequence[Path], dataset: Any, load: Any, ignored: Collection[int]) -> str | None:
    """The first label map of a sample whose labels are not the classes of mmseg's ``dataset``, by its own reader."""
    classes = dataset.metainfo["classes"]
    looked_at, seen = 0, np.zeros(256, bool)
    for path in sample(files):
        looked_at += 1
        try:
            _, mode, _ = read_header(path, turned=False)
            stored = np.asarray(decode(path)) if mode not in ("1", "L", "P") else np.zeros(1)
            if stored.min() < 0 or stored.max() > 255 or (stored % 1).any():
                return f"annotation {path} holds labels from {stored.min()} to {stored.max()}; mmseg keeps 8 bits"
            record = dict(seg_map_path=str(path), label_map=dataset.label_map, seg_fields=[])
            labels = load({**record, "reduce_zero_label": dataset.reduce_zero_label})["gt_seg_map"]
        except Exception as error:  # Pillow's decoders raise anything, down to struct.error
            return f"annotation {path} cannot be read: {(str(error) or type(error).__name__).splitlines()[0]}"
        if labels.ndim != 2:
            return f"annotation {path} must hold one label per pixel, and mmseg reads it as an array {labels.shape}"
        held = np.bincount(labels.ravel(), minlength=256) > 0
        if strange := [int(label) for label in held.nonzero()[0] if label >= len(classes) and label not in ignored]:
            changed = " after reduce_zero_label" * bool(dataset.reduce_zero_label)
            changed += " after label_map" * bool(dataset.label_map)
            return (
                f"annotation {path} holds the labels {shorten(strange)}{changed}, which are no class: the "
                f"{len(classes)} classes ({shorten(classes)}) are 0 to {len(classes) - 1}, and ignored is "
                f"{shorten(sorted(ignored))}"
            )
        seen |= held
    absent = [name for label, name in enumerate(classes) if not seen[label]]
    as_stored = not dataset.reduce_zero_label and not dataset.label_map
    if len(classes) == 2 and as_stored and seen[0] and absent and any(seen[label] for label in ignored if label > 1):
        return (
            f"the {looked_at} annotations that were looked at ({files[0]}, ...) hold 0 and the ignored "
            f"{shorten(sorted(ignored))} alone: the class {classes[1]} must have the label 1"
        )
    lacking = f", none of them with {shorten(absent)}" if absent else ""
    print(f"looked at {looked_at} of {len(files)} label maps of {type(dataset).__name__}{lacking}")
    return None


def pair_faults(
    images: Path,
    maps: Path,
    suffixes: tuple[str, str] = (".jpg", ".png"),
    listed: Sequence[str] | None = None,
    modes: Collection[str] = (),
    turned: bool = True,
) -> Iterator[str]:
    """What is wrong with a folder of images and their label maps, as messages: first what takes the least to find.

    ``suffixes`` are the endings of images and label maps, ``listed`` the images that are used, without ending (default:
    all, as mmseg finds them), ``modes`` Pillow's modes that a label map may have (default: any). ``turned`` says that
    images are loaded as their EXIF data turn them; label maps never are.
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
        if fault := _compare(images / image, maps / label_map, modes, turned):
            yield fault


def _compare(image: Path, label_map: Path, modes: Collection[str], turned: bool) -> str | None:
    try:
        expected, *_ = read_header(image, turned)
    except (OSError, Image.DecompressionBombError):  # missing, or of a format that another reader may know
        return None
    try:
        found, mode, kind = read_header(label_map, turned=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = "is not an image" if isinstance(error, UnidentifiedImageError) else f"cannot be read: {error}"
        return f"annotation {label_map} {reason}"
    if modes and kind in ("JPEG", "MPO"):
        return f"annotation {label_map} is a JPEG, whose compression changes labels: write label maps as PNG"
    if modes and mode not in modes:
        return f"annotation {label_map} must hold one label per pixel (Pillow's mode {' or '.join(modes)}), got {mode}"
    if found != expected:
        sizes = "annotation {} is {} x {}, its image {} is {} x {} (height x width)"
        return sizes.format(label_map, *found, image, *expected)
    return None
