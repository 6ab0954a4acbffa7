"""CARAFE++ in the place of a layer or function call of a model that somebody else wrote."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import CARAFEDownsample, CARAFEUpsample
from ..modules.checks import check_features
from ..modules.sizes import complete, computed, repeat_border
from ..ops._tracing import as_one_node
from ..ops.fused import reassemble_logits


class CARAFEInterpolation(CARAFEUpsample):
    """:class:`carafe_plugin.CARAFEUpsample` that is called as ``F.interpolate`` or ``nn.Upsample`` is.

    Args:
        channels (int): of the features.
        scale_factor (int): how many times larger the output is.
        mode (str): the interpolation whose place it takes, 'nearest', 'nearest-exact' or 'bilinear', with which it has
            to be called. After 'bilinear' kernels read the outermost rows and columns beyond the border, as that does,
            instead of zeros.
        align_corners (bool): likewise; no ``init`` starts as True.
        size (int | Sequence[int] | None): of the output, where a call does not say it.
        **options: other arguments of :class:`carafe_plugin.CARAFEUpsample`.

    Example:
        >>> import torch
        >>> interpolate = CARAFEInterpolation(16, 2, "bilinear", init="bilinear", init_spread=1e-6)
        >>> features = torch.rand(1, 16, 5, 7)
        >>> expected = torch.nn.functional.interpolate(features, scale_factor=2, mode="bilinear")
        >>> torch.allclose(interpolate(features, scale_factor=2, mode="bilinear"), expected, atol=1e-5)
        True
    """

    def __init__(
        self,
        channels: int,
        scale_factor: int,
        mode: str,
        align_corners: bool = False,
        size: int | Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(channels, scale_factor, **options)
        self.mode, self.align_corners, self.size = mode, align_corners, size

    def forward(
        self,
        input: Tensor,
        size: int | Sequence[int] | None = None,
        scale_factor: float | Sequence[float] | None = None,
        mode: str | None = None,
        align_corners: bool | None = None,
        recompute_scale_factor: bool | None = None,
        antialias: bool = False,
    ) -> Tensor:
        """Upsample features, (N, C, H, W) -> (N, C, H', W'), to ``size``, or by this module's factor.

        A size less than one location of the input away from that factor is cut from or completes the output.

        Raises:
            ValueError: features of other channels, another interpolation than this module stands for, or a size or
                factor that is not its own.
        """
        check_features(input, self.channels, "input")
        if mode is not None and (mode, bool(align_corners)) != (self.mode, self.align_corners):
            raise ValueError(
                f"mode and align_corners must be {self.mode!r}, {self.align_corners}, of the interpolation that "
                f"CARAFE++ replaced, got {mode!r}, {align_corners}"
            )
        size = self.size if size is None and scale_factor is None else size
        return self._to_size(input, _output_size(input, self.up, size, scale_factor))

    def _to_size(self, features: Tensor, size: Sequence[int]) -> Tensor:
        if self.mode != "bilinear":
            own = computed(features, size, self.up, self.down)
            return complete(super().forward(features, own), size)
        margin = max(1, self.kernel_size // 2)
        logits = self.predict_logits(features)
        features, logits = repeat_border(features, margin), repeat_border(logits, margin)
        output = reassemble_logits(features, logits, *self.settings)
        cut = margin * self.up
        # Beyond what the features have, there is the margin's.
        return output.narrow(2, cut, size[0]).narrow(3, cut, size[1])


@as_one_node
def _output_size(features: Tensor, up: int, size: Any, scale_factor: Any) -> list[int]:
    """The size that a call asks for; a ValueError where that is not ``up`` times the features'."""
    if size is None:
        _check_factor(up, scale_factor)
        return [length * up for length in features.shape[2:]]
    size = _pair(size)
    if any(type(length) is not int for length in (*size, *features.shape[2:])):
        return size  # symbolic sizes: a comparison would fix them
    if any(abs(length * up - wanted) >= up for length, wanted in zip(features.shape[2:], size, strict=True)):
        raise ValueError(
            f"size must be about {up} times the input's {tuple(features.shape[2:])}, for which CARAFE++ was put here, "
            f"got {tuple(size)}"
        )
    return size


