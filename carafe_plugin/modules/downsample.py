"""CARAFE++ downsampling."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from torch import nn

from .kernel_prediction import KernelPrediction, resize_ratio


class CARAFEDownsample(KernelPrediction):
    """Content-aware downsampling: (N, C, H, W) -> (N, C, ceil(H / sigma), ceil(W / sigma)).

    Paper, Sec. 3 and Fig. 2. It replaces a max pooling or the stride of a convolution. In a backbone the paper adds
    BatchNorm and ReLU after the channel compressor: ``norm=nn.BatchNorm2d, act=nn.ReLU``.

    Args:
        channels (int): C, kept by the operator.
        scale_factor (int | float | fractions.Fraction): sigma, how many times smaller the output is; at least 1
            (2 halves the map).
        down_kernel (int): k of the reassembly, odd.
        down_group (int): G, groups of channels with kernels of their own; divides ``channels``.
        encoder_kernel (int): k_encoder, odd. The paper recommends ``down_kernel - 2``.
        encoder_dilation (int): dilation of the content encoder, whose stride is sigma.
        compressed_channels (int | None): Cm, channels after the channel compressor; None removes the compressor.
        normalizer (str): the kernel normaliser, 'softmax', 'sigmoid' or 'sigmoid_normalized' (Table 14).
        norm (Callable[[int], nn.Module] | None): builds a normalisation layer after the compressor.
        act (Callable[[], nn.Module] | None): builds an activation after that.

    Raises:
        ValueError: an argument is out of its range, or the input has other channels.

    Example:
        >>> import torch
        >>> from carafe_plugin import CARAFEDownsample
        >>> CARAFEDownsample(64)(torch.rand(1, 64, 25, 42)).shape
        torch.Size([1, 64, 13, 21])
    """

    def __init__(
        self,
        channels: int,
        scale_factor: int | float | Fraction = 2,
        down_kernel: int = 5,
        down_group: int = 1,
        encoder_kernel: int = 3,
        encoder_dilation: int = 1,
        compressed_channels: int | None = 16,
        normalizer: str = "softmax",
        norm: Callable[[int], nn.Module] | None = None,
        act: Callable[[], nn.Module] | None = None,
    ) -> None:
        down, up = resize_ratio(scale_factor)
        kernel, encoder = (down_kernel, down_group), (encoder_kernel, encoder_dilation)
        super().__init__(channels, up, down, *kernel, *encoder, compressed_channels, normalizer, norm, act)
        self.scale_factor = scale_factor
