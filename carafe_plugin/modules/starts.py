"""First values that are part of what a module is, whoever initialises its parts and in whatever order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_Module = TypeVar("_Module", bound=nn.Module)


class KeepsItsStart(nn.Module):
    """A module with parts that were made by :func:`starting`."""

    def _starting_parts(self) -> Iterator[nn.Module]:
        return (module for module in self.modules() if "reset_parameters" in vars(module))

    def init_weights(self) -> None:
        """Give those parts their first values, under the name that MMEngine calls."""
        for part in self._starting_parts():
            part.reset_parameters()  # type: ignore[operator]

    def apply(self, fn: Callable[[nn.Module], None]) -> KeepsItsStart:
        """Apply a function to every submodule, except that MMEngine's initialisers leave the first values in place.

        An enclosing module's ``init_cfg`` (Xavier for every ``Conv2d`` in an FPN) comes down the whole tree through
        ``apply``, whereas ``init_weights`` stops at direct children, short of a module in a plain ``Sequential``.
        MMEngine's log says who initialised a parameter: here it names this class.
        """
        super().apply(fn)
        if getattr(fn, "__module__", None) == "mmengine.model.weight_init":
            self.init_weights()
            record = getattr(self, "_params_init_info", {})
            text = f"Initialized by user-defined `init_weights` in {type(self).__name__} "  # MMEngine's words
            for parameter in (each for part in self._starting_parts() for each in part.parameters(recurse=False)):
                if parameter in record:
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


def interpolating_(conv: nn.Conv2d, init: str, spread: float, settings: tuple[int, int, int, int, str]) -> None:
    """Biases that make the kernels of CARAFE++ an interpolation's, and weights that leave them so but let all learn.

    Weights of zero would keep the gradient from what is before the convolution.
    """
    near_zero_(conv)
    with torch.no_grad():
        conv.weight.mul_(1e-5)
        conv.bias.copy_(interpolation_logits(init, spread, *settings))  # type: ignore[union-attr]


def interpolation_logits(init: str, spread: float, k: int, g: int, up: int, down: int, normalizer: str) -> Tensor:
    """The content encoder's biases, (G * k^2 * up^2,), for a start of the modules other than 'average'."""
    # On the CPU, whatever the default device is: some have no float64.
    taps, phases = (torch.arange(length, dtype=torch.float64, device="cpu") for length in (k, up))
    taps, phases = taps - k // 2, phases[:, None]
    # Where phase p reads along an axis, from the source location on: corners are not aligned.
    place = (2 * phases + down - up) / (2 * up) if init == "bilinear" else 0 * phases
    if init in ("average2", "average3"):
        axis = ((taps >= (0 if init == "average2" else -1)) & (taps <= 1)).double() / int(init[-1]) + 0 * phases
    else:
        axis = (1 - (taps - place).abs()).clamp(min=0)
    kernels = (1 - spread) * torch.einsum("ru,sv->uvrs", axis, axis) + spread / k**2
    # Normalised sigmoids forget the factor, which keeps the largest from saturating.
    sigmoids = kernels / 2 if normalizer == "sigmoid_normalized" else kernels
    return (kernels.log() if normalizer == "softmax" else sigmoids.logit()).flatten().repeat(g)


def zero_(conv: nn.Conv2d) -> None:
    """Weights and biases of zero."""
    nn.init.zeros_(conv.weight)
    _zero_bias(conv)


def _zero_bias(conv: nn.Conv2d) -> None:
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
