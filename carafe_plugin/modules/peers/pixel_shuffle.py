"""Upsampling by a convolution whose channels become pixels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .base import Upsampler, odd


class PixelShuffleUpsample(Upsampler):
    """A k x k convolution to sigma^2 * C channels, laid out as pixels: (N, C, H, W) -> (N, C, sigma * H, sigma * W).

    Shi et al., "Real-Time Single Image and Video Super-Resolution Using an Efficient Sub-Pixel Convolutional Neural
    Network" (CVPR 2016), eq. 3 and 4; CARAFE++ paper, Table 4, 'P.S.', and Table 6. The kernel's size is not said: here
    3 x 3, as the other learnt operators of the table have.

    Args:
        channels: C.
        scale_factor: sigma.
        kernel_size: k, odd.

    Raises:
        ValueError: An argument is out of its range, or the input has other channels.

    Example:
        >>> import torch
        >>> PixelShuffleUpsample(16)(torch.rand(1, 16, 5, 7)).shape
        torch.Size([1, 16, 10, 14])
    """

    def __init__(self, channels: int, scale_factor: int = 2, kernel_size: int = 3) -> None:
        super().__init__(channels, scale_factor)
        padding = odd("kernel_size", kernel_size) // 2
        self.conv = nn.Conv2d(channels, channels * scale_factor**2, kernel_size, padding=padding)

    def resample(self, features: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(features), self.scale_factor)
