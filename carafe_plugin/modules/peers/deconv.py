"""Upsampling by a transposed convolution."""

from __future__ import annotations

from torch import Tensor, nn

from .base import Upsampler, positive


class DeconvUpsample(Upsampler):
    """A transposed convolution with stride sigma: (N, C, H, W) -> (N, C, sigma * H, sigma * W).

    Noh, Hong and Han, "Learning Deconvolution Network for Semantic Segmentation" (ICCV 2015); CARAFE++ paper, Table 4,
    'Deconv'. The kernel's size is not said: 3 x 3 as the other learnt operators of the table have. (The baseline of
    Table 6 is the mask head's own 2 x 2 one, the type ``"deconv"``.)

    Args:
        channels: C.
        scale_factor: sigma.
        kernel_size: At least sigma, else some pixels would get nothing.

    Raises:
        ValueError: An argument is out of its range, or the input has other channels.

    Example:
        >>> import torch
        >>> DeconvUpsample(16)(torch.rand(1, 16, 5, 7)).shape
        torch.Size([1, 16, 10, 14])
    """

    def __init__(self, channels: int, scale_factor: int = 2, kernel_size: int = 3) -> None:
        super().__init__(channels, scale_factor)
        if positive("kernel_size", kernel_size) < scale_factor:
            raise ValueError(f"kernel_size must be at least the scale factor {scale_factor}, got {kernel_size}")
        # sigma * (H - 1) + k rows, of which so many at the top and at the bottom are too many.
        excess = kernel_size - scale_factor
        padding = (excess + 1) // 2
        self.deconv = nn.ConvTranspose2d(
            channels, channels, kernel_size, scale_factor, padding, output_padding=2 * padding - excess
        )

    def resample(self, features: Tensor) -> Tensor:
        return self.deconv(features)
