"""The places of a model that resize a map, and what CARAFE++ in each of them would be."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..modules import CARAFEDownsample
from ..modules.carafe import KernelPrediction
from ..modules.strided import DownsampledConv2d
from . import libraries
from .layers import CARAFEInterpolation, CARAFEPool, in_place_of_deconvolution
from .redirection import Redirected
from .tracing import Resizing, Trace

#: Added to a place's own options: with it outputs stay the model's own to rounding.
SPREAD = 1e-6


class Unsuitable(Exception):
    """Why a place stays as it is, in words for the report."""


@dataclass(frozen=True)
class Place:
    """A layer, or a call of ``F.interpolate`` in a module's forward (``call`` is its number there).

    Attributes:
        name (str): of the module that would be there.
        aliases (tuple[str, ...]): all its names, where a layer has several.
        was (str): what is there.
        upsamples (bool): its direction.
        module (nn.Module): the layer, or whose forward it is.
        passes (list[Resizing]): what was seen of it.
        call (int | None): the number of the call.
        by_function (str): a function that is called there and cannot be answered.
    """

    name: str
    was: str
    upsamples: bool
    module: nn.Module
    passes: list[Resizing]
    call: int | None = None
    by_function: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def shrinks(self) -> bool:
        """Whether it is seen to make maps smaller."""
        return any(each.after[-1] < each.before[-1] for each in self.passes)


def find(model: nn.Module, trace: Trace, upsample: bool, downsample: bool) -> Iterator[Place]:
    """All places where a model resizes maps in one of the directions, convertible or not, in the modules' order."""
    names = {module: name for name, module in model.named_modules()}
    aliases: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        aliases[module].append(name)
    calls = _calls(trace)
    inside = {part for module in names if isinstance(module, KernelPrediction) for part in module.modules()}
    for module, name in names.items():
        if module in inside:
            continue
        for call, passes in sorted(calls.get(module, {}).items()):
            place = f"{name}.carafe_upsamplers.{call}".lstrip(".")
            found = Place(place, f"F.interpolate, {passes[0].mode}", True, module, passes, call, aliases=(place,))
            if found.shrinks and downsample:
                yield replace(found, upsamples=False, by_function="F.interpolate")
            elif upsample and not found.shrinks and any(each.before[2:] != each.after[2:] for each in passes):
                yield found
        if calls.get(module):
            continue  # a layer of the user's that interpolates: told of by its calls
        passes = trace.layers.get(module, [])
        parts = [part for part, _ in module.named_children() if part != "parametrizations"]
        if parts or isinstance(module, DownsampledConv2d):
            continue
        resizes = any(each.before[2:] != each.after[2:] for each in passes)
        upsamples = (
            is_plain(module)
            or isinstance(module, (nn.ConvTranspose2d, nn.PixelShuffle))
            or any(each.after[-1] > each.before[-1] for each in passes)
        )
        # Pooling everything into one location, or into a fixed number of them, is no downsampling of a map.
        shrinks = _strides(module) or (resizes and "Adaptive" not in type(module).__name__)
        if upsample and upsamples and (resizes or not passes):
            yield Place(name, _in_words(module), True, module, passes, aliases=tuple(aliases[module]))
        elif downsample and not upsamples and shrinks and not any(each.after[2:] == (1, 1) for each in passes):
            yield Place(name, _in_words(module), False, module, passes, aliases=tuple(aliases[module]))
    if downsample:
        for module, function in dict.fromkeys(trace.poolings):
            if not isinstance(module, (nn.MaxPool2d, nn.AvgPool2d)):
                name = names.get(module, "") or type(module).__name__
                yield Place(name, f"F.{function}", False, module, [], by_function=f"F.{function}", aliases=(name,))


def _calls(trace: Trace) -> dict[nn.Module, dict[int, list[Resizing]]]:
    """The calls of ``F.interpolate`` by the module whose forward makes them, and by their number in it."""
    found: dict[nn.Module, dict[int, list[Resizing]]] = defaultdict(lambda: defaultdict(list))
    number: Counter[tuple[nn.Module, int]] = Counter()
    for call in trace.calls:
        if call.within and not is_plain(call.within[-1][0]):
            module, one_pass = call.within[-1]
            found[module][number[module, one_pass]].append(call)
            number[module, one_pass] += 1
    return found


