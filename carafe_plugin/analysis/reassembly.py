"""Which source locations an output location is reassembled from, through one CARAFE++ or a chain (paper, Fig. 1 and 9).

With the kernels of a forward pass held fixed, CARAFE++ is linear: an output location is a weighted sum of the ``k x k``
source locations around its centre, zero outside the map. So is a chain of them, and a source's weight in the result is
the sum, over all paths that lead to it, of the products of the weights on the way.

What lies between two operators of a chain is left out: each location passes its value on as it is.

* In an FPN's top-down path that is exact. A lateral map is added between two operators, and a sum of maps is
  reassembled term by term: the composed weight of a source is exactly the derivative of the finest map (before its
  output convolution) with respect to that location of the coarser one, kernels fixed.
* In a backbone, whole residual blocks lie between the operators. Their convolutions see further than one location,
  so that the composed weights show what reassembly contributes to the receptive field, and not all of it.

The kernels depend on the features themselves; that dependence is not part of the weights.

Plain PyTorch: nothing here needs an OpenMMLab package.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from carafe_plugin.modules.carafe import KernelPrediction
from carafe_plugin.ops.reference import crop, masks_from_logits


@dataclass(frozen=True)
class Sources:
    """Weighted locations of a map; every location occurs once, and none has the weight zero.

    ``rows``, ``columns`` (int64) and ``weights`` (float64) are Tensor[S]; ``size`` is the map's height and width.
    """

    rows: Tensor
    columns: Tensor
    weights: Tensor
    size: tuple[int, int]

    @classmethod
    def at(cls, row: int, column: int, size: tuple[int, int]) -> Sources:
        """One location, with weight 1; a ValueError where it is not on the map."""
        for name, value, limit in (("row", row, size[0]), ("column", column, size[1])):
            if not 0 <= value < limit:
                raise ValueError(f"{name} must be from 0 to {limit - 1} on a map of {size[0]} x {size[1]}, got {value}")
        return cls(torch.tensor([row]), torch.tensor([column]), torch.ones(1, dtype=torch.float64), size)

    @classmethod
    def collect(cls, rows: Tensor, columns: Tensor, weights: Tensor, size: tuple[int, int]) -> Sources:
        """The locations of tensors of one shape: the weights of equal ones added, those outside dropped."""
        height, width = size
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width) & (weights != 0)
        places, which = torch.unique(rows[inside] * width + columns[inside], return_inverse=True)
        sums = torch.zeros(len(places), dtype=torch.float64).index_add(0, which, weights[inside])
        return cls(places // width, places % width, sums, size)

    @property
    def total(self) -> float:
        """Sum of the weights: 1 for normalised kernels, less what fell outside the maps."""
        return float(self.weights.sum())

    def to_map(self) -> Tensor:
        """The weights as a map (H, W), float64, zero elsewhere."""
        weights = torch.zeros(self.size, dtype=torch.float64)
        weights[self.rows, self.columns] = self.weights
        return weights


@dataclass(frozen=True)
class Reassembly:
    """The kernels of one CARAFE++ in one forward pass.

    Attributes:
        name (str): the module's name in its model.
        kernels (Tensor[N, G, k, k, H', W']): normalised, on the CPU; N images or regions, G groups of channels.
        source_size (tuple[int, int]): H and W of the features.
        up, down (int): the coprime scale: output ``i'`` has the centre ``floor(i' * down / up)``.
    """

    name: str
    kernels: Tensor
    source_size: tuple[int, int]
    up: int
    down: int

    @property
    def output_size(self) -> tuple[int, int]:
        """H' and W', as the operator gave them: less than the whole where that was asked for."""
        return (self.kernels.shape[-2], self.kernels.shape[-1])

    @property
    def group_size(self) -> int:
        """G, the number of groups of channels that have kernels of their own."""
        return self.kernels.shape[1]

    def sources(self, row: int, column: int, group: int | None = None, image: int = 0) -> Sources:
        """What one output location is reassembled from; arguments and errors are those of :func:`compose`."""
        return compose([self], row, column, group, image)[0]

    def pull_back(self, outputs: Sources, group: int, image: int = 0) -> Sources:
        """What a weighted sum of output locations is reassembled from: the transposed operator.

        ``outputs`` lie on the output map as it was used: cropped at the bottom and right, or completed there by
        repeating the last row and column. A ``group`` or ``image`` that does not exist is a ValueError.
        """
        for name, value, limit in (("group", group, self.group_size), ("image", image, len(self.kernels))):
            if not 0 <= value < limit:
                raise ValueError(f"{name} must be from 0 to {limit - 1} in {self.name}, got {value}")
        height, width = self.output_size
        rows, columns = outputs.rows.clamp(max=height - 1), outputs.columns.clamp(max=width - 1)
        kernels = self.kernels[image, group, :, :, rows, columns].double()  # (k, k, S)
        radius = kernels.shape[0] // 2
        offsets = torch.arange(-radius, radius + 1)
        source_rows = rows * self.down // self.up + offsets[:, None, None]
        source_columns = columns * self.down // self.up + offsets[None, :, None]
        source_rows, source_columns = torch.broadcast_tensors(source_rows, source_columns)
        return Sources.collect(source_rows, source_columns, kernels * outputs.weights, self.source_size)


@contextmanager
def record_reassemblies(model: nn.Module) -> Iterator[list[Reassembly]]:
    """Record the kernels of every CARAFE++ that runs in ``model`` inside the ``with`` block.

    Each adds itself to the list when it has run, with the kernels that it used, twice when it runs twice; the model's
    outputs and gradients stay as they are. One pass over a model takes as much memory as all its kernels. A subclass
    that takes more than the features gives the kernels that result by ``effective_kernels(kernels, *others)``, as
    masked CARAFE++ does.

    Example:
        >>> import torch
        >>> from carafe_plugin import CARAFEUpsample
        >>> from carafe_plugin.analysis import record_reassemblies
        >>> upsampler = CARAFEUpsample(16)
        >>> with record_reassemblies(upsampler) as found:
        ...     output = upsampler(torch.rand(1, 16, 6, 8))
        >>> sources = found[0].sources(row=5, column=7)
        >>> len(sources.weights), round(sources.total, 6)  # 5 x 5 around (2, 3)
        (25, 1.0)
    """
    found: list[Reassembly] = []
    logits: dict[nn.Module, Tensor] = {}

    def keep_logits(site: KernelPrediction, encoder: nn.Module, inputs: Any, output: Tensor) -> None:
        logits[site] = output.detach()

    def keep_kernels(name: str, site: Any, inputs: tuple, named: dict[str, Any], output: Any) -> None:
        bound = signature(site.forward).bind(*inputs, **named)
        wanted = None if bound.arguments.pop("output_size", None) is None else output.shape[2:]
        kernels = crop(masks_from_logits(logits.pop(site), *site.settings), wanted)
        features, *rest = bound.args
        if rest:  # of which not every location counts
            kernels = site.effective_kernels(kernels, *rest)
        kernels = kernels.cpu().unflatten(1, (site.group_size, site.kernel_size, site.kernel_size))
        height, width = features.shape[-2:]
        found.append(Reassembly(name, kernels, (height, width), site.up, site.down))

    handles = []
    for name, site in model.named_modules():
        if isinstance(site, KernelPrediction):
            handles.append(site.content_encoder.register_forward_hook(partial(keep_logits, site)))
            handles.append(site.register_forward_hook(partial(keep_kernels, name), with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def check_chain(chain: Sequence[Reassembly]) -> None:
    """Check that each operator's output is the next one's source, up to the crop or completion of an FPN.

    Raises:
        ValueError: the chain is empty, or two neighbours' sizes differ by more than the rounding of a scale explains.
    """
    if not chain:
        raise ValueError("a chain must have at least one reassembly, got none")
    for first, second in pairwise(chain):
        # ceil(H / 2) upsampled by 2 is at most 1 too large, floor(H / 2) 1 too small: less than one source location.
        differences = (abs(out - source) for out, source in zip(first.output_size, second.source_size, strict=True))
        if max(differences) >= first.up:
            raise ValueError(
                f"{first.name} and {second.name} do not follow one another: the first makes a map of "
                f"{_by(first.output_size)}, the second takes one of {_by(second.source_size)}"
            )


def chain_groups(chain: Sequence[Reassembly]) -> list[tuple[int, ...]]:
    """The groups of a chain's channels: for each, which group of every operator it belongs to.

    Channels stay in order, so that operators with different numbers of groups divide them into as many as the least
    common multiple of these, all equally large.

    Example:
        >>> import torch
        >>> from carafe_plugin.analysis import Reassembly, chain_groups
        >>> chain = [Reassembly("", torch.ones(1, groups, 1, 1, 4, 4), (4, 4), 1, 1) for groups in (1, 2, 4)]
        >>> chain_groups(chain)
        [(0, 0, 0), (0, 0, 1), (0, 1, 2), (0, 1, 3)]
    """
    count = math.lcm(*(reassembly.group_size for reassembly in chain))
    return [tuple(group * reassembly.group_size // count for reassembly in chain) for group in range(count)]


def compose(
    chain: Sequence[Reassembly], row: int, column: int, group: int | None = None, image: int = 0
) -> list[Sources]:
    """What one output location of a chain of operators is reassembled from, on every map on the way.

    Args:
        chain (Sequence[Reassembly]): in the order in which they ran, such as an FPN's from the coarsest level down.
        row (int): of the last one's output map.
        column (int): of the last one's output map.
        group (int | None): one of :func:`chain_groups`; None for the average over all channels.
        image (int): index in the batch.

    Returns:
        One :class:`Sources` for each operator, the last one's first: ``[0]`` through the last operator alone, ``[-1]``
        through all of them, on the source map of the first.

    Raises:
        ValueError: the operators do not follow one another, or there is no such location, group or image.

    Example:
        >>> import torch
        >>> from carafe_plugin import CARAFEUpsample
        >>> from carafe_plugin.analysis import compose, record_reassemblies
        >>> model = torch.nn.Sequential(CARAFEUpsample(8, up_kernel=3), CARAFEUpsample(8, up_kernel=3))
        >>> with record_reassemblies(model) as chain:
        ...     output = model(torch.rand(1, 8, 6, 6))
        >>> [(sources.size, len(sources.weights)) for sources in compose(chain, row=11, column=11)]
        [((12, 12), 9), ((6, 6), 16)]
    """
    check_chain(chain)
    groups = chain_groups(chain)
    if group is not None and not 0 <= group < len(groups):
        raise ValueError(f"group must be from 0 to {len(groups) - 1}, got {group}")
    levels: list[list[Sources]] = [[] for _ in chain]
    for members in groups if group is None else [groups[group]]:
        reached = Sources.at(row, column, chain[-1].output_size)
        for level, reassembly, member in zip(levels, reversed(chain), reversed(members), strict=True):
            reached = reassembly.pull_back(reached, member, image)
            level.append(reached)
    return [_average(level) for level in levels]


def _average(parts: Sequence[Sources]) -> Sources:
    rows, columns, weights = (torch.cat([getattr(p, name) for p in parts]) for name in ("rows", "columns", "weights"))
    return Sources.collect(rows, columns, weights / len(parts), parts[0].size)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
