"""Partial convolution: a convolution that sees known locations alone, and says what is known behind it.

From Liu et al., Image Inpainting for Irregular Holes Using Partial Convolutions, ECCV 2018 (the paper's
reference [26]).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def check_validity(features: Tensor, validity: Tensor) -> None:
    """Raise a ValueError unless ``validity`` is the one-channel map that belongs to ``features``."""
    expected = (features.shape[0], 1, *features.shape[2:])
    if tuple(validity.shape) != expected:
        raise ValueError(
            f"validity must have shape {expected}, as features {tuple(features.shape)} say, got {tuple(validity.shape)}"
        )


def fill_unknown(features: Tensor, validity: Tensor) -> Tensor:
    """The paper's M * X, with 0 for what is invalid, even for NaN, in the memory format of ``features``."""
    # Out of place, masked_fill would return a contiguous tensor.
    return features.clone().masked_fill_(validity == 0, 0)


class PartialConv2d(nn.Conv2d):
    r"""A convolution whose windows count their valid locations only.

    With X the features, M their validity in {0, 1}, w and b weight and bias, and k^2 the locations of a window:

        X' = w^T (M * X) * k^2 / sum(M) + b  where sum(M) > 0, else 0;    M' = [sum(M) > 0]

    As in its authors' module, what lies outside the map is invalid: windows at the border are scaled up as those beside
    a hole are. One validity map serves all channels.

    Args: those of :class:`torch.nn.Conv2d`, without groups and padding modes.

    Example:
        >>> import torch
        >>> features, validity = torch.rand(1, 3, 8, 8), torch.ones(1, 1, 8, 8)
        >>> validity[..., 2:6, 2:6] = 0
        >>> features, validity = PartialConv2d(3, 16, 3, padding=1)(features, validity)
        >>> features.shape, int((validity == 0).sum())  # the hole has lost its rim
        (torch.Size([1, 16, 8, 8]), 4)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, bias=bias)

    def forward(self, features: Tensor, validity: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Convolve.

        Args:
            features (Tensor[N, C, H, W]): X; what it holds at invalid locations, even NaN, has no influence.
            validity (Tensor[N, 1, H, W]): M, ones and zeros of the dtype of ``features``.

        Returns:
            (Tensor[N, C', H', W'], Tensor[N, 1, H', W']): X' and M'.

        Raises:
            ValueError: ``validity`` has another shape.
        """
        check_validity(features, validity)
        known = fill_unknown(features, validity)
        with torch.no_grad():
            window = validity.new_ones(1, 1, *self.kernel_size)
            count = self._conv_forward(validity, window, None)
            valid = (count > 0).to(features.dtype)
            scale = valid * window.numel() / count.clamp_min(1)
        output = self._conv_forward(known, self.weight, None) * scale
        if self.bias is not None:
            output = output + self.bias[:, None, None] * valid
        return output, valid
