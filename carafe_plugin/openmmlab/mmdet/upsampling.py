"""MMDetection's necks, pixel decoders and mask head that upsample by CARAFE++."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from mmcv.cnn import Conv2d
from mmdet.models.dense_heads import MaskFormerHead
from mmdet.models.layers import MSDeformAttnPixelDecoder, PixelDecoder, TransformerEncoderPixelDecoder
from mmdet.models.necks import FPN, PAFPN
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.task_modules.prior_generators import MlvlPointGenerator
from mmdet.registry import MODELS
from mmengine.model import ModuleList
from torch import Tensor, nn

from carafe_plugin.modules.checks import check_features
from carafe_plugin.openmmlab.layers import INTERPOLATIONS, build_upsampler, fit_to_size, read_cfg, upsample_to


class _TopDownPath:
    """The parts of FPN and PAFPN between the lateral convolutions and the outputs.

    Both interpolate in the middle of ``forward``, with no hook for an upsampler with parameters: it is restated here.
    """

    in_channels: list[int]
    out_channels: int
    num_outs: int
    start_level: int
    backbone_end_level: int
    add_extra_convs: bool | str
    relu_before_extra_convs: bool
    upsample_cfg: dict
    lateral_convs: nn.ModuleList
    fpn_convs: nn.ModuleList

    def __init__(self, *args: Any, carafe_cfg: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        align_corners = self.upsample_cfg.get("align_corners")
        # MMEngine's list, not PyTorch's: its init_weights reaches the upsamplers.
        self.upsample_modules = ModuleList(
            build_upsampler(carafe_cfg, self.out_channels, align_corners=align_corners, guides=True)
            for _ in self.lateral_convs[1:]
        )

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Fuse the backbone's maps, fine to coarse, each (N, in_channels[i], H_i, W_i), into ``num_outs`` maps."""
        if len(inputs) != len(self.in_channels):
            raise ValueError(f"inputs must hold {len(self.in_channels)} maps (in_channels), got {len(inputs)}")
        laterals = []
        for level, lateral_conv in enumerate(self.lateral_convs, start=self.start_level):
            check_features(inputs[level], self.in_channels[level], f"inputs[{level}]", f"in_channels[{level}]")
            laterals.append(lateral_conv(inputs[level]))
        for i in reversed(range(len(laterals) - 1)):
            upsampled = upsample_to(self.upsample_modules[i], laterals[i + 1], laterals[i].shape[2:], laterals[i])
            laterals[i] = laterals[i] + upsampled
        outs = self._merge_bottom_up([conv(x) for conv, x in zip(self.fpn_convs, laterals, strict=False)])
        while len(outs) < self.num_outs:  # levels above the backbone's last: subsampled, or by convolutions of stride 2
            if not self.add_extra_convs:
                outs.append(F.max_pool2d(outs[-1], 1, stride=2))
                continue
            source = outs[-1]
            if len(outs) == len(laterals):  # the first extra level, where the options differ
                if self.add_extra_convs == "on_input":
                    source = inputs[self.backbone_end_level - 1]
                elif self.add_extra_convs == "on_lateral":
                    source = laterals[-1]
            elif self.relu_before_extra_convs:
                source = F.relu(source)
            outs.append(self.fpn_convs[len(outs)](source))
        return tuple(outs)

    def _merge_bottom_up(self, maps: list[Tensor]) -> list[Tensor]:
        return maps


@MODELS.register_module()
class CARAFEFPN(_TopDownPath, FPN):
    """FPN whose top-down path upsamples by CARAFE++ (arXiv 2012.04733, Sec. 4.1).

    Takes FPN's arguments and loads FPN's checkpoints: the only new parameters are in ``upsample_modules``, where
    ``upsample_modules.{i}`` makes the map that is added to lateral ``i``. The maps may have any size: see
    :func:`~carafe_plugin.openmmlab.layers.fit_to_size`. FPN's ``upsample_cfg`` describes the interpolation that
    CARAFE++ stands in for: it is accepted, so that changing ``type`` is enough, and has no effect, except that
    ``carafe_cfg=dict(init="bilinear")`` is refused where it aligns corners. An upsampler that is guided by the encoder
    (``"FADE"``) is given the lateral map, before the sum.

    Args:
        carafe_cfg (dict | None): the upsampler, described and checked by
            :func:`~carafe_plugin.openmmlab.layers.build_upsampler`.

    Raises:
        ValueError: ``inputs`` does not match ``in_channels``.

    Example:
        >>> import torch
        >>> neck = CARAFEFPN(in_channels=[8, 16, 32], out_channels=16, num_outs=4)
        >>> [tuple(m.shape[2:]) for m in neck([torch.rand(1, 8, 25, 41), torch.rand(1, 16, 13, 21),
        ...                                    torch.rand(1, 32, 7, 11)])]
        [(25, 41), (13, 21), (7, 11), (4, 6)]
    """


