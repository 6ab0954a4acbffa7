"""CARAFE++ instead of MMSegmentation's ``Upsample``, and UNet's upsampling step with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmseg.models.backbones.unet import InterpConv
from mmseg.models.utils import Upsample
from mmseg.registry import MODELS
from torch import nn

from carafe_plugin.openmmlab.layers import Interpolation, build_upsampler


def replace_upsample(steps: nn.Sequential, carafe_cfg: Mapping[str, Any] | None, channels: int) -> None:
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
        upsampler = build_upsampler(carafe_cfg, channels, int(factor))
        if isinstance(upsampler, Interpolation):
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
        replace_upsample(self.interp_upsample, carafe_cfg, conv.out_channels if conv_first else conv.in_channels)
