"""Checkpoints of plain-PyTorch CARAFE modules that many projects carry, to and from MMCV's names (:data:`LAYOUTS`).

BatchNorms are folded into their convolutions, except a compressor's that an activation follows: it becomes
``compressor_norm``, for ``CARAFEUpsample(..., norm=nn.BatchNorm2d, act=...)``, with the eps 1e-5. :class:`Fork` has
what no name tells. Both sides of every conversion are run on the same input (:func:`convert_layout`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from carafe_plugin.engine.plain_carafe import (
    ACTIVATIONS,
    NORM_PARTS,
    ORDERS,
    Fork,
    Parts,
    difference,
    from_mmcv,
    to_mmcv,
)

__all__ = ["ACTIVATIONS", "LAYOUTS", "ORDERS", "Conversion", "Converted", "Fork", "Layout", "LayoutError"]
__all__ += ["convert_layout", "find_modules", "find_sources", "norm_of_mmcv"]


class LayoutError(ValueError):
    """Parameters fit no layout, or one layout cannot express what another holds; the message lists the keys."""


@dataclass(frozen=True)
class Layout:
    """Names of a module's parts below the module's own name; None where there never is such a part."""

    compressor: str
    encoder: str
    compressor_norm: str | None = None  # the BatchNorm after the compressor
    encoder_norm: str | None = None
    after: str | None = None  # a convolution after the reassembly, not part of the operator: it keeps its name

    def parts(self) -> list[str]:
        """All names."""
        names = (self.compressor, self.compressor_norm, self.encoder, self.encoder_norm, self.after)
        return [name for name in names if name is not None]


#: A norm may be absent from a checkpoint of any layout: exported models have theirs folded. So may a bias.
LAYOUTS = {
    # mmcv.ops.CARAFEPack, mmdet 1.x's CARAFEPack, and CARAFEUpsample of this package (alone with compressor_norm)
    "mmcv": Layout("channel_compressor", "content_encoder", compressor_norm="compressor_norm"),
    # comp and enc are blocks of conv, bn and act; the usual one, also in the YOLO family
    "conv-bn": Layout("comp.conv", "enc.conv", "comp.bn", "enc.bn"),
    # comp is such a block, enc a convolution with a BatchNorm next to it
    "conv-bn-split": Layout("comp.conv", "enc", "comp.bn", "bn"),
    # comp and enc are nn.Sequential(convolution, BatchNorm, ...)
    "sequential": Layout("comp.0", "enc.0", "comp.1", "enc.1"),
    # comp is such a Sequential, enc a convolution
    "sequential-conv": Layout("comp.0", "enc", "comp.1"),
    # two convolutions
    "comp-enc": Layout("comp", "enc"),
    # two convolutions, and a third that changes the channels afterwards
    "down-encoder": Layout("down", "encoder", after="out"),
}

#: How far the two sides of a conversion may differ, by the checkpoint's dtype: folding rounds the parameters once.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 5e-1}


@dataclass(frozen=True)
class Converted:
    """One converted module: where, which, and by how much the two sides' outputs differ at most."""

    source: str
    destination: str
    layout: str
    channels: int
    compressed_channels: int
    kernel_size: int
    difference: float


@dataclass(frozen=True)
class Conversion:
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


