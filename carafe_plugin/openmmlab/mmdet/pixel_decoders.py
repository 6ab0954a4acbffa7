"""The pixel decoders of MaskFormer and Mask2Former, whose top-down path upsamples by CARAFE++."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn import Conv2d
from mmdet.models.dense_heads import MaskFormerHead
from mmdet.models.layers import MSDeformAttnPixelDecoder, PixelDecoder, TransformerEncoderPixelDecoder
from mmdet.registry import MODELS
from mmengine.model import ModuleList
from torch import Tensor, nn

from carafe_plugin.openmmlab.layers import build_upsampler, upsample_to


class _DecoderTopDownPath:
    """What follows the coarsest map in each of the decoders.

    They interpolate in the middle of ``forward``, with no hook for an upsampler with parameters: it is restated here.
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

    def _merge_top_down(self, coarsest: Tensor, feats: Sequence[Tensor]) -> list[Tensor]:
        """From the coarsest map down: upsample, add the lateral map of the level below, convolve; all results."""
        maps = [coarsest]
        for i in reversed(range(len(self.lateral_convs))):
            lateral = self.lateral_convs[i](feats[i])
            height, width = lateral.shape[2:]
            upsampled = upsample_to(self.upsample_modules[i], maps[-1], (height, width))
            maps.append(self.output_convs[i](lateral + upsampled))
        return maps


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

    def forward(self, feats: Sequence[Tensor], batch_img_metas: Sequence[dict]) -> tuple[Tensor, Tensor]:
        """The backbone's maps, fine to coarse, to the mask features (N, out_channels, H_0, W_0) and the memory."""
        maps = self._merge_top_down(self.last_feat_conv(feats[-1]), feats)
        return self.mask_feature(maps[-1]), feats[-1]


@MODELS.register_module()
class CARAFETransformerEncoderPixelDecoder(_DecoderTopDownPath, TransformerEncoderPixelDecoder):
    """MaskFormer's pixel decoder with a transformer encoder, upsampling by CARAFE++.

    Takes TransformerEncoderPixelDecoder's arguments and loads its checkpoints, with ``carafe_cfg`` and
    ``upsample_modules`` as in :class:`CARAFEPixelDecoder`.
    """

    def forward(self, feats: Sequence[Tensor], batch_img_metas: Sequence[dict]) -> tuple[Tensor, Tensor]:
        """The backbone's maps, fine to coarse, to the mask features (N, out_channels, H_0, W_0) and the memory."""
        memory = self._encode(feats[-1], batch_img_metas)
        maps = self._merge_top_down(self.encoder_out_proj(memory), feats)
        return self.mask_feature(maps[-1]), memory

    def _encode(self, features: Tensor, batch_img_metas: Sequence[dict]) -> Tensor:
        """The transformer encoder on the coarsest map, (N, C, H, W) -> (N, feat_channels, H, W)."""
        n, _, height, width = features.shape
        # True where an image of the batch was padded.
        padding = features.new_ones((n, 1, *batch_img_metas[0]["batch_input_shape"]), dtype=torch.float32)
        for image, meta in zip(padding, batch_img_metas, strict=True):
            image[:, : meta["img_shape"][0], : meta["img_shape"][1]] = 0
        padding_mask = F.interpolate(padding, size=(height, width), mode="nearest")[:, 0].to(torch.bool)
        memory = self.encoder(
            query=_as_sequence(self.encoder_in_proj(features)),
            query_pos=_as_sequence(self.positional_encoding(padding_mask)),
            key_padding_mask=padding_mask.flatten(1),
        )
        return memory.transpose(1, 2).reshape(n, -1, height, width)


@MODELS.register_module()
class CARAFEMSDeformAttnPixelDecoder(_DecoderTopDownPath, MSDeformAttnPixelDecoder):
    """Mask2Former's pixel decoder, upsampling by CARAFE++ after its multi-scale deformable attention.

    The attention serves the coarser levels; the finer ones, as a rule the finest alone, are reached by a top-down path
    whose bilinear interpolation CARAFE++ replaces. Where it serves all, a ValueError says so.

    Takes MSDeformAttnPixelDecoder's arguments and loads its checkpoints, with ``carafe_cfg`` and ``upsample_modules``
    as in :class:`CARAFEPixelDecoder`. For MMSegmentation's Mask2Former, built on MMDetection's, the full path is the
    type as well.
    """

    def forward(self, feats: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The backbone's maps, fine to coarse, (N, in_channels[i], H_i, W_i) each, to what Mask2Former needs.

        Returns:
            The mask features (N, out_channels, H_0, W_0), and the ``num_outs`` maps that the transformer decoder
            attends to, coarse to fine, (N, feat_channels, H_i, W_i) each.
        """
        encoded = self._encode(feats)
        maps = encoded[:-1] + self._merge_top_down(encoded[-1], feats)
        return self.mask_feature(maps[-1]), maps[: self.num_outs]

    def _encode(self, feats: Sequence[Tensor]) -> list[Tensor]:
        """Multi-scale deformable attention over the coarser levels, coarse to fine."""
        n = feats[0].shape[0]
        queries, embeddings, points, sizes = [], [], [], []
        for i, input_conv in enumerate(self.input_convs):
            level = self.num_input_levels - 1 - i
            features, stride = feats[level], self.strides[level]
            height, width = features.shape[2:]
            no_padding = features.new_zeros((n, height, width), dtype=torch.bool)
            embedding = self.postional_encoding(no_padding) + self.level_encoding.weight[i].view(1, -1, 1, 1)
            centres = self.point_generator.single_level_grid_priors((height, width), level, device=features.device)
            queries.append(_as_sequence(input_conv(features)))
            embeddings.append(_as_sequence(embedding))
            points.append(centres / centres.new_tensor([width * stride, height * stride]))
            sizes.append((height, width))
        levels, lengths = len(sizes), [height * width for height, width in sizes]
        spatial_shapes = torch.tensor(sizes, device=feats[0].device)
        level_ends = spatial_shapes.prod(dim=1).cumsum(dim=0)
        query, reference_points = torch.cat(queries, dim=1), torch.cat(points)
        memory = self.encoder(
            query=query,
            query_pos=torch.cat(embeddings, dim=1),
            key_padding_mask=query.new_zeros(query.shape[:2], dtype=torch.bool),
            spatial_shapes=spatial_shapes,
            # Every image and every level of the keys is sampled at the same place, in fractions of the map.
            reference_points=reference_points[None, :, None].expand(n, -1, levels, -1),
            level_start_index=torch.cat([level_ends.new_zeros(1), level_ends[:-1]]),
            valid_ratios=reference_points.new_ones((n, levels, 2)),
        )
        maps = memory.transpose(1, 2).split(lengths, dim=-1)
        return [x.reshape(n, -1, *size) for x, size in zip(maps, sizes, strict=True)]


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


def _as_sequence(features: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H * W, C)."""
    return features.flatten(2).transpose(1, 2)