def _check_factor(up: int, scale_factor: float | Sequence[float] | None) -> None:
    factors = [up] if scale_factor is None else _pair(scale_factor)
    if any(factor != up for factor in factors):
        raise ValueError(f"scale_factor must be {up}, for which CARAFE++ was put here, got {scale_factor}")


def _pair(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sequence) else [value, value]


class CARAFEPool(CARAFEDownsample):
    """:class:`carafe_plugin.CARAFEDownsample` in the place of a pooling, whose output it has the size of.

    Args:
        channels (int): of the features.
        scale_factor (int): how many times smaller the output is.
        rounds_down (bool): whether the output has floor(H / scale_factor) rows, or ceil(H / scale_factor).
        completes (bool): whether the last row and column are repeated first where H and W are not divisible: a window
            at the border then has the mean of what is there, as a pooling's has.
        **options: other arguments of :class:`carafe_plugin.CARAFEDownsample`.

    Example:
        >>> import torch
        >>> CARAFEPool(16, 2, rounds_down=True)(torch.rand(1, 16, 5, 7)).shape
        torch.Size([1, 16, 2, 3])
    """

    def __init__(
        self, channels: int, scale_factor: int, rounds_down: bool, completes: bool = False, **options: Any
    ) -> None:
        super().__init__(channels, scale_factor, **options)
        self.rounds_down, self.completes = rounds_down, completes

    def forward(self, features: Tensor) -> Tensor:  # type: ignore[override]
        """Features (N, C, H, W) -> (N, C, H / s, W / s), rounded as the pooling does."""
        if self.completes:
            features = _divisible(features, self.down)
        return super().forward(features, _pooled_size(features, self.down) if self.rounds_down else None)


@as_one_node
def _divisible(features: Tensor, by: int) -> Tensor:
    return complete(features, [(length + by - 1) // by * by for length in features.shape[2:]])


@as_one_node
def _pooled_size(features: Tensor, by: int) -> list[int]:
    return [length // by for length in features.shape[2:]]


class ProjectedUpsample(nn.Sequential):
    """A 1x1 convolution and CARAFE++, called as a deconvolution is."""

    projection: nn.Conv2d
    upsampler: nn.Module

    def __init__(self, projection: nn.Conv2d, upsampler: nn.Module) -> None:
        super().__init__(OrderedDict(projection=projection, upsampler=upsampler))

    def forward(self, features: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Features (N, in_channels, H, W) -> (N, out_channels, 2 * H, 2 * W), or to ``output_size``, (..., H', W')."""
        size = None if output_size is None else list(output_size)[-2:]
        return self.upsampler(self.projection(features), size)


def in_place_of_deconvolution(deconvolution: nn.ConvTranspose2d, upsampler: nn.Module) -> nn.Module:
    """A 1x1 convolution with the mean of a deconvolution's taps, and an upsampler of its output channels behind it.

    The mean of each 2x2 block of outputs is that of the deconvolution, as far as the upsampler keeps means.
    """
    groups = deconvolution.groups
    projection = nn.Conv2d(
        deconvolution.in_channels, deconvolution.out_channels, 1, groups=groups, bias=deconvolution.bias is not None
    ).to(deconvolution.weight)
    with torch.no_grad():
        # (in, out / groups, 2, 2) -> (out, in / groups, 1, 1), group by group.
        means = deconvolution.weight.mean(dim=(2, 3)).unflatten(0, (groups, -1)).transpose(1, 2)
        projection.weight.copy_(means.flatten(0, 1)[..., None, None])
        if projection.bias is not None and deconvolution.bias is not None:
            projection.bias.copy_(deconvolution.bias)
    projection.requires_grad_(deconvolution.weight.requires_grad)
    return ProjectedUpsample(projection, upsampler)
