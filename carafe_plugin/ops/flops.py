"""How many FLOPs the operators take, told to ``torch.utils.flop_counter.FlopCounterMode``.

The operators are the partial derivatives of one trilinear form (:mod:`carafe_plugin.ops.reference`), so each
makes the same ``N * C * H' * W' * k ** 2`` multiply-adds. FlopCounterMode counts two FLOPs for each, as it does for a
convolution, and like there the taps that fall outside the map count too.

Importing this module registers the counts. Where the PyTorch reference serves there is no operator for torch to see:
the counter is then told by :func:`announce`, so that both backends give the same number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils import flop_counter

from . import fused as logits
from ._registration import OPERATORS, is_compiled

__all__ = ["announce", "multiply_adds"]

# Operators of these names compute nothing: a FLOP counter sees them go by.
_ANNOUNCED = {operator: f"_announced_{operator.lstrip('_')}" for operator in OPERATORS}
_SCHEMAS = {
    "carafe": "(Tensor features, Tensor masks, int kernel_size, int group_size, int up, int down) -> ()",
    "_carafe_grad_features": "(Tensor grad_output, Tensor masks, int height, int width, int kernel_size, "
    "int group_size, int up, int down) -> ()",
    "_carafe_grad_masks": "(Tensor grad_output, Tensor features, int kernel_size, int group_size, int up, int down)"
    " -> ()",
}
_library: Any = None  # torch.library.Library: what it defines lasts as long as it does


def multiply_adds(output: Sequence[int], kernel_size: int) -> int:
    """Multiply-adds of a reassembly, or of one of its two gradients.

    Args:
        output: Shape of the reassembled map, (N, C, H', W').
        kernel_size: k of the reassembly.

    Example:
        >>> multiply_adds((1, 256, 2, 2), kernel_size=5)  # what upsampling by 2 makes of one location
        25600
    """
    return prod(output) * kernel_size**2


def announce(operator: str, *arguments: Any) -> None:
    """Tell the FLOP counters that are active that something other than the compiled ``operator`` computes it.

    Args:
        operator: One of the compiled operators' names.
        *arguments: What the compiled operator would be given.
    """
    # Other modes (tracing, fake tensors) would record the announcement, so it is made to counters alone.
    try:  # private to torch: without it the reference's FLOPs go uncounted, and nothing else is lost
        from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
    except ImportError:
        return
    modes = _get_current_dispatch_mode_stack()
    if any(type(mode).__module__ == flop_counter.__name__ for mode in modes):
        getattr(torch.ops.carafe_plugin, _ANNOUNCED[operator])(*arguments)


def _carafe_flops(features: Sequence[int], masks: Sequence[int], kernel_size: int, *_: int, **__: Any) -> int:
    return 2 * multiply_adds((*features[:2], *masks[2:]), kernel_size)


def _grad_features_flops(
    grad_output: Sequence[int], masks: Sequence[int], height: int, width: int, kernel_size: int, *_: int, **__: Any
) -> int:
    return 2 * multiply_adds(grad_output, kernel_size)


def _grad_masks_flops(grad_output: Sequence[int], features: Sequence[int], kernel_size: int, *_: int, **__: Any) -> int:
    return 2 * multiply_adds(grad_output, kernel_size)


def _logits_flops(
    features: Sequence[int], raw: Sequence[int], kernel_size: int, group_size: int, up: int, *_: int, **__: Any
) -> int:
    return 2 * multiply_adds((*features[:2], raw[2] * up, raw[3] * up), kernel_size)


def _logits_grad_logits_flops(
    grad_output: Sequence[int], features: Sequence[int], raw: Sequence[int], kernel_size: int, *_: int, **__: Any
) -> int:
    return 2 * multiply_adds(grad_output, kernel_size)


def _set_formula(name: str, formula: Callable[..., int]) -> None:
    packet = getattr(torch.ops.carafe_plugin, name)
    if hasattr(flop_counter, "register_flop_formula"):
        flop_counter.register_flop_formula(packet)(formula)
    else:  # torch 2.1 has the table alone
        vars(flop_counter)["flop_mapping"][packet] = formula


def _register() -> None:
    global _library
    _library = torch.library.Library("carafe_plugin", "FRAGMENT")
    formulae: tuple[Callable[..., int], ...] = (_carafe_flops, _grad_features_flops, _grad_masks_flops)
    for operator, formula in zip(OPERATORS, formulae, strict=True):
        announced = _ANNOUNCED[operator]
        _library.define(announced + _SCHEMAS[operator])
        _library.impl(announced, lambda *_: None, "CompositeExplicitAutograd")
        for name in [announced, operator] if is_compiled() else [announced]:
            _set_formula(name, formula)
    if is_compiled():  # the kernel normaliser counts nothing, as torch's own softmax does
        formulae = (_logits_flops, _grad_features_flops, _logits_grad_logits_flops)
        for operator, formula in zip(logits.OPERATORS, formulae, strict=True):
            _set_formula(operator, formula)


_register()
