"""The datasets of a configuration, checked before anything is built, and before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner

from carafe_plugin.engine.annotations import AnnotationError, check_annotations
from carafe_plugin.engine.config import dataset_configs, require_settings
from carafe_plugin.engine.errors import UsageError, reading_named_files
from carafe_plugin.engine.label_maps import find_fault
from carafe_plugin.engine.processes import process_rank


def check_dataset_files(cfg: Config, *splits: str) -> None:
    """Raise a UsageError where an annotation file or image folder of ``cfg`` is missing, before anything is built.

    Then, in mmseg, every image must have its annotation, of the same size; in mmdet, annotations must be sound and
    their images there (:func:`~carafe_plugin.engine.annotations.check_annotations`). ``splits`` are the data loaders
    that the run needs: 'train', 'val', 'test'; only 'val' may be absent from ``cfg``.
    """
    require_settings(cfg, *(f"{split}_dataloader" for split in splits if split != "val"))
    datasets = []
    for split in splits:
        for dataset in dataset_configs((cfg.get(f"{split}_dataloader") or {}).get("dataset")):
            if not dataset.get("backend_args"):  # else the files are not on this machine
                place = f"{split}_dataloader ({_type_name(dataset)})"
                _check_exists(dataset, place)
                datasets.append((split, place, dataset))
    # One process reads the headers of all images, or all annotations; where it ends, its launcher ends the others.
    if process_rank(cfg.get("launcher")) != 0:
        return
    for split, place, dataset in datasets:
        if cfg.get("default_scope") == "mmseg" and (fault := find_fault(dataset)):
            raise UsageError(f"{place}: {fault}")
        if cfg.get("default_scope") == "mmdet":
            try:
                check_annotations(dataset, cfg.get(f"{split}_evaluator"), training=split == "train")
            except AnnotationError as error:
                raise UsageError(f"{place}: {error}") from error


def _check_exists(dataset: Any, place: str) -> None:
    annotations = dataset.get("ann_file")
    if isinstance(annotations, str) and annotations and not _exists(dataset, annotations, Path.exists):
        raise UsageError(f"no such annotation file for {place}: {_path(dataset, annotations)}")
    prefix = dataset.get("data_prefix") or {}
    for key, folder in prefix.items() if isinstance(prefix, Mapping) else [("data_prefix", prefix)]:
        if isinstance(folder, str) and folder and not _exists(dataset, folder, Path.is_dir):
            raise UsageError(f"no such folder for {place}, {key}: {_path(dataset, folder)}")


def _path(dataset: Any, part: str) -> Path:
    return Path(dataset.get("data_root") or "", part).absolute()


def _exists(dataset: Any, part: str, exists: Callable[[Path], bool]) -> bool:
    """Whether ``part`` of a dataset exists, as far as this machine can tell."""
    return "://" in (dataset.get("data_root") or "") + part or exists(_path(dataset, part))


def _type_name(dataset: Any) -> str:
    kind = dataset.get("type")
    return kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))


def check_not_empty(runner: Runner, *splits: str) -> None:
    """Build a run's datasets for ``splits`` ('train', 'val', 'test'), skipping those without a data loader. Raises
    UsageError where one holds no image, or a file that it names is missing.
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
            types = ", ".join(map(_type_name, datasets))
            raise UsageError(f"no images in {split}_dataloader ({types}): looked in {sources}")
