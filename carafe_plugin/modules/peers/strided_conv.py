"""Downsampling by a convolution with a stride."""

from __future__ import annotations

from torch import Tensor, nn

from .base import Downsampler, odd


class StridedConvDownsample(Downsampler):
    """A k x k convolution with stride sigma: (N, C, H, W) -> (N, C, ceil(H / sigma), ceil(W / sigma)).

    CARAFE++ paper, Table 3, 'Conv'. That row is the plain ResNet, whose own convolutions have the stride; this module
    is for places without a convolution of their own, the stem's pooling for instance.

    Args:
        channels: C.
        scale_factor: sigma.
        kernel_size: k, odd.

    Raises:
        ValueError: An argument is out of its range, or the input has other channels.

    Example:
        >>> import torch
        >>> StridedConvDownsample(16)(torch.rand(1, 16, 25, 42)).shape
        torch.Size([1, 16, 13, 21])
    """

    def __init__(self, channels: int, scale_factor: int = 2, kernel_size: int = 3) -> None:
        super().__init__(channels, scale_factor)
        padding = odd("kernel_size", kernel_size) // 2
        self.conv = nn.Conv2d(channels, channels, kernel_size, stride=scale_factor, padding=padding)

    def resample(self, features: Tensor) -> Tensor:
        return self.conv(features)
