"""First values that are part of what a module is, whoever initialises its parts and in whatever order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

_Module = TypeVar("_Module", bound=nn.Module)


class KeepsItsStart(nn.Module):
    """A module whose first values, its ``init_weights``, stay what they are within MMEngine's modules."""

    init_weights: Callable[[], None]

    def apply(self, fn: Callable[[nn.Module], None]) -> KeepsItsStart:
        """Apply a function to every submodule, except that MMEngine's initialisers leave the paper's values in place.

        An enclosing module's ``init_cfg`` (Xavier for every ``Conv2d`` in an FPN) comes down the whole tree through
        ``apply``, whereas ``init_weights`` stops at direct children, short of a module in a plain ``Sequential``.
        MMEngine's record of who initialised what, which it logs, names this module for what is not the initialiser's.
        """
        super().apply(fn)
        if getattr(fn, "__module__", None) == "mmengine.model.weight_init":
            before = [parameter.detach().clone() for parameter in self.parameters()]
            self.init_weights()
            record = getattr(self, "_params_init_info", {})
            for old, parameter in zip(before, self.parameters(), strict=True):
                if parameter in record and not torch.equal(old, parameter):
                    text = f"Initialized by user-defined `init_weights` in {type(self).__name__} "
                    record[parameter].update(init_info=text, tmp_mean_value=parameter.detach().mean().cpu())
        return self


def starting(module: _Module, start: Callable[[Any], object]) -> _Module:
    """Let ``start`` be a module's ``reset_parameters``, and return the module; nothing is drawn yet.

    A model that was built on the meta device (FSDP) gets its values by a call of ``reset_parameters`` of every module
    that has parameters itself. A subclass would not do: tools that fuse, quantise and count recognise a convolution by
    its exact type. ``start`` is a function of a module's or a partial of one, so that the module can be pickled.
    """
    module.reset_parameters = partial(start, module)  # type: ignore[assignment]
    return module


def xavier_(conv: nn.Conv2d) -> None:
    """Xavier-uniform weights, and biases of zero."""
    nn.init.xavier_uniform_(conv.weight)
    _zero_bias(conv)


def near_zero_(conv: nn.Conv2d) -> None:
    """Weights near zero, and biases of zero: the kernels of CARAFE++ are nearly uniform."""
    nn.init.xavier_uniform_(conv.weight)  # drawn first as in mmcv's CARAFEPack: a seed gives the same values
    nn.init.normal_(conv.weight, std=0.001)
    _zero_bias(conv)


def zero_(conv: nn.Conv2d) -> None:
    """Weights and biases of zero."""
    nn.init.zeros_(conv.weight)
    _zero_bias(conv)


def _zero_bias(conv: nn.Conv2d) -> None:
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
