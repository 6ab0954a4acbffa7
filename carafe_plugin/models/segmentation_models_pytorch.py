"""segmentation_models_pytorch: the decoders of Unet, Unet++, MAnet, FPN, UPerNet and Segformer.

Where a decoder aligns corners (PAN, DPT, DeepLabV3+, FPN's segmentation branch and every head's ``upsampling``), no
kernels start as its interpolation: ``upsample=dict(init="bilinear")`` converts these too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

FEATURES = (
    "UnetDecoderBlock",
    "DecoderBlock",
    "MFABBlock",
    "FPNBlock",
    "FPNLateralBlock",
    "Conv3x3GNReLU",
    "UPerNetDecoder",
    "SegformerDecoder",
    "FusionBlock",
    "ConvBnRelu",
    "GAUBlock",
)


def example_inputs(model: nn.Module) -> Any:
    """An image whose sides every encoder divides."""
    encoder: Any = getattr(model, "encoder", None)
    return torch.rand(1, getattr(encoder, "_in_channels", 3), 128, 128)
