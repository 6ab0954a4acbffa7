"""CARAFE++ that keeps Partial Conv's mask propagation (paper, Sec. 4.3): both directions, any rational scale."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from carafe_plugin.modules import CARAFEDownsample, CARAFEUpsample
from carafe_plugin.modules.kernel_prediction import KernelPrediction
from carafe_plugin.ops.fused import reassemble_logits
from carafe_plugin.ops.reference import output_size

from .partial_conv import check_validity, fill_unknown


def propagate(module: KernelPrediction, features: Tensor, validity: Tensor) -> tuple[Tensor, Tensor]:
    r"""Rescale features and their validity with the same content-aware kernels.

    The kernels W are predicted from M * X, so nothing under a hole can influence them. For every output location:

        X' = sum(W M X) * sum(W) / sum(W M)  where sum(W M) > 0, else 0;    M' = [sum(W M) > 0]

    Outside the map X is zero and valid, as CARAFE++ has it. sum(W) is 1 with the normalisers whose kernels sum to 1;
    with 'sigmoid' it keeps the kernels' own scale. Where all of a window is valid the factor is exactly 1: an all-valid
    map gives plain CARAFE++, bit for bit.

    Args:
        module: any of the plain modules: its kernel prediction and its scale.
        features (Tensor[N, C, H, W]): X; what it holds at invalid locations, even NaN, has no influence.
        validity (Tensor[N, 1, H, W]): M, ones and zeros of the dtype of ``features``.

    Returns:
        (Tensor[N, C, H', W'], Tensor[N, 1, H', W']): X' and M'. With several groups of channels, a location is valid
        where it is so in every group.

    Raises:
        ValueError: ``validity`` has another shape.
    """
    check_validity(features, validity)
    known = fill_unknown(features, validity)
    logits = module.predict_logits(known)
    dtype = logits.dtype  # under autocast the plain modules' too
    settings = (module.kernel_size, module.group_size, module.up, module.down, module.normalizer)
    with torch.autocast(features.device.type, enabled=False):
        # Where little is valid, a quotient of two small sums: too small for float16.
        exact = torch.float32 if dtype == torch.float16 else dtype
        known, logits = known.to(dtype).to(exact), logits.to(exact)
        total = reassemble_logits(known, logits, *settings)
        valid_weight, weight = _kernel_sums(module, validity, logits)
        # Above 0, in floating point: the weight's reciprocal and that of its square must be finite (1e-19 in float32).
        valid = (valid_weight > torch.finfo(exact).tiny ** 0.5).all(dim=1, keepdim=True)
        factor = torch.where(valid, weight / torch.where(valid, valid_weight, 1), 0)
        n, c, h, w = total.shape
        output = (total.reshape(n, module.group_size, -1, h, w) * factor[:, :, None]).reshape(n, c, h, w)
    return output.to(dtype), valid.to(features.dtype)


def _kernel_sums(module: KernelPrediction, validity: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """sum(W M) and sum(W) of every kernel, each (N, G, H', W'), with what is outside the map counted as valid.

    Both are reassemblies with the features' kernels: of M, and of ones. A margin of ones as wide as the kernels' radius
    stands for the outside. (1 - sum(W (1 - M)) would need no margin, but where little is valid rounding would eat it.)
    """
    k, g, up, down = module.kernel_size, module.group_size, module.up, module.down
    # Wide enough, and a whole number of locations of the output, so that sources keep their places.
    margin = output_size(k // 2, 1, down) * down
    maps = torch.cat([validity, torch.ones_like(validity)], dim=1).repeat(1, g, 1, 1).to(logits.dtype)
    maps = F.pad(maps, [margin] * 4, value=1.0)
    margin_of_logits = margin // down if up == 1 else margin
    sums = reassemble_logits(maps, F.pad(logits, [margin_of_logits] * 4), k, g, up, down, module.normalizer)
    start = margin * up // down
    height, width = (output_size(size, up, down) for size in validity.shape[2:])
    sums = sums[..., start : start + height, start : start + width]
    return sums[:, 0::2], sums[:, 1::2]


class MaskedCARAFEUpsample(CARAFEUpsample):
    """:class:`CARAFEUpsample` for features of which some are unknown; arguments and parameters are the same.

    Example:
        >>> import torch
        >>> features, validity = torch.rand(1, 16, 8, 8), torch.ones(1, 1, 8, 8)
        >>> validity[..., :6, :6] = 0
        >>> features, validity = MaskedCARAFEUpsample(16)(features, validity)
        >>> features.shape, int((validity == 0).sum())  # far from the hole's rim and the map's border
        (torch.Size([1, 16, 16, 16]), 16)
    """

    def forward(self, features: Tensor, validity: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """X (N, C, H, W) and M (N, 1, H, W) -> X' and M', see :func:`propagate`."""
        return propagate(self, features, validity)


class MaskedCARAFEDownsample(CARAFEDownsample):
    """:class:`CARAFEDownsample` for features of which some are unknown; arguments and parameters are the same."""

    def forward(self, features: Tensor, validity: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """X (N, C, H, W) and M (N, 1, H, W) -> X' and M', see :func:`propagate`."""
        return propagate(self, features, validity)
