"""UperNet's head, upsampling by CARAFE++ in its PPM, FPN and FUSE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.model import ModuleList
from mmseg.models.decode_heads import UPerHead
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from torch import Tensor, nn

from carafe_plugin.openmmlab.layers import build_upsampler, read_cfg, upsample_to

SWITCHES = ("ppm", "fpn", "fuse")


@MODELS.register_module()
class CARAFEUPerHead(UPerHead):
    """UPerHead that upsamples by CARAFE++ in three places, each a switch (arXiv 2012.04733, Sec. 4.2, Table 9).

    * ``ppm``: a pooled map returns to full size by bilinear interpolation to half of it, rounded up, and CARAFE++ from
      there; ``ppm_upsamplers.{i}`` serves the pooled map ``i``.
    * ``fpn``: CARAFE++ instead of bilinear interpolation; ``upsample_modules.{i}`` feeds lateral ``i``.
    * ``fuse``: instead of interpolating every level to the finest size at once, upsample and concatenate in turn:
      ``[P2, up([P3, up([P4, up(P5)])])]`` with P2 the finest. The channels lie as UPerHead has them;
      ``fuse_upsamplers.{i}`` makes what follows level ``i``.

    Takes UPerHead's arguments and loads UPerHead's checkpoints, whichever switches are on: the only new parameters are
    in these modules. With every switch off it is UPerHead, bit for bit. The maps may have any size: see
    :func:`~carafe_plugin.openmmlab.layers.fit_to_size`.

    Args:
        carafe_cfg (dict | None): the switches ``ppm``, ``fpn`` and ``fuse``, each on where it is left out and the head
            has such a place, and the upsampler, described and checked by
            :func:`~carafe_plugin.openmmlab.layers.build_upsampler`.

    Raises:
        TypeError: a switch is not a bool.
        ValueError: a switch is on where the head has nothing to upsample.

    Example:
        >>> import torch
        >>> head = CARAFEUPerHead(in_channels=[8, 16, 32, 64], in_index=[0, 1, 2, 3], channels=16, num_classes=5)
        >>> head([torch.rand(2, 8, 25, 33), torch.rand(2, 16, 13, 17), torch.rand(2, 32, 7, 9),
        ...       torch.rand(2, 64, 4, 5)]).shape
        torch.Size([2, 5, 25, 33])
    """

    def __init__(self, *args: Any, carafe_cfg: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        upsampler_cfg = read_cfg(carafe_cfg)
        super().__init__(*args, **kwargs)
        levels_below_top = len(self.lateral_convs)
        # Every module's channels, in the order of its list.
        places = dict(
            ppm=[self.channels] * len(self.psp_modules),
            fpn=[self.channels] * levels_below_top,
            fuse=[self.channels * (levels_below_top - i) for i in range(levels_below_top)],
        )
        switches = {name: _pop_switch(upsampler_cfg, name, bool(places[name])) for name in SWITCHES}

        def build(name: str) -> ModuleList | None:
            # MMEngine's list, not PyTorch's: its init_weights reaches the upsamplers.
            return ModuleList(_build(upsampler_cfg, c) for c in places[name]) if switches[name] else None

        self.ppm_upsamplers = build("ppm")
        self.upsample_modules = build("fpn")
        self.fuse_upsamplers = build("fuse")

    def psp_forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Pool the coarsest map to several sizes, bring all of them back to its own, and merge them with it."""
        if self.ppm_upsamplers is None:
            return super().psp_forward(inputs)
        features = inputs[-1]
        height, width = features.shape[2:]
        maps = [features]
        for pool, upsampler in zip(self.psp_modules, self.ppm_upsamplers, strict=True):
            halfway = self._interpolate(pool(features), ((height + 1) // 2, (width + 1) // 2))
            maps.append(upsample_to(upsampler, halfway, (height, width)))
        return self.bottleneck(torch.cat(maps, dim=1))

    def _forward_feature(self, inputs: Sequence[Tensor]) -> Tensor:
        """The backbone's maps, fine to coarse, to the features (N, channels, H_0, W_0) that are classified.

        UPerHead interpolates in the middle of this method, with no hook for an upsampler that has parameters.
        """
        inputs = self._transform_inputs(inputs)
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, inputs, strict=False)]
        laterals.append(self.psp_forward(inputs))
        for i in reversed(range(len(laterals) - 1)):
            size = laterals[i].shape[2:]
            if self.upsample_modules is None:
                upsampled = self._interpolate(laterals[i + 1], size)
            else:
                upsampled = upsample_to(self.upsample_modules[i], laterals[i + 1], size)
            laterals[i] = laterals[i] + upsampled
        levels = [conv(lateral) for conv, lateral in zip(self.fpn_convs, laterals, strict=False)]
        return self.fpn_bottleneck(self._fuse([*levels, laterals[-1]]))

    def _fuse(self, levels: list[Tensor]) -> Tensor:
        """Concatenate the levels, fine to coarse, at the size of the finest."""
        if self.fuse_upsamplers is None:
            size = levels[0].shape[2:]
            return torch.cat(levels[:1] + [self._interpolate(level, size) for level in levels[1:]], dim=1)
        fused = levels[-1]
        for level, upsampler in zip(levels[-2::-1], reversed(self.fuse_upsamplers), strict=True):
            height, width = level.shape[2:]
            fused = torch.cat([level, upsample_to(upsampler, fused, (height, width))], dim=1)
        return fused

    def _interpolate(self, features: Tensor, size: Sequence[int]) -> Tensor:
        return resize(features, size=size, mode="bilinear", align_corners=self.align_corners)


def _pop_switch(cfg: dict[str, Any], name: str, exists: bool) -> bool:
    switch = cfg.pop(name, exists)
    if not isinstance(switch, bool):
        raise TypeError(f"carafe_cfg: the switch {name!r} must be True or False, got {switch!r}")
    if switch and not exists:
        lacking = "pool_scales is empty" if name == "ppm" else "in_channels has one level"
        raise ValueError(f"carafe_cfg: {name}=True, but there is nothing to upsample: {lacking}")
    return switch


def _build(cfg: Mapping[str, Any], channels: int) -> nn.Module:
    try:
        return build_upsampler(cfg, channels)
    except TypeError as error:
        raise TypeError(
            f"{error} (apart from the upsampler's arguments, the switches are {', '.join(SWITCHES)})"
        ) from error
