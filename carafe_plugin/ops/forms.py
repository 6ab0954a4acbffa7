"""The operator as standard operators, for runtimes that do not have this package's library.

Two forms of what :func:`carafe_plugin.ops.reference.reassemble` defines. :func:`multiply_add` has no number of a size
in it, so that an exported model takes any N, H and W. :func:`banded` is made for one size, and several times as fast
where matrix products are: it writes a row of outputs as a product of a band matrix and the windows of a tile.

Both compute in the dtype of the features, and take and return what the operator ``carafe_plugin::carafe`` does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from ._tracing import torch_exports
from .reference import NONE, NORMALIZERS, masks_from_logits, normalize_kernels


def reassembly(features: Tensor) -> Callable[..., Tensor]:
    """What computes a call: the operator, or one of the forms where ``torch.onnx.export`` is at work.

    Then nobody may be there to give the exporter a table of decompositions: tools of other libraries export for their
    users. Where it is not known whether sizes are fixed, the form serves them all.
    """
    if not torch.onnx.is_in_onnx_export():
        return torch.ops.carafe_plugin.carafe.default
    fixed = torch_exports() and all(type(size) is int for size in features.shape)
    return banded if fixed else multiply_add


# Height and width of a tile in sites, going up and going down. A larger one wastes more of the band, of which a row has
# k^2 weights; a smaller one copies more of the features, and multiplies smaller matrices.
_UP_TILE, _DOWN_TILE = (2, 4), (4, 4)


def multiply_add(
    features: Tensor,
    kernels: Tensor,
    k: int,
    g: int,
    up: int,
    down: int,
    normalizer: int = NONE,
    out_height: int | None = None,
    out_width: int | None = None,
) -> Tensor:
    """A product and a sum for each of the k^2 taps, for any sizes.

    Going up by an integer, the phases of a source location are an axis of the weights, so that no feature is copied.
    Other scales read a map that is enlarged by ``up``, in steps of ``down``.
    """
    n, c, h, w = features.shape
    source = F.pad(features, [k // 2] * 4)
    by_phase = up > 1 and down == 1
    if by_phase:
        weights = _weights_by_phase(kernels, k, g, up, normalizer, h, w)
        rows, columns, enlarged = h, w, 1
    else:
        weights = _masks(kernels, k, g, up, down, normalizer)
        # Read off here: behind unflatten, the tracer of `dynamo=False` takes sizes for constants.
        (rows, columns), enlarged = weights.shape[2:], up
        weights = weights.unflatten(1, (g, k * k)).unsqueeze(3)
        if up > 1:
            copies = source[..., :, None, :, None].expand(-1, -1, -1, up, -1, up)
            source = copies.reshape(n, c, source.shape[2] * up, source.shape[3] * up)
    source = source.unflatten(1, (g, c // g))

    def weighted(tap: int) -> Tensor:
        u, v = (enlarged * place for place in divmod(tap, k))
        window = source[..., u : u + down * (rows - 1) + 1 : down, v : v + down * (columns - 1) + 1 : down]
        return (window.unsqueeze(3) if by_phase else window) * weights[:, :, tap]

    output = reduce(torch.add, (weighted(tap) for tap in range(k * k)))
    if not by_phase:
        return _first(output.reshape(n, c, rows, columns), out_height, out_width)
    output = F.pixel_shuffle(output.reshape(n, c * up * up, h, w), up)
    wanted = kernels.shape[2:] if normalizer == NONE else (out_height, out_width)
    return _first(output, *wanted)


def banded(
    features: Tensor,
    kernels: Tensor,
    k: int,
    g: int,
    up: int,
    down: int,
    normalizer: int = NONE,
    out_height: int | None = None,
    out_width: int | None = None,
) -> Tensor:
    """A matrix product for every tile; where up and down are both more than 1, :func:`multiply_add`.

    A tile is s x t neighbouring sites, locations of the coarser map (the features going up, the output going down).
    Their windows lie in the same (down * (s - 1) + k) x (down * (t - 1) + k) features. So the outputs at its sites are
    the product of a matrix, whose rows have the k x k weights of a kernel at the features of its window, and zeros,
    with these features, of all channels at once.
    """
    if up > 1 and down > 1:
        return multiply_add(features, kernels, k, g, up, down, normalizer, out_height, out_width)
    n, c, h, w = features.shape[0] * g, features.shape[1] // g, *features.shape[2:]  # groups are so many maps
    logits = _by_phase(kernels, up, h, w) if normalizer == NONE else kernels
    rows, columns = logits.shape[2:]
    (tile_rows, s), (tile_columns, t) = map(_tiles, (rows, columns), _UP_TILE if up > 1 else _DOWN_TILE)
    height, width = down * (s - 1) + k, down * (t - 1) + k
    tiles = tile_rows * tile_columns

    # The features of each tile's windows, (N, tiles, height * width, C): channels last, so that what is copied lies
    # together.
    bottom, right = down * (tile_rows * s - 1) + k - h - k // 2, down * (tile_columns * t - 1) + k - w - k // 2
    margins = [0, 0, k // 2, max(0, right), k // 2, max(0, bottom)]
    padded = F.pad(features.reshape(n, c, h, w).permute(0, 2, 3, 1), margins)
    covered = _grid((tile_rows, tile_columns), (down * s, down * t), (height, width), padded.shape[2], features.device)
    windows = padded.flatten(1, 2).index_select(1, covered.flatten()).reshape(n, tiles, height * width, c)

    # The band, (N, tiles, sites' outputs, height * width). Each site puts its k^2 weights where its own window lies: a
    # product with a matrix of ones and zeros, a single operator that moves them all.
    places = _grid((s, t), (down, down), (k, k), width, features.device).reshape(s * t, k * k, 1)
    places = (places == torch.arange(height * width, device=features.device)).to(features.dtype)
    weights = logits.reshape(n, k * k, up * up * rows * columns).permute(0, 2, 1)
    if normalizer != NONE:
        weights = weights.reshape(n * up * up * rows * columns, k * k, 1, 1)
        weights = normalize_kernels(weights, k, 1, NORMALIZERS[normalizer - 1])
    weights = weights.reshape(n, up, up, rows, columns, k * k)
    weights = F.pad(weights, [0, 0, 0, tile_columns * t - columns, 0, tile_rows * s - rows])
    weights = weights.reshape(n, up, up, tile_rows, s, tile_columns, t, k * k).permute(4, 6, 0, 3, 5, 1, 2, 7)
    band = weights.reshape(s * t, n * tiles * up * up, k * k) @ places
    band = band.reshape(s, t, n, tiles, up, up, height * width).permute(2, 3, 0, 4, 1, 5, 6)
    band = band.reshape(n, tiles, s * up * t * up, height * width)

    output = (band @ windows).reshape(n, tile_rows, tile_columns, s * up, t * up, c).permute(0, 1, 3, 2, 4, 5)
    output = output.reshape(n, tile_rows * s * up * tile_columns * t * up, c).permute(0, 2, 1)
    output = output.reshape(n // g, g * c, tile_rows * s * up, tile_columns * t * up)
    wanted = kernels.shape[2:] if normalizer == NONE else (rows * up, columns * up)
    return _first(output[..., : wanted[0], : wanted[1]], out_height, out_width)


def _tiles(sites: int, most: int) -> tuple[int, int]:
    """The fewest tiles of an axis that are no longer than ``most`` sites, and how long they are."""
    tiles = (sites + most - 1) // most
    return tiles, (sites + tiles - 1) // tiles


def _grid(
    counts: tuple[int, int], steps: tuple[int, int], sizes: tuple[int, int], width: int, device: torch.device
) -> Tensor:
    """Of windows in a map of that width, where each of a window's elements lies: (*counts, *sizes)."""
    rows, columns = (
        torch.arange(count, device=device)[:, None] * step + torch.arange(size, device=device)
        for count, step, size in zip(counts, steps, sizes, strict=True)
    )
    return rows[:, None, :, None] * width + columns[:, None]


