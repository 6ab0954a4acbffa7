"""CARAFE++ as MMEngine layers, and the helpers that every toolbox's adapter shares.

Importing this module registers ``CARAFEUpsample``, ``CARAFEDownsample``, the operators that the paper compares them
with (:mod:`carafe_plugin.modules.peers`) and later upsamplers (:mod:`~carafe_plugin.modules.rivals`,
:mod:`~carafe_plugin.modules.guided`) in MMEngine's root ``MODELS`` registry, so that every toolbox builds them from a
configuration by name::

    upsample_cfg = dict(type="CARAFEUpsample", compressed_channels=32, norm_cfg=dict(type="BN"))

It needs MMEngine alone; ``norm_cfg`` and ``act_cfg`` are built by MMCV, which every toolbox brings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from carafe_plugin import modules
from carafe_plugin.modules import guided, peers, rivals
from carafe_plugin.modules.sizes import complete, computed, fit_to_size
from carafe_plugin.openmmlab import require

require("mmengine", __name__)

from mmengine.registry import MODELS  # noqa: E402


def _factory(name: str, cfg: Mapping[str, Any]) -> Callable[..., nn.Module]:
    """Translate ``norm_cfg`` or ``act_cfg`` into the callable that the plain modules take."""
    if not isinstance(cfg, Mapping) or "type" not in cfg:
        raise TypeError(f"{name} must be None or a dictionary with the key 'type', got {cfg!r}")
    require("mmcv", name)
    from mmcv.cnn import build_activation_layer, build_norm_layer

    if name == "act_cfg":
        return lambda: build_activation_layer(dict(cfg))
    return lambda channels: build_norm_layer(dict(cfg), channels)[1]


class _MMEngineLayer(nn.Module):
    """The plain module with configurations of norm and activation."""

    def __init__(
        self,
        *args: Any,
        norm_cfg: Mapping[str, Any] | None = None,
        act_cfg: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if norm_cfg is not None:
            kwargs["norm"] = _factory("norm_cfg", norm_cfg)
        if act_cfg is not None:
            kwargs["act"] = _factory("act_cfg", act_cfg)
        super().__init__(*args, **kwargs)


@MODELS.register_module()
class CARAFEUpsample(_MMEngineLayer, modules.CARAFEUpsample):
    """:class:`carafe_plugin.CARAFEUpsample` for configurations.

    Takes the plain module's arguments, with ``norm_cfg`` and ``act_cfg`` instead of ``norm`` and ``act``.

    Args:
        norm_cfg (dict | None): norm layer after the channel compressor, such as ``dict(type="BN")``.
        act_cfg (dict | None): activation after the norm layer, such as ``dict(type="ReLU")``.

    Raises:
        TypeError: ``norm_cfg`` or ``act_cfg`` is not a dictionary with a ``type``, or an argument is unknown.

    Example:
        >>> import torch
        >>> from mmengine.registry import MODELS
        >>> from carafe_plugin.openmmlab import layers
        >>> upsampler = MODELS.build(dict(type="CARAFEUpsample", channels=16, scale_factor=2))
        >>> upsampler(torch.rand(1, 16, 5, 7)).shape
        torch.Size([1, 16, 10, 14])
    """


@MODELS.register_module()
class CARAFEDownsample(_MMEngineLayer, modules.CARAFEDownsample):
    """:class:`carafe_plugin.CARAFEDownsample` for configurations, as :class:`CARAFEUpsample`.

    The paper's backbones have ``norm_cfg=dict(type="BN")`` and ``act_cfg=dict(type="ReLU")``.

    Example:
        >>> import torch
        >>> from carafe_plugin.openmmlab.layers import CARAFEDownsample
        >>> CARAFEDownsample(channels=16, scale_factor=2)(torch.rand(1, 16, 5, 7)).shape
        torch.Size([1, 16, 3, 4])
    """


for _peer in (*peers.DOWNSAMPLERS, *peers.UPSAMPLERS, *rivals.RIVALS, *guided.GUIDED):
    MODELS.register_module(module=_peer)

_UPSAMPLERS = (modules.CARAFEUpsample, peers.Upsampler)
_DOWNSAMPLERS = (modules.CARAFEDownsample, peers.Downsampler)

INTERPOLATIONS = ("nearest", "bilinear")


class Interpolation(nn.Upsample):
    """The toolboxes' resizing without parameters, which CARAFE++ replaces: features (N, C, H, W) to a given size."""

    def __init__(self, scale_factor: int, mode: str, align_corners: bool | None = None) -> None:
        super().__init__(None, scale_factor, mode, align_corners)

    def forward(self, features: Tensor, size: Sequence[int]) -> Tensor:  # type: ignore[override]
        return F.interpolate(features, size=size, mode=self.mode, align_corners=self.align_corners)


def read_cfg(carafe_cfg: Mapping[str, Any] | None) -> dict[str, Any]:
    """A ``carafe_cfg`` as a dictionary that the caller may change, None as an empty one; else a TypeError."""
    if carafe_cfg is not None and not isinstance(carafe_cfg, Mapping):
        raise TypeError(f"carafe_cfg must be a dictionary or None, got {carafe_cfg!r}")
    return dict(carafe_cfg or {})


def pop_switch(cfg: dict[str, Any], name: str, default: bool) -> bool:
    """Take a switch out of a ``carafe_cfg``; one that is not a bool is a TypeError."""
    switch = cfg.pop(name, default)
    if not isinstance(switch, bool):
        raise TypeError(f"carafe_cfg: the switch {name!r} must be True or False, got {switch!r}")
    return switch


