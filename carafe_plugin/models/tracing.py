"""What a model resizes, and where: seen in one forward pass."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode

#: Poolings by function call, which are told of and cannot be answered.
_POOLINGS = ("max_pool2d", "avg_pool2d")


@dataclass(frozen=True)
class Resizing:
    """A pass through a layer, or a call of ``F.interpolate``: features (N, C, H, W) of ``before`` became ``after``."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    like: Tensor = field(repr=False, compare=False)  # an empty tensor of the features' dtype and device
    mode: str = ""
    align_corners: bool | None = None
    #: The modules whose forward it happened in, the model first, each with the number of its pass.
    within: tuple[tuple[nn.Module, int], ...] = field(default=(), repr=False, compare=False)


@dataclass
class Trace:
    """What :func:`trace` saw.

    Attributes:
        layers (dict[nn.Module, list[Resizing]]): the passes of every module that takes and returns a map.
        calls (list[Resizing]): the calls of ``F.interpolate``, in their order, those of ``nn.Upsample`` included.
        poolings (list[tuple[nn.Module, str]]): who pools by which function.
        output (Any): what the model returned.
    """

    layers: dict[nn.Module, list[Resizing]] = field(default_factory=lambda: defaultdict(list))
    calls: list[Resizing] = field(default_factory=list)
    poolings: list[tuple[nn.Module, str]] = field(default_factory=list)
    output: Any = None


def trace(
    model: nn.Module, inputs: Any, fault: str = "inputs must be what {model} runs on; on these it ends with"
) -> Trace:
    """Run a model once, in evaluation mode and without gradients, and leave it and the random numbers as they were.

    What a model draws at random is the same every time.

    Args:
        model (nn.Module): on any device.
        inputs (Any): a mapping is passed by name, a tuple or list as positional arguments, anything else as one.
        fault (str): how the error begins if it does not run.

    Raises:
        ValueError: the model does not run on the inputs; its own error is the cause.
    """
    found = Trace()
    stack: list[tuple[nn.Module, int]] = []
    passes: dict[nn.Module, int] = defaultdict(int)

    def enter(module: nn.Module, arguments: Any) -> None:
        passes[module] += 1
        stack.append((module, passes[module]))

    def leave(module: nn.Module, arguments: Any, output: Any) -> None:
        while stack and stack.pop()[0] is not module:
            pass  # one that has ended with an error, which the model has caught
        if isinstance(output, tuple) and output:
            output = output[0]  # pooling with indices
        if arguments and _is_map(arguments[0]) and _is_map(output):
            found.layers[module].append(_resizing(arguments[0], output))

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, function: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            kwargs = kwargs or {}
            output = function(*args, **kwargs)
            if function is F.interpolate:
                settings = dict(zip(("input", "size", "scale_factor", "mode", "align_corners"), args, strict=False))
                settings.update(kwargs)
                how = dict(mode=settings.get("mode", "nearest"), align_corners=settings.get("align_corners"))
                found.calls.append(_resizing(settings["input"], output, within=tuple(stack), **how))
            elif getattr(function, "__name__", "") in _POOLINGS and stack:
                found.poolings.append((stack[-1][0], function.__name__))
            return output

    arguments, by_name = _arguments(inputs)
    hooks = (
        module_hooks.register_module_forward_pre_hook(enter),
        module_hooks.register_module_forward_hook(leave),
    )
    try:
        with evaluating(model), torch.random.fork_rng(), torch.no_grad(), Watch():
            torch.manual_seed(0)
            found.output = model(*arguments, **by_name)
    except Exception as error:
        beginning = fault.format(model=type(model).__name__)
        raise ValueError(f"{beginning} {type(error).__name__}: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode, and afterwards each of its modules in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        model.train(modes[0][1])  # for those that do more than to set it
        for module, training in modes:
            module.training = training


def largest_difference(found: Any, expected: Any) -> float | None:
    """Between the tensors of two outputs, relative to their largest value or 1; None where they are not comparable."""
    differences = []
    pairs = list(zip(_tensors(found), _tensors(expected), strict=False))
    for one, other in pairs:
        if one.shape != other.shape or one.is_meta:
            return None
        if other.numel() and (other.is_floating_point() or other.is_complex()):
            scale = max(1.0, float(other.abs().max()))
            differences.append(float((one - other).abs().max()) / scale)
    if any(math.isnan(difference) for difference in differences):
        return math.nan
    return max(differences) if differences else None


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, Sequence) and not isinstance(output, str):
        for value in output:
            yield from _tensors(value)


def _arguments(inputs: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), inputs
    return (inputs if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def _is_map(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() >= 3


def _resizing(before: Tensor, after: Tensor, **settings: Any) -> Resizing:
    return Resizing(tuple(before.shape), tuple(after.shape), before.new_empty(0), **settings)
