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

from .reference import NONE, NORMALIZERS, masks_from_logits, normalize_kernels

_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # not before torch 2.7


def reassembly(features: Tensor) -> Callable[..., Tensor]:
    """What computes a call: the operator, or one of the forms where ``torch.onnx.export`` is at work.

    Then nobody may be there to give the exporter a table of decompositions: tools of other libraries export for their
    users. Where it is not known whether sizes are fixed, the form serves them all.
    """
    if not torch.onnx.is_in_onnx_export():
        return torch.ops.carafe_plugin.carafe.default
    fixed = _is_exporting() and all(type(size) is int for size in features.shape)
    return banded if fixed else multiply_add


# Sites of a tile, going up and going down. A longer one wastes more of the band, which is zero but for k of a row; a
# shorter one copies more columns twice, and multiplies smaller matrices.
_UP_TILE, _DOWN_TILE = 12, 8


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
    """A matrix product for every row of a tile; where up and down are both more than 1, :func:`multiply_add`.

    A tile is t neighbouring sites, locations of the coarser map (the features going up, the output going down). Their
    windows lie in the same L = down * (t - 1) + k columns of k rows of features. So the outputs at its sites are the
    product of a matrix, whose row for site i has that kernel's k x k weights at columns down * i and following, and
    zeros, with these k * L features, of all channels at once.
    """
    if up > 1 and down > 1:
        return multiply_add(features, kernels, k, g, up, down, normalizer, out_height, out_width)
    masks = _masks(kernels, k, g, up, down, normalizer)
    channels, (height, width) = features.shape[1], masks.shape[2:]
    n, c, h, w = features.shape[0] * g, channels // g, *features.shape[2:]  # groups are so many maps
    features, masks = features.reshape(n, c, h, w), masks.reshape(n, k * k, height, width)
    rows, columns = (h, w) if up > 1 else (height, width)
    # At least so many sites that a window reaches into the next tile alone.
    tiles = (columns + (most := max(_UP_TILE if up > 1 else _DOWN_TILE, k)) - 1) // most
    t = max((columns + tiles - 1) // tiles, (k + down - 1) // down)
    length, beyond = down * (t - 1) + k, k - down

    # The features of each tile's windows, (N, rows, tiles, k * L, C): channels last, so that what is cut lies together.
    bottom = max(0, down * (rows - 1) + k - h - k // 2)
    padded = F.pad(features.permute(0, 2, 3, 1), [0, 0, k // 2, (tiles + 1) * down * t - w - k // 2, k // 2, bottom])
    blocks = padded.reshape(n, padded.shape[1], tiles + 1, down * t * c)
    windows = blocks[:, :, :tiles, : length * c]
    if beyond > 0:
        windows = torch.cat([windows, blocks[:, :, 1:, : beyond * c]], dim=3)
    windows = torch.cat([windows[:, u : u + down * (rows - 1) + 1 : down] for u in range(k)], dim=3)
    windows = windows.reshape(n, rows, 1, tiles, k * length, c)

    # The band: a row that is longer by L + down - k than it was, cut from a row of rows, is `down` further right.
    masks = F.pad(masks, [0, tiles * t * up - width, 0, rows * up - height])
    taps = masks.reshape(n, k, k, rows, up, tiles, t, up).permute(0, 3, 4, 5, 7, 1, 6, 2)
    taps = F.pad(taps, [0, length + down - k]).reshape(n, rows, up, tiles, up, k, t * (length + down))
    band = taps[..., : t * length].reshape(n, rows, up, tiles, up, k, t, length)
    band = band.permute(0, 1, 2, 3, 6, 4, 5, 7).reshape(n, rows, up, tiles, t * up, k * length)

    output = (band @ windows).reshape(n, rows * up * tiles * t * up, c).permute(0, 2, 1)
    output = output.reshape(-1, channels, rows * up, tiles * t * up)[..., :height, :width]
    return _first(output, out_height, out_width)


def _masks(kernels: Tensor, k: int, g: int, up: int, down: int, normalizer: int) -> Tensor:
    if normalizer == NONE:
        return kernels
    return masks_from_logits(kernels, k, g, up, down, NORMALIZERS[normalizer - 1])


def _weights_by_phase(kernels: Tensor, k: int, g: int, up: int, normalizer: int, h: int, w: int) -> Tensor:
    """Normalised weights at the source locations, (N, G, k^2, 1, up^2, H, W), as the encoder has them."""
    if normalizer == NONE:
        kernels = F.pad(kernels, [0, w * up - kernels.shape[3], 0, h * up - kernels.shape[2]])
        weights = F.pixel_unshuffle(kernels, up)
    else:
        logits = kernels.reshape(kernels.shape[0], g * k * k, up * up * h, w)
        weights = normalize_kernels(logits, k, g, NORMALIZERS[normalizer - 1])
    return weights.reshape(kernels.shape[0], g, k * k, 1, up * up, h, w)


def _first(output: Tensor, height: int | None, width: int | None) -> Tensor:
    for axis, length in ((-2, height), (-1, width)):
        if isinstance(length, torch.SymInt):  # whether a slice shortens the axis, an exporter would have to know
            output = output.index_select(axis, torch.arange(length, device=output.device))
        elif length is not None:
            output = output.narrow(axis, 0, length)
    return output