@MODELS.register_module()
class CARAFEPAFPN(_TopDownPath, PAFPN):
    """PAFPN whose top-down path upsamples by CARAFE++; the bottom-up path keeps its strided convolutions.

    Takes PAFPN's arguments and loads PAFPN's checkpoints, with ``carafe_cfg`` and ``upsample_modules`` as in
    :class:`CARAFEFPN`.

    Example:
        >>> import torch
        >>> neck = CARAFEPAFPN(in_channels=[8, 16], out_channels=16, num_outs=2)
        >>> [tuple(m.shape[2:]) for m in neck([torch.rand(1, 8, 25, 41), torch.rand(1, 16, 13, 21)])]
        [(25, 41), (13, 21)]
    """

    def _merge_bottom_up(self, maps: list[Tensor]) -> list[Tensor]:
        for i, downsample_conv in enumerate(self.downsample_convs):
            # The convolution gives ceil(H / 2) rows, which is one too many where a backbone rounds down.
            maps[i + 1] = maps[i + 1] + fit_to_size(downsample_conv(maps[i]), maps[i + 1].shape[2:])
        return maps[:1] + [conv(x) for conv, x in zip(self.pafpn_convs, maps[1:], strict=True)]


class _WithoutTopDownPath:
    """A decoder with some attributes changed, in place of ``self`` in its parent's ``forward``."""

    def __init__(self, decoder: Any, **changes: Any) -> None:
        self.decoder = decoder
        for name, value in changes.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoder, name)


