"""Checkpoints of plain-PyTorch CARAFE modules that many projects carry, to and from MMCV's names (:data:`LAYOUTS`).

BatchNorms are folded into their convolutions, except a compressor's that an activation follows: it becomes
``compressor_norm``, for ``CARAFEUpsample(..., norm=nn.BatchNorm2d, act=...)``, with the eps 1e-5. :class:`Fork` has
what no name tells. Both sides of every conversion are run on the same input (:func:`convert_layout`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from carafe_plugin.modules import CARAFEUpsample

#: What can follow the compressor. MMCV's own class has nothing there.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.1),  # the slope of the YOLO family
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "mish": nn.Mish,
    "hardswish": nn.Hardswish,
}

#: How the encoder's k^2 * s^2 channels lie. "taps": tap by tap with the s^2 positions inside, which is what a pixel
#: shuffle before the softmax reads, and MMCV. "positions": position by position with the k^2 taps inside, where the
#: logits are viewed as (s^2, k^2), normalised and applied, and the result is pixel-shuffled.
ORDERS = ("taps", "positions")
MMCV_EPS = 1e-5  # torch's default, and with it that of compressor_norm


class LayoutError(ValueError):
    """Parameters fit no layout, or one layout cannot express what another holds; the message lists the keys."""


@dataclass(frozen=True)
class Fork:
    """What the names do not tell about the side that is not MMCV's."""

    act: str = "identity"  # after the compressor, one of ACTIVATIONS
    eps: float = 1e-5  # of the BatchNorms: 1e-3 in the YOLO family
    order: str = "taps"  # of the encoder's channels, one of ORDERS
    scale: int = 2  # s, the upsampling factor

    def __post_init__(self) -> None:
        for name, values in (("act", tuple(ACTIVATIONS)), ("order", ORDERS)):
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}")
        if isinstance(self.scale, bool) or not isinstance(self.scale, int) or self.scale < 1:
            raise ValueError(f"scale must be a positive int, got {self.scale!r}")
        if not (isinstance(self.eps, int | float) and self.eps > 0):
            raise ValueError(f"eps must be positive, got {self.eps!r}")


class Layout(NamedTuple):
    """Names of a module's parts below the module's own name; None where there never is such a part."""

    compressor: str
    compressor_norm: str | None  # the BatchNorm after the compressor
    encoder: str
    encoder_norm: str | None = None
    after: str | None = None  # a convolution after the reassembly, not part of the operator: it keeps its name


#: A norm may be absent from a checkpoint of any layout: exported models have theirs folded. So may a bias.
LAYOUTS = {
    # mmcv.ops.CARAFEPack, mmdet 1.x's CARAFEPack, and CARAFEUpsample of this package (alone with compressor_norm)
    "mmcv": Layout("channel_compressor", "compressor_norm", "content_encoder"),
    # comp and enc are blocks of conv, bn and act; the usual one, also in the YOLO family
    "conv-bn": Layout("comp.conv", "comp.bn", "enc.conv", "enc.bn"),
    # comp is such a block, enc a convolution with a BatchNorm next to it
    "conv-bn-split": Layout("comp.conv", "comp.bn", "enc", "bn"),
    # comp and enc are nn.Sequential(convolution, BatchNorm, ...)
    "sequential": Layout("comp.0", "comp.1", "enc.0", "enc.1"),
    # comp is such a Sequential, enc a convolution
    "sequential-conv": Layout("comp.0", "comp.1", "enc"),
    # two convolutions
    "comp-enc": Layout("comp", None, "enc"),
    # two convolutions, and a third that changes the channels afterwards
    "down-encoder": Layout("down", None, "encoder", after="out"),
}

#: How far the two sides of a conversion may differ, by the checkpoint's dtype: folding rounds the parameters once.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 5e-1}


class Converted(NamedTuple):
    """One converted module: where, which, and by how much the two sides' outputs differ at most."""

    source: str
    destination: str
    layout: str
    channels: int
    compressed_channels: int
    kernel_size: int
    difference: float


