"""From the content encoder's raw output to the rescaled map: pixel shuffle, kernel normaliser and reassembly.

:func:`normalize_kernels` and :func:`kernels_from_logits` are the definition. Compiled operators do all three steps in
one pass: neither the shuffled nor the normalised kernels ever lie in memory, and autograd keeps the features and the
raw output alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _registration
from ._fallback import autocast_enabled
from .functional import reassemble

NORMALIZERS = ("softmax", "sigmoid", "sigmoid_normalized")
OPERATORS = ("_carafe_logits", "_carafe_logits_grad_features", "_carafe_logits_grad_logits")
_MAX_SCALE = {"cpu": 64, "cuda": 8}  # of the compiled operators
_MAX_WEIGHTS = 512  # of a pixel, on CUDA: of a block's few pixels they must fit into its shared memory
_library: Any = None  # torch.library.Library: registrations last as long as it does


def normalize_kernels(logits: Tensor, kernel_size: int, group_size: int, normalizer: str) -> Tensor:
    """The kernel normaliser: each ``k x k`` kernel on its own (Sec. 3.2; the alternatives are those of Table 14).

    Args:
        logits (Tensor[N, G * k^2, H, W]): the content encoder's output, group-major.
        kernel_size (int): ``k``.
        group_size (int): ``G``.
        normalizer (str): 'softmax', 'sigmoid', or 'sigmoid_normalized' (the sigmoid divided by its sum).

    Returns:
        Tensor[N, G * k^2, H, W]: the dtype of ``logits``.
    """
    n, _, h, w = logits.shape
    if normalizer == "sigmoid":
        return logits.sigmoid()
    kernels = logits.reshape(n, group_size, kernel_size**2, h, w)
    if normalizer == "sigmoid_normalized":
        # sigmoid(x) / sum(sigmoid(x)) is softmax(log(sigmoid(x))), which stays right where every sigmoid underflows.
        kernels = F.logsigmoid(kernels)
    # The explicit dtype keeps autocast from making a float32 copy of the largest tensor here.
    return kernels.softmax(dim=2, dtype=kernels.dtype).reshape(logits.shape)


def shuffle_logits(logits: Tensor, up: int, down: int) -> Tensor:
    """The logits of every output location: ``F.pixel_shuffle`` by ``up``, of which every ``down``-th location is kept.

    Where ``up`` is 1 the content encoder's stride has done that already.
    """
    if up == 1:
        return logits
    if logits.shape[0] > 0:
        logits = F.pixel_shuffle(logits, up)
    else:  # the backward pass of F.pixel_shuffle fails on an empty batch (torch 2.11), and no RoIs is a usual case
        n, channels, h, w = logits.shape
        phases = logits.reshape(n, channels // up**2, up, up, h, w).permute(0, 1, 4, 2, 5, 3)
        logits = phases.reshape(n, channels // up**2, h * up, w * up)
    return logits[..., ::down, ::down] if down > 1 else logits


def kernels_from_logits(logits: Tensor, k: int, g: int, up: int, down: int, normalizer: str) -> Tensor:
    """The normalised kernels, (N, G * k^2, H', W'), that the content encoder's raw output stands for."""
    return normalize_kernels(shuffle_logits(logits, up, down), k, g, normalizer)


def reassemble_logits(features: Tensor, logits: Tensor, k: int, g: int, up: int, down: int, normalizer: str) -> Tensor:
    """Features rescaled by the kernels that ``logits`` stand for, in one pass where that is compiled.

    Args:
        features (Tensor[N, C, H, W]): as for :func:`carafe_plugin.ops.carafe`.
        logits (Tensor[N, G * k^2 * up^2, H'', W'']): the content encoder's output; ``(H'', W'')`` is ``(H, W)`` where
            ``up > 1`` and ``(ceil(H / down), ceil(W / down))`` where ``up`` is 1.
        k (int): size of the reassembly kernels.
        g (int): ``G``, groups of channels.
        up (int): with ``down``, the scale.
        down (int): see ``up``.
        normalizer (str): one of ``NORMALIZERS``.

    Returns:
        Tensor[N, C, H', W'].
    """
    if _fused(features, logits, k, up, down):
        how = NORMALIZERS.index(normalizer)
        return torch.ops.carafe_plugin._carafe_logits.default(features, logits, k, g, up, down, how)
    return reassemble(features, kernels_from_logits(logits, k, g, up, down, normalizer), k, g, up, down)


