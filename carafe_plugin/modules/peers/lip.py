"""Downsampling by Local Importance-based Pooling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Downsampler, odd, positive

GATE = 12.0  # the original's: the importance of two pixels differs by e^12 at most


class LIPDownsample(Downsampler):
    """An average weighted by a learnt importance: (N, C, H, W) -> (N, C, ceil(H / sigma), ceil(W / sigma)).

    Gao, Wang and Wu, "LIP: Local Importance-based Pooling" (ICCV 2019); CARAFE++ paper, Table 3, 'LIP', and Sec. 3.4.
    A small network predicts a logit for every value of the map; a window's output is the mean of its values weighted by
    the exponentials of the logits, 12 sigmoid(.), so that a weight is never far from the others by more than e^12.

    The original's two networks: with ``bottleneck``, convolutions 1x1, 3x3 and 1x1 of that width, each followed by an
    instance normalisation, ReLU between them (in its residual blocks, 128 wide); without, one 3x3 convolution and an
    instance normalisation (in its stem). The last convolution starts at zero: the pooling starts as a plain average.

    The original places it at a ResNet's seven strides, behind the 1x1 of a block, and lets a 1x1 convolution at stride
    1 follow where there was the 3x3: ``carafe_cfg=dict(type="LIPDownsample", stem=dict(bottleneck=None),
    pointwise=True)`` of the package's ResNets. One thing is decided otherwise: its code shares the first two
    convolutions between a block's path and shortcut, here each pooling has its own, predicted from its own input.

    Args:
        channels: C.
        scale_factor: sigma.
        kernel_size: Of the window, odd.
        bottleneck: Width of the bottleneck; None for a single 3x3 convolution.

    Raises:
        ValueError: An argument is out of its range, or the input has other channels or one pixel.
        IndexError: The batch is empty. Both are of PyTorch's instance normalisation.

    Example:
        >>> import torch
        >>> LIPDownsample(16)(torch.rand(1, 16, 25, 42)).shape
        torch.Size([1, 16, 13, 21])
    """

    def __init__(
        self, channels: int, scale_factor: int = 2, kernel_size: int = 3, bottleneck: int | None = 128
    ) -> None:
        super().__init__(channels, scale_factor)
        self.kernel_size = odd("kernel_size", kernel_size)
        layers: list[nn.Module] = []
        if bottleneck is None:
            last = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        else:
            width = positive("bottleneck", bottleneck)
            layers += [*_normed(nn.Conv2d(channels, width, 1, bias=False)), nn.ReLU(inplace=True)]
            layers += [*_normed(nn.Conv2d(width, width, 3, padding=1, bias=False)), nn.ReLU(inplace=True)]
            last = nn.Conv2d(width, channels, 1, bias=False)
        self.logits = nn.Sequential(*layers, *_normed(last))
        self.init_weights()

    def init_weights(self) -> None:
        """Equal importance everywhere; what lies before the last convolution starts as convolutions do."""
        for module in self.logits:
            if isinstance(module, (nn.Conv2d, nn.InstanceNorm2d)):
                module.reset_parameters()
        convs = [module for module in self.logits if isinstance(module, nn.Conv2d)]
        nn.init.zeros_(convs[-1].weight)

    def resample(self, features: Tensor) -> Tensor:
        # Shifted by the largest value possible, which cancels out: in half precision e^12 would be infinite.
        weights = torch.exp(GATE * (torch.sigmoid(self.logits(features)) - 1))
        window = (self.kernel_size, self.scale_factor, self.kernel_size // 2)
        return F.avg_pool2d(weights * features, *window) / F.avg_pool2d(weights, *window)


def _normed(conv: nn.Conv2d) -> list[nn.Module]:
    return [conv, nn.InstanceNorm2d(conv.out_channels, affine=True)]
