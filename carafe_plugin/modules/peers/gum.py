"""Upsampling at learnt positions: the Guided Upsampling Module."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Upsampler, odd


class GUMUpsample(Upsampler):
    """Bilinear interpolation whose sampling positions are moved: (N, C, H, W) -> (N, C, sigma * H, sigma * W).

    Mazzini, "Guided Upsampling Network for Real-Time Semantic Segmentation" (BMVC 2018, arXiv 1807.07466); CARAFE++
    paper, Tables 4 and 6, 'GUM'. A guidance table holds an offset (p, q) for every output location, which is added to
    the regular grid (x, y) before sampling:

        V[i] = sum_n sum_m U[n, m] max(0, 1 - |x_i + p_i - m|) max(0, 1 - |y_i + q_i - n|)

    Chosen here, since the original predicts the table by a branch of its own network, which an FPN does not have: one
    k x k convolution of the input predicts the sigma^2 offsets of each pixel, in pixels of the input, horizontal ones
    first. It starts at zero: the operator starts as bilinear interpolation. Positions outside the map are moved to its
    border.

    Args:
        channels: C.
        scale_factor: sigma.
        kernel_size: k of the convolution that predicts offsets, odd.

    Raises:
        ValueError: An argument is out of its range, or the input has other channels.

    Example:
        >>> import torch
        >>> GUMUpsample(16)(torch.rand(1, 16, 5, 7)).shape
        torch.Size([1, 16, 10, 14])
    """

    def __init__(self, channels: int, scale_factor: int = 2, kernel_size: int = 3) -> None:
        super().__init__(channels, scale_factor)
        padding = odd("kernel_size", kernel_size) // 2
        self.guidance = nn.Conv2d(channels, 2 * scale_factor**2, kernel_size, padding=padding)
        self.init_weights()

    def init_weights(self) -> None:
        """No offsets: bilinear interpolation."""
        nn.init.zeros_(self.guidance.weight)
        if self.guidance.bias is not None:
            nn.init.zeros_(self.guidance.bias)

    def resample(self, features: Tensor) -> Tensor:
        offsets = F.pixel_shuffle(self.guidance(features), self.scale_factor)  # (N, 2, H', W')
        offsets = offsets.to(torch.promote_types(offsets.dtype, torch.float32))  # half precision is too coarse to aim
        height, width = features.shape[2:]
        x = self._centres(width, offsets) + offsets[:, 0]
        y = self._centres(height, offsets)[:, None] + offsets[:, 1]
        # grid_sample counts from -1 to 1, edge to edge of the outermost pixels.
        grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
        sampled = F.grid_sample(features.to(grid.dtype), grid, padding_mode="border", align_corners=False)
        return sampled.to(features.dtype)

    def _centres(self, size: int, like: Tensor) -> Tensor:
        """Where the centres of the output's pixels lie along one axis, counted in pixels of the input."""
        target = torch.arange(size * self.scale_factor, dtype=like.dtype, device=like.device)
        return (target + 0.5) / self.scale_factor - 0.5
