"""The derivatives of the operators, in reverse and in forward mode, by the operators themselves.

Of each operator, from its tensors and its geometry (k, G, up, down, normaliser): the gradients to those of its tensors
that are wanted, and the terms of its output's tangent. All but the kernel normaliser is linear in each tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference

NORMALIZERS = ("none", *reference.NORMALIZERS)  #: by number; csrc/common/operators.h has the same
NONE = 0  #: the normaliser of masks
Geometry = tuple[int, ...]
Gradients = tuple["Tensor | None", ...]
Tangents = Sequence["Tensor | None"]


def call(name: str, *arguments: Any) -> Tensor:
    """Call an operator of this package through the dispatcher."""
    return getattr(torch.ops.carafe_plugin, name).default(*arguments)


def carafe_backward(grad: Tensor, tensors: Sequence[Tensor], geometry: Geometry, wanted: Sequence[bool]) -> Gradients:
    """Of ``carafe``."""
    features, kernels = tensors
    size = features.shape[2:]
    return (
        call("_carafe_grad_features", grad, kernels, *size, *geometry) if wanted[0] else None,
        call("_carafe_grad_kernels", grad, features, kernels, *geometry) if wanted[1] else None,
    )


def grad_features_backward(
    grad: Tensor, tensors: Sequence[Tensor], geometry: Geometry, wanted: Sequence[bool]
) -> Gradients:
    """Of ``_carafe_grad_features``: <grad, grad_features(z)> is <carafe(grad), z>."""
    grad_output, kernels = tensors
    return (
        call("carafe", grad, kernels, *geometry) if wanted[0] else None,
        call("_carafe_grad_kernels", grad_output, grad, kernels, *geometry) if wanted[1] else None,
    )


def grad_kernels_backward(
    grad: Tensor, tensors: Sequence[Tensor], geometry: Geometry, wanted: Sequence[bool]
) -> Gradients:
    """Of ``_carafe_grad_kernels``."""
    grad_output, features, kernels = tensors
    direction = _tangent_of_masks(grad, kernels, geometry) if wanted[0] or wanted[1] else grad
    masks_geometry = (*geometry[:4], NONE)
    size = features.shape[2:]
    return (
        call("carafe", features, direction, *masks_geometry) if wanted[0] else None,
        call("_carafe_grad_features", grad_output, direction, *size, *masks_geometry) if wanted[1] else None,
        _curvature(grad, tensors, geometry) if wanted[2] else None,
    )


def _curvature(direction: Tensor, tensors: Sequence[Tensor], geometry: Geometry) -> Tensor | None:
    """The derivative of ``_carafe_grad_kernels`` with respect to its kernels in a direction; it is symmetric."""
    grad_output, features, kernels = tensors
    k, g, up, down, normalizer = geometry
    if normalizer == NONE:
        return None
    name = NORMALIZERS[normalizer]
    masks = reference.shuffle_logits(kernels, up, down)  # their size alone matters
    grad_masks = call("_carafe_grad_kernels", grad_output, features, masks, k, g, up, down, NONE)
    return reference.curvature_of_masks(direction, grad_masks, kernels, k, g, up, name)


def _tangent_of_masks(tangent: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    k, g, up, down, normalizer = geometry
    if normalizer == NONE:
        return tangent
    return reference.tangent_of_masks(tangent, kernels, k, g, up, down, NORMALIZERS[normalizer])


def carafe_tangent(tensors: Sequence[Tensor], tangents: Tangents, geometry: Geometry) -> Iterator[Tensor]:
    """Of ``carafe``."""
    features, kernels = tensors
    if tangents[0] is not None:
        yield call("carafe", tangents[0], kernels, *geometry)
    if tangents[1] is not None:
        tangent = _tangent_of_masks(tangents[1], kernels, geometry)
        yield call("carafe", features, tangent, *geometry[:4], NONE)


def grad_features_tangent(
    tensors: Sequence[Tensor], tangents: Tangents, geometry: Geometry, *size: int
) -> Iterator[Tensor]:
    """Of ``_carafe_grad_features``."""
    grad_output, kernels = tensors
    if tangents[0] is not None:
        yield call("_carafe_grad_features", tangents[0], kernels, *size, *geometry)
    if tangents[1] is not None:
        tangent = _tangent_of_masks(tangents[1], kernels, geometry)
        yield call("_carafe_grad_features", grad_output, tangent, *size, *geometry[:4], NONE)


def grad_kernels_tangent(tensors: Sequence[Tensor], tangents: Tangents, geometry: Geometry) -> Iterator[Tensor]:
    """Of ``_carafe_grad_kernels``."""
    grad_output, features, kernels = tensors
    if tangents[0] is not None:
        yield call("_carafe_grad_kernels", tangents[0], features, kernels, *geometry)
    if tangents[1] is not None:
        yield call("_carafe_grad_kernels", grad_output, tangents[1], kernels, *geometry)
    if tangents[2] is not None:
        term = _curvature(tangents[2], tensors, geometry)
        yield torch.zeros_like(kernels) if term is None else term
