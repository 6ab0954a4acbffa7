"""Modules that interpolate by a function call in the middle of their forward: CARAFE++ answers the call.

Such a module has no layer to swap. Its class is changed to a subclass whose forward runs the parent's, whatever that is
in the installed version of a library, within a mode in which PyTorch hands the calls of ``F.interpolate`` over. The
calls are told apart by their order, channels and mode. Parameters, other attributes and ``isinstance`` stay as they
were; the new modules are in ``carafe_upsamplers``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

#: What a call is known by: the channels of its input, mode, and whether corners are aligned.
Signature = tuple[int, str, bool]


def signature(channels: int, mode: str | None, align_corners: bool | None) -> Signature:
    return channels, mode or "nearest", bool(align_corners)


class Redirected(nn.Module):
    """Mixed in before a module's class; :func:`redirect` makes one of a module.

    Attributes:
        carafe_upsamplers (nn.ModuleDict): what answers calls, by their number among those in this forward itself.
        carafe_calls (tuple[tuple[str | None, Signature], ...]): for each call of a forward pass, those of modules
            inside it included, the key of what answers it, or None, and what it is known by. Calls that are known by
            something else may come in between, and those that nothing answers may be missing.
    """

    carafe_upsamplers: nn.ModuleDict
    carafe_calls: tuple[tuple[str | None, Signature], ...]

    def __reduce_ex__(self, protocol: Any) -> tuple:  # a class made at run time is not found by its name
        (_, _, *state) = tuple(super().__reduce_ex__(max(2, protocol)))
        return _empty, (type(self).__bases__[1],), *state


class _Answering(TorchFunctionMode):
    """``answered`` gets the places in ``calls`` that have come; as no attribute, which torch.compile would lose."""

    def __init__(
        self, upsamplers: nn.ModuleDict, calls: Sequence[tuple[str | None, Signature]], answered: list[int]
    ) -> None:
        super().__init__()
        self.upsamplers, self.calls, self.answered = upsamplers, calls, answered
        self.learns = torch.is_grad_enabled()

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.interpolate:
            key = self._key(_interpolate_signature(*args, **kwargs))
            if key is not None:
                function = self.upsamplers[key]
                if self.learns and not torch.is_grad_enabled() and function.training:
                    raise RuntimeError(
                        "CARAFE++ would not learn here: the forward that it was put into interpolates without "
                        "gradients, in torch.utils.checkpoint or torch.no_grad(); checkpoint the module as a whole"
                    )
        return function(*args, **kwargs)

    def _key(self, known_by: Signature) -> str | None:
        place = self.answered[-1] + 1 if self.answered else 0
        while place < len(self.calls):
            key, expected = self.calls[place]
            if expected == known_by:
                self.answered.append(place)
                return key
            if key is not None:
                break
            place += 1
        if any(key is not None and expected == known_by for key, expected in self.calls):
            self.answered.append(len(self.calls))  # one too many, or not in its turn
        return None


def _interpolate_signature(
    input: Any,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: Any = None,
    *_: Any,
    **__: Any,
) -> Signature:
    return signature(input.shape[1], mode, align_corners)


@functools.cache
def _subclass(parent: Any) -> type[nn.Module]:
    @functools.wraps(parent.forward)  # whose arguments torch.export and others read
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        answered: list[int] = []
        with _Answering(self.carafe_upsamplers, self.carafe_calls, answered):
            result = parent.forward(self, *args, **kwargs)
        expected = [place for place, (key, _) in enumerate(self.carafe_calls) if key is not None]
        if [place for place in answered if place in expected or place == len(self.carafe_calls)] != expected:
            raise RuntimeError(
                f"{type(self).__name__}.forward does not call F.interpolate as when CARAFE++ was put in: of the "
                f"{len(expected)} calls that are answered, some came too often, too seldom or in another order; "
                "convert the model in the form, and with inputs, in which it is used"
            )
        return result

    metaclass: Any = type(parent)
    content = {
        "__module__": __name__,
        "__doc__": f"{parent.__qualname__} whose interpolations are CARAFE++.",
        "forward": forward,
    }
    return metaclass(f"CARAFE{parent.__name__}", (Redirected, parent), content)


def _empty(parent: Any) -> nn.Module:
    subclass = _subclass(parent)
    return subclass.__new__(subclass)


def redirect(
    module: nn.Module, upsamplers: Mapping[str, nn.Module], calls: Sequence[tuple[str | None, Signature]]
) -> None:
    """Let CARAFE++ answer calls of ``F.interpolate`` that a module's forward makes, in place.

    Args:
        module (nn.Module): any, but not one that has been through this.
        upsamplers (Mapping[str, nn.Module]): what answers, called as ``F.interpolate`` is.
        calls (Sequence[tuple[str | None, Signature]]): for each call, in their order, a key of ``upsamplers``, or None
            to let it pass, and what it is known by. Those in modules inside it count.

    Raises:
        TypeError: the module's class cannot be inherited from.

    Example:
        >>> import torch
        >>> from carafe_plugin.models.layers import CARAFEInterpolation
        >>> class Twice(torch.nn.Module):
        ...     def forward(self, features):
        ...         return torch.nn.functional.interpolate(features, scale_factor=2)
        >>> module = Twice()
        >>> redirect(module, {"0": CARAFEInterpolation(8, 2, "nearest")}, [("0", signature(8, "nearest", None))])
        >>> type(module).__name__, module(torch.rand(1, 8, 3, 4)).shape
        ('CARAFETwice', torch.Size([1, 8, 6, 8]))
    """
    parent: Any = type(module)
    module.__class__ = _subclass(parent)
    module.carafe_upsamplers = nn.ModuleDict(upsamplers)
    module.carafe_calls = tuple(calls)  # type: ignore[assignment]


def undo(module: nn.Module) -> None:
    """Make a module that :func:`redirect` changed what it was."""
    del module.carafe_upsamplers, module.carafe_calls
    module.__class__ = type(module).__bases__[1]