class Conversion(NamedTuple):
    """A converted checkpoint: all its parameters, those of no CARAFE untouched, and what was converted."""

    state_dict: dict[str, Tensor]
    modules: list[Converted]


def find_modules(state_dict: Mapping[str, Tensor], layouts: Sequence[str] = tuple(LAYOUTS)) -> dict[str, str]:
    """The CARAFE modules of a checkpoint: prefix (``"neck.up.0."`` or ``""``) -> name of the layout.

    A module is where the encoder and the compressor of one of ``layouts`` stand side by side.
    """
    found = {}
    for key in state_dict:
        for name in layouts:
            ending = f"{LAYOUTS[name].encoder}.weight"
            prefix = key.removesuffix(ending)
            whole_name = key.endswith(ending) and (not prefix or prefix.endswith("."))
            if whole_name and f"{prefix}{LAYOUTS[name].compressor}.weight" in state_dict:
                found[prefix] = name
    return found


def find_sources(state_dict: Mapping[str, Tensor], to: str, below: Sequence[str] = ("",)) -> dict[str, str]:
    """The modules that a conversion to the layout ``to`` takes, of those whose names start with one of ``below``:
    prefix -> name of the layout. ``"mmcv"`` takes every other layout, the others take it.
    """
    found = find_modules(state_dict, _sources(to))
    return {prefix: name for prefix, name in found.items() if prefix.startswith(tuple(below))}


def norm_of_mmcv(state_dict: Mapping[str, Tensor], prefix: str) -> bool:
    """Whether a module of MMCV's names has a norm after its compressor, as only this package's with ``norm=`` has."""
    return f"{prefix}{LAYOUTS['mmcv'].compressor_norm}.running_mean" in state_dict


def _sources(to: str) -> list[str]:
    return [name for name in LAYOUTS if name != "mmcv"] if to == "mmcv" else ["mmcv"]


@torch.no_grad()
def convert_layout(
    state_dict: Mapping[str, Tensor],
    to: str,
    fork: Fork,
    below: Sequence[str] = ("",),
    rename: Mapping[str, str] | None = None,
) -> Conversion:
    """Convert every CARAFE module of a checkpoint whose name starts with one of ``below``, from MMCV's layout to
    another or from another to MMCV's. ``state_dict`` stays as it is; the result has all parameters in the old order.

    ``to`` is a key of :data:`LAYOUTS`. ``fork`` says what the names do not tell about the side that is not MMCV's.
    ``rename`` maps modules' old names to new ones: ``{"model.11": "neck.upsample_modules.0"}``.

    Raises LayoutError where no module is found, keys next to a module's belong to no known part, shapes do not fit, the
    target cannot express the source, or the two sides' outputs differ.
    """
    rename = dict(rename or {})
    if to not in LAYOUTS:
        raise ValueError(f"the layout must be one of {', '.join(LAYOUTS)}, got {to!r}")
    places = find_sources(state_dict, to, below)
    if not places:
        raise LayoutError(_nothing_found(state_dict, to, below))
    if unknown := [name for name in rename if f"{name}." not in places]:
        found = ", ".join(prefix.rstrip(".") for prefix in places)
        raise LayoutError(f"no CARAFE module is called {', '.join(unknown)}; found {found}")

    replaced: dict[str, dict[str, Tensor]] = {}
    modules = []
    for prefix, name in places.items():
        source = prefix.rstrip(".")
        destination = rename.get(source, source)
        parameters, settings = _convert_module(state_dict, prefix, name, to, fork)
        replaced[prefix] = {f"{destination}." * bool(prefix) + key: value for key, value in parameters.items()}
        modules.append(Converted(source, destination, name, *settings))
    result: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        owner = next((prefix for prefix in places if key.startswith(prefix)), None)
        new = {key: value} if owner is None else replaced.pop(owner, {})  # all of a module, where its first was
        if duplicates := sorted(result.keys() & new.keys()):
            raise LayoutError(f"the converted checkpoint would hold {', '.join(duplicates)} twice")
        result |= new
    return Conversion(result, modules)


