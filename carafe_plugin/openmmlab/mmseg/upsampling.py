"""MMSegmentation's heads, and UNet's upsampling step, that upsample by CARAFE++."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmcv.cnn import ConvModule
from mmengine.model import ModuleList
from mmseg.models.backbones.unet import InterpConv
from mmseg.models.decode_heads import FPNHead, UPerHead
from mmseg.models.utils import Upsample, resize
from mmseg.registry import MODELS
from torch import Tensor, nn

from carafe_plugin.openmmlab.layers import build_upsampler, pop_switch, read_cfg, upsample_to

SWITCHES = ("ppm", "fpn", "fuse")


@MODELS.register_module()
class CARAFEUPerHead(UPerHead):
    """UPerHead that upsamples by CARAFE++ in three places, each a switch (arXiv 2012.04733, Sec. 4.2, Table 9).

    * ``ppm``: a pooled map returns to full size by bilinear interpolation to half of it, rounded up, and CARAFE++ from
      there; ``ppm_upsamplers.{i}`` serves the pooled map ``i``.
    * ``fpn``: CARAFE++ instead of bilinear interpolation; ``upsample_modules.{i}`` feeds lateral ``i``. Here alone can
      an upsampler be guided by the encoder (``"FADE"``): it is given the lateral map, before the sum.
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
        switches = {name: pop_switch(upsampler_cfg, name, bool(places[name])) for name in SWITCHES}

        def build(name: str) -> ModuleList | None:
            if not switches[name]:
                return None
            if not places[name]:
                lacking = "pool_scales is empty" if name == "ppm" else "in_channels has one level"
                raise ValueError(f"carafe_cfg: {name}=True, but there is nothing to upsample: {lacking}")
            try:  # MMEngine's list, not PyTorch's: its init_weights reaches the upsamplers.
                return ModuleList(
                    build_upsampler(upsampler_cfg, channels, align_corners=self.align_corners, guides=name == "fpn")
                    for channels in places[name]
                )
            except TypeError as error:
                known = f"apart from the upsampler's arguments, the switches are {', '.join(SWITCHES)}"
                raise TypeError(f"{error} ({known})") from error

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
                upsampled = upsample_to(self.upsample_modules[i], laterals[i + 1], size, laterals[i])
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
            fused = torch.cat([level, upsample_to(upsampler, fused, level.shape[2:])], dim=1)
        return fused

    def _interpolate(self, features: Tensor, size: Sequence[int]) -> Tensor:
        return resize(features, size=size, mode="bilinear", align_corners=self.align_corners)


