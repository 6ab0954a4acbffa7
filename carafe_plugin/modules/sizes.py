"""Maps that fit together although their sizes are rounded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..ops._tracing import as_one_node, is_exporting
from ..ops.reference import crop, output_size


@as_one_node
def computed(features: Tensor, size: Sequence[int], up: int, down: int) -> list[int] | None:
    """The part of ``size`` that features scaled by ``up / down`` have; None, for all, where it is not known yet."""
    if _unknown(size, features):
        return None
    return _within(size, (output_size(length, up, down) for length in features.shape[2:]))


@as_one_node
def fit_to_size(features: Tensor, size: Sequence[int]) -> Tensor:
    """Crop (N, C, H, W) to ``size`` at the bottom and right, or complete it there by repeating the last row and column.

    Levels of a pyramid seldom differ by exactly two: twice ``ceil(H / 2)`` exceeds an odd ``H`` by one, and twice
    ``floor(H / 2)`` (backbones that round down) falls short by one. H and W must be at least 1.

    Example:
        >>> import torch
        >>> fit_to_size(torch.arange(4.).reshape(1, 1, 2, 2), (1, 3))
        tensor([[[[0., 1., 1.]]]])
    """
    if not _unknown(size, features):
        features = crop(features, _within(size, features.shape[2:]))
    return complete(features, size)


def _unknown(size: Sequence[int], features: Tensor) -> bool:
    """Whether the sizes are those of whoever will run an exported model: no comparison may decide anything."""
    return is_exporting() and any(type(length) is not int for length in (*size, *features.shape[2:]))


def _within(size: Sequence[int], whole: Iterable[int]) -> list[int]:
    # Not min(): a compiler with symbolic sizes would not see which of the two it is.
    return [length if length <= most else most for length, most in zip(size, whole, strict=True)]


@as_one_node
def complete(features: Tensor, size: Sequence[int]) -> Tensor:
    """Features no larger than ``size``, with the last row and column repeated until they have it."""
    if _unknown(size, features):
        for axis, length in zip((-2, -1), size, strict=True):
            places = torch.arange(length, device=features.device).clamp(max=features.shape[axis] - 1)
            features = features.index_select(axis, places)
        return features
    height, width = size
    # Repeating through expand, and not replication padding: the gradient of the latter is not deterministic on CUDA.
    if features.shape[-2] < height:
        last_row = features[..., -1:, :].expand(-1, -1, height - features.shape[-2], -1)
        features = torch.cat([features, last_row], dim=-2)
    if features.shape[-1] < width:
        last_column = features[..., -1:].expand(-1, -1, -1, width - features.shape[-1])
        features = torch.cat([features, last_column], dim=-1)
    return features


@as_one_node
def repeat_border(features: Tensor, width: int) -> Tensor:
    """Features with their outermost rows and columns repeated ``width`` times around them."""
    for axis in (-2, -1):
        sizes = list(features.shape)
        length, sizes[axis] = sizes[axis], width
        edges = (features.narrow(axis, place, 1).expand(sizes) for place in (0, length - 1))  # as in complete
        features = torch.cat([next(edges), features, next(edges)], axis)
    return features