def module_name(prefix: str) -> str:
    """What messages call the module with this prefix."""
    return prefix.rstrip(".") or "the module"


def _nothing_found(state_dict: Mapping[str, Tensor], to: str, below: Sequence[str]) -> str:
    """The refusal of a checkpoint without a known module; keys that look like one's come first."""
    words = ("carafe", "comp", "enc", "mask", "kernel", "upsample")
    keys = [key for key in state_dict if key.startswith(tuple(below))]
    keys.sort(key=lambda key: not any(word in key.lower() for word in words))
    listed = ", ".join(keys[:40]) + (f" and {len(keys) - 40} more" if len(keys) > 40 else "")
    if to != "mmcv" and find_modules(state_dict, _sources("mmcv")):
        return f"{to} is made from the layout mmcv alone: convert --to mmcv first"
    return (
        f"no CARAFE module of the layouts {', '.join(_sources(to))}; keys that matched none: {listed or 'none at all'}"
    )


# ------------------------------------------------------------------------------------------------ one module


class Parts(NamedTuple):
    """One module's layers in float64, by the names of :class:`Layout`; Identity where there is no norm."""

    compressor: nn.Conv2d
    compressor_norm: nn.Module
    encoder: nn.Conv2d
    encoder_norm: nn.Module


def _convert_module(
    state_dict: Mapping[str, Tensor], prefix: str, name: str, to: str, fork: Fork
) -> tuple[dict[str, Tensor], tuple[int, int, int, float]]:
    """A module's new parameters, without a prefix, and the last four values of its :class:`Converted`."""
    own = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
    after = LAYOUTS[name].after or LAYOUTS[to].after
    kept = {key: own.pop(key) for key in (f"{after}.weight", f"{after}.bias") if after and key in own}
    try:
        source = _read(own, name, fork, prefix)
    except RuntimeError as error:  # torch lists the keys: missing, unexpected, of another shape
        listed = "; ".join(line.strip() for line in str(error).splitlines()[1:])
        raise LayoutError(f"{module_name(prefix)} looks like the layout {name}, but does not fit: {listed}") from error
    weight_name = f"{prefix}{LAYOUTS[name].encoder}.weight"
    dtype = state_dict[weight_name].dtype
    if dtype not in TOLERANCE:
        raise LayoutError(f"{weight_name} must be of a floating-point dtype, got {dtype}")
    kernel_size = _kernel_size(source.encoder, weight_name, fork.scale)
    result = to_mmcv(source, fork) if to == "mmcv" else from_mmcv(source, fork, LAYOUTS[to])
    parameters = _write(result, LAYOUTS[to], dtype)

    # What was written, in its dtype, against what was read: rounding and naming are part of the check.
    written = _read(parameters, to, fork)
    distance = difference(*((written, source) if to == "mmcv" else (source, written)), kernel_size, fork)
    if not distance <= TOLERANCE[dtype]:
        raise LayoutError(
            f"{module_name(prefix)}: the outputs differ by {distance:.3g} after the conversion from "
            f"{name} to {to} (tolerance {TOLERANCE[dtype]:g}); nothing was written"
        )
    settings = (source.compressor.in_channels, source.compressor.out_channels, kernel_size, distance)
    return {**parameters, **kept}, settings


