"""Modules that interpolate by a function call in the middle of their forward: CARAFE++ answers the call.

Such a module has no layer to swap. Its class is changed to a subclass whose forward runs the parent's, whatever that
is in the installed version of a library, within a mode in which PyTorch hands the calls of ``F.interpolate`` over. The
calls are told apart by their order. Parameters, other attributes and ``isinstance`` stay as they were; the new modules
are in ``carafe_upsamplers``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode


class Redirected(nn.Module):
    """Mixed in before a module's class; :func:`redirect` makes one of a module.

    Attributes:
        carafe_upsamplers (nn.ModuleDict): what answers calls, by their number among those in this forward itself.
        carafe_calls (tuple[str | None, ...]): for each call of a forward pass, those of modules inside it included, the
            key of what answers it, or None.
    """

    carafe_upsamplers: nn.ModuleDict
    carafe_calls: tuple[str | None, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's forward.

        Raises:
            RuntimeError: it has not interpolated as often as when it was converted, so that it is not known which call
                was which.
        """
        calls: list[str | None] = []  # and no attribute of the mode, which torch.compile would not find afterwards
        with _Answering(self.carafe_upsamplers, self.carafe_calls, calls):
            result = super().forward(*args, **kwargs)
        if len(calls) != len(self.carafe_calls):
            raise RuntimeError(
                f"{type(self).__name__}.forward has called F.interpolate {len(calls)} times, and "
                f"{len(self.carafe_calls)} times when CARAFE++ was put in: which call is which is not known; convert "
                "the model with inputs that take the same way through it"
            )
        return result

    def __reduce_ex__(self, protocol: Any) -> tuple:  # a class made at run time is not found by its name
        (_, _, *state) = tuple(super().__reduce_ex__(max(2, protocol)))
        return _empty, (type(self).__bases__[1],), *state


class _Answering(TorchFunctionMode):
    def __init__(self, upsamplers: nn.ModuleDict, keys: Sequence[str | None], calls: list[str | None]) -> None:
        super().__init__()
        self.upsamplers, self.keys, self.calls = upsamplers, keys, calls

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function is F.interpolate:
            key = self.keys[len(self.calls)] if len(self.calls) < len(self.keys) else None
            self.calls.append(key)
            if key is not None:
                function = self.upsamplers[key]
        return function(*args, **(kwargs or {}))


@functools.cache
def _subclass(parent: Any) -> type[nn.Module]:
    content = {"__module__": __name__, "__doc__": f"{parent.__qualname__} whose interpolations are CARAFE++."}
    metaclass: Any = type(parent)
    return metaclass(f"CARAFE{parent.__name__}", (Redirected, parent), content)


def _empty(parent: Any) -> nn.Module:
    subclass = _subclass(parent)
    return subclass.__new__(subclass)


def redirect(module: nn.Module, upsamplers: Mapping[str, nn.Module], calls: Sequence[str | None]) -> None:
    """Let CARAFE++ answer calls of ``F.interpolate`` that a module's forward makes, in place.

    Args:
        module (nn.Module): any, but not one that has been through this.
        upsamplers (Mapping[str, nn.Module]): what answers, called as ``F.interpolate`` is.
        calls (Sequence[str | None]): for each call, in their order, a key of ``upsamplers``, or None to let it pass.
            Those in modules inside it count.

    Example:
        >>> import torch
        >>> from carafe_plugin.models.layers import CARAFEInterpolation
        >>> class Twice(torch.nn.Module):
        ...     def forward(self, features):
        ...         return torch.nn.functional.interpolate(features, scale_factor=2)
        >>> module = Twice()
        >>> redirect(module, {"0": CARAFEInterpolation(8, 2, "nearest")}, ["0"])
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
