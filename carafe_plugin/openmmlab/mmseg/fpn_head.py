"""Semantic FPN's head, upsampling by CARAFE++."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmcv.cnn import ConvModule
from mmseg.models.decode_heads import FPNHead
from mmseg.models.utils import Upsample, resize
from mmseg.registry import MODELS
from torch import Tensor

from carafe_plugin.openmmlab.layers import fit_to_size
from carafe_plugin.openmmlab.mmseg.upsample import replace_upsample


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
            replace_upsample(scale_head, carafe_cfg, self.channels)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """The backbone's or neck's maps, fine to coarse, to logits (N, num_classes, H_0, W_0)."""
        maps = self._transform_inputs(inputs)
        sizes = {stride: x.shape[2:] for stride, x in zip(self.feature_strides, maps, strict=True)}
        output = self.scale_heads[0](maps[0])
        for stride, scale_head, x in zip(self.feature_strides[1:], self.scale_heads[1:], maps[1:], strict=True):
            for step in scale_head:
                x = step(x)
                if not isinstance(step, (ConvModule, Upsample)):
                    stride //= 2
                    # Fitted here, and not by the interpolation at the end, which would blur what was reassembled.
                    x = fit_to_size(x, sizes.get(stride, x.shape[2:]))
            output = output + resize(x, size=output.shape[2:], mode="bilinear", align_corners=self.align_corners)
        return self.cls_seg(output)