def _read(state_dict: Mapping[str, Tensor], name: str, fork: Fork, prefix: str = "") -> Parts:
    """A module's layers from its parameters, which have the names of the layout ``name``. Raises torch's RuntimeError
    where they do not fit; ``prefix`` is for messages.
    """
    layout = LAYOUTS[name]
    places = (layout.compressor, layout.encoder)
    compressor, encoder = (state_dict[f"{place}.weight"].shape for place in places)
    if len(encoder) != 4 or compressor[2:] != (1, 1) or encoder[1] != compressor[0]:
        raise LayoutError(
            f"{prefix}{places[0]}.weight and {places[1]}.weight must have shapes (Cm, C, 1, 1) and "
            f"(k^2 * s^2, Cm, k_enc, k_enc), got {tuple(compressor)} and {tuple(encoder)}"
        )

    def norm(place: str | None, channels: int) -> nn.Module:
        present = f"{place}.running_mean" in state_dict
        return _batch_norm(channels, MMCV_EPS if name == "mmcv" else fork.eps) if present else nn.Identity()

    parts = Parts(
        _convolution(*compressor),
        norm(layout.compressor_norm, compressor[0]),
        _convolution(*encoder),
        norm(layout.encoder_norm, encoder[0]),
    )
    no_biases = {f"{place}.bias": torch.zeros(len(state_dict[f"{place}.weight"])) for place in places}
    _named(parts, layout).load_state_dict({**no_biases, **state_dict})
    return parts


def _write(parts: Parts, layout: Layout, dtype: torch.dtype) -> dict[str, Tensor]:
    values = _named(parts, layout).state_dict()
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in values.items()}


def _named(parts: Parts, layout: Layout) -> nn.Module:
    """A module with the parts at their places in a layout."""
    root = nn.Module()
    for part, place in zip(parts, layout, strict=False):
        *folders, name = place.split(".") if place else ["none"]
        parent = root
        for folder in folders:
            parent.add_module(folder, getattr(parent, folder, nn.Module()))
            parent = parent.get_submodule(folder)
        parent.add_module(name, part)
    return root


def _convolution(channels: int, in_channels: int, *kernel: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, kernel, padding=kernel[0] // 2, dtype=torch.float64).eval()  # type: ignore[arg-type]


def _batch_norm(channels: int, eps: float) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps, dtype=torch.float64).eval()


def _kernel_size(encoder: nn.Conv2d, weight_name: str, scale: int) -> int:
    taps, rest = divmod(encoder.out_channels, scale**2)
    kernel_size, (rows, columns) = math.isqrt(taps), encoder.kernel_size
    if rest or kernel_size**2 != taps or kernel_size % 2 == 0:
        raise LayoutError(
            f"{weight_name} has {encoder.out_channels} channels, which is not k^2 * s^2 with an odd k "
            f"and the scale s = {scale}: give the right scale (groups, and downsampling, have no other layout)"
        )
    if rows % 2 == 0 or rows != columns:
        raise LayoutError(f"{weight_name} must have an odd square kernel, got shape {tuple(encoder.weight.shape)}")
    return kernel_size


# ------------------------------------------------------------------------------------------------ the mathematics


def to_mmcv(source: Parts, fork: Fork) -> Parts:
    """MMCV's layers of a fork's module: no norm, except where an activation follows the compressor's."""
    encoder = _reorder(_fold(source.encoder, source.encoder_norm), fork, to_taps=True)
    if fork.act == "identity" or isinstance(source.compressor_norm, nn.Identity):
        return Parts(_fold(source.compressor, source.compressor_norm), nn.Identity(), encoder, nn.Identity())
    return Parts(source.compressor, _with_eps(source.compressor_norm, MMCV_EPS), encoder, nn.Identity())


def from_mmcv(source: Parts, fork: Fork, layout: Layout) -> Parts:
    """A fork's layers of MMCV's, with the norms that its layout has."""
    encoder = _reorder(source.encoder, fork, to_taps=False)
    return Parts(
        *_split(source.compressor, source.compressor_norm, layout.compressor_norm is not None, fork.eps),
        *_split(encoder, source.encoder_norm, layout.encoder_norm is not None, fork.eps),
    )


