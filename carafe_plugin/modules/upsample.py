"""CARAFE++ upsampling."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from torch import nn

from .kernel_prediction import KernelPrediction, resize_ratio


class CARAFEUpsample(KernelPrediction):
    """Content-aware upsampling: (N, C, H, W) -> (N, C, ceil(sigma * H), ceil(sigma * W)).

    Paper, Sec. 3 and Fig. 3; the ICCV 2019 paper's CARAFE is this module. Argument names, parameter names and shapes,
    channel order and initialisation are those of mmcv's ``CARAFEPack``, so its checkpoints load with ``strict=True``.

    Args:
        channels (int): C, kept by the operator.
        scale_factor (int | float | fractions.Fraction): sigma, how many times larger the output is; at least 1.
        up_kernel (int): k of the reassembly, odd.
        up_group (int): G, groups of channels with kernels of their own; divides ``channels``.
        encoder_kernel (int): k_encoder, odd. The paper recommends ``up_kernel - 2``.
        encoder_dilation (int): dilation of the content encoder.
        compressed_channels (int | None): Cm, channels after the channel compressor; None removes the compressor.
        normalizer (str): the kernel normaliser, 'softmax', 'sigmoid' or 'sigmoid_normalized' (Table 14).
        norm (Callable[[int], nn.Module] | None): builds a normalisation layer after the compressor, e.g.
            ``nn.BatchNorm2d``.
        act (Callable[[], nn.Module] | None): builds an activation after that, e.g. ``nn.ReLU``.

    Raises:
        ValueError: an argument is out of its range, or the input has other channels.

    Example:
        >>> import torch
        >>> from carafe_plugin import CARAFEUpsample
        >>> CARAFEUpsample(256)(torch.rand(1, 256, 25, 42)).shape
        torch.Size([1, 256, 50, 84])
    """

    def __init__(
        self,
        channels: int,
        scale_factor: int | float | Fraction = 2,
        up_kernel: int = 5,
        up_group: int = 1,
        encoder_kernel: int = 3,
        encoder_dilation: int = 1,
        compressed_channels: int | None = 64,
        normalizer: str = "softmax",
        norm: Callable[[int], nn.Module] | None = None,
        act: Callable[[], nn.Module] | None = None,
    ) -> None:
        up, down = resize_ratio(scale_factor)
        kernel, encoder = (up_kernel, up_group), (encoder_kernel, encoder_dilation)
        super().__init__(channels, up, down, *kernel, *encoder, compressed_channels, normalizer, norm, act)
        self.scale_factor = scale_factor
