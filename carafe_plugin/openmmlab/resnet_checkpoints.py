"""Checkpoints of ResNets: which depth they are of, and how MMPretrain's become MMDetection's and MMSegmentation's.

The three toolboxes name a ResNet's parameters alike, CARAFE++'s included, with two exceptions that
:func:`extract_backbone` knows of:

* the deep stem (V1c, V1d): ``stem.{0,1,2}.conv`` and ``.bn`` in MMPretrain, ``stem.{0,3,6}`` and ``stem.{1,4,7}`` in
  the other two;
* ``avg_down`` (V1d) in a stage without stride: MMPretrain leaves its pooling out, the other two keep it with a stride
  of 1, so that the shortcut's convolution and norm are ``downsample.{0,1}`` here and ``downsample.{1,2}`` there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

#: Depth -> whether its blocks are bottlenecks, and their number in each stage.
ARCHITECTURES = {
    18: (False, (2, 2, 2, 2)),
    34: (False, (3, 4, 6, 3)),
    50: (True, (3, 4, 6, 3)),
    101: (True, (3, 4, 23, 3)),
    152: (True, (3, 8, 36, 3)),
}

#: Each CARAFE++ has one parameter whose name ends so.
CARAFE_KEY = "content_encoder.weight"

_BLOCK = re.compile(r"layer(\d+)\.(\d+)\.")
_DEEP_STEM = re.compile(r"stem\.(\d+)\.([a-z]\w*)\.(.+)")
_SHORTCUT = re.compile(r"(layer\d+\.0\.downsample)\.(\d+)\.(.+)")


class CheckpointMismatch(ValueError):
    """A checkpoint is of another backbone than the one that loads it; the message names both."""


def matching_depths(state_dict: Mapping[str, Tensor], prefix: str = "") -> tuple[int, ...]:
    """The depths of :data:`ARCHITECTURES` whose blocks ``state_dict`` has, in as many stages as it has.

    ``prefix`` is what the names of the backbone's parameters start with; of another network there are none.

    Example:
        >>> import torch
        >>> keys = [f"layer{stage}.{block}.conv1.weight" for stage in (1, 2, 3, 4) for block in (0, 1)]
        >>> matching_depths(dict.fromkeys(keys, torch.zeros(())))
        (18,)
    """
    names = [key[len(prefix) :] for key in state_dict if key.startswith(prefix)]
    blocks: dict[int, int] = {}
    for found in filter(None, map(_BLOCK.match, names)):
        stage, block = map(int, found.groups())
        blocks[stage] = max(blocks.get(stage, 0), block + 1)
    counts = tuple(blocks[stage] for stage in sorted(blocks))
    if not counts or sorted(blocks) != list(range(1, len(blocks) + 1)):
        return ()
    bottleneck = any(re.match(r"layer\d+\.\d+\.conv3\.", name) for name in names)
    return tuple(
        depth
        for depth, (bottlenecks, stages) in ARCHITECTURES.items()
        if bottleneck == bottlenecks and stages[: len(counts)] == counts
    )


def count_carafe(state_dict: Mapping[str, Tensor]) -> int:
    """How many CARAFE++ modules ``state_dict`` holds parameters of."""
    return sum(key.endswith(CARAFE_KEY) for key in state_dict)


def backbone_type(backbone: Mapping[str, Tensor]) -> str:
    """The class of this package that a backbone from :func:`extract_backbone` belongs to.

    Example:
        >>> import torch
        >>> weight = torch.zeros(8, 8, 3, 3)
        >>> backbone_type({"stem.0.weight": weight, "layer1.0.conv2.weight": weight})
        'CARAFEResNetV1c'
    """
    weight = backbone.get("layer1.0.conv2.weight")
    if weight is not None and weight.shape[0] != weight.shape[1]:
        return "CARAFEResNeXt"  # grouped: fewer channels in
    if "stem.0.weight" not in backbone:
        return "CARAFEResNet"
    pooled = any((found := _SHORTCUT.fullmatch(key)) and found[2] == "2" for key in backbone)
    return "CARAFEResNetV1d" if pooled else "CARAFEResNetV1c"


def extract_backbone(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone of an MMPretrain checkpoint under the names of MMDetection and MMSegmentation.

    The same tensors without the prefix ``"backbone."``, as a backbone's ``init_cfg=dict(type="Pretrained", ...)``
    expects them.

    Raises:
        ValueError: no parameter starts with ``"backbone."``, or they are not a ResNet's in MMPretrain.

    Example:
        >>> import torch
        >>> weight = torch.zeros(8, 3, 3, 3)
        >>> list(extract_backbone({"backbone.layer1.0.conv1.weight": weight, "backbone.stem.1.conv.weight": weight}))
        ['layer1.0.conv1.weight', 'stem.3.weight']
    """
    prefix = "backbone."
    backbone = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
    if not backbone:
        some = ", ".join(list(state_dict)[:3]) or "none at all"
        raise ValueError(f"no parameter starts with {prefix!r}, as those of MMPretrain's models do; found {some}, ...")
    if "layer1.0.conv1.weight" not in backbone:
        some = ", ".join(list(backbone)[:3])
        raise ValueError(f"the backbone is not a ResNet: it has no layer1.0.conv1.weight; found {some}, ...")
    if "stem.0.weight" in backbone:
        raise ValueError("the deep stem is not MMPretrain's (stem.0.conv.weight): it has stem.0.weight")
    shift = _stages_without_pooling(backbone)
    return {_rename(key, shift): value for key, value in backbone.items()}


def _stages_without_pooling(backbone: Mapping[str, Tensor]) -> set[str]:
    """The shortcuts without pooling of a net that has it in others (``avg_down``)."""
    convolutions = [
        found.group(1, 2)
        for key, value in backbone.items()
        if (found := _SHORTCUT.fullmatch(key)) and found[3] == "weight" and value.dim() == 4
    ]
    pooled = any(index == "1" for _, index in convolutions)  # others start with their convolution
    return {name for name, index in convolutions if pooled and index == "0"}


def _rename(key: str, shift: set[str]) -> str:
    if found := _DEEP_STEM.fullmatch(key):
        unit, layer, rest = found.groups()  # convolution, norm, activation: three places for each unit
        return f"stem.{3 * int(unit) + (layer != 'conv')}.{rest}"
    if (found := _SHORTCUT.fullmatch(key)) and found[1] in shift:
        return f"{found[1]}.{int(found[2]) + 1}.{found[3]}"
    return key
