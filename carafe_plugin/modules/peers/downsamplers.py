"""The paper's other downsamplers (Table 3). They raise what :class:`Resampler` does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Downsampler, odd, positive

DPP_EPSILON = 1e-3  # the original's: keeps the root differentiable where a pixel equals its window's mean
LIP_GATE = 12.0  # the original's: the importance of two pixels differs by e^12 at most


class StridedConvDownsample(Downsampler):
    """A k x k convolution with stride sigma: (N, C, H, W) -> (N, C, ceil(H / sigma), ceil(W / sigma)).

    CARAFE++ paper, Table 3, 'Conv'. That row is the plain ResNet, whose own convolutions have the stride; this module
    is for places without a convolution of their own, the stem's pooling for instance.

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


class MaxPoolDownsample(Downsampler):
    """The largest value of each window: (N, C, H, W) -> (N, C, ceil(H / sigma), ceil(W / sigma)).

    CARAFE++ paper, Table 3, 'MPool': "in the same manner with CARAFE++". The window's size is not said. Here it is 3x3
    around the source location sigma * (i', j'), as in a ResNet's stem, which so remains what it was.
    """

    def __init__(self, channels: int, scale_factor: int = 2, kernel_size: int = 3) -> None:
        super().__init__(channels, scale_factor)
        self.kernel_size = odd("kernel_size", kernel_size)

    def resample(self, features: Tensor) -> Tensor:
        return F.max_pool2d(features, self.kernel_size, self.scale_factor, self.kernel_size // 2)


class AveragePoolDownsample(Downsampler):
    """The mean of each window: (N, C, H, W) -> (N, C, ceil(H / sigma), ceil(W / sigma)).

    CARAFE++ paper, Table 3, 'APool': "in the same manner with CARAFE++". The window's size is not said. Here it is that
    of :class:`MaxPoolDownsample`, 3x3 around the source location; at a border it averages what lies inside the map.
    """

    def __init__(self, channels: int, scale_factor: int = 2, kernel_size: int = 3) -> None:
        super().__init__(channels, scale_factor)
        self.kernel_size = odd("kernel_size", kernel_size)

    def resample(self, features: Tensor) -> Tensor:
        padding = self.kernel_size // 2
        return F.avg_pool2d(features, self.kernel_size, self.scale_factor, padding, count_include_pad=False)


class DPPDownsample(Downsampler):
    r"""Pixels that stand out from their surroundings count more: (N, C, H, W) -> (N, C, ceil(H/sigma), ceil(W/sigma)).

    Saeedan, Weber, Goesele and Roth, "Detail-Preserving Pooling in Deep Networks" (CVPR 2018); CARAFE++ paper, Table 3,
    'DPP'. Over a window of sigma x sigma pixels q,

        out[p] = sum_q w[p, q] I[q] / sum_q w[p, q],    w[p, q] = alpha + (sqrt((I[q] - D[p])^2 + epsilon^2))^lambda

    where D is a smoothed downsampling of I, and alpha (a floor) and lambda (the reward of details) are learnt for each
    channel, positive as exponentials of the parameters.

    Chosen here, since the table does not say which variant it used: the "lite" one, in which D is the mean of the
    window; the symmetric reward above; both exponentials start at 1. The authors' code further divides the squared
    distances by their mean over the window, which the formula does not have, and neither has this module.
    A window that the border cuts consists of what lies inside the map.
    """

    def __init__(self, channels: int, scale_factor: int = 2) -> None:
        super().__init__(channels, scale_factor)
        self.log_alpha = nn.Parameter(torch.zeros(channels, 1, 1))
        self.log_lambda = nn.Parameter(torch.zeros(channels, 1, 1))

    def _window_mean(self, features: Tensor) -> Tensor:
        return F.avg_pool2d(features, self.scale_factor, ceil_mode=True)

    def resample(self, features: Tensor) -> Tensor:
        height, width = features.shape[2:]
        smoothed = self._window_mean(features)
        smoothed = smoothed.repeat_interleave(self.scale_factor, 2).repeat_interleave(self.scale_factor, 3)
        squares = (features - smoothed[..., :height, :width]) ** 2 + DPP_EPSILON**2
        weights = self.log_alpha.exp() + squares ** (0.5 * self.log_lambda.exp())
        return self._window_mean(weights * features) / self._window_mean(weights)


class LIPDownsample(Downsampler):
    """An average weighted by a learnt importance: (N, C, H, W) -> (N, C, ceil(H / sigma), ceil(W / sigma)).

    Gao, Wang and Wu, "LIP: Local Importance-based Pooling" (ICCV 2019); CARAFE++ paper, Table 3, 'LIP', and Sec. 3.4.
    A small network predicts a logit for every value of the map; a window's output is the mean of its values weighted by
    the exponentials of the logits, 12 sigmoid(.), so that a weight is never far from the others by more than e^12.

    The original's two networks: with ``bottleneck``, convolutions 1x1, 3x3 and 1x1 of that width, each followed by an
    instance normalisation, ReLU between them (in its residual blocks, 128 wide); without, one 3x3 convolution and an
    instance normalisation (in its stem). The last convolution starts at zero: the pooling starts as a plain average.

    The original places it at a ResNet's seven strides, after the 1x1 of a block, and lets a 1x1 convolution at stride
    1 follow where there was the 3x3: ``carafe_cfg=dict(type="LIPDownsample", stem=dict(bottleneck=None),
    pointwise=True)`` of the package's ResNets. One thing is decided otherwise: its code shares the first two
    convolutions between a block's path and shortcut, here each pooling has its own, predicted from its own input.

    Args:
        bottleneck (int | None): width of the bottleneck; None for a single 3x3 convolution.

    Raises:
        ValueError: the input has one pixel.
        IndexError: the batch is empty. Both are of PyTorch's instance normalisation.
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
        weights = torch.exp(LIP_GATE * (torch.sigmoid(self.logits(features)) - 1))
        window = (self.kernel_size, self.scale_factor, self.kernel_size // 2)
        return F.avg_pool2d(weights * features, *window) / F.avg_pool2d(weights, *window)


def _normed(conv: nn.Conv2d) -> list[nn.Module]:
    return [conv, nn.InstanceNorm2d(conv.out_channels, affine=True)]