def build_upsampler(
    carafe_cfg: Mapping[str, Any] | None,
    channels: int,
    scale_factor: int = 2,
    align_corners: bool | None = None,
    guides: bool = False,
) -> nn.Module:
    """Build the upsampler that a ``carafe_cfg`` describes, as every adapter of the toolboxes takes it.

    Args:
        carafe_cfg (dict | None): ``type`` is ``"CARAFEUpsample"`` when left out, with its arguments (``up_kernel``,
            ``compressed_channels``, ...) as the other keys; None means the paper's setting. ``"nearest"`` and
            ``"bilinear"`` (which takes ``align_corners``) give :class:`Interpolation`, with which an adapter does
            what its parent does, bit for bit, where the parent interpolates so. Any other type that ``MODELS`` knows is
            built with ``channels``, ``scale_factor`` and the remaining keys.
        channels (int): channels of the features, set by the caller, never by ``carafe_cfg``.
        scale_factor (int): upsampling factor, set by the caller as well.
        align_corners (bool | None): of the interpolation that the upsampler stands in for.
        guides (bool): whether the caller gives :func:`upsample_to` the encoder's map of the size to reach, which types
            with the attribute ``guided`` need (:class:`~carafe_plugin.modules.guided.GuidedUpsampler`).

    Returns:
        nn.Module: the upsampler, to be called through :func:`upsample_to`.

    Raises:
        TypeError: ``carafe_cfg`` is not a dictionary, or has a key that its type does not take.
        ValueError: ``carafe_cfg`` sets ``channels`` or ``scale_factor``, or describes a downsampler, or an upsampler
            that is guided where the caller has no map for it; or its ``init`` is "bilinear" where ``align_corners`` is
            True.
        KeyError: ``type`` is not registered.
    """
    if align_corners and read_cfg(carafe_cfg).get("init") == "bilinear":
        raise ValueError(
            "carafe_cfg: init='bilinear' stands for align_corners=False; with align_corners=True, as here, the weights "
            "of bilinear interpolation change from place to place, and no start has them"
        )
    upsampler = _build_resampler(carafe_cfg, "CARAFEUpsample", channels, scale_factor, INTERPOLATIONS)
    if isinstance(upsampler, _DOWNSAMPLERS):
        raise ValueError(f"carafe_cfg must describe an upsampler, got type={read_cfg(carafe_cfg)['type']!r}")
    if _is_guided(upsampler) and not guides:
        raise ValueError(
            f"carafe_cfg: the type {read_cfg(carafe_cfg)['type']!r} is guided by the encoder's map of the size to "
            f"reach, and there is none in this place: expected a type that upsamples one map"
        )
    return upsampler


def _is_guided(upsampler: nn.Module) -> bool:
    return getattr(upsampler, "guided", False) is True


def build_downsampler(carafe_cfg: Mapping[str, Any] | None, channels: int, scale_factor: int = 2) -> nn.Module:
    """Build the downsampler that a ``carafe_cfg`` describes: (N, C, H, W) -> (N, C, ceil(H / s), ceil(W / s)).

    As :func:`build_upsampler`, with ``"CARAFEDownsample"`` as the ``type`` when left out, and no interpolations.

    Example:
        >>> import torch
        >>> build_downsampler(dict(down_kernel=3), channels=16)(torch.rand(1, 16, 5, 8)).shape
        torch.Size([1, 16, 3, 4])
    """
    downsampler = _build_resampler(carafe_cfg, "CARAFEDownsample", channels, scale_factor)
    if isinstance(downsampler, _UPSAMPLERS):
        raise ValueError(f"carafe_cfg must describe a downsampler, got type={read_cfg(carafe_cfg)['type']!r}")
    return downsampler


def _build_resampler(
    carafe_cfg: Mapping[str, Any] | None,
    default: str,
    channels: int,
    scale_factor: int,
    interpolations: tuple[str, ...] = (),
) -> nn.Module:
    cfg = read_cfg(carafe_cfg)
    kind = cfg.setdefault("type", default)
    fixed = dict(channels=channels, scale_factor=scale_factor)
    for key, value in fixed.items():
        if key in cfg:
            raise ValueError(f"carafe_cfg must not set {key!r}: its place in the network does ({key}={value})")
    known = False
    # MMEngine raises a RuntimeError for a name that it cannot resolve (older versions return None).
    with MODELS.switch_scope_and_registry(cfg.get("_scope_")) as registry, suppress(RuntimeError):
        known = kind in interpolations or not isinstance(kind, str) or registry.get(kind) is not None
    if not known:
        names = ", ".join(repr(name) for name in (default, *interpolations))
        raise KeyError(
            f"carafe_cfg: the type {kind!r} is not registered; expected {names} or another type in MODELS that takes "
            f"channels and scale_factor"
        )
    try:
        if kind in interpolations:
            settings = {key: value for key, value in cfg.items() if key not in ("type", "_scope_")}
            return Interpolation(scale_factor, kind, **settings)
        return MODELS.build(dict(cfg, **fixed))
    except (TypeError, ValueError) as error:
        raise type(error)(f"carafe_cfg={cfg!r}: {error}") from error


def upsample_to(
    upsampler: nn.Module, features: Tensor, size: Sequence[int], encoder_features: Tensor | None = None
) -> Tensor:
    """Upsample features (N, C, H, W) and make them fit a map of exactly ``size`` (H', W').

    ``encoder_features`` (N, C, H', W') are handed on to an upsampler that is guided by them.
    """
    if _is_guided(upsampler):
        return upsampler(features, encoder_features)
    if isinstance(upsampler, Interpolation):
        return upsampler(features, size)
    if not isinstance(upsampler, modules.CARAFEUpsample):
        return fit_to_size(upsampler(features), size)
    return complete(upsampler(features, computed(features, size, upsampler.up, upsampler.down)), size)
