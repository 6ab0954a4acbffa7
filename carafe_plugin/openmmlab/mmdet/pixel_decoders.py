"""The pixel decoders of MaskFormer and Mask2Former, whose top-down path upsamples by CARAFE++."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmcv.cnn import Conv2d
from mmdet.models.dense_heads import MaskFormerHead
from mmdet.models.layers import MSDeformAttnPixelDecoder, PixelDecoder, TransformerEncoderPixelDecoder
from mmdet.models.task_modules.prior_generators import MlvlPointGenerator
from mmdet.registry import MODELS
from mmengine.model import ModuleList
from torch import Tensor, nn

from carafe_plugin.openmmlab.layers import build_upsampler, upsample_to


class _WithoutTopDownPath:
    """A decoder with some attributes changed, in place of ``self`` in its parent's ``forward``."""

    def __init__(self, decoder: Any, **changes: Any) -> None:
        vars(self).update(changes, decoder=decoder)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoder, name)


class _DecoderTopDownPath:
    """What follows the coarsest map in each of the decoders.

    They interpolate in the middle of ``forward``, with no hook for an upsampler with parameters: the parent's runs as
    if there were no level below the coarsest, and what follows is restated here.
    """

    lateral_convs: nn.ModuleList
    output_convs: nn.ModuleList
    mask_feature: nn.Conv2d

    def __init__(self, *args: Any, carafe_cfg: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not len(self.lateral_convs):
            raise ValueError("in_channels leaves no level below the coarsest: there is nothing to upsample")
        channels = self.mask_feature.in_channels
        self.upsample_modules = ModuleList(build_upsampler(carafe_cfg, channels) for _ in self.lateral_convs)

    def _start(self, *inputs: Any, **changes: Any) -> tuple[Tensor, Any]:
        """The coarsest map, and what the parent's ``forward`` returns beside the mask features made of it."""
        changed: Any = _WithoutTopDownPath(self, mask_feature=nn.Identity(), **changes)
        return super().forward.__func__(changed, *inputs)  # type: ignore[misc]

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


@MODELS.register_module()
class CARAFETransformerEncoderPixelDecoder(_DecoderTopDownPath, TransformerEncoderPixelDecoder):
    """MaskFormer's pixel decoder with a transformer encoder, upsampling by CARAFE++.

    Takes TransformerEncoderPixelDecoder's arguments and loads its checkpoints, with ``carafe_cfg`` and
    ``upsample_modules`` as in :class:`CARAFEPixelDecoder`.
    """


@MODELS.register_module()
class CARAFEMSDeformAttnPixelDecoder(_DecoderTopDownPath, MSDeformAttnPixelDecoder):
    """Mask2Former's pixel decoder, upsampling by CARAFE++ after its multi-scale deformable attention.

    The attention serves the coarser levels; the finer ones, as a rule the finest alone, are reached by a top-down path
    whose bilinear interpolation CARAFE++ replaces. Where it serves all, a ValueError says so.

    Takes MSDeformAttnPixelDecoder's arguments and loads its checkpoints, with ``carafe_cfg`` and ``upsample_modules``
    as in :class:`CARAFEPixelDecoder`. For MMSegmentation's Mask2Former, built on MMDetection's, the full path is the
    type as well.
    """

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
