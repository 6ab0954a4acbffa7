"""Operators that see known locations alone, and return which locations are known after them.

Each is called with features X (N, C, H, W), of which invalid locations, even NaN, have no influence, and their validity
M (N, 1, H, W), ones and zeros of the same dtype; it returns X' (N, C', H', W') and M' (N, 1, H', W'). A validity of
another shape is a ValueError.

Partial convolution is that of Liu et al., Image Inpainting for Irregular Holes Using Partial Convolutions, ECCV 2018
(the paper's reference [26]); masked CARAFE++ keeps its mask propagation (paper, Sec. 4.3), in both directions and at
any rational scale.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carafe_plugin.modules import CARAFEDownsample, CARAFEUpsample
from carafe_plugin.modules.carafe import KernelPrediction
from carafe_plugin.ops.fused import reassemble_logits
from carafe_plugin.ops.reference import output_size, source_index


def fill_unknown(features: Tensor, validity: Tensor) -> Tensor:
    """The paper's M * X, with 0 for what is invalid, even for NaN, in the memory format of ``features``."""
    expected = (features.shape[0], 1, *features.shape[2:])
    if tuple(validity.shape) != expected:
        raise ValueError(
            f"validity must have shape {expected}, as features {tuple(features.shape)} say, got {tuple(validity.shape)}"
        )
    # Out of place, masked_fill would return a contiguous tensor.
    return features.clone().masked_fill_(validity == 0, 0)


