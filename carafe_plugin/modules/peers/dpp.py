"""Downsampling by Detail-Preserving Pooling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Downsampler

EPSILON = 1e-3  # the original's: keeps the root differentiable where a pixel equals its window's mean


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

    Args:
        channels: C.
        scale_factor: sigma. A window that the border cuts consists of what lies inside the map.

    Raises:
        ValueError: An argument is out of its range, or the input has other channels.

    Example:
        >>> import torch
        >>> DPPDownsample(16)(torch.rand(1, 16, 25, 42)).shape
        torch.Size([1, 16, 13, 21])
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
        squares = (features - smoothed[..., :height, :width]) ** 2 + EPSILON**2
        weights = self.log_alpha.exp() + squares ** (0.5 * self.log_lambda.exp())
        return self._window_mean(weights * features) / self._window_mean(weights)
