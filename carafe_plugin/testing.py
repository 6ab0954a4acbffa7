"""What every test of the operator needs: scales, shapes, layouts, and tolerances with their reasons.

Part of the package, so that a project that builds on the operator can test against the same definition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction

import torch
from torch import Tensor

from .ops.functional import scale_ratio
from .ops.reference import output_size

SCALES: tuple[int | Fraction, ...] = (2, 3, 4, 1, Fraction(1, 2), Fraction(1, 3), Fraction(3, 2), Fraction(2, 3))

# Heights and widths of feature maps: even, odd, a single pixel, one longer than any vector register, one that no vector
# length divides.
SHAPES: tuple[tuple[int, int], ...] = ((6, 8), (5, 7), (1, 1), (2, 70), (9, 33))

# Largest relative error ||got - expected|| / ||expected|| against the reference, which accumulates in the same dtype
# but in another order, with the same operations: for float64 and float32 that order is all that differs, over sums of
# up to k^2 = 49 terms (k^2 * up^2 in the gradient); the half-precision dtypes add one rounding of the result, half a
# unit in the last place at most (2^-11 and 2^-8).
TOLERANCES: Mapping[torch.dtype, float] = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}


def relative_error(got: Tensor, expected: Tensor) -> float:
    """``||got - expected|| / ||expected||`` in float64; NaN where either has one, so that a comparison fails."""
    got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
    return float((got - expected).norm() / expected.norm().clamp_min(1e-30)) if expected.numel() else 0.0


# Of a single element, relative to its own size and the root mean square of all: its sum may cancel.
ELEMENT_FACTOR = 4


def assert_close(got: Tensor, expected: Tensor) -> None:
    """Assert the same shape and dtype, and relative errors, of the whole and each element, within its tolerance."""
    assert got.shape == expected.shape, f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    assert got.dtype == expected.dtype, f"dtype {got.dtype}, expected {expected.dtype}"
    error = relative_error(got, expected)
    tolerance = TOLERANCES[got.dtype]
    assert error <= tolerance, f"relative error {error:.3g} > {tolerance:.3g} for {got.dtype}"
    if got.numel() == 0:
        return
    exact = expected.detach().double().cpu()
    bound = ELEMENT_FACTOR * tolerance * (exact.abs() + exact.square().mean().sqrt())
    excess = (got.detach().double().cpu() - exact).abs() - bound
    worst = int(excess.argmax())
    assert excess.max() <= 0, f"element {worst}: got {got.flatten()[worst]}, expected {expected.flatten()[worst]}"


def _sliced(t: Tensor) -> Tensor:
    padded = torch.full((t.shape[0], t.shape[1] + 1, t.shape[2] + 3, t.shape[3] + 2), float("nan")).to(t)
    padded[:, 1:, 2:-1, 1:-1] = t
    return padded[:, 1:, 2:-1, 1:-1]


# Every way in which a map may lie in memory. `expanded` repeats one column and one image with strides of 0, so it
# changes the values; the others do not. What surrounds a slice is NaN: reading it cannot go unnoticed.
LAYOUTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "sliced": _sliced,
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda t: t[:1, :, :, :1].expand_as(t),
}


def random_case(
    size: tuple[int, int],
    channels: int,
    kernel_size: int,
    group_size: int,
    scale: int | Fraction,
    *,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random (features, masks, grad_output) that fit together, drawn on the CPU so that devices see the same numbers.

    Example:
        >>> [tuple(t.shape) for t in random_case((5, 7), 4, 3, 2, Fraction(1, 2))]
        [(2, 4, 5, 7), (2, 18, 3, 4), (2, 4, 3, 4)]
    """
    up, down = scale_ratio(scale)
    out = (output_size(size[0], up, down), output_size(size[1], up, down))
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, channels, *size), (batch, group_size * kernel_size**2, *out), (batch, channels, *out))
    features, masks, grad = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return features.to(device, dtype), masks.to(device, dtype), grad.to(device, dtype)
