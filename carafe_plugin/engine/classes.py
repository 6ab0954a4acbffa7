"""Whether a model's classes are those of its data: how many there are, which, and in which order.

Labels are numbers. With fewer outputs than classes a training ends in the middle; with more, or with the same classes
in another order, nothing fails, and every figure is of something else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from torch import nn

from carafe_plugin.engine.config import dataset_configs
from carafe_plugin.engine.errors import UsageError
from carafe_plugin.images import sample, shorten

#: Parts of mmdet's and mmseg's models whose outputs are not the dataset's classes: region proposals, stuff of another
#: dataset, boundaries, depth, people to be followed and recognised again, words of a text.
_OTHER_OUTPUTS = {"RPN", "FusedSemanticHead", "STDCHead", "VPDDepthHead", "BaseMOTModel", "LinearReIDHead"}
_OTHER_OUTPUTS |= {"GroundingDINOHead"}


def config_meta(cfg: Config, split: str) -> dict[str, Any]:
    """The ``metainfo`` (``classes`` and more) of the first dataset of a split ('train', 'val', 'test'), without reading
    its files; nothing where the configuration does not say it.
    """
    for dataset in dataset_configs((cfg.get(f"{split}_dataloader") or {}).get("dataset")):
        with suppress(Exception):  # whoever builds it in earnest says what is wrong with it
            return DATASETS.build({**dataset, "lazy_init": True, "pipeline": []}).metainfo
    return {}


def checkpoint_meta(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint records of its training's dataset (``classes`` and more), as the toolboxes write it today or
    wrote it before 2022; nothing where it records no classes.

    Example:
        >>> checkpoint_meta(dict(meta=dict(CLASSES=("cat", "dog"))))
        {'classes': ('cat', 'dog')}
    """
    meta = checkpoint.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    known = meta.get("dataset_meta")
    known = known if isinstance(known, Mapping) else {key: meta[key] for key in ("CLASSES", "PALETTE") if key in meta}
    known = {str(key).lower(): value for key, value in known.items()}
    return known if isinstance(known.get("classes"), (list, tuple)) else {}


def dataset_meta(dataset: Any) -> Mapping[str, Any]:
    """The ``metainfo`` of a dataset that is built; of mmdet's ConcatDataset, which has a list where parts differ in
    anything, that of the first part, unless they differ in their classes.
    """
    meta = getattr(dataset, "metainfo", None) or {}
    if isinstance(meta, Mapping):
        return meta
    return meta[0] if len({tuple(part.get("classes") or ()) for part in meta}) == 1 else {}


def compare_classes(first: tuple[str, Any], second: tuple[str, Any]) -> tuple[str, bool] | None:
    """How two lists of classes, each with a name for it, differ, and whether they are the same in another order; None
    where they do not, or one is unknown.

    Example:
        >>> compare_classes(("the file", ["a", "b"]), ("the configuration", ["b", "a"]))
        ('the file has the classes a, b, the configuration b, a (the first to differ: a, b)', True)
    """
    (name, classes), (other_name, others) = first, second
    if not classes or not others or list(classes) == list(others):
        return None
    pairs = [(mine, theirs) for mine, theirs in zip(classes, others, strict=False) if mine != theirs]
    differing = "the first to differ: {}, {}".format(*pairs[0]) if pairs else f"{len(classes)} and {len(others)}"
    message = f"{name} has the classes {shorten(classes)}, {other_name} {shorten(others)} ({differing})"
    return message, sorted(map(str, classes)) == sorted(map(str, others))


