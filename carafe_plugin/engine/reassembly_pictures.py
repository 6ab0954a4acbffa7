"""A picture of chosen locations and the sources that they are reassembled from, drawn over the image."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Circle, Rectangle

from carafe_plugin.analysis import Reassembly, Sources
from carafe_plugin.engine.atomic import AtomicLocalBackend
from carafe_plugin.engine.reassembly_view import View

Box = tuple[float, float, float, float]  #: left, top, width and height, in pixels
MAX_PART = 0.6  # of the image's width: what takes up more is shown with all of the image around it
CENTRE, SOURCE = "#00e6a8", (0.84, 0.125, 0.0)  # the paper's green and red; outlined and filled tell them apart as well
OUTLINE = (("black", 2.2), (CENTRE, 1.1))  # of the location: colours and widths, one on the other


@dataclass(frozen=True)
class Shown:
    """One location of a chain's output and the sources that :func:`carafe_plugin.analysis.compose` found for it."""

    point: tuple[float, float]  # of the image, as asked for: x and y in pixels
    row: int
    column: int
    levels: list[Sources]


def draw_reassembly(
    pixels: np.ndarray,
    view: View,
    chains: Mapping[str, Sequence[Reassembly]],
    shown: Mapping[str, Sequence[Shown]],
    out: Path,
) -> None:
    """Draw a row for each location: the image with the location, then the sources on each map back to the first.

    Where the sources take up a small part of a large image, their panels show that part, which is dashed in the first.
    ``pixels`` are (H, W, 3) uint8 RGB; ``chains``, in the order in which they ran, and ``shown`` go by title.
    """
    height, width = pixels.shape[:2]
    columns = 1 + max(len(chain) for chain in chains.values())
    rows = sum(len(locations) for locations in shown.values())
    side = 8 / columns
    figure = Figure(
        figsize=(8, rows * (side * height / width + 0.25) + 0.5),
        layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.02),
    )
    grid = iter(figure.subplots(rows, columns, squeeze=False))
    grey = _pale(pixels)
    for title, chain in chains.items():
        cells = view.cells(chain[-1].output_size, chain)
        for index, location in enumerate(shown[title]):
            axes = next(grid)
            for axis in axes:
                axis.set(xticks=[], yticks=[])
                axis.axis("off")
            part = _part(location, view, chain)
            _panel(axes[0], pixels, cells, location, (0, 0, width, height))
            _ring(axes[0], cells, location, 0.04 * max(width, height))
            if part != (0, 0, width, height):
                axes[0].add_patch(Rectangle(part[:2], part[2], part[3], fill=False, linestyle="--", edgecolor="white"))
            x, y = location.point
            axes[0].text(0, 1.02, f"({x:g}, {y:g})", transform=axes[0].transAxes, fontsize=8, va="bottom")
            if index == 0:
                first, last = chain[0].source_size, chain[-1].output_size
                axes[0].set_title(f"{title}: {_by(first)} to {_by(last)}\n", fontsize=9, loc="left")
            for axis, sources in zip(axes[1:], location.levels, strict=False):
                _draw_sources(axis, sources, view, chain)
                _panel(axis, grey, cells, location, part)
                axis.set_title(f"from {_by(sources.size)}", fontsize=8, pad=3)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    AtomicLocalBackend().put(content.getvalue(), out)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _pale(pixels: np.ndarray) -> np.ndarray:
    """Without colours and pale, so that the weights stand out."""
    grey = pixels.astype(float) @ (0.299, 0.587, 0.114)
    return np.repeat((110 + grey * 0.5)[..., None], 3, axis=2).clip(0, 255).astype(np.uint8)


def _part(location: Shown, view: View, chain: Sequence[Reassembly]) -> Box:
    """The part of the image that holds all the sources, of the image's proportions; all of it where that is much."""
    height, width = view.image_size
    corners = []
    for sources in location.levels:
        left, top, step_x, step_y = view.cells(sources.size, chain)
        for end in (0, 1):
            places = zip((sources.columns + end).tolist(), (sources.rows + end).tolist(), strict=True)
            corners += [(left + column * step_x, top + row * step_y) for column, row in places]
    if not corners:  # kernels that are zero within the map
        return (0, 0, width, height)
    (x0, y0), (x1, y1) = np.min(corners, axis=0), np.max(corners, axis=0)
    share = 1.2 * max((x1 - x0) / width, (y1 - y0) / height)
    if share > MAX_PART:
        return (0, 0, width, height)
    left, top = (x0 + x1 - share * width) / 2, (y0 + y1 - share * height) / 2
    return (
        float(np.clip(left, 0, width - share * width)),
        float(np.clip(top, 0, height - share * height)),
        share * width,
        share * height,
    )


def _panel(axis: Axes, pixels: np.ndarray, cells: Box, location: Shown, part: Box) -> None:
    height, width = pixels.shape[:2]
    axis.imshow(pixels, extent=(0, width, height, 0), interpolation="nearest", zorder=0)
    left, top, step_x, step_y = cells
    corner = left + location.column * step_x, top + location.row * step_y
    for colour, line in OUTLINE:
        axis.add_patch(Rectangle(corner, step_x, step_y, fill=False, edgecolor=colour, linewidth=line, zorder=2))
    axis.set(xlim=(part[0], part[0] + part[2]), ylim=(part[1] + part[3], part[1]))


def _ring(axis: Axes, cells: Box, location: Shown, radius: float) -> None:
    """A ring around a square that is easily missed."""
    left, top, step_x, step_y = cells
    if max(step_x, step_y) < radius:
        centre = left + (location.column + 0.5) * step_x, top + (location.row + 0.5) * step_y
        for colour, line in OUTLINE:
            axis.add_patch(Circle(centre, radius, fill=False, edgecolor=colour, linewidth=line, zorder=2))


def _draw_sources(axis: Axes, sources: Sources, view: View, chain: Sequence[Reassembly]) -> None:
    weights = sources.to_map().numpy()
    left, top, step_x, step_y = view.cells(sources.size, chain)
    # The square root shows small weights too: composed ones differ by orders of magnitude.
    alpha = np.sqrt(weights / max(weights.max(), 1e-12))
    colours = np.concatenate([np.broadcast_to(SOURCE, (*weights.shape, 3)), alpha[..., None]], axis=2)
    right, bottom = left + weights.shape[1] * step_x, top + weights.shape[0] * step_y
    axis.imshow(colours, extent=(left, right, bottom, top), interpolation="nearest", zorder=1)
