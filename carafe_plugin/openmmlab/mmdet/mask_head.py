"""The mask head of Mask R-CNN, upsampling by CARAFE++."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.registry import MODELS

from carafe_plugin.openmmlab.layers import INTERPOLATIONS, build_upsampler, read_cfg


@MODELS.register_module()
class CARAFEFCNMaskHead(FCNMaskHead):
    """Mask head that upsamples by CARAFE++ where FCNMaskHead has its deconvolution (arXiv 2012.04733, Sec. 4.1).

    Takes FCNMaskHead's arguments. Of its checkpoints everything loads but ``upsample``, whose parameters are
    CARAFE++'s. ``conv_logits`` keeps its shape where ``in_channels`` and ``conv_out_channels`` do.

    Args:
        upsample_cfg (dict): what CARAFE++ stands in for; only its ``scale_factor`` is read.
        carafe_cfg (dict | None): the upsampler, described and checked by
            :func:`~carafe_plugin.openmmlab.layers.build_upsampler`; here ``scale_factor`` overrides that of
            ``upsample_cfg``, and ``"deconv"``, ``"nearest"`` and ``"bilinear"`` give FCNMaskHead with that upsampler.

    Raises:
        ValueError: ``upsample_cfg`` has type None, so that there is nothing to replace.

    Example:
        >>> import torch
        >>> head = CARAFEFCNMaskHead(num_convs=1, in_channels=16, conv_out_channels=16, num_classes=3)
        >>> head(torch.rand(2, 16, 14, 14)).shape
        torch.Size([2, 3, 28, 28])
    """

    def __init__(
        self,
        *args: Any,
        upsample_cfg: Mapping[str, Any] = dict(type="deconv", scale_factor=2),
        carafe_cfg: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if upsample_cfg.get("type") is None:
            raise ValueError(f"upsample_cfg must name the upsampler that CARAFE++ replaces, got {dict(upsample_cfg)!r}")
        cfg = read_cfg(carafe_cfg)
        scale_factor = cfg.pop("scale_factor", upsample_cfg.get("scale_factor", 2))
        if cfg.get("type") in ("deconv", *INTERPOLATIONS):
            super().__init__(*args, upsample_cfg=dict(cfg, scale_factor=scale_factor), **kwargs)
            return
        # The parent knows upsamplers by a fixed list of names. Without one it still runs whatever `upsample` holds.
        super().__init__(*args, upsample_cfg=dict(type=None, scale_factor=scale_factor), **kwargs)
        channels = self.conv_out_channels if self.num_convs > 0 else self.in_channels
        self.upsample = build_upsampler(cfg, channels, scale_factor)
        self.upsample_cfg = cfg
        self.upsample_method = cfg.get("type", "CARAFEUpsample")