def _fold(convolution: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    """A convolution with the norm after it as one convolution."""
    return fuse_conv_bn_eval(convolution, norm) if isinstance(norm, nn.BatchNorm2d) else convolution


def _split(convolution: Any, norm: Any, wanted: bool, eps: float) -> tuple[nn.Conv2d, nn.Module]:
    """The same as a convolution without bias and a norm that adds it where one is ``wanted``, else as one alone."""
    if not wanted:
        return _fold(convolution, norm), nn.Identity()
    if isinstance(norm, nn.Identity):
        norm = _with_eps(_batch_norm(convolution.out_channels, eps=0), eps)
        norm.bias.copy_(convolution.bias)
    else:
        norm = _with_eps(norm, eps)
        norm.running_mean -= convolution.bias
    convolution = copy.deepcopy(convolution)
    convolution.bias = None
    return convolution, norm


def _with_eps(norm: Any, eps: float) -> nn.BatchNorm2d:
    """A norm that computes the same with another ``eps``."""
    result = _batch_norm(norm.num_features, eps)
    result.load_state_dict(norm.state_dict())
    result.weight.mul_(((norm.running_var + eps) / (norm.running_var + norm.eps)).sqrt())
    return result


def _reorder(convolution: nn.Conv2d, fork: Fork, to_taps: bool) -> nn.Conv2d:
    """The encoder with its channels from the fork's order to tap by tap, or back."""
    if fork.order == "taps":
        return convolution
    rows = fork.scale**2 if to_taps else convolution.out_channels // fork.scale**2
    order = torch.arange(convolution.out_channels).view(rows, -1).t().flatten()
    convolution = copy.deepcopy(convolution)
    for parameter in convolution.parameters():
        parameter.copy_(parameter[order])
    return convolution


def plain_carafe(features: Tensor, parts: Parts, fork: Fork) -> tuple[Tensor, Tensor]:
    """CARAFE written out as those projects do, from float64 features (N, C, H, W): the upsampled features,
    (N, C, sH, sW), and the logits of their kernels, (N, k^2, sH, sW).
    """
    s, taps = fork.scale, parts.encoder.out_channels // fork.scale**2
    act = ACTIVATIONS[fork.act]()
    logits = nn.Sequential(parts.compressor, parts.compressor_norm, act, parts.encoder, parts.encoder_norm)(features)
    k = math.isqrt(taps)
    if fork.order == "positions":  # each output position of a pixel in turn, from one window
        logits = logits.unflatten(1, (s * s, taps))
        patches = F.unfold(features, k, padding=k // 2).view(*features.shape[:2], 1, taps, *features.shape[2:])
        outputs = (patches * logits.softmax(2)[:, None]).sum(3).flatten(1, 2)
        return F.pixel_shuffle(outputs, s), F.pixel_shuffle(logits.transpose(1, 2).flatten(1, 2), s)
    logits = F.pixel_shuffle(logits, s)
    larger = F.interpolate(features, scale_factor=s, mode="nearest")
    patches = F.unfold(larger, k, dilation=s, padding=k // 2 * s).view(*features.shape[:2], taps, *larger.shape[2:])
    return (patches * logits.softmax(1)[:, None]).sum(2), logits


def difference(mmcv: Parts, other: Parts, kernel_size: int, fork: Fork) -> float:
    """How far this package's module is from the fork's formulation: outputs, and logits relative to the largest.

    The outputs alone would not do: near a fresh initialisation all kernels are alike, in whatever order.
    """
    module = CARAFEUpsample(
        mmcv.compressor.in_channels,
        fork.scale,
        kernel_size,
        encoder_kernel=mmcv.encoder.kernel_size[0],
        compressed_channels=mmcv.compressor.out_channels,
        norm=None if isinstance(mmcv.compressor_norm, nn.Identity) else nn.BatchNorm2d,
        act=ACTIVATIONS[fork.act],
    )
    module.double().eval().load_state_dict(_write(mmcv, LAYOUTS["mmcv"], torch.float64))
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, mmcv.compressor.in_channels, 7, 9, dtype=torch.float64, generator=generator)
    outputs, logits = module(features), F.pixel_shuffle(module.predict_logits(features), fork.scale)
    expected, expected_logits = plain_carafe(features, other, fork)
    scale = expected_logits.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return max((outputs - expected).abs().max().item(), ((logits - expected_logits).abs().max() / scale).item())
