"""A folder of one's own in COCO's format: its splits, its classes, and the configuration that trains a model on it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mmengine.config import Config

from carafe_plugin.engine.annotations import check_coco, read_coco
from carafe_plugin.engine.config import import_adapters, load_config, toolbox
from carafe_plugin.engine.dataset_checks import check_dataset_files
from carafe_plugin.engine.errors import UsageError, note
from carafe_plugin.images import shorten

#: How files and folders call the splits, at the beginning of a word.
_WORDS = {"train": ("train",), "val": ("val", "dev"), "test": ("test",)}
_BASES = ("mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py")


@dataclass(frozen=True)
class CocoFolder:
    """The annotation files of a folder in COCO's format, by their splits ('train', and 'val' or 'test' where there are
    such).

    Raises UsageError, as they are asked for, where the training's file is missing, a split has several, or one cannot
    be read.
    """

    root: Path

    @cached_property
    def files(self) -> dict[str, Path]:
        """The annotation file of each split."""
        listed = sorted({*self.root.glob("*.json"), *self.root.glob("*/*.json")})
        found: dict[str, list[Path]] = {}
        for file in listed:
            found.setdefault(self._split(file), []).append(file)
        if len(listed) == 1:
            found = {"train": listed}
        if "train" not in found:
            raise UsageError(
                f"no annotation file in {self.root} or a folder in it (*.json) says 'train' in its name or that of its "
                f"folder; found {shorten(file.relative_to(self.root) for file in listed)}"
            )
        files = {}
        for split in [name for name in _WORDS if name in found]:
            instances = [file for file in found[split] if file.name.startswith("instances")]  # COCO has others, too
            if len(chosen := instances or found[split]) > 1:
                names = shorten(file.relative_to(self.root) for file in chosen)
                raise UsageError(f"several annotation files in {self.root} may be that of {split}: {names}")
            files[split] = chosen[0]
        return files

    def _split(self, file: Path) -> str:
        """The split that a file's name, or else its folder's, speaks of; "" for none."""
        for name in (file.stem, file.parent.name if file.parent != self.root else ""):
            for split, words in _WORDS.items():
                if re.search(rf"(?<![a-z])({'|'.join(words)})", name.lower()):
                    return split
        return ""

    @cached_property
    def contents(self) -> dict[str, Any]:
        """What the annotation files hold, with ids and classes that fit together. One of a test that holds no
        annotations is left out.
        """
        contents = {split: read_coco(file) for split, file in self.files.items()}
        if contents.get("test", {}).get("annotations") == []:
            note(f"{self.files['test']} holds no annotations: nothing to measure on")
            del contents["test"]
        for split, content in contents.items():
            check_coco(content, self.files[split], measured=split != "train", training=split == "train")
        return contents

    @cached_property
    def counts(self) -> dict[str, dict[str, int]]:
        """How many objects each split holds of each category that occurs, in the order of the training's file."""
        counts: dict[str, dict[str, int]] = {}
        for split, content in self.contents.items():
            names = {category["id"]: category["name"] for category in content["categories"]}
            counts[split] = dict.fromkeys(names.values(), 0)
            for annotation in content["annotations"]:
                counts[split][names[annotation["category_id"]]] += 1
        return counts

    @property
    def classes(self) -> tuple[str, ...]:
        """The categories that have an object in some split, in the order in which mmdet numbers them. A line on stderr
        names the others, and those that a split lacks.
        """
        listed = [category["name"] for category in self.contents["train"]["categories"]]
        listed += [name for count in self.counts.values() for name in count if name not in listed and count[name]]
        used = [name for name in listed if any(count.get(name) for count in self.counts.values())]
        if unused := [name for name in listed if name not in used]:
            note(f"no object in any split is of the categories {shorten(unused)}, which are left out of the classes")
        for split, count in self.counts.items():
            if absent := [name for name in used if not count.get(name)]:
                result = "they cannot be learnt" if split == "train" else "results there are of the others"
                note(f"no object of {split} is of the classes {shorten(absent)}: {result}")
        return tuple(used)

    def image_folder(self, split: str) -> Path:
        """The folder, at most two below the root, that holds most of the first images that an annotation file lists."""
        file = self.files[split]
        names = [image["file_name"] for image in self.contents[split]["images"][:20]]
        below = sorted(path for pattern in ("*/", "*/*/") for path in self.root.glob(pattern))
        folders = [file.parent, *sorted(below, key=lambda path: self._split(path / "x") != split), self.root]
        return max(folders, key=lambda folder: sum((folder / name).is_file() for name in names))


