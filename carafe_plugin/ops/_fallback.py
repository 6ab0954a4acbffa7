"""What serves where the compiled operators do not: other devices, torch older than 2.10, no compiler.

The reference as autograd Functions, so that nothing ``k ** 2`` times larger than a map is kept for the backward pass,
closed under differentiation as the registered operators are. On CUDA, mmcv's own operator takes over where it is
installed and known to be right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for a device type; the spelling changed in torch 2.4."""
    try:
        return torch.is_autocast_enabled(device_type)
    except RuntimeError:  # a device without autocast, such as meta
        return False
    except TypeError:
        return torch.is_autocast_cpu_enabled() if device_type == "cpu" else torch.is_autocast_enabled()


def autocast_dtype(device_type: str) -> torch.dtype:
    """The dtype that autocast computes in on a device type."""
    if hasattr(torch, "get_autocast_dtype"):
        return torch.get_autocast_dtype(device_type)
    return torch.get_autocast_cpu_dtype() if device_type == "cpu" else torch.get_autocast_gpu_dtype()


def autocast_all(tensors: Sequence[Tensor], device_type: str) -> list[Tensor]:
    """The tensors in autocast's dtype; float64 in one of them keeps all in float64, as torch's own rules do."""
    dtype = autocast_dtype(device_type)
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        dtype = torch.float64
    return [tensor.to(dtype) for tensor in tensors]


def _announce(operator: str, *arguments: Any) -> None:
    """Tell torch's FLOP counters, which see no operator of this package here, what is about to be computed."""
    if hasattr(torch.compiler, "is_compiling") and torch.compiler.is_compiling():
        return
    from .flops import announce  # flops itself builds on the registration, and that on this module

    announce(operator, *arguments)


class _Reassemble(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, masks: Tensor, *geometry: int) -> Tensor:
        ctx.save_for_backward(features, masks)
        ctx.geometry = geometry
        _announce("carafe", features, masks, *geometry)
        return _like(reference.reassemble(features, masks, *geometry), features)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        features, masks = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        size = features.shape[-2:]
        dx = _GradFeatures.apply(grad_output, masks, *size, *ctx.geometry) if wanted[0] else None
        dm = _GradMasks.apply(grad_output, features, *ctx.geometry) if wanted[1] else None
        return (dx, dm, *[None] * 4)


class _GradFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad_output: Tensor, masks: Tensor, height: int, width: int, *geometry: int) -> Tensor:
        ctx.save_for_backward(grad_output, masks)
        ctx.geometry = geometry
        _announce("_carafe_grad_features", grad_output, masks, height, width, *geometry)
        return _like(reference.grad_features(grad_output, masks, height, width, *geometry), grad_output)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        grad_output, masks = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        dz = _Reassemble.apply(cotangent, masks, *ctx.geometry) if wanted[0] else None
        dm = _GradMasks.apply(grad_output, cotangent, *ctx.geometry) if wanted[1] else None
        return (dz, dm, *[None] * 6)


class _GradMasks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad_output: Tensor, features: Tensor, *geometry: int) -> Tensor:
        ctx.save_for_backward(grad_output, features)
        ctx.geometry = geometry
        _announce("_carafe_grad_masks", grad_output, features, *geometry)
        return reference.grad_masks(grad_output, features, *geometry)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        grad_output, features = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        dz = _Reassemble.apply(features, cotangent, *ctx.geometry) if wanted[0] else None
        size = features.shape[-2:]
        dx = _GradFeatures.apply(grad_output, cotangent, *size, *ctx.geometry) if wanted[1] else None
        return (dz, dx, *[None] * 4)


def _like(result: Tensor, source: Tensor) -> Tensor:
    """The result in the memory format of the map that it was computed from."""
    channels_last = is_channels_last(source)
    return result.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def is_channels_last(maps: Tensor) -> bool:
    """Whether results computed from ``maps`` are laid out channels_last (a map that is both counts as contiguous)."""
    return maps.is_contiguous(memory_format=torch.channels_last) and not maps.is_contiguous()


def reassemble(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, up: int, down: int) -> Tensor:
    """The operator by mmcv's CUDA kernel or the reference, autocast included."""
    device_type = features.device.type
    if autocast_enabled(device_type):
        features, masks = autocast_all((features, masks), device_type)
    if _mmcv_is_right(features, masks, kernel_size, group_size, down):
        return _MMCVReassemble.apply(features, masks, kernel_size, group_size, up, down)
    return _Reassemble.apply(features, masks, kernel_size, group_size, up, down)


# mmcv's backward kernel counts threads, 32 for each weight, in 32 bits.
_MMCV_MAX_WEIGHTS = (2**31 - 1) // 32


def _mmcv_is_right(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, down: int) -> bool:
    """The kernel of mmcv reads raw NCHW memory, knows integer upsampling only, and holds 384 weights a pixel."""
    if not features.is_cuda or down != 1 or group_size * kernel_size**2 > 384:
        return False
    if features.numel() == 0 or masks.numel() > _MMCV_MAX_WEIGHTS or features.dtype == torch.float64:
        return False
    if not (features.is_contiguous() and masks.is_contiguous()):
        return False
    try:
        from mmcv import _ext
        from mmcv.ops.carafe import CARAFEFunction  # noqa: F401
    except Exception:  # mmcv is absent, or its compiled part does not load: either way it cannot serve
        return False
    return not hasattr(_ext, "is_stand_in")  # that of mmcv_ops has no kernel: it calls this operator


class _MMCVReassemble(_Reassemble):
    """The operator of mmcv, in float32: its own sums are as short as its dtype."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, masks: Tensor, *geometry: int) -> Tensor:
        from mmcv.ops.carafe import CARAFEFunction

        kernel_size, group_size, up, _ = geometry
        _announce("carafe", features, masks, *geometry)
        with torch.enable_grad():
            inputs = tuple(t.detach().float().requires_grad_() for t in (features, masks))
            ctx.output = CARAFEFunction.apply(*inputs, kernel_size, group_size, up)
        ctx.inputs, ctx.geometry = inputs, geometry
        ctx.save_for_backward(features, masks)
        return ctx.output.detach().to(features.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # a second derivative is wanted, which mmcv disconnects without a word
            return _Reassemble.backward(ctx, grad_output)
        size = ctx.inputs[0].shape[-2:]
        _announce("_carafe_grad_features", grad_output, ctx.inputs[1], *size, *ctx.geometry)
        _announce("_carafe_grad_masks", grad_output, ctx.inputs[0], *ctx.geometry)
        grads = torch.autograd.grad(ctx.output, ctx.inputs, grad_output.float().contiguous(), retain_graph=True)
        return (*(grad.to(saved.dtype) for grad, saved in zip(grads, ctx.saved_tensors, strict=True)), *[None] * 4)