def convert_layout(
    state_dict: Mapping[str, Tensor],
    to: str,
    fork: Fork | None = None,
    below: Sequence[str] = ("",),
    rename: Mapping[str, str] | None = None,
) -> Conversion:
    """Convert every CARAFE module of a checkpoint whose name starts with one of ``below``, from MMCV's layout to
    another or from another to MMCV's. ``state_dict`` stays as it is; the result has all parameters in the old order.

    ``to`` is a key of :data:`LAYOUTS`. ``fork`` says what the names do not tell about the side that is not MMCV's; None
    is ``Fork()``, without an activation, and not enough where a module of MMCV's names has a ``compressor_norm``.
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
    if fork is None:
        if normed := [_called(prefix) for prefix in places if norm_of_mmcv(state_dict, prefix)]:
            raise LayoutError(f"{normed[0]} has a compressor_norm: fork must say which activation follows it")
        fork = Fork()

    replaced: dict[str, dict[str, Tensor]] = {}
    owner: dict[str, str] = {}
    modules = []
    for prefix, name in places.items():
        source = prefix.rstrip(".")
        destination = rename.get(source, source)
        keys = _keys_of(state_dict, prefix, name, to)
        parameters, settings = _convert_module(state_dict, keys, prefix, name, to, fork)
        replaced[prefix] = {f"{destination}." * bool(prefix) + key: value for key, value in parameters.items()}
        owner |= dict.fromkeys(keys, prefix)
        modules.append(Converted(source, destination, name, *settings))
    result: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        new = replaced.pop(owner[key], {}) if key in owner else {key: value}  # all of a module, where its first was
        if duplicates := sorted(result.keys() & new.keys()):
            raise LayoutError(f"the converted checkpoint would hold {', '.join(duplicates)} twice")
        result |= new
    return Conversion(result, modules)


def _called(prefix: str) -> str:
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


def _keys_of(state_dict: Mapping[str, Tensor], prefix: str, name: str, to: str) -> list[str]:
    """The keys of a module. Raises LayoutError where some are of no known part."""
    layout = LAYOUTS[name]
    tails = {f"{part}.{kind}" for part in (layout.compressor, layout.encoder) for kind in ("weight", "bias")}
    for norm in (layout.compressor_norm, layout.encoder_norm):
        if norm is not None and f"{prefix}{norm}.running_mean" in state_dict:
            tails |= {f"{norm}.{kind}" for kind in (*NORM_PARTS, "num_batches_tracked")}
    if after := layout.after or LAYOUTS[to].after:
        tails |= {f"{after}.{kind}" for kind in ("weight", "bias")}
    keys = [key for key in state_dict if key.startswith(prefix)]
    if strange := [key for key in keys if key[len(prefix) :] not in tails]:
        place = prefix.rstrip(".") or "the checkpoint"
        raise LayoutError(f"{place} looks like the layout {name}, but these keys do not match: {', '.join(strange)}")
    return keys


# ------------------------------------------------------------------------------------------------ one module


def _convert_module(
    state_dict: Mapping[str, Tensor], keys: Sequence[str], prefix: str, name: str, to: str, fork: Fork
) -> tuple[dict[str, Tensor], tuple[int, int, int, float]]:
    """A module's new parameters, without a prefix, and what :class:`Converted` holds after the layout's name."""
    dtype = state_dict[f"{prefix}{LAYOUTS[name].encoder}.weight"].dtype
    if dtype not in TOLERANCE:
        raise LayoutError(f"{prefix}{LAYOUTS[name].encoder}.weight must be of a floating-point dtype, got {dtype}")
    source = _read(state_dict, prefix, name)
    kernel_size = _kernel_size(source, prefix, name, fork.scale)
    result = to_mmcv(source, fork) if to == "mmcv" else from_mmcv(source, fork, *_norms(LAYOUTS[to]))
    parameters = {key: value.to(dtype) for key, value in _write(result, LAYOUTS[to]).items()}
    counters = [state_dict[key] for key in keys if key.endswith("num_batches_tracked")]
    for norm in [key.removesuffix("running_mean") for key in list(parameters) if key.endswith("running_mean")]:
        parameters[f"{norm}num_batches_tracked"] = counters[0] if counters else torch.zeros((), dtype=torch.int64)

    if after := LAYOUTS[name].after or LAYOUTS[to].after:
        parameters |= {key[len(prefix) :]: state_dict[key] for key in keys if key.startswith(f"{prefix}{after}.")}

    # What was written, in its dtype, against what was read: rounding and naming are part of the check.
    written = _read(parameters, "", to)
    distance = difference(*((written, source) if to == "mmcv" else (source, written)), kernel_size, fork)
    if not distance <= TOLERANCE[dtype]:
        raise LayoutError(
            f"{_called(prefix)}: the outputs differ by {distance:.3g} after the conversion from "
            f"{name} to {to} (tolerance {TOLERANCE[dtype]:g}); nothing was written"
        )
    compressed, channels = source.compressor[0].shape[:2]
    return parameters, (channels, compressed, kernel_size, distance)


def _norms(layout: Layout) -> tuple[bool, bool]:
    return layout.compressor_norm is not None, layout.encoder_norm is not None


def _read(state_dict: Mapping[str, Tensor], prefix: str, name: str) -> Parts:
    """A module's parameters as float64."""
    layout = LAYOUTS[name]

    def convolution(part: str) -> tuple[Tensor, Tensor]:
        weight = state_dict[f"{prefix}{part}.weight"].double()
        if weight.dim() != 4:
            raise LayoutError(f"{prefix}{part}.weight must have 4 dimensions, got shape {tuple(weight.shape)}")
        bias = state_dict.get(f"{prefix}{part}.bias")
        return weight, weight.new_zeros(len(weight)) if bias is None else bias.double()

    def norm(part: str | None, channels: int) -> Tensor | None:
        if part is None or f"{prefix}{part}.running_mean" not in state_dict:
            return None
        names = [f"{prefix}{part}.{kind}" for kind in NORM_PARTS]
        if missing := [key for key in names if key not in state_dict]:
            raise LayoutError(f"the norm {prefix}{part} is not complete: {', '.join(missing)} missing")
        rows = [state_dict[key].double() for key in names]
        if any(row.shape != (channels,) for row in rows):
            raise LayoutError(f"{names[0]} must have shape ({channels},), got {tuple(rows[0].shape)}")
        return torch.stack(rows)

    compressor, encoder = convolution(layout.compressor), convolution(layout.encoder)
    if compressor[0].shape[2:] != (1, 1) or encoder[0].shape[1] != len(compressor[0]):
        raise LayoutError(
            f"{prefix}{layout.compressor}.weight and {layout.encoder}.weight must have shapes (Cm, C, 1, 1) and "
            f"(k^2 * s^2, Cm, k_enc, k_enc), got {tuple(compressor[0].shape)} and {tuple(encoder[0].shape)}"
        )
    return Parts(
        compressor,
        norm(layout.compressor_norm, len(compressor[0])),
        encoder,
        norm(layout.encoder_norm, len(encoder[0])),
    )