class PartialConv2d(nn.Conv2d):
    r"""A convolution whose windows count their valid locations only.

    With X the features, M their validity in {0, 1}, w and b weight and bias, and k^2 the locations of a window:

        X' = w^T (M * X) * k^2 / sum(M) + b  where sum(M) > 0, else 0;    M' = [sum(M) > 0]

    As in its authors' module, what lies outside the map is invalid: windows at the border are scaled up as those next
    to a hole are. One validity map serves all channels.

    Args: those of :class:`torch.nn.Conv2d`; groups and padding modes are a ValueError.

    Example:
        >>> import torch
        >>> features, validity = torch.rand(1, 3, 8, 8), torch.ones(1, 1, 8, 8)
        >>> validity[..., 2:6, 2:6] = 0
        >>> features, validity = PartialConv2d(3, 16, 3, padding=1)(features, validity)
        >>> features.shape, int((validity == 0).sum())  # the hole has lost its rim
        (torch.Size([1, 16, 8, 8]), 4)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.groups != 1 or self.padding_mode != "zeros":
            raise ValueError(f"groups must be 1 and padding_mode 'zeros', got {self.groups} and {self.padding_mode!r}")

    def forward(self, features: Tensor, validity: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """X and M -> X' and M'."""
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


def _without_autocast(device_type: str) -> AbstractContextManager:
    """Autocast off; nothing to do on a device type that has none, such as meta."""
    try:
        return torch.autocast(device_type, enabled=False)
    except RuntimeError:
        return nullcontext()


def _validity_and_factor(valid_weight: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """M' as bool (N, 1, H', W') and sum(W) / sum(W M), 0 where M' is, from sum(W M) and sum(W), (N, G, H', W') each."""
    # Above 0, in floating point: the weight's reciprocal and that of its square must be finite (1e-19 in float32).
    valid = (valid_weight > torch.finfo(valid_weight.dtype).tiny ** 0.5).all(dim=1, keepdim=True)
    return valid, torch.where(valid, weight / torch.where(valid, valid_weight, 1), 0)


class _MaskedCARAFE(KernelPrediction):
    def forward(self, features: Tensor, validity: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        r"""X and M -> X' and M', rescaled with the same content-aware kernels.

        The kernels W are predicted from M * X, so nothing under a hole can influence them. For every output location:

            X' = sum(W M X) * sum(W) / sum(W M)  where sum(W M) > 0, else 0;    M' = [sum(W M) > 0]

        Outside the map X is zero and valid, as CARAFE++ has it. sum(W) is 1 with the normalisers whose kernels sum to
        1; with 'sigmoid' it keeps the kernels' own scale. Where all of a window is valid the factor is exactly 1: an
        all-valid map gives plain CARAFE++, bit for bit. With several groups of channels, a location is valid where it
        is so in each.
        """
        known = fill_unknown(features, validity)
        logits = self.predict_logits(known)
        dtype = logits.dtype  # under autocast the plain modules' too
        with _without_autocast(features.device.type):
            # Where little is valid, a quotient of two small sums: too small for float16.
            exact = torch.float32 if dtype == torch.float16 else dtype
            known, logits = known.to(dtype).to(exact), logits.to(exact)
            total = reassemble_logits(known, logits, *self.settings)
            valid, factor = _validity_and_factor(*self._kernel_sums(validity, logits))
            output = (total.unflatten(1, (self.group_size, -1)) * factor[:, :, None]).flatten(1, 2)
        return output.to(dtype), valid.to(features.dtype)

    def _kernel_sums(self, validity: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """sum(W M) and sum(W) of every kernel, (N, G, H', W') each, with what is outside the map counted as valid.

        Both are reassemblies, of M and of ones, within a margin of ones as wide as the kernels' radius. (1 - sum(W (1 -
        M)) would need no margin, but where little is valid rounding would eat it.)
        """
        k, g, up, down, _ = self.settings
        # Wide enough, and a whole number of locations of the output, so that sources keep their places.
        margin = output_size(k // 2, 1, down) * down
        maps = torch.cat([validity, torch.ones_like(validity)], dim=1).repeat(1, g, 1, 1).to(logits.dtype)
        maps = F.pad(maps, [margin] * 4, value=1.0)
        logits = F.pad(logits, [margin // down if up == 1 else margin] * 4)
        start = margin * up // down
        height, width = (output_size(size, up, down) for size in validity.shape[2:])
        sums = reassemble_logits(maps, logits, *self.settings)[..., start : start + height, start : start + width]
        return sums[:, 0::2], sums[:, 1::2]

    def effective_kernels(self, kernels: Tensor, validity: Tensor) -> Tensor:
        """The weights that the features have in X', W M sum(W) / sum(W M), for :mod:`carafe_plugin.analysis`.

        Shaped as ``kernels``, the normalised W (N, G * k^2, H', W'), in float32 or float64; 0 where M' is 0.
        """
        k, g, up, down, _ = self.settings
        padded = F.pad(validity[:, 0] != 0, [k // 2] * 4, value=True)
        windows = padded.unfold(1, k, 1).unfold(2, k, 1)  # (N, H, W, k, k)
        rows, columns = (source_index(length, up, down, validity.device) for length in kernels.shape[2:])
        known = windows[:, None, rows[:, None], columns].flatten(4).movedim(4, 2)  # (N, 1, k^2, H', W')
        weights = kernels.to(torch.promote_types(kernels.dtype, torch.float32)).unflatten(1, (g, k * k))
        _, factor = _validity_and_factor((weights * known).sum(2), weights.sum(2))
        return (weights * known * factor[:, :, None]).flatten(1, 2)


class MaskedCARAFEUpsample(_MaskedCARAFE, CARAFEUpsample):
    """:class:`CARAFEUpsample` for features of which some are unknown; arguments and parameters are the same.

    Example:
        >>> import torch
        >>> features, validity = torch.rand(1, 16, 8, 8), torch.ones(1, 1, 8, 8)
        >>> validity[..., :6, :6] = 0
        >>> features, validity = MaskedCARAFEUpsample(16)(features, validity)
        >>> features.shape, int((validity == 0).sum())  # far from the hole's rim and the map's border
        (torch.Size([1, 16, 16, 16]), 16)
    """


class MaskedCARAFEDownsample(_MaskedCARAFE, CARAFEDownsample):
    """:class:`CARAFEDownsample` for features of which some are unknown; arguments and parameters are the same."""
