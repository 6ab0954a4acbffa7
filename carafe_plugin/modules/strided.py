"""Convolutions whose stride CARAFE++ replaces."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class DownsampledConv2d(nn.Conv2d):
    """A strided convolution's parameters at stride 1, after a module that shrinks the map instead of the stride.

    The paper's Fig. 4: "CARAFE++ downsamples the feature map before convolution layers". Deformable convolutions become
    plain ones, as the paper does with DCNv2 (Sec. 5.2): their weight stays, their offsets go. ``conv``'s Parameter
    objects are taken over, so that nothing is drawn at random; any other kind of convolution is a TypeError.

    Example:
        >>> import torch
        >>> from carafe_plugin import CARAFEDownsample
        >>> conv = nn.Conv2d(16, 8, 3, stride=2, padding=1, bias=False)
        >>> layer = DownsampledConv2d(conv, CARAFEDownsample(16))
        >>> layer(torch.rand(1, 16, 9, 12)).shape, layer.weight is conv.weight
        (torch.Size([1, 8, 5, 6]), True)
    """

    def __init__(self, conv: Any, downsampler: nn.Module) -> None:
        # MMCV's wrapper for empty inputs has the plain convolution's name; other subclasses compute something else.
        if type(conv).__name__ != "Conv2d" and not isinstance(getattr(conv, "conv_offset", None), nn.Module):
            raise TypeError(f"expected a plain or a deformable convolution, got {type(conv).__name__}")
        bias = getattr(conv, "bias", None)  # MMCV's first deformable convolution has no such attribute
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=bias is not None,
            padding_mode=getattr(conv, "padding_mode", "zeros"),
            device="meta",  # neither memory nor random numbers for what is replaced at once
        )
        self.weight, self.bias = conv.weight, bias
        self.downsampler = downsampler

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, in_channels, H, W) -> (N, out_channels, ceil(H / s), ceil(W / s)) for a downsampler by s."""
        return super().forward(self.downsampler(features))
