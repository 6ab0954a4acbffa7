"""Upsamplers that came after CARAFE++, as plain ``torch.nn`` modules, in our reading of their papers.

They stand where :mod:`carafe_plugin.modules.peers` does and read the map to be upsampled alone; those that are also
told the encoder's map are in :mod:`carafe_plugin.modules.guided`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._tracing import as_one_node
from ..ops.functional import carafe
from .checks import odd, positive
from .peers import Upsampler, _sample_moved
from .starts import KeepsItsStart, near_zero_, starting, xavier_, zero_

STATIC_SCOPE = 0.25  # how far a sampling point may go for each unit that the linear layer says, in source pixels
DYNAMIC_SCOPE = 0.5  # the most that a predicted scope can be: twice the static one, which is its start


class DySample(KeepsItsStart, Upsampler):
    r"""Points to sample are predicted, and interpolated bilinearly: (N, C, H, W) -> (N, C, sigma * H, sigma * W).

    Liu, Lu, Fu and Cao, "Learning to Upsample by Learning to Sample" (ICCV 2023, arXiv 2308.15085). With G the centres
    of the output's pixels, where bilinear interpolation reads, and O predicted offsets, in pixels of the input,

        X' = grid_sample(X, G + O),    O = 0.25 linear(X)  or, dynamic scope,  O = 0.5 sigmoid(linear'(X)) linear(X)

    each of ``groups`` groups of channels having offsets of its own. In the style "lp" (linear, then pixel shuffle) the
    linear layers, 1x1 convolutions, predict all sigma^2 offsets of a source pixel; in "pl" (pixel shuffle, then linear)
    they run on the shuffled map of C / sigma^2 channels. The paper's names: DySample is "lp" and DySample-S is "pl", a
    plus sign says that the scope is dynamic. Its groups are 4 for "lp" and 8 for "pl": so the parameters that it states
    for an FPN come out, 49.2K of DySample+ and 6.2K of DySample-S+.

    Fresh weights have a standard deviation of 0.001, and biases and the scope's weights are zero: it starts as
    bilinear interpolation, but for offsets near zero. Points beyond the map are moved to its border.

    Chosen here, where the paper does not say: the order of the offsets' channels (horizontal ones first, then groups).

    Args:
        style (str): "lp" or "pl".
        groups (int | None): divides ``channels``; None means the paper's.
        dynamic_scope (bool): whether a second linear layer predicts how far the points may go.

    Raises:
        ValueError: also for a ``style`` that is neither, and for channels that ``groups`` or, in the style "pl",
            sigma^2 do not divide.

    Example:
        >>> import torch
        >>> DySample(16)(torch.rand(1, 16, 5, 7)).shape
        torch.Size([1, 16, 10, 14])
    """

    def __init__(
        self,
        channels: int,
        scale_factor: int = 2,
        style: str = "lp",
        groups: int | None = None,
        dynamic_scope: bool = False,
    ) -> None:
        super().__init__(channels, scale_factor)
        if style not in ("lp", "pl"):
            raise ValueError(f"style must be 'lp' or 'pl', got {style!r}")
        self.style = style
        self.groups = positive("groups", groups if groups is not None else 4 if style == "lp" else 8)
        phases = scale_factor**2
        if channels % self.groups:
            raise ValueError(f"channels must be a multiple of groups={self.groups}, got {channels}")
        if style == "pl" and channels % phases:
            raise ValueError(f"channels must be a multiple of scale_factor^2={phases} for style='pl', got {channels}")
        sizes = (channels, 2 * self.groups * phases) if style == "lp" else (channels // phases, 2 * self.groups)
        self.offset = starting(nn.Conv2d(*sizes, 1), near_zero_)
        self.scope = starting(nn.Conv2d(*sizes, 1, bias=False), zero_) if dynamic_scope else None
        self.init_weights()

    def resample(self, features: Tensor) -> Tensor:
        source = features if self.style == "lp" else F.pixel_shuffle(features, self.scale_factor)
        scope = STATIC_SCOPE if self.scope is None else DYNAMIC_SCOPE * torch.sigmoid(self.scope(source))
        offsets = scope * self.offset(source)
        if self.style == "lp":
            offsets = F.pixel_shuffle(offsets, self.scale_factor)
        return sample_groups(features, offsets, self.scale_factor)


@as_one_node
def sample_groups(features: Tensor, offsets: Tensor, scale_factor: int) -> Tensor:
    """Interpolate groups of channels where offsets (N, 2 * groups, H', W'), horizontal ones first, move them to.

    An offset that is not a number, as in a training that has diverged, moves nothing.
    """
    groups = offsets.shape[1] // 2
    offsets = offsets.unflatten(1, (2, groups)).transpose(1, 2).flatten(0, 1)
    grouped = features.unflatten(1, (groups, features.shape[1] // groups)).flatten(0, 1)
    return _sample_moved(grouped, offsets, scale_factor).reshape(*features.shape[:2], *offsets.shape[2:])


class DLU(KeepsItsStart, Upsampler):
    r"""CARAFE++ whose kernels are sampled from a small map of them: (N, C, H, W) -> (N, C, sigma * H, sigma * W).

    Fu, Hu, Dong, Gao, Li and Zhong, "Lighten CARAFE: Dynamic Lightweight Upsampling with Guided Reassemble Kernels"
    (arXiv 2410.22139). CARAFE++ predicts sigma^2 kernels for each source location; here one is predicted, and softmax
    normalises it. These source kernels are a map of the input's size, which is interpolated bilinearly where guidance
    offsets D, in pixels of the input and predicted for every output location, move that location's source:

        W[i', j'] = W_source[floor(i' / sigma) + D_y[i', j'], floor(j' / sigma) + D_x[i', j']],    output = carafe(X, W)

    Channel compressor, kernel sizes and first values are CARAFE++'s; the guidance starts at zero: sigma^2 locations
    share a kernel, which is nearly uniform. At sigma = 16 it has 91% fewer parameters than CARAFE++, as the paper says.
    Positions beyond the map are moved to its border.

    What the paper's text did not tell was taken from the authors' published code: the guidance comes from the
    compressed channels, by a convolution as large as the content encoder's. Chosen here: with several groups of
    channels, each has offsets of its own.

    Args:
        up_kernel (int): k of the reassembly, odd.
        up_group (int): G, groups of channels with kernels of their own; divides ``channels``.
        encoder_kernel (int): k of the convolutions that predict source kernels and guidance, odd.
        compressed_channels (int): channels after the channel compressor.

    Example:
        >>> import torch
        >>> DLU(16)(torch.rand(1, 16, 5, 7)).shape
        torch.Size([1, 16, 10, 14])
    """

    def __init__(
        self,
        channels: int,
        scale_factor: int = 2,
        up_kernel: int = 5,
        up_group: int = 1,
        encoder_kernel: int = 3,
        compressed_channels: int = 64,
    ) -> None:
        super().__init__(channels, scale_factor)
        self.up_kernel, self.up_group = odd("up_kernel", up_kernel), positive("up_group", up_group)
        if channels % up_group:
            raise ValueError(f"channels must be a multiple of up_group={up_group}, got {channels}")
        width, padding = (
            positive("compressed_channels", compressed_channels),
            odd("encoder_kernel", encoder_kernel) // 2,
        )
        self.channel_compressor = starting(nn.Conv2d(channels, width, 1), xavier_)
        kernels = nn.Conv2d(width, up_group * up_kernel**2, encoder_kernel, padding=padding)
        self.content_encoder = starting(kernels, near_zero_)
        guidance = nn.Conv2d(width, 2 * up_group * scale_factor**2, encoder_kernel, padding=padding)
        self.guidance = starting(guidance, zero_)
        self.init_weights()

    def resample(self, features: Tensor) -> Tensor:
        compressed = self.channel_compressor(features)
        offsets = F.pixel_shuffle(self.guidance(compressed), self.scale_factor)
        kernels = self.content_encoder(compressed).unflatten(1, (self.up_group, -1)).softmax(2).flatten(1, 2)
        kernels = _sample_kernels(kernels, offsets, self.scale_factor)
        return carafe(features, kernels, self.up_kernel, self.up_group, self.scale_factor)


@as_one_node
def _sample_kernels(kernels: Tensor, offsets: Tensor, scale_factor: int) -> Tensor:
    """Interpolate kernels (N, G * k^2, H, W) where offsets (N, 2 * G, H', W') move the source locations."""
    # Counted from the source location and not from the output's centre; in half precision a third is not exact.
    offsets = offsets.to(torch.promote_types(offsets.dtype, torch.float32))
    columns, rows = (
        0.5 - (torch.arange(length, device=offsets.device, dtype=offsets.dtype) % scale_factor + 0.5) / scale_factor
        for length in (offsets.shape[3], offsets.shape[2])
    )
    right, down = offsets.chunk(2, dim=1)
    return sample_groups(kernels, torch.cat([right + columns, down + rows[:, None]], dim=1), scale_factor)


RIVALS = (DySample, DLU)