def write_config(folder: CocoFolder, base: str | None = None) -> tuple[str, Config]:
    """The text of a configuration that trains ``base`` on a folder, and what it becomes: number of classes, datasets,
    metrics. The default is mmdet's Mask R-CNN or, where objects have no masks, Faster R-CNN.

    Raises UsageError where ``base`` is not of mmdet, or has no part for them.
    """
    classes, training = folder.classes, folder.contents["train"]["annotations"]
    base = base or _BASES[bool(training) and all(annotation.get("segmentation") for annotation in training)]
    cfg = load_config(base)
    if toolbox(cfg) != "mmdet":
        raise UsageError(f"--base must be a configuration of MMDetection, got {base} of {toolbox(cfg)}")
    written = dict(model=_changes(cfg.model, "num_classes", dict(num_classes=len(classes))))
    if not written["model"]:
        raise UsageError(f"--base must have a model with num_classes, got {base}")
    own = {**written, **_data_settings(folder, cfg, classes)}
    if missing := [name for name in ("train", "val", "test") if f"{name}_dataloader" not in own]:
        raise UsageError(
            f"--base must have datasets with an ann_file for train, val and test, got {base}: {missing[0]}"
        )
    named = "{classes}"  # a name in the text, which has them once
    written |= _data_settings(folder, cfg, named)
    cfg.merge_from_dict(own)
    place = base if "::" in base else str(Path(base).absolute())
    text = Config(written).pretty_text.replace(repr(named), "classes")
    return f"_base_ = {place!r}\nclasses = {classes!r}\n{text}", cfg


def _data_settings(folder: CocoFolder, cfg: Config, classes: Sequence[str]) -> dict[str, Any]:
    """What a configuration says of a folder's splits: data loaders and metrics, None for those that it has no data for.
    A folder without val is validated on test, one without test tested on val.
    """
    settings: dict[str, Any] = {}
    for name, other in (("train", "train"), ("val", "test"), ("test", "val")):
        split = name if name in folder.contents else other
        if split not in folder.contents:
            settings |= {f"{name}_{part}": None for part in ("dataloader", "cfg", "evaluator")}
            continue
        images, file = folder.image_folder(split), folder.files[split]
        dataset = dict(
            data_root=f"{folder.root}/",
            ann_file=file.relative_to(folder.root).as_posix(),
            data_prefix=dict(img="" if images == folder.root else f"{images.relative_to(folder.root).as_posix()}/"),
            metainfo=dict(classes=classes),
        )
        found = {
            f"{name}_dataloader": _changes(cfg.get(f"{name}_dataloader"), "ann_file", dataset),
            f"{name}_evaluator": _changes(cfg.get(f"{name}_evaluator"), "ann_file", dict(ann_file=str(file))),
        }
        settings |= {part: changes for part, changes in found.items() if changes}
    return settings


def _changes(part: Any, marker: str, settings: Mapping[str, Any]) -> Any:
    """What a configuration must say for each dictionary in a part of its base that has the key ``marker`` to have
    ``settings``; None where there is none. Of dictionaries that is what changes, of lists the whole.
    """
    if isinstance(part, Mapping):
        found = {
            key: change for key, value in part.items() if (change := _changes(value, marker, settings)) is not None
        }
        return ({**found, **settings} if marker in part else found) or None
    if not isinstance(part, (list, tuple)) or all(_changes(value, marker, settings) is None for value in part):
        return None
    whole = Config(dict(part=list(part)))
    for number, value in enumerate(part):
        if change := _changes(value, marker, settings):
            whole.merge_from_dict({f"part.{number}": change})
    return whole.to_dict()["part"]


def folder_faults(cfg: Config) -> Sequence[str]:
    """What a training with a configuration, and its validation and test, would refuse in their datasets."""
    import_adapters(toolbox(cfg))
    faults: dict[str, str] = {}
    for split in ("train", "val", "test"):
        if cfg.get(f"{split}_dataloader"):
            try:
                check_dataset_files(cfg, split)
            except UsageError as error:
                loader, _, fault = str(error).partition(": ")
                faults.setdefault(fault, f"{loader}: {fault}")  # once, where val is tested on too
    return list(faults.values())