def _fused(features: Tensor, logits: Tensor, k: int, up: int, down: int) -> bool:
    device_type, scale = features.device.type, max(up, down)
    return (
        device_type in _MAX_SCALE
        and _registration.is_compiled(device_type)
        and min(up, down) == 1
        and scale <= _MAX_SCALE[device_type]
        and (device_type == "cpu" or (k * scale) ** 2 <= _MAX_WEIGHTS)
        and (features.dtype == logits.dtype or autocast_enabled(device_type))
    )


# -------------------------------------------------------------------------------------------- the compiled operators


def _logits_fake(features: Tensor, logits: Tensor, k: int, g: int, up: int, down: int, how: int) -> Tensor:
    return _registration._carafe_fake(features, logits, k, g, up, down)


def _logits_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    features, logits = ctx.saved_tensors
    ops, wanted, size = torch.ops.carafe_plugin, ctx.needs_input_grad, features.shape[-2:]
    dx = ops._carafe_logits_grad_features.default(grad_output, logits, *size, *ctx.geometry) if wanted[0] else None
    dz = ops._carafe_logits_grad_logits.default(grad_output, features, logits, *ctx.geometry) if wanted[1] else None
    return (dx, dz, *[None] * 5)


def _grad_features_fake(
    grad_output: Tensor, logits: Tensor, height: int, width: int, k: int, g: int, up: int, down: int, how: int
) -> Tensor:
    return _registration._grad_features_fake(grad_output, logits, height, width, k, g, up, down)


def _grad_features_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    # Linear in the features: <cotangent, grad_features(g)> is <reassemble(cotangent), g>.
    grad_output, logits = ctx.saved_tensors
    ops, wanted = torch.ops.carafe_plugin, ctx.needs_input_grad
    dg = ops._carafe_logits.default(cotangent, logits, *ctx.geometry) if wanted[0] else None
    dz = ops._carafe_logits_grad_logits.default(grad_output, cotangent, logits, *ctx.geometry) if wanted[1] else None
    return (dg, dz, *[None] * 7)


def _grad_logits_fake(
    grad_output: Tensor, features: Tensor, logits: Tensor, k: int, g: int, up: int, down: int, how: int
) -> Tensor:
    return _registration._empty_like_map(logits, tuple(logits.shape))


def _grad_logits_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    # Not linear in the logits: PyTorch differentiates the definition. Rarely asked for (second derivatives).
    k, g, up, down, how = ctx.geometry
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases, so that only what this operator itself depends on is differentiated; with create_graph they stay
        # joined to the graph of the originals.
        saved = [
            tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()
            for tensor in ctx.saved_tensors
        ]
        grad_output, features, logits = saved
        kernels = kernels_from_logits(logits, k, g, up, down, NORMALIZERS[how])
        masks_grad = torch.ops.carafe_plugin._carafe_grad_masks.default(grad_output, features, k, g, up, down)
        (value,) = torch.autograd.grad(kernels, logits, masks_grad, create_graph=True)
        wanted = [tensor for tensor, asked in zip(saved, ctx.needs_input_grad, strict=False) if asked]
        found = iter(torch.autograd.grad(value, wanted, cotangent, create_graph=differentiable, allow_unused=True))
    grads = [next(found) if asked else None for asked in ctx.needs_input_grad[:3]]
    return (*grads, *[None] * 5)


def _register() -> None:
    global _library
    _library = torch.library.Library("carafe_plugin", "IMPL")
    fakes = (_logits_fake, _grad_features_fake, _grad_logits_fake)
    backwards = (_logits_backward, _grad_features_backward, _grad_logits_backward)
    _registration.register(_library, OPERATORS, fakes, backwards, ("cpu", "cuda"))


if _registration.is_compiled("cpu"):
    _register()
