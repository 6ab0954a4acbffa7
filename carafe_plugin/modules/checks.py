"""The checks of arguments and inputs that modules share."""

from __future__ import annotations

from torch import Tensor

from ..ops._tracing import as_one_node


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


@as_one_node
def check_features(features: Tensor, channels: int, name: str = "features", setting: str = "channels") -> None:
    """Raise a ValueError unless ``features`` is a batch of maps of as many channels as a setting says."""
    if features.dim() != 4 or features.shape[1] != channels:
        raise ValueError(
            f"{name} must have shape (N, {channels}, H, W) as {setting}={channels} says, got {tuple(features.shape)}"
        )
