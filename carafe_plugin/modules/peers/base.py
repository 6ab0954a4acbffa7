"""What the operators other than CARAFE++ have in common: its two first arguments, and the check of its input."""

from __future__ import annotations

from torch import Tensor, nn


class Resampler(nn.Module):
    """An operator that keeps the channels of a map and changes its size by an integer factor.

    Args:
        channels (int): C.
        scale_factor (int): sigma, how many times larger or smaller the map becomes.
        kernel_size (int): where a class has one, k of its convolution or window; odd unless the class says otherwise.

    Raises:
        ValueError: ``channels`` or ``scale_factor`` is not a positive int, another argument is out of its range, or the
            input is not a map of C channels.
    """

    def __init__(self, channels: int, scale_factor: int = 2) -> None:
        super().__init__()
        self.channels = positive("channels", channels)
        self.scale_factor = positive("scale_factor", scale_factor)

    def resample(self, features: Tensor) -> Tensor:
        """The operator itself, on a map whose channels have been checked."""
        raise NotImplementedError

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, C, H, W) -> (N, C, H', W')."""
        if features.dim() != 4 or features.shape[1] != self.channels:
            raise ValueError(
                f"features must have shape (N, {self.channels}, H, W) as channels={self.channels} says, "
                f"got {tuple(features.shape)}"
            )
        return self.resample(features)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, scale_factor={self.scale_factor}"


class Upsampler(Resampler):
    """A :class:`Resampler` to (N, C, sigma * H, sigma * W)."""


class Downsampler(Resampler):
    """A :class:`Resampler` to (N, C, ceil(H / sigma), ceil(W / sigma))."""


def positive(name: str, value: int) -> int:
    """``value``, which must be a positive int."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")
    return value


def odd(name: str, value: int) -> int:
    """``value``, which must be an odd positive int: a window with a centre, and "same" padding."""
    if positive(name, value) % 2 == 0:
        raise ValueError(f"{name} must be an odd positive int, got {value!r}")
    return value
