"""Ultralytics: models that are built, and models that are described in YAML.

A trainer of this library builds its model anew from its YAML, so a model to be trained by it wants the name:
:func:`register` makes ``CARAFE`` one, and :func:`with_carafe` writes it in the place of ``nn.Upsample``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._require import require
from ..modules import CARAFEUpsample

FEATURES = ("Proto26", "CBFuse", "FpnNeck", "PixelDecoder")
_READ = ("i", "f", "type", "np")  # by DetectionModel's forward and summary


class CARAFE(CARAFEUpsample):
    """CARAFE++ as a layer of a model's YAML: ``[-1, 1, CARAFE, ["ch", 2]]``.

    Args:
        ch (int | Sequence[int]): the channels of all layers so far, of which the last one's are the features'; the YAML
            says ``"ch"``, which the library's parser replaces.
        scale_factor (int): how many times larger the output is.
        *options: other arguments of :class:`carafe_plugin.CARAFEUpsample`, in their order: YAML has no names.
    """

    def __init__(self, ch: int | Sequence[int], scale_factor: int = 2, *options: Any) -> None:
        super().__init__(ch if isinstance(ch, int) else ch[-1], scale_factor, *options)


def register() -> None:
    """Let the library's YAML files say ``CARAFE``, in this process and those that it starts by forking.

    Raises:
        ImportError: ultralytics is not installed.
        RuntimeError: the name stands for another class.
    """
    require("ultralytics", "carafe_plugin.models.ultralytics")
    from ultralytics.nn import tasks

    if vars(tasks).setdefault("CARAFE", CARAFE) is not CARAFE:
        raise RuntimeError(
            f"ultralytics.nn.tasks.CARAFE is {tasks.CARAFE.__module__}.{tasks.CARAFE.__qualname__} already"
        )


def with_carafe(description: Mapping[str, Any], *options: Any) -> dict[str, Any]:
    """A model's description, as its YAML file reads, with CARAFE++ for every nearest ``nn.Upsample``.

    Args:
        description (Mapping[str, Any]): with the lists ``backbone`` and ``head``, a row ``[from, number, module,
            arguments]`` for each layer.
        *options: of :class:`CARAFE` after the factor.

    Returns:
        dict: a copy, which the library reads after :func:`register`. Of ``scales`` it has a built model's alone, since
            the library chooses one by the name of the file.

    Raises:
        ValueError: there is no such layer.

    Example:
        >>> rows = dict(backbone=[[-1, 1, "Conv", [64, 3, 2]]], head=[[-1, 1, "nn.Upsample", [None, 2, "nearest"]]])
        >>> with_carafe(rows)["head"]
        [[-1, 1, 'CARAFE', ['ch', 2]]]
    """
    changed = copy.deepcopy(dict(description))
    replaced = 0
    for row in (*changed.get("backbone", ()), *changed.get("head", ())):
        source, _, module, arguments = row
        # Its arguments are size, scale_factor and mode.
        nearest = module == "nn.Upsample" and (len(arguments) < 3 or arguments[2] == "nearest")
        if nearest and isinstance(source, int) and arguments[0] in (None, "None"):
            row[2], row[3] = "CARAFE", ["ch", arguments[1], *options]
            replaced += 1
    if changed.get("scale") in changed.get("scales", ()):
        changed["scales"] = {changed["scale"]: changed["scales"][changed["scale"]]}
    if not replaced:
        raise ValueError("description must have an nn.Upsample with a scale factor in its backbone or head, got none")
    return changed


def adopt(new: nn.Module, old: nn.Module) -> None:
    """Give a layer the number, source and name that the model's forward and summary read of it."""
    for name in _READ:
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))
    if hasattr(old, "np"):
        for name, value in (("type", type(new).__name__), ("np", sum(p.numel() for p in new.parameters()))):
            setattr(new, name, value)


def example_inputs(model: nn.Module) -> Tensor:
    """An image of the channels that the model's YAML says."""
    settings = getattr(model, "yaml", None) or {}
    return torch.rand(1, settings.get("channels", settings.get("ch", 3)), 128, 128)