class _DecoderTopDownPath:
    """What follows the coarsest map in each of the decoders.

    They interpolate in the middle of ``forward``, with no hook for an upsampler with parameters: the parent's runs as
    if there were no level below the coarsest, and what follows is restated here.
    """

    parent: Any  # the decoder whose forward runs first
    lateral_convs: nn.ModuleList
    output_convs: nn.ModuleList
    mask_feature: nn.Conv2d

    def __init__(self, *args: Any, carafe_cfg: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not len(self.lateral_convs):
            raise ValueError("in_channels leaves no level below the coarsest: there is nothing to upsample")
        channels = self.mask_feature.in_channels
        self.upsample_modules = ModuleList(build_upsampler(carafe_cfg, channels) for _ in self.lateral_convs)

    def init_weights(self) -> None:
        """The parent's, which names its own layers one by one, and that of the upsamplers."""
        super().init_weights()  # type: ignore[misc]
        self.upsample_modules.init_weights()

    def _start(self, *inputs: Any, **changes: Any) -> tuple[Tensor, Any]:
        """The coarsest map, and what the parent's ``forward`` returns beside the mask features made of it."""
        # A function, since torch.fx wants to know where a module has its place.
        return self.parent.forward(_WithoutTopDownPath(self, mask_feature=lambda maps: maps, **changes), *inputs)

    def _merge_top_down(self, coarsest: Tensor, feats: Sequence[Tensor]) -> list[Tensor]:
        """From the coarsest map down: upsample, add the lateral map of the level below, convolve; all results."""
        maps = [coarsest]
        for i in reversed(range(len(self.lateral_convs))):
            lateral = self.lateral_convs[i](feats[i])
            upsampled = upsample_to(self.upsample_modules[i], maps[-1], lateral.shape[2:])
            maps.append(self.output_convs[i](lateral + upsampled))
        return maps

    def forward(self, feats: Sequence[Tensor], batch_img_metas: Sequence[dict]) -> tuple[Tensor, Tensor]:
        """The backbone's maps, fine to coarse, to the mask features (N, out_channels, H_0, W_0) and the memory."""
        coarsest, memory = self._start(feats, batch_img_metas, num_inputs=1)
        return self.mask_feature(self._merge_top_down(coarsest, feats)[-1]), memory


@MODELS.register_module()
class CARAFEPixelDecoder(_DecoderTopDownPath, PixelDecoder):
    """MaskFormer's pixel decoder, an FPN, upsampling by CARAFE++ (arXiv 2012.04733, Sec. 4.1).

    Takes PixelDecoder's arguments and loads its checkpoints: the only new parameters are in ``upsample_modules``, where
    ``upsample_modules.{i}`` makes the map that is added to lateral ``i``. The maps may have any size: see
    :func:`~carafe_plugin.openmmlab.layers.fit_to_size`.

    MaskFormerHead recognises PixelDecoder by its exact type. Where the coarsest map has other channels than the
    transformer decoder, the head must be :class:`CARAFEMaskFormerHead`.

    Args:
        carafe_cfg (dict | None): the upsampler, described and checked by
            :func:`~carafe_plugin.openmmlab.layers.build_upsampler`.

    Raises:
        ValueError: ``in_channels`` leaves nothing to upsample.

    Example:
        >>> import torch
        >>> decoder = CARAFEPixelDecoder(in_channels=[8, 16, 32], feat_channels=32, out_channels=12)
        >>> mask_feature, memory = decoder([torch.rand(1, 8, 25, 41), torch.rand(1, 16, 13, 21),
        ...                                 torch.rand(1, 32, 7, 11)], batch_img_metas=[])
        >>> mask_feature.shape, memory.shape
        (torch.Size([1, 12, 25, 41]), torch.Size([1, 32, 7, 11]))
    """

    parent = PixelDecoder


@MODELS.register_module()
class CARAFETransformerEncoderPixelDecoder(_DecoderTopDownPath, TransformerEncoderPixelDecoder):
    """MaskFormer's pixel decoder with a transformer encoder, upsampling by CARAFE++.

    Takes TransformerEncoderPixelDecoder's arguments and loads its checkpoints, with ``carafe_cfg`` and
    ``upsample_modules`` as in :class:`CARAFEPixelDecoder`.
    """

    parent = TransformerEncoderPixelDecoder


@MODELS.register_module()
class CARAFEMSDeformAttnPixelDecoder(_DecoderTopDownPath, MSDeformAttnPixelDecoder):
    """Mask2Former's pixel decoder, upsampling by CARAFE++ after its multi-scale deformable attention.

    The attention serves the coarser levels; the finer ones, as a rule the finest alone, are reached by a top-down path
    whose bilinear interpolation CARAFE++ replaces. Where it serves all, a ValueError says so.

    Takes MSDeformAttnPixelDecoder's arguments and loads its checkpoints, with ``carafe_cfg`` and ``upsample_modules``
    as in :class:`CARAFEPixelDecoder`. For MMSegmentation's Mask2Former, built on MMDetection's, the full path is the
    type as well.
    """

    parent = MSDeformAttnPixelDecoder

    def forward(self, feats: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:  # type: ignore[override]
        """The backbone's maps, fine to coarse, (N, in_channels[i], H_i, W_i) each, to what Mask2Former needs.

        Returns:
            The mask features (N, out_channels, H_0, W_0), and the ``num_outs`` maps that the transformer decoder
            attends to, coarse to fine, (N, feat_channels, H_i, W_i) each.
        """
        n = self.num_encoder_levels
        strides = self.strides[-n:]
        coarsest, encoded = self._start(
            feats[-n:], num_input_levels=n, num_outs=n, strides=strides, point_generator=MlvlPointGenerator(strides)
        )
        maps = encoded[:-1] + self._merge_top_down(coarsest, feats)
        return self.mask_feature(maps[-1]), maps[: self.num_outs]


class MemoryProjection(nn.Module):
    """Projects the memory of :class:`CARAFEPixelDecoder` to the channels of a MaskFormerHead's transformer decoder.

    MaskFormerHead does so for PixelDecoder alone; ``enforce_decoder_input_project`` asks for it where the channels are
    the same, too.
    """

    pixel_decoder: nn.Module
    decoder_embed_dims: int

    def __init__(self, *args: Any, enforce_decoder_input_project: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, enforce_decoder_input_project=enforce_decoder_input_project, **kwargs)
        if not isinstance(self.pixel_decoder, CARAFEPixelDecoder):
            return
        channels = self.pixel_decoder.in_channels[-1]
        if enforce_decoder_input_project or channels != self.decoder_embed_dims:
            self.decoder_input_proj = Conv2d(channels, self.decoder_embed_dims, kernel_size=1)


@MODELS.register_module()
class CARAFEMaskFormerHead(MemoryProjection, MaskFormerHead):
    """MaskFormerHead, with its arguments and checkpoints, for a ``pixel_decoder`` that is CARAFEPixelDecoder."""


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
