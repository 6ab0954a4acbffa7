"""The public operator: documentation and validation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from ._tracing import as_one_node
from .forms import reassembly
from .reference import DTYPES
from .reference import output_size as whole_size

# An "exact" float has a small power of two below the line (0.5, 1.5, 0.75): anything longer is a rounded third or
# tenth, for which guessing the intended fraction would be wrong as often as right.
_MAX_FLOAT_DENOMINATOR = 64


@as_one_node
def carafe(
    features: Tensor,
    masks: Tensor,
    kernel_size: int,
    group_size: int = 1,
    scale_factor: int | float | Fraction = 2,
    output_size: int | Sequence[int] | None = None,
) -> Tensor:
    r"""Content-aware reassembly of features (CARAFE++, eq. 3) for any rational scale.

    Every output location is a weighted sum of a ``k x k`` neighbourhood of its source location, with weights of its
    own. Upsampling, downsampling and scales such as 3/2 are the same formula; see :mod:`carafe_plugin.ops.reference`.

    Args:
        features (Tensor[N, C, H, W]): float64, float32, float16 or bfloat16; any strides (contiguous and channels_last
            are fast). Zero outside the map.
        masks (Tensor[N, group_size * kernel_size ** 2, H', W']): the normalised kernels, one per output location and
            group, taps in row-major order, ``H' = ceil(H * scale_factor)``, ``W' = ceil(W * scale_factor)`` or
            ``output_size``; dtype and device of ``features`` (under autocast the dtypes may differ).
        kernel_size (int): ``k``, odd.
        group_size (int): number of channel groups ``G`` that have kernels of their own; ``C`` is a multiple of it.
        scale_factor (int | float | fractions.Fraction): output size over input size, greater than 0. A float must be
            exact (0.5, 1.5); write a third as ``Fraction(1, 3)``.
        output_size (int | Sequence[int] | None): ``(H', W')``, or one number for both, where not all of the output is
            wanted: its first rows and columns, as ``output[..., :H', :W']``. None means all.

    Returns:
        Tensor[N, C, H', W']: dtype and memory format of ``features``. Sums are accumulated in float32 (float64 for
        float64).

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, sizes, devices or the scale do not fit together.

    The first five positions are those of ``mmcv.ops.carafe``. Differentiable to any order; the compiled operators are
    deterministic.

    Example:
        >>> import torch
        >>> from carafe_plugin.ops import carafe
        >>> features = torch.arange(4.0).reshape(1, 1, 2, 2)
        >>> centre_tap = torch.zeros(1, 9, 4, 4)
        >>> centre_tap[:, 4] = 1
        >>> carafe(features, centre_tap, kernel_size=3, scale_factor=2)[0, 0]
        tensor([[0., 0., 1., 1.],
                [0., 0., 1., 1.],
                [2., 2., 3., 3.],
                [2., 2., 3., 3.]])
    """
    up, down = scale_ratio(scale_factor)
    check_maps({"features": features, "masks": masks})
    wanted = () if output_size is None else read_output_size(output_size, features, up, down)
    _check(features, masks, kernel_size, group_size, up, down, wanted)
    crop = (0, *wanted) if wanted else ()  # 0 stands for masks
    return reassembly(features)(features, masks, kernel_size, group_size, up, down, *crop)


def read_output_size(output_size: int | Sequence[int], features: Tensor, up: int, down: int) -> tuple[int, int]:
    """An ``output_size`` as (H', W'), for features (N, C, H, W) that are scaled by ``up / down``.

    Raises:
        TypeError: it is neither an int nor two of them.
        ValueError: it is less than 1, or more than there is.

    Example:
        >>> read_output_size(7, torch.zeros(1, 1, 4, 5), 2, 1)
        (7, 7)
    """
    sizes = output_size if isinstance(output_size, Sequence) else (output_size, output_size)
    kinds = (int, torch.SymInt, Tensor) if torch.jit.is_tracing() else (int, torch.SymInt)
    if len(sizes) != 2 or not all(isinstance(each, kinds) and not isinstance(each, bool) for each in sizes):
        raise TypeError(f"output_size must be an int or two of them, (H', W'), got {output_size!r}")
    height, width = sizes
    h, w = features.shape[2:]
    most_rows, most_columns = whole_size(h, up, down), whole_size(w, up, down)
    if not (1 <= height <= most_rows and 1 <= width <= most_columns):
        raise ValueError(
            f"output_size must be from (1, 1) to ({most_rows}, {most_columns}), which {h} x {w} features scaled by "
            f"{up}/{down} have kernels for, got ({height}, {width})"
        )
    return height, width


def scale_ratio(scale_factor: int | float | Fraction) -> tuple[int, int]:
    """The coprime ``(up, down)`` of a scale factor.

    Raises:
        TypeError: ``scale_factor`` is not a number.
        ValueError: it is not positive, or a float that is not an exact ratio.

    Example:
        >>> scale_ratio(2), scale_ratio(0.5), scale_ratio(Fraction(3, 2))
        ((2, 1), (1, 2), (3, 2))
    """
    if isinstance(scale_factor, bool) or not isinstance(scale_factor, (int, float, Fraction)):
        raise TypeError(
            f"scale_factor must be an int, a float or a fractions.Fraction, got {type(scale_factor).__name__}"
        )
    if not 0 < scale_factor < math.inf:  # not math.isfinite: torch.compile cannot trace it
        raise ValueError(f"scale_factor must be finite and greater than 0, got {scale_factor}")
    if isinstance(scale_factor, int):
        return scale_factor, 1
    if isinstance(scale_factor, Fraction):
        return scale_factor.numerator, scale_factor.denominator
    down = 1  # not scale_factor.as_integer_ratio(): the compiler of torch 2.4 cannot trace it
    while down < _MAX_FLOAT_DENOMINATOR and scale_factor * down != int(scale_factor * down):
        down *= 2
    if scale_factor * down != int(scale_factor * down):
        up, down = scale_factor.as_integer_ratio()
        scale_factor = float(scale_factor)  # NumPy's has another repr()
        guess = Fraction(scale_factor).limit_denominator(1000)
        if float(guess) != scale_factor:  # neither a rounded third nor another short fraction: as it is written
            guess = Fraction(repr(scale_factor))
        raise ValueError(
            f"scale_factor must be a rational number that is written exactly, got the float {scale_factor!r}, which is "
            f"{up}/{down}; did you mean fractions.Fraction({guess.numerator}, {guess.denominator})?"
        )
    return int(scale_factor * down), down


def _check(
    features: Tensor, masks: Tensor, kernel_size: int, group_size: int, up: int, down: int, wanted: tuple[int, ...]
) -> None:
    for name, number in (("kernel_size", kernel_size), ("group_size", group_size)):
        if isinstance(number, bool) or not isinstance(number, (int, torch.SymInt)):
            raise TypeError(f"{name} must be an int, got {type(number).__name__}")
    n, c, h, w = features.shape
    check_kernels(c, kernel_size, group_size)
    if features.device != masks.device:
        raise ValueError(
            f"features and masks must be on the same device, got features on {features.device}, masks on {masks.device}"
        )
    if features.dtype != masks.dtype and not _autocast_enabled(features.device.type):
        raise TypeError(
            f"features and masks must have the same dtype outside autocast, got {features.dtype} and {masks.dtype}"
        )
    outputs = wanted or (whole_size(h, up, down), whole_size(w, up, down))
    expected = (n, group_size * kernel_size**2, *outputs)
    if tuple(masks.shape) != expected:
        raise ValueError(
            f"masks must have shape {expected}: batch size of features, group_size * kernel_size ** 2, output size "
            f"({h} x {w} features scaled by {up}/{down}), got {tuple(masks.shape)}"
        )


def check_maps(maps: Mapping[str, Tensor]) -> None:
    """Raise TypeError or ValueError for what is not a four-dimensional tensor of a dtype that there are kernels for."""
    for name, value in maps.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        if value.layout != torch.strided or value.is_nested:
            layout = "a nested tensor" if value.is_nested else str(value.layout)
            raise TypeError(f"{name} must be a dense tensor, of the layout torch.strided, got {layout}")
        if value.dtype not in DTYPES:
            raise TypeError(f"{name}: the dtype must be float64, float32, float16 or bfloat16, got {value.dtype}")
        if value.dim() != 4:
            shape = tuple(value.shape)
            raise ValueError(f"{name} must have 4 dimensions, got {value.dim()}: {shape} is not (N, C, H, W)")


def check_kernels(channels: int, kernel_size: int, group_size: int) -> None:
    """Raise ValueError for a kernel size that is even, or groups that do not divide the channels."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and at least 1, got {kernel_size}")
    if group_size < 1 or channels % group_size:
        raise ValueError(
            f"group_size must be at least 1 and divide the channels, got {group_size} for {channels} channels"
        )


def _autocast_enabled(device_type: str) -> bool:
    try:
        return torch.is_autocast_enabled(device_type)
    except RuntimeError:  # a device without autocast, such as meta
        return False
    except TypeError:  # before torch 2.4
        return torch.is_autocast_cpu_enabled() if device_type == "cpu" else torch.is_autocast_enabled()