def head_fault(model: nn.Module, source: str, meta: Mapping[str, Any]) -> str | None:
    """The first part of a built model whose ``num_classes`` is not the number of a dataset's classes, as a message;
    None where there is none, or the dataset has no list of classes.

    ``meta`` is the dataset's ``metainfo``, ``source`` its name. Parts that say nothing of the dataset's classes are
    passed over: a detector's region proposals, mask heads that take all classes alike, heads with classes of another
    kind. Of a panoptic dataset, a part may have things, stuff or both.
    """
    classes = meta.get("classes")
    if isinstance(classes, str):
        return f"the classes of {source} must be a tuple of names, got the text {classes!r} (one alone: ({classes!r},))"
    if not classes:
        return None
    fitting = {len(classes), len(meta.get("thing_classes") or classes)}
    if stuff := len(meta.get("stuff_classes") or ()):
        fitting |= {stuff, stuff + 1}  # one more for all things
    for name, part in _heads(model):
        # mmseg's sigmoid of one channel tells two classes apart.
        binary = part.num_classes == getattr(part, "out_channels", 0) == 1 and len(classes) == 2
        if part.num_classes not in fitting and not binary:
            return (
                f"{name or 'the model'} ({type(part).__name__}) has num_classes={part.num_classes}, and {source} "
                f"{len(classes)} classes: {shorten(classes)}"
            )
    return None


def _heads(model: nn.Module) -> list[tuple[str, Any]]:
    """The parts that have an output for each class, before the model that is made of them."""
    parts = sorted(model.named_modules(), key=lambda named: named[0] == "")
    others = [name for name, part in parts if _OTHER_OUTPUTS & {kind.__name__ for kind in type(part).__mro__}]
    return [
        (name, part)
        for name, part in parts
        if not _is_exempt(name, part) and not any(f"{name}.".startswith(f"{other}.") or not other for other in others)
    ]


def _is_exempt(name: str, part: Any) -> bool:
    number = getattr(part, "num_classes", None)
    if type(number) is not int or number < 1:  # a backbone without its classifier has -1
        return True
    if "rpn_head" in name.split("."):  # of whatever type
        return True
    if getattr(part, "class_agnostic", False):
        return True
    if hasattr(part, "batch_augments"):  # mmpretrain's preprocessor reads the number only to make vectors of labels
        return not part.batch_augments and not getattr(part, "to_onehot", False)
    return False


def label_fault(dataset: Any, source: str, classes: Sequence[str] | None, number: int) -> str | None:
    """The first image of one of mmpretrain's datasets whose label is none of ``number`` classes, as a message."""
    if not hasattr(dataset, "get_data_info"):
        return None
    for index in sample(range(len(dataset))):
        record = dataset.get_data_info(index)
        if "gt_label" not in record:
            return None
        labels = np.ravel(record["gt_label"])  # one or several; of several tasks, a dictionary
        if labels.dtype.kind in "iu" and ((labels < 0) | (labels >= number)).any():
            named = f" ({shorten(classes)})" if classes else ""
            return (
                f"{source}: image {record.get('img_path')} has the label {shorten(labels)}, and the {number} "
                f"classes{named} are 0 to {number - 1}"
            )
    return None


class CheckClassesHook(Hook):
    """Raise a UsageError before a run whose model has another number of classes than a dataset of ``splits`` ('train',
    'val', 'test'), whose labels are none of them, or whose datasets have the same classes in different orders; datasets
    with other names of classes are warned of.
    """

    def __init__(self, *splits: str) -> None:
        self.splits = splits

    def before_run(self, runner: Runner) -> None:
        """Compare the model and the datasets, all of which are built now."""
        known: tuple[str, Any] = ("", None)
        for split in self.splits:
            if not runner.cfg.get(f"{split}_dataloader"):
                continue
            dataset = getattr(runner, f"{split}_dataloader").dataset
            meta = dataset_meta(dataset)
            source = f"{split}_dataloader ({type(dataset).__name__})"
            classes = meta.get("classes")
            fault = head_fault(runner.model, source, meta)
            # A retriever's "labels" of a test are places in a gallery.
            gallery = split != "train" and hasattr(getattr(runner.model, "module", runner.model), "prototype")
            number = len(classes or ()) or min((part.num_classes for _, part in _heads(runner.model)), default=0)
            if number and not gallery:
                fault = fault or label_fault(dataset, source, classes, number)
            if fault:
                raise UsageError(fault)
            if difference := compare_classes(known, (source, classes)):
                message, reordered = difference
                if reordered:
                    raise UsageError(f"{message}: labels would be mixed up")
                runner.logger.warning(message)
            known = (source, classes) if classes else known
