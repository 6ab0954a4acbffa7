"""Downsampling by average pooling."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .base import Downsampler, odd


class AveragePoolDownsample(Downsampler):
    """The mean of each window: (N, C, H, W) -> (N, C, ceil(H / sigma), ceil(W / sigma)).

    CARAFE++ paper, Table 3, 'APool': "in the same manner with CARAFE++". The window's size is not said. Here it is that
    of :class:`MaxPoolDownsample`, 3x3 around the source location; at a border it averages what lies inside the map.

    Args:
        channels: C.
        scale_factor: sigma.
        kernel_size: Of the window, odd.

    Raises:
        ValueError: An argument is out of its range, or the input has other channels.

    Example:
        >>> import torch
        >>> AveragePoolDownsample(1)(torch.arange(9.0).view(1, 1, 3, 3))
        tensor([[[[2., 3.],
                  [5., 6.]]]])
    """

    def __init__(self, channels: int, scale_factor: int = 2, kernel_size: int = 3) -> None:
        super().__init__(channels, scale_factor)
        self.kernel_size = odd("kernel_size", kernel_size)

    def resample(self, features: Tensor) -> Tensor:
        padding = self.kernel_size // 2
        return F.avg_pool2d(features, self.kernel_size, self.scale_factor, padding, count_include_pad=False)