def _kernel_size(parts: Parts, prefix: str, name: str, scale: int) -> int:
    weight = parts.encoder[0]
    taps, rest = divmod(len(weight), scale**2)
    kernel_size, encoder_kernel = math.isqrt(taps), weight.shape[2]
    if rest or kernel_size**2 != taps or kernel_size % 2 == 0:
        raise LayoutError(
            f"{prefix}{LAYOUTS[name].encoder}.weight has {len(weight)} channels, which is not k^2 * s^2 with an odd k "
            f"and the scale s = {scale}: give the right scale (groups, and downsampling, have no other layout)"
        )
    if encoder_kernel % 2 == 0 or weight.shape[3] != encoder_kernel:
        raise LayoutError(
            f"{prefix}{LAYOUTS[name].encoder}.weight must have an odd square kernel, got shape {tuple(weight.shape)}"
        )
    return kernel_size


def _write(parts: Parts, layout: Layout) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for part, (weight, bias), norm_part, norm in (
        (layout.compressor, parts.compressor, layout.compressor_norm, parts.compressor_norm),
        (layout.encoder, parts.encoder, layout.encoder_norm, parts.encoder_norm),
    ):
        result[f"{part}.weight"] = weight
        if norm is None or layout is LAYOUTS["mmcv"]:  # a block of convolution and norm has no bias
            result[f"{part}.bias"] = bias
        if norm is not None:
            result |= {f"{norm_part}.{kind}": row for kind, row in zip(NORM_PARTS, norm, strict=True)}
    return result
