"""Downsampling by max pooling."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .base import Downsampler, odd


class MaxPoolDownsample(Downsampler):
    """The largest value of each window: (N, C, H, W) -> (N, C, ceil(H / sigma), ceil(W / sigma)).

    CARAFE++ paper, Table 3, 'MPool': "in the same manner with CARAFE++". The window's size is not said. Here it is 3x3
    around the source location sigma * (i', j'), as in a ResNet's stem, which so remains what it was.

    Args:
        channels: C.
        scale_factor: sigma.
        kernel_size: Of the window, odd.

    Raises:
        ValueError: An argument is out of its range, or the input has other channels.

    Example:
        >>> import torch
        >>> MaxPoolDownsample(1)(torch.arange(9.0).view(1, 1, 3, 3))
        tensor([[[[4., 5.],
                  [7., 8.]]]])
    """

    def __init__(self, channels: int, scale_factor: int = 2, kernel_size: int = 3) -> None:
        super().__init__(channels, scale_factor)
        self.kernel_size = odd("kernel_size", kernel_size)

    def resample(self, features: Tensor) -> Tensor:
        return F.max_pool2d(features, self.kernel_size, self.scale_factor, self.kernel_size // 2)
