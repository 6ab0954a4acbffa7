"""Upsamplers and downsamplers other than CARAFE, as modules: what a network would otherwise have in its place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SubPixelConv(nn.Sequential):
    """A 3x3 convolution to up^2 times the channels, then pixel shuffle (arXiv 1609.05158)."""

    def __init__(self, channels: int, up: int) -> None:
        super().__init__(nn.Conv2d(channels, channels * up**2, 3, padding=1), nn.PixelShuffle(up))


class PointSampler(nn.Module):
    """Upsampling by sampling at learnt points, after the idea of DySample (arXiv 2308.15085).

    A 1x1 convolution predicts, for every output location and each of a few groups of channels, how far from its usual
    place bilinear interpolation reads. The static range of the paper: a quarter of the distance between source pixels.

    Args:
        channels: C of the features, a multiple of `groups`.
        up: the scale, an integer.
        groups: groups of channels with points of their own.
    """

    def __init__(self, channels: int, up: int, groups: int = 4) -> None:
        super().__init__()
        self.up, self.groups = up, groups
        self.offset = nn.Conv2d(channels, 2 * groups * up**2, 1)
        nn.init.normal_(self.offset.weight, std=0.001)
        if self.offset.bias is not None:
            nn.init.zeros_(self.offset.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H * up, W * up)."""
        n, c, h, w = features.shape
        height, width = h * self.up, w * self.up
        # (N * groups, H', W', 2): x and y offsets in source pixels.
        offset = F.pixel_shuffle(0.25 * self.offset(features), self.up)
        offset = offset.view(n * self.groups, 2, height, width).permute(0, 2, 3, 1)
        # grid_sample's coordinates run from -1 to 1 over the map; one source pixel is 2 / size of that.
        rows, columns = (
            (torch.arange(size, device=features.device, dtype=features.dtype) * 2 + 1) / size - 1
            for size in (height, width)
        )
        usual = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)
        grid = usual + offset * offset.new_tensor([2 / w, 2 / h])
        grouped = features.reshape(n * self.groups, c // self.groups, h, w)
        sampled = F.grid_sample(grouped, grid, mode="bilinear", padding_mode="border", align_corners=False)
        return sampled.view(n, c, height, width)


def upsamplers(channels: int, up: int) -> dict[str, tuple[str, nn.Module]]:
    """Name -> a line of description, and the module, for upsampling by an integer."""
    groups = next(groups for groups in (4, 2, 1) if channels % groups == 0)
    return {
        "nearest": ("nearest interpolation", nn.Upsample(scale_factor=up, mode="nearest")),
        "bilinear": ("bilinear interpolation", nn.Upsample(scale_factor=up, mode="bilinear")),
        "deconvolution": (
            "deconvolution, stride and kernel = scale",
            nn.ConvTranspose2d(channels, channels, up, stride=up),
        ),
        "pixel-shuffle": ("3x3 convolution, then pixel shuffle", SubPixelConv(channels, up)),
        "grid-sample": ("grid_sample at learnt points, as DySample does", PointSampler(channels, up, groups)),
    }


def downsamplers(channels: int, down: int) -> dict[str, tuple[str, nn.Module]]:
    """The same for downsampling by an integer, to ceil(H / down)."""
    return {
        "max-pool": ("3x3 max pooling", nn.MaxPool2d(3, down, padding=1)),
        "average-pool": ("average pooling, kernel = stride", nn.AvgPool2d(down, ceil_mode=True)),
        "strided-conv": ("3x3 convolution with a stride", nn.Conv2d(channels, channels, 3, stride=down, padding=1)),
    }


def others(channels: int, up: int, down: int) -> dict[str, tuple[str, nn.Module]]:
    """The modules for a scale, initialised with a fixed seed; empty where `up` and `down` both exceed 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if down == 1:
            return upsamplers(channels, up)
        return downsamplers(channels, down) if up == 1 else {}
