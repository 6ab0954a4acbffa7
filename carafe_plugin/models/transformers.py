"""Transformers: the pyramids of its detectors and segmentation models.

UperNet and its relatives (top-down path and fusion), Mask2Former's and its relatives' pixel decoders, the hybrid
encoders of RT-DETR and D-FINE, DETR's mask head, MaskFormer's pyramid, SegFormer's fusion, and the decoders of depth,
matting, text detection, super-resolution and autoencoders that are built alike. Left alone: masks, scores, positional
embeddings, depths, and UperNet's pyramid pooling, whose scale changes with the image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

FEATURES = (
    "*UperNetHead",
    "*UperHead",
    "*PixelDecoder",
    "*HybridEncoder",
    "*LiteEncoder",
    "*DINOv3ConvEncoder",
    "*FPNFusionStage",
    "*FPNLayer",
    "*SegformerDecodeHead",
    "*VisionNeck",
    "PPOCR*Neck",
    "*MaskFeatFPN",
    "*CSPPAN",
    "VitMatteFusionBlock",
    "EfficientLoFTROutConvBlock",
    "EfficientLoFTRFineFusionLayer",
    "NearestConvUpsampler",
    "*ConvUpsample",
    # One by one: PromptDepthAnything's relative of these upsamples a depth map, too.
    "CHMv2FeatureFusionLayer",
    "DPTFeatureFusionLayer",
    "DepthAnythingFeatureFusionLayer",
    "Tipsv2DptFeatureFusionLayer",
    "ZoeDepthFeatureFusionLayer",
)


def example_inputs(model: nn.Module) -> Any:
    """An image, by name, of the size that the configuration says, or 256 x 256."""
    config: Any = getattr(model, "config", None)
    if getattr(model, "main_input_name", None) != "pixel_values":
        return None
    backbone = getattr(config, "backbone_config", None) or config
    size: Any = getattr(config, "image_size", None) or 256
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    channels: Any = getattr(config, "num_channels", None) or getattr(backbone, "num_channels", 3)
    return dict(pixel_values=torch.rand(1, channels, height, width))
