"""Loads the compiled operators and gives each its fake, autograd and autocast registration.

The C++ half defines the schemas and the CPU and CUDA kernels; what is here is Python because torch's stable ABI
covers neither autograd nor autocast.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._fallback import autocast_all, is_channels_last
from .reference import output_size

OPERATORS = ("carafe", "_carafe_grad_features", "_carafe_grad_masks")
_BACKEND_VARIABLE = "CARAFE_BACKEND"
_serving: set[str] = set()  # device types that the compiled operators serve
_library: Any = None  # torch.library.Library: registrations last as long as it does


def is_compiled(device_type: str = "cpu") -> bool:
    """Whether the compiled operators serve a device type; elsewhere the PyTorch reference does.

    Example:
        >>> from carafe_plugin.ops import is_compiled
        >>> is_compiled("mps")
        False
    """
    return device_type in _serving


def _load() -> None:
    backend = os.environ.get(_BACKEND_VARIABLE, "auto")
    if backend not in ("auto", "compiled", "reference"):
        raise ValueError(f"{_BACKEND_VARIABLE} must be 'auto', 'compiled' or 'reference', got {backend!r}")
    if backend == "reference":
        return
    try:
        importlib.import_module("carafe_plugin._C")
    except ImportError as error:
        if backend == "compiled":
            raise ImportError(f"{_BACKEND_VARIABLE}=compiled, but carafe_plugin._C does not load: {error}") from error
        warnings.warn(
            "carafe_plugin: the compiled operators do not load, so the slower PyTorch reference serves "
            f"({error}). {_BACKEND_VARIABLE}=reference says that this is intended.",
            stacklevel=3,
        )
        return
    _serving.add("cpu")
    try:
        importlib.import_module("carafe_plugin._C_cuda")
    except ImportError as error:
        if torch.cuda.is_available():
            warnings.warn(
                f"carafe_plugin: the CUDA operators do not load, so the PyTorch reference serves on CUDA ({error})",
                stacklevel=3,
            )
    else:
        _serving.add("cuda")
    _register()


# ---------------------------------------------------------------------------------------------------- carafe


def _carafe_fake(features: Tensor, masks: Tensor, k: int, g: int, up: int, down: int) -> Tensor:
    n, c, h, w = features.shape
    return _empty_like_map(features, (n, c, output_size(h, up, down), output_size(w, up, down)))


def _carafe_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    features, masks = ctx.saved_tensors
    ops, wanted, size = torch.ops.carafe_plugin, ctx.needs_input_grad, features.shape[-2:]
    dx = ops._carafe_grad_features.default(grad_output, masks, *size, *ctx.geometry) if wanted[0] else None
    dm = ops._carafe_grad_masks.default(grad_output, features, *ctx.geometry) if wanted[1] else None
    return (dx, dm, *[None] * 4)


# ------------------------------------------------------------------------------------- _carafe_grad_features


def _grad_features_fake(
    grad_output: Tensor, masks: Tensor, height: int, width: int, k: int, g: int, up: int, down: int
) -> Tensor:
    return _empty_like_map(grad_output, (grad_output.shape[0], grad_output.shape[1], height, width))


def _grad_features_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    grad_output, masks = ctx.saved_tensors
    ops, wanted = torch.ops.carafe_plugin, ctx.needs_input_grad
    dz = ops.carafe.default(cotangent, masks, *ctx.geometry) if wanted[0] else None
    dm = ops._carafe_grad_masks.default(grad_output, cotangent, *ctx.geometry) if wanted[1] else None
    return (dz, dm, *[None] * 6)


# ---------------------------------------------------------------------------------------- _carafe_grad_masks


def _grad_masks_fake(grad_output: Tensor, features: Tensor, k: int, g: int, up: int, down: int) -> Tensor:
    n, _, h_out, w_out = grad_output.shape
    return grad_output.new_empty((n, g * k * k, h_out, w_out))


def _grad_masks_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    grad_output, features = ctx.saved_tensors
    ops, wanted, size = torch.ops.carafe_plugin, ctx.needs_input_grad, features.shape[-2:]
    dz = ops.carafe.default(features, cotangent, *ctx.geometry) if wanted[0] else None
    dx = ops._carafe_grad_features.default(grad_output, cotangent, *size, *ctx.geometry) if wanted[1] else None
    return (dz, dx, *[None] * 4)


def _empty_like_map(source: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An output map: dtype, device and memory format of ``source``. C++ follows the same rule (arguments.h)."""
    memory_format = torch.channels_last if is_channels_last(source) else torch.contiguous_format
    return torch.empty(shape, dtype=source.dtype, device=source.device, memory_format=memory_format)


def _autocast(operator: str, device_type: str) -> Callable[..., Tensor]:
    """Casts the tensors, then calls the operator below the autocast keys."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    keys = keys | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)

    def call(*args: Any) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            tensors = autocast_all([arg for arg in args if isinstance(arg, Tensor)], device_type)  # they come first
            return getattr(torch.ops.carafe_plugin, operator).default(*tensors, *args[len(tensors) :])

    return call


def _keep_tensors(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps what every backward pass here needs: the tensors, and the geometry, which ends every list of arguments."""
    tensors = [each for each in inputs if isinstance(each, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.geometry = inputs[len(tensors) :]


def _keep_tensors_less_size(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """The same where height and width stand before the geometry."""
    _keep_tensors(ctx, inputs, output)
    ctx.geometry = ctx.geometry[2:]


def register(
    library: Any,
    operators: Sequence[str],
    fakes: Sequence[Callable[..., Tensor]],
    backwards: Sequence[Callable[..., tuple[Tensor | None, ...]]],
    device_types: Sequence[str],
) -> None:
    """Give a reassembly, its gradient to the features and its gradient to the weights what C++ cannot give them.

    Args:
        library: Holds the autocast registrations, which last as long as it does.
        operators: The three names.
        fakes: What each returns, without values.
        backwards: The derivative of each.
        device_types: Where autocast is to know them.
    """
    setups = (_keep_tensors, _keep_tensors_less_size, _keep_tensors)
    for operator, fake, setup, backward in zip(operators, fakes, setups, backwards, strict=True):
        name = f"carafe_plugin::{operator}"
        torch.library.register_fake(name, fake)
        torch.library.register_autograd(name, backward, setup_context=setup)
        for device_type in device_types:
            library.impl(operator, _autocast(operator, device_type), f"Autocast{device_type.upper()}")


def _register() -> None:
    global _library
    _library = torch.library.Library("carafe_plugin", "IMPL")
    fakes = (_carafe_fake, _grad_features_fake, _grad_masks_fake)
    backwards = (_carafe_backward, _grad_features_backward, _grad_masks_backward)
    register(_library, OPERATORS, fakes, backwards, ("cpu", "cuda"))


_load()