def build(place: Place, options: Mapping[str, Any], curated: bool) -> tuple[nn.Module, bool]:
    """CARAFE++ for a place, and whether it starts as what was there.

    Args:
        place (Place): of :func:`find`.
        options (Mapping[str, Any]): of CARAFEUpsample or CARAFEDownsample.
        curated (bool): whether a place is to be left alone that is not known, or does not look, to be features'.

    Raises:
        Unsuitable: the place has to stay as it is.
    """
    if place.by_function:
        raise Unsuitable(f"{place.by_function} by a function call cannot be answered here: make it a layer")
    if not place.passes:
        raise Unsuitable("the example inputs do not pass through it")
    if any(len(each.before) != 4 or len(each.after) != 4 for each in place.passes):
        raise Unsuitable("its maps are not (N, C, H, W)")
    if place.call is not None:
        return _in_place_of_call(place, options, curated)
    builders: dict[type, Callable] = {
        nn.ConvTranspose2d: _in_place_of_deconvolution,
        nn.MaxPool2d: _in_place_of_pooling,
        nn.AvgPool2d: _in_place_of_pooling,
        nn.Conv2d: _in_place_of_convolution,
    }
    module = place.module
    if is_plain(module):
        assert isinstance(module, nn.Upsample)
        return _in_place_of_interpolation(place, options, curated, size=module.size)
    if module._forward_pre_hooks and type(module) in (nn.Conv2d, nn.ConvTranspose2d):
        raise Unsuitable("a hook computes its weight or input")
    if type(module) not in builders:
        raise Unsuitable(f"there is no CARAFE++ for a {type(module).__name__}")
    return builders[type(module)](place, options)


def _in_place_of_call(place: Place, options: Mapping[str, Any], curated: bool) -> tuple[nn.Module, bool]:
    if isinstance(place.module, (torch.fx.GraphModule, torch.jit.ScriptModule)):
        raise Unsuitable("it is in a graph that has been traced: convert the model before that")
    if isinstance(place.module, Redirected):
        raise Unsuitable("its module has been converted before")
    if curated and (reason := libraries.reason_to_keep(place.module)):
        raise Unsuitable(reason)
    return _in_place_of_interpolation(place, options, curated)


def _in_place_of_interpolation(
    place: Place, options: Mapping[str, Any], curated: bool, size: Any = None
) -> tuple[nn.Module, bool]:
    channels, first = _channels(place), place.passes[0]
    if curated and channels in (1, 3):
        kind = "a mask or a depth" if channels == 1 else "an image"
        raise Unsuitable(f"it is taken for {kind}, with {channels} channels; names=[...] with this name converts it")
    mode, align_corners = first.mode, bool(first.align_corners)
    if place.call is None and isinstance(place.module, nn.Upsample):
        mode, align_corners = place.module.mode, bool(place.module.align_corners)
    if any((each.mode, bool(each.align_corners)) != (first.mode, bool(first.align_corners)) for each in place.passes):
        raise Unsuitable("its mode changes from pass to pass")
    if mode not in ("nearest", "nearest-exact", "bilinear"):
        raise Unsuitable(f"mode={mode!r} is not one whose place CARAFE++ takes: nearest and bilinear")
    factors = {
        after / before for each in place.passes for before, after in zip(each.before[2:], each.after[2:], strict=True)
    }
    if any(each.before[2:] == (1, 1) for each in place.passes):
        raise Unsuitable("it spreads a single location")
    if len(factors) > 1 or not (factor := factors.pop()).is_integer() or factor < 2:
        sizes = ", ".join(
            f"{h}x{w} to {H}x{W}" for (_, _, h, w), (_, _, H, W) in {(p.before, p.after) for p in place.passes}
        )
        raise Unsuitable(f"its scale is not an integer above 1 ({sizes})")
    if align_corners and "init" not in options:
        raise Unsuitable(
            "align_corners=True: no kernels start as that interpolation, whose weights change from place to place; "
            'upsample=dict(init="bilinear") or another init converts it and changes outputs'
        )
    init = mode.removesuffix("-exact")
    options = _with_start(options, init)
    upsampler = CARAFEInterpolation(channels, int(factor), mode, align_corners=align_corners, size=size, **options)
    return upsampler, options["init"] == init and not align_corners