def _masks(kernels: Tensor, k: int, g: int, up: int, down: int, normalizer: int) -> Tensor:
    if normalizer == NONE:
        return kernels
    return masks_from_logits(kernels, k, g, up, down, NORMALIZERS[normalizer - 1])


def _weights_by_phase(kernels: Tensor, k: int, g: int, up: int, normalizer: int, h: int, w: int) -> Tensor:
    """Normalised weights at the source locations, (N, G, k^2, 1, up^2, H, W), as the encoder has them."""
    if normalizer == NONE:
        weights = _by_phase(kernels, up, h, w)
    else:
        logits = kernels.reshape(kernels.shape[0], g * k * k, up * up * h, w)
        weights = normalize_kernels(logits, k, g, NORMALIZERS[normalizer - 1])
    return weights.reshape(kernels.shape[0], g, k * k, 1, up * up, h, w)


def _by_phase(masks: Tensor, up: int, h: int, w: int) -> Tensor:
    """Masks as the encoder has logits, (N, G * k^2 * up^2, H, W); those that are not wanted are zero."""
    if up == 1:
        return masks
    return F.pixel_unshuffle(F.pad(masks, [0, w * up - masks.shape[3], 0, h * up - masks.shape[2]]), up)


def _first(output: Tensor, height: int | None, width: int | None) -> Tensor:
    for axis, length in ((-2, height), (-1, width)):
        if isinstance(length, torch.SymInt):  # whether a slice shortens the axis, an exporter would have to know
            output = output.index_select(axis, torch.arange(length, device=output.device))
        elif length is not None:
            output = output.narrow(axis, 0, length)
    return output
