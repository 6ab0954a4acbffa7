"""The definition of the operator in PyTorch: the specification that C++ and CUDA are checked against.

For a scale of ``up / down`` (coprime), an output location ``(i', j')`` is reassembled from the ``k x k``
neighbourhood of the source location ``(floor(i' * down / up), floor(j' * down / up))`` (eq. 3 of the paper, for both
directions and every rational scale between them). The operator is bilinear in the features and the masks, so with
``Z`` a cotangent of its output the three functions below are the three partial derivatives of one trilinear form

    T(X, M, Z) = sum over outputs and taps of  Z[n, c, i', j'] * M[n, g(c) k^2 + tap, i', j'] * X[n, c, i + u, j + v]

and every derivative of any order is again one of the three.

All of them accumulate in float32 (float64 for float64) and return the dtype of their first argument.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def output_size(size: int, up: int, down: int) -> int:
    """Length of an axis of ``size`` elements after scaling by ``up / down``: ``ceil(size * up / down)``."""
    return -(-size * up // down)


def source_index(size: int, up: int, down: int, device: torch.device) -> Tensor:
    """Source index ``floor(i' * down / up)`` of every output index ``i'`` along an axis of ``size`` elements."""
    return torch.arange(output_size(size, up, down), device=device) * down // up


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _masks_by_tap(masks: Tensor, kernel_size: int, group_size: int) -> Tensor:
    """(N, G * k^2, H', W') -> (k^2, N, G, 1, H', W') in the accumulation dtype."""
    n, _, h_out, w_out = masks.shape
    taps = masks.to(_accumulation_dtype(masks.dtype)).reshape(n, group_size, 1, kernel_size**2, h_out, w_out)
    return taps.permute(3, 0, 1, 2, 4, 5)


def _grouped(maps: Tensor, group_size: int) -> Tensor:
    """(N, C, H, W) -> (N, G, C / G, H, W) in the accumulation dtype."""
    n, c, h, w = maps.shape
    return maps.to(_accumulation_dtype(maps.dtype)).reshape(n, group_size, c // group_size, h, w)


def reassemble(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, up: int, down: int) -> Tensor:
    """Content-aware reassembly, eq. 3: features (N, C, H, W), masks (N, G * k^2, H', W') -> (N, C, H', W')."""
    n, c, h, w = features.shape
    radius = kernel_size // 2
    rows = source_index(h, up, down, features.device)
    columns = source_index(w, up, down, features.device)
    padded = F.pad(_grouped(features, group_size), [radius] * 4)
    output = padded.new_zeros(n, group_size, c // group_size, len(rows), len(columns))
    for tap, weights in enumerate(_masks_by_tap(masks, kernel_size, group_size)):
        u, v = divmod(tap, kernel_size)
        output = output + weights * padded.index_select(-2, rows + u).index_select(-1, columns + v)
    return output.reshape(n, c, len(rows), len(columns)).to(features.dtype)


def grad_features(
    grad_output: Tensor, masks: Tensor, height: int, width: int, kernel_size: int, group_size: int, up: int, down: int
) -> Tensor:
    """dT/dX: the gradient with respect to features of size ``height x width``, (N, C, H, W)."""
    n, c, h_out, _ = grad_output.shape
    radius = kernel_size // 2
    rows = source_index(height, up, down, grad_output.device)
    columns = source_index(width, up, down, grad_output.device)
    cotangent = _grouped(grad_output, group_size)
    weights = _masks_by_tap(masks, kernel_size, group_size)
    lead = (n, group_size, c // group_size)
    padded = cotangent.new_zeros(*lead, height + 2 * radius, width + 2 * radius)
    for u in range(kernel_size):
        row_sums = cotangent.new_zeros(*lead, h_out, width + 2 * radius)
        for v in range(kernel_size):
            row_sums = row_sums.index_add(-1, columns + v, weights[u * kernel_size + v] * cotangent)
        padded = padded.index_add(-2, rows + u, row_sums)
    inner = padded[..., radius : radius + height, radius : radius + width]
    return inner.reshape(n, c, height, width).to(grad_output.dtype)


def grad_masks(grad_output: Tensor, features: Tensor, kernel_size: int, group_size: int, up: int, down: int) -> Tensor:
    """dT/dM: the gradient with respect to the masks, (N, G * k^2, H', W')."""
    n, _, h, w = features.shape
    radius = kernel_size // 2
    rows = source_index(h, up, down, features.device)
    columns = source_index(w, up, down, features.device)
    padded = F.pad(_grouped(features, group_size), [radius] * 4)
    cotangent = _grouped(grad_output, group_size)
    taps = [
        (cotangent * padded.index_select(-2, rows + u).index_select(-1, columns + v)).sum(2)
        for u in range(kernel_size)
        for v in range(kernel_size)
    ]
    grad = torch.stack(taps, dim=2)
    return grad.reshape(n, group_size * kernel_size**2, len(rows), len(columns)).to(grad_output.dtype)
