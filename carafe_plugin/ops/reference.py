"""The definition of the operator in PyTorch: the specification that C++ and CUDA are checked against.

Two words for kernels: *logits* are what the content encoder puts out, (N, G * k^2 * up^2, H'', W''), and *masks* are
the normalised kernels in the layout of the output, (N, G * k^2, H', W'); :func:`masks_from_logits` leads from one to
the other (pixel shuffle, kernel normaliser).

For a scale of ``up / down`` (coprime), an output location ``(i', j')`` is reassembled from the ``k x k``
neighbourhood of the source location ``(floor(i' * down / up), floor(j' * down / up))`` (eq. 3 of the paper, for both
directions and every rational scale between them). The operator is bilinear in the features and the masks, so with
``Z`` a gradient of its output the three functions below are the three partial derivatives of one trilinear form

    T(X, M, Z) = sum over outputs and taps of  Z[n, c, i', j'] * M[n, g(c) k^2 + tap, i', j'] * X[n, c, i + u, j + v]

and every derivative of any order is again one of the three. Fewer outputs than there are, the first rows and columns,
are a sum over these: where masks or a gradient of the output tell the size, it may be any up to the whole output's.

All of them accumulate in float32 (float64 for float64) and return the dtype of their first argument.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._tracing import as_one_node

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
#: The kernel normalisers (Sec. 3.2; the alternatives to the softmax are those of Table 14).
NORMALIZERS = ("softmax", "sigmoid", "sigmoid_normalized")
NONE = 0  #: the number of the normaliser of masks; that of another is one more than its place in the above

is_compiling = getattr(torch.compiler, "is_compiling", torch._utils.is_compiling)  # the first came after torch 2.1


def output_size(size: int, up: int, down: int) -> int:
    """Length of an axis of ``size`` elements after scaling by ``up / down``: ``ceil(size * up / down)``."""
    return -(-size * up // down)


def source_index(outputs: int, up: int, down: int, device: torch.device) -> Tensor:
    """Source index ``floor(i' * down / up)`` of each of the first ``outputs`` output indices ``i'`` along an axis."""
    return torch.arange(outputs, device=device) * down // up


def _by_group(maps: Tensor, group_size: int) -> Tensor:
    """(N, C, H, W) -> (N, G, C / G, H, W) in the accumulation dtype."""
    dtype = torch.float64 if maps.dtype == torch.float64 else torch.float32
    return maps.to(dtype).unflatten(1, (group_size, maps.shape[1] // group_size))


def _windows(
    features: Tensor, outputs: Sequence[int], kernel_size: int, group_size: int, up: int, down: int
) -> Iterator[Tensor]:
    """What each of the k^2 taps reads, for ``outputs`` (H', W'): (N, G, C / G, H', W')."""
    rows, columns = (source_index(length, up, down, features.device) for length in outputs)
    padded = F.pad(_by_group(features, group_size), [kernel_size // 2] * 4)
    for u in range(kernel_size):
        for v in range(kernel_size):
            yield padded.index_select(-2, rows + u).index_select(-1, columns + v)


def reassemble(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, up: int, down: int) -> Tensor:
    """Content-aware reassembly, eq. 3: features (N, C, H, W), masks (N, G * k^2, H', W') -> (N, C, H', W')."""
    weights = _by_group(masks, group_size).unsqueeze(3)
    output = weights.new_zeros(())
    for tap, window in enumerate(_windows(features, masks.shape[2:], kernel_size, group_size, up, down)):
        output = output + weights[:, :, tap] * window
    return output.reshape(*features.shape[:2], *masks.shape[2:]).to(features.dtype)


def grad_features(
    grad_output: Tensor, masks: Tensor, height: int, width: int, kernel_size: int, group_size: int, up: int, down: int
) -> Tensor:
    """dT/dX: the gradient with respect to features of size ``height x width``, (N, C, H, W)."""
    radius = kernel_size // 2
    rows, columns = (source_index(length, up, down, grad_output.device) for length in grad_output.shape[2:])
    grad, weights = _by_group(grad_output, group_size), _by_group(masks, group_size).unsqueeze(3)
    padded = grad.new_zeros(*grad.shape[:3], height + 2 * radius, width + 2 * radius)
    for u in range(kernel_size):
        row_sums = grad.new_zeros(*grad.shape[:4], width + 2 * radius)
        for v in range(kernel_size):
            row_sums = row_sums.index_add(-1, columns + v, weights[:, :, u * kernel_size + v] * grad)
        padded = padded.index_add(-2, rows + u, row_sums)
    inner = padded[..., radius : radius + height, radius : radius + width]
    return inner.reshape(*grad_output.shape[:2], height, width).to(grad_output.dtype)


def grad_masks(grad_output: Tensor, features: Tensor, kernel_size: int, group_size: int, up: int, down: int) -> Tensor:
    """dT/dM: the gradient with respect to the masks, (N, G * k^2, H', W')."""
    grad = _by_group(grad_output, group_size)
    windows = _windows(features, grad.shape[3:], kernel_size, group_size, up, down)
    sums = torch.stack([(grad * window).sum(2) for window in windows], dim=2)
    return sums.flatten(1, 2).to(grad_output.dtype)


def normalize_kernels(logits: Tensor, kernel_size: int, group_size: int, normalizer: str) -> Tensor:
    """The kernel normaliser: each ``k x k`` kernel on its own.

    Args:
        logits (Tensor[N, G * k^2, H, W]): the content encoder's output after the pixel shuffle, group-major.
        kernel_size (int): ``k``.
        group_size (int): ``G``.
        normalizer (str): 'softmax', 'sigmoid', or 'sigmoid_normalized' (the sigmoid divided by its sum).

    Returns:
        Tensor[N, G * k^2, H, W]: the dtype of ``logits``.
    """
    if normalizer == "sigmoid":
        return logits.sigmoid()
    kernels = logits.unflatten(1, (group_size, kernel_size**2))
    if normalizer == "sigmoid_normalized":
        # sigmoid(x) / sum(sigmoid(x)) is softmax(log(sigmoid(x))), which stays right where every sigmoid underflows.
        kernels = F.logsigmoid(kernels)
    # The explicit dtype keeps autocast from making a float32 copy of the largest tensor here.
    return kernels.softmax(dim=2, dtype=kernels.dtype).reshape(logits.shape)


def crop(maps: Tensor, size: Sequence[int] | None) -> Tensor:
    """The first rows and columns of maps, ``size`` of them; all for None."""
    if size is None:
        return maps
    if not is_compiling():
        return maps[..., : size[0], : size[1]]
    # Whether a view is contiguous depends on the size, which then a compiler would have to fix.
    rows, columns = (torch.arange(length, device=maps.device) for length in size)
    return maps.index_select(-2, rows).index_select(-1, columns)


def shuffle_logits(logits: Tensor, up: int, down: int) -> Tensor:
    """The logits of every output location: ``F.pixel_shuffle`` by ``up``, of which every ``down``-th location is kept.

    Where ``up`` is 1 the content encoder's stride has done that already.
    """
    if up == 1:
        return logits
    if 0 not in logits.shape:
        logits = F.pixel_shuffle(logits, up)
    else:  # the backward pass of F.pixel_shuffle fails on an empty map (torch 2.11), and no RoIs is a usual case
        n, channels, h, w = logits.shape
        phases = logits.reshape(n, channels // up**2, up, up, h, w).permute(0, 1, 4, 2, 5, 3)
        logits = phases.reshape(n, channels // up**2, h * up, w * up)
    return logits[..., ::down, ::down] if down > 1 else logits


@as_one_node
def masks_from_logits(logits: Tensor, k: int, g: int, up: int, down: int, normalizer: str) -> Tensor:
    """The normalised kernels, (N, G * k^2, H', W'), that the content encoder's raw output stands for."""
    return normalize_kernels(shuffle_logits(logits, up, down), k, g, normalizer)


def _product_of_jacobian(masks: Tensor, direction: Tensor, k: int, g: int, normalizer: str) -> Tensor:
    """The Jacobian of the softmax, or of the sigmoid, times a direction; both are symmetric."""
    if normalizer == "sigmoid":
        return masks * (1 - masks) * direction
    kernels, directions = (maps.unflatten(1, (g, k**2)) for maps in (masks, direction))
    return (kernels * (directions - (kernels * directions).sum(dim=2, keepdim=True))).reshape(masks.shape)


def tangent_of_masks(tangent: Tensor, logits: Tensor, k: int, g: int, up: int, down: int, normalizer: str) -> Tensor:
    """The derivative of :func:`masks_from_logits` in the direction ``tangent``, which has the shape of ``logits``."""
    logits, tangent = shuffle_logits(logits, up, down), shuffle_logits(tangent, up, down)
    masks = normalize_kernels(logits, k, g, normalizer)
    if normalizer == "sigmoid_normalized":
        tangent = tangent * (-logits).sigmoid()
    return _product_of_jacobian(masks, tangent, k, g, normalizer)


def grad_logits(grad_masks: Tensor, logits: Tensor, k: int, g: int, up: int, normalizer: str) -> Tensor:
    """From the gradient to the masks to that to the logits, for scales that are integers or their reciprocals.

    Where there is no gradient to masks, at the bottom and right, it is zero.
    """
    logits = shuffle_logits(logits, up, 1)
    masks = normalize_kernels(logits, k, g, normalizer)
    grad = _product_of_jacobian(masks, _completed(grad_masks, masks), k, g, normalizer)
    return _unshuffle(grad * (-logits).sigmoid() if normalizer == "sigmoid_normalized" else grad, up)


def curvature_of_masks(
    direction: Tensor, grad_masks: Tensor, logits: Tensor, k: int, g: int, up: int, normalizer: str
) -> Tensor:
    """The derivative of :func:`grad_logits` with respect to the logits in a direction, which has their shape."""
    logits, direction = shuffle_logits(logits, up, 1), shuffle_logits(direction, up, 1)
    masks = normalize_kernels(logits, k, g, normalizer)
    grad_masks = _completed(grad_masks, masks)
    if normalizer == "sigmoid":
        return _unshuffle(masks * (1 - masks) * (1 - 2 * masks) * direction * grad_masks, up)
    slope = (-logits).sigmoid() if normalizer == "sigmoid_normalized" else torch.ones_like(logits)  # of log(sigmoid)
    kernels, grads, directions = (maps.unflatten(1, (g, k**2)) for maps in (masks, grad_masks, direction * slope))
    mean_grad, mean_direction = ((kernels * maps).sum(dim=2, keepdim=True) for maps in (grads, directions))
    inner = (grads * (directions - mean_direction) - directions * mean_grad).reshape(masks.shape)
    result = _product_of_jacobian(masks, inner, k, g, normalizer) * slope
    if normalizer == "sigmoid_normalized":
        result = result - direction * slope * (1 - slope) * (kernels * (grads - mean_grad)).reshape(masks.shape)
    return _unshuffle(result, up)


def _completed(maps: Tensor, like: Tensor) -> Tensor:
    """With zeros at the bottom and right up to the size of another map."""
    return F.pad(maps, (0, like.shape[-1] - maps.shape[-1], 0, like.shape[-2] - maps.shape[-2]))


def _unshuffle(maps: Tensor, up: int) -> Tensor:
    """``F.pixel_unshuffle``, for empty batches too."""
    n, channels, h, w = maps.shape
    phases = maps.reshape(n, channels, h // up, up, w // up, up).permute(0, 1, 3, 5, 2, 4)
    return phases.reshape(n, channels * up**2, h // up, w // up)
