"""Upsampling a map that a spatial attention has weighted."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Upsampler, odd


class SpatialAttentionUpsample(Upsampler):
    """A predicted weight for each location, then interpolation: (N, C, H, W) -> (N, C, sigma * H, sigma * W).

    Chen et al., "SCA-CNN: Spatial and Channel-wise Attention in Convolutional Networks for Image Captioning" (CVPR
    2017), of which this takes the spatial half; CARAFE++ paper, Tables 4 and 6, 'S.A.', and Sec. 3.4: it "predicts an
    attention map with the same spatial size as the input feature, and then rescales the feature map on each location".

    Chosen here, where neither paper says: a k x k convolution predicts one weight for all channels of a location; a
    sigmoid bounds it (the original's softmax over all locations would make a weight depend on the image's size); the
    interpolation is nearest, the baseline's, so that weighting before or after it is the same.

    Args:
        channels: C.
        scale_factor: sigma.
        kernel_size: k, odd.

    Raises:
        ValueError: An argument is out of its range, or the input has other channels.

    Example:
        >>> import torch
        >>> SpatialAttentionUpsample(16)(torch.rand(1, 16, 5, 7)).shape
        torch.Size([1, 16, 10, 14])
    """

    def __init__(self, channels: int, scale_factor: int = 2, kernel_size: int = 3) -> None:
        super().__init__(channels, scale_factor)
        self.attention = nn.Conv2d(channels, 1, kernel_size, padding=odd("kernel_size", kernel_size) // 2)

    def resample(self, features: Tensor) -> Tensor:
        weighted = features * torch.sigmoid(self.attention(features))
        return F.interpolate(weighted, scale_factor=float(self.scale_factor), mode="nearest")
