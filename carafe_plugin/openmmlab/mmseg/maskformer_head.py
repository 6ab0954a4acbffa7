"""MMSegmentation's MaskFormer, for a pixel decoder that upsamples by CARAFE++. MaskFormer needs MMDetection."""

from __future__ import annotations

from mmseg.models.decode_heads import MaskFormerHead
from mmseg.registry import MODELS

from carafe_plugin.openmmlab.mmdet.pixel_decoders import MemoryProjection


@MODELS.register_module()
class CARAFEMaskFormerHead(MemoryProjection, MaskFormerHead):
    """MaskFormerHead, with its arguments and checkpoints, for a ``pixel_decoder`` that is CARAFEPixelDecoder."""
