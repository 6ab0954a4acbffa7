"""Upsampling by interpolation, then a convolution."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .base import Upsampler, odd


class NearestConvUpsample(Upsampler):
    """Nearest interpolation, then a k x k convolution: (N, C, H, W) -> (N, C, sigma * H, sigma * W).

    CARAFE++ paper, Table 4, 'N.C.': "we add an extra 3x3 convolution layer after the corresponding upsampling".

    Args:
        channels: C.
        scale_factor: sigma.
        kernel_size: k, odd.

    Raises:
        ValueError: An argument is out of its range, or the input has other channels.

    Example:
        >>> import torch
        >>> NearestConvUpsample(16)(torch.rand(1, 16, 5, 7)).shape
        torch.Size([1, 16, 10, 14])
    """

    mode = "nearest"
    align_corners: bool | None = None

    def __init__(self, channels: int, scale_factor: int = 2, kernel_size: int = 3) -> None:
        super().__init__(channels, scale_factor)
        self.conv = nn.Conv2d(channels, channels, kernel_size, padding=odd("kernel_size", kernel_size) // 2)

    def resample(self, features: Tensor) -> Tensor:
        scale = float(self.scale_factor)
        return self.conv(F.interpolate(features, scale_factor=scale, mode=self.mode, align_corners=self.align_corners))


class BilinearConvUpsample(NearestConvUpsample):
    """Bilinear interpolation, then a k x k convolution: (N, C, H, W) -> (N, C, sigma * H, sigma * W).

    CARAFE++ paper, Table 4, 'B.C.'; otherwise as :class:`NearestConvUpsample`. Corners are not aligned, as in the
    toolboxes.

    Example:
        >>> import torch
        >>> BilinearConvUpsample(16)(torch.rand(1, 16, 5, 7)).shape
        torch.Size([1, 16, 10, 14])
    """

    mode = "bilinear"
    align_corners = False