def _in_place_of_deconvolution(place: Place, options: Mapping[str, Any]) -> tuple[nn.Module, bool]:
    layer = place.module
    assert isinstance(layer, nn.ConvTranspose2d)
    _channels(place)
    geometry = (layer.kernel_size, layer.stride, layer.padding, layer.output_padding, layer.dilation)
    if geometry != ((2, 2), (2, 2), (0, 0), (0, 0), (1, 1)):
        raise Unsuitable("of deconvolutions only those of 2x2 with stride 2 have a counterpart")
    upsampler = CARAFEInterpolation(layer.out_channels, 2, "nearest", **_with_start(options, "average"))
    return in_place_of_deconvolution(layer, upsampler), False


def _in_place_of_pooling(place: Place, options: Mapping[str, Any]) -> tuple[nn.Module, bool]:
    layer, channels = place.module, _channels(place)
    assert isinstance(layer, (nn.MaxPool2d, nn.AvgPool2d))
    stride = _square(layer.stride, "stride")
    window, padding = _square(layer.kernel_size, "window"), _square(layer.padding, "padding")
    if stride < 2:
        raise Unsuitable("its stride is 1")
    if _square(getattr(layer, "dilation", 1), "dilation") != 1:
        raise Unsuitable("its window is dilated")
    if getattr(layer, "return_indices", False):
        raise Unsuitable("it returns indices as well")
    up = (lambda a, b: -(-a // b)) if layer.ceil_mode else (lambda a, b: a // b)
    lengths = range(4 * window, 4 * window + stride)
    pooled = [up(length + 2 * padding - window, stride) + 1 for length in lengths]
    rounds_down = pooled == [length // stride for length in lengths]
    if not rounds_down and pooled != [-(-length // stride) for length in lengths]:
        raise Unsuitable(f"its output is not H / {stride}, rounded up or down")
    start = "average"
    if isinstance(layer, nn.AvgPool2d) and layer.divisor_override is None:
        if (window, stride, padding) == (2, 2, 0):
            start = "average2"
        elif (window, padding, layer.count_include_pad) == (3, 1, True):
            start = "average3"
    options = _with_start(options, start)
    keeps = start != "average" and options["init"] == start
    completes = options["init"] == "average2" and not rounds_down
    return CARAFEPool(channels, stride, rounds_down, completes, **options), keeps


def _in_place_of_convolution(place: Place, options: Mapping[str, Any]) -> tuple[nn.Module, bool]:
    layer = place.module
    assert isinstance(layer, nn.Conv2d)
    channels = _channels(place)
    stride = _square(layer.stride, "stride")
    if channels <= 4:
        raise Unsuitable("it reads the image, which is no feature map")
    if isinstance(layer.padding, str):
        raise Unsuitable(f"padding={layer.padding!r} with a stride")
    extents = zip(layer.kernel_size, layer.dilation, layer.padding, strict=True)
    if any(dilation * (kernel - 1) != 2 * padding for kernel, dilation, padding in extents):
        raise Unsuitable("without its stride it would not keep the size of a map (kernel_size, padding)")
    start = "stride" if layer.kernel_size == (1, 1) else "average"
    options = _with_start(options, start)
    downsampler = CARAFEDownsample(channels, stride, **options)
    return DownsampledConv2d(layer, downsampler), start == "stride" == options["init"]


def _with_start(options: Mapping[str, Any], init: str) -> dict[str, Any]:
    return {"init": init, "init_spread": SPREAD, **options}


def _channels(place: Place) -> int:
    found = {each.before[1] for each in place.passes}
    if len(found) > 1:
        raise Unsuitable(
            f"it serves maps of {', '.join(map(str, sorted(found)))} channels: one CARAFE++ has one number"
        )
    if not place.passes[0].like.is_floating_point():
        raise Unsuitable(f"its input is {place.passes[0].like.dtype}, no features")
    return found.pop()


def _strides(module: nn.Module) -> bool:
    stride = getattr(module, "stride", 1) if isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)) else 1
    return max(stride) > 1 if isinstance(stride, tuple) else stride > 1


def _square(value: int | tuple[int, ...], what: str) -> int:
    if isinstance(value, tuple):
        if len(set(value)) > 1:
            raise Unsuitable(f"its {what} is {' x '.join(map(str, value))}, not the same both ways")
        return value[0]
    return value


def _in_words(module: nn.Module) -> str:
    return repr(module) if len(repr(module)) < 60 else type(module).__name__


def is_plain(module: nn.Module) -> bool:
    """Whether a module is an ``nn.Upsample`` that does what that does, and nothing else."""
    return isinstance(module, nn.Upsample) and type(module).forward is nn.Upsample.forward