@MODELS.register_module()
class CARAFEFPNHead(FPNHead):
    """Semantic FPN's head, whose levels reach the finest one's size by steps of convolution and CARAFE++ by 2.

    Takes FPNHead's arguments and loads FPNHead's checkpoints: the only new parameters stand where FPNHead's
    interpolations stand, in ``scale_heads.{level}.{1, 3, ...}``. The maps may have any size: each step is made to fit
    the level that it reaches, see :func:`~carafe_plugin.openmmlab.layers.fit_to_size`. The paper replaces bilinear
    upsampling in UperNet's FPN so (arXiv 2012.04733, Sec. 4.2).

    Args:
        carafe_cfg (dict | None): the upsampler, described and checked by
            :func:`~carafe_plugin.openmmlab.layers.build_upsampler`; ``dict(type="bilinear")`` with the head's
            ``align_corners`` is FPNHead, bit for bit.

    Raises:
        ValueError: ``feature_strides`` are all the same, so that there is nothing to upsample.

    Example:
        >>> import torch
        >>> head = CARAFEFPNHead(feature_strides=[4, 8, 16], in_channels=[8, 8, 8], in_index=[0, 1, 2], channels=16,
        ...                      num_classes=5)
        >>> head([torch.rand(2, 8, 25, 33), torch.rand(2, 8, 13, 17), torch.rand(2, 8, 7, 9)]).shape
        torch.Size([2, 5, 25, 33])
    """

    def __init__(self, *args: Any, carafe_cfg: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not any(isinstance(step, Upsample) for step in self.scale_heads.modules()):
            raise ValueError(f"feature_strides={list(self.feature_strides)} leave nothing to upsample")
        for scale_head in self.scale_heads:
            _replace_upsample(scale_head, carafe_cfg, self.channels)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """The backbone's or neck's maps, fine to coarse, to logits (N, num_classes, H_0, W_0)."""
        maps = self._transform_inputs(inputs)
        sizes = {stride: x.shape[2:] for stride, x in zip(self.feature_strides, maps, strict=True)}
        output = self.scale_heads[0](maps[0])
        for stride, scale_head, x in zip(self.feature_strides[1:], self.scale_heads[1:], maps[1:], strict=True):
            for step in scale_head:
                if isinstance(step, (ConvModule, Upsample)):
                    x = step(x)
                    continue
                stride //= 2
                # Fitted here, and not by the interpolation at the end, which would blur what was reassembled.
                x = upsample_to(step, x, sizes[stride]) if stride in sizes else step(x)
            output = output + resize(x, size=output.shape[2:], mode="bilinear", align_corners=self.align_corners)
        return self.cls_seg(output)


def _replace_upsample(steps: nn.Sequential, carafe_cfg: Mapping[str, Any] | None, channels: int) -> None:
    """Swap every ``Upsample`` of a sequence for CARAFE++, in place: the other steps keep their checkpoint keys.

    ``carafe_cfg`` and ``channels`` are :func:`~carafe_plugin.openmmlab.layers.build_upsampler`'s; ``"nearest"`` and
    ``"bilinear"`` give an ``Upsample`` of that mode. A factor that is not one whole number is a ValueError.
    """
    for i, step in enumerate(steps):
        if not isinstance(step, Upsample):
            continue
        factor = step.scale_factor
        if step.size is not None or not isinstance(factor, float) or not factor.is_integer():
            raise ValueError(
                f"upsample_cfg must set scale_factor to a whole number where CARAFE++ upsamples, "
                f"got size={step.size}, scale_factor={factor}"
            )
        upsampler = build_upsampler(carafe_cfg, channels, int(factor), step.align_corners)
        if isinstance(upsampler, nn.Upsample):
            upsampler = Upsample(None, factor, upsampler.mode, upsampler.align_corners)
        steps[i] = upsampler


@MODELS.register_module()
class CARAFEInterpConv(InterpConv):
    """InterpConv, the decoder's upsampling step in UNet, with CARAFE++ for its interpolation.

    In a configuration it is UNet's ``upsample_cfg``::

        backbone = dict(type="UNet", upsample_cfg=dict(type="carafe_plugin.openmmlab.mmseg.CARAFEInterpConv"))

    Takes InterpConv's arguments and loads InterpConv's checkpoints: the only new parameters are CARAFE++'s, in
    ``interp_upsample.0``, or ``.1`` where the convolution comes first. The paper upsamples a U-net's decoder so in
    Sec. 4.3 (arXiv 2012.04733).

    Args:
        carafe_cfg (dict | None): the upsampler, described and checked by
            :func:`~carafe_plugin.openmmlab.layers.build_upsampler`; its factor is the ``scale_factor`` of InterpConv's
            ``upsample_cfg``.

    Raises:
        ValueError: the ``scale_factor`` of ``upsample_cfg`` is not one whole number.

    Example:
        >>> import torch
        >>> CARAFEInterpConv(32, 16, carafe_cfg=dict(up_kernel=3))(torch.rand(2, 32, 6, 8)).shape
        torch.Size([2, 16, 12, 16])
    """

    def __init__(self, *args: Any, carafe_cfg: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        conv_first = isinstance(self.interp_upsample[1], Upsample)
        conv = self.interp_upsample[0 if conv_first else 1]
        _replace_upsample(self.interp_upsample, carafe_cfg, conv.out_channels if conv_first else conv.in_channels)
