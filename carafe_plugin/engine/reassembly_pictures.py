"""What locations are reassembled from, drawn over the image: a picture of chosen ones, and a page to look around in.

The page shows the kernel and the sources of any location of a chain: one HTML file, from reassembly_page.html.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Circle, Patch, Rectangle
from PIL import Image
from torch import Tensor

from carafe_plugin.analysis import Reassembly, Sources, chain_groups
from carafe_plugin.engine.atomic import AtomicLocalBackend
from carafe_plugin.engine.reassembly_view import View

Box = tuple[float, float, float, float]  #: left, top, width and height, in pixels
MAX_PART = 0.6  # of the image's width: what takes up more is shown with all of the image around it
CENTRE, SOURCE = "#00e6a8", (0.84, 0.125, 0.0)  # the paper's green and red; outlined and filled tell them apart as well
OUTLINE = (("black", 2.2), (CENTRE, 1.1))  # of the location: colours and widths, one on the other
TEMPLATE = Path(__file__).with_name("reassembly_page.html")
MAX_SIDE = 1024  # of the image that the page holds, in pixels: more makes the file larger, and hardly clearer
DRAWN_WIDTH = 640  # of the page's canvases: small images are drawn larger, so that their locations can be told apart


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
                axis.axis("off")
            part = _part(location, view, chain)
            _panel(axes[0], pixels, cells, location, (0, 0, width, height), 0.04 * max(width, height))
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
    size, first, last = np.array([width, height]), np.min(corners, axis=0), np.max(corners, axis=0)
    share = 1.2 * max((last - first) / size)
    if share > MAX_PART:
        return (0, 0, width, height)
    left, top = ((first + last - share * size) / 2).clip(0, (1 - share) * size).tolist()
    return (left, top, share * width, share * height)


def _panel(axis: Axes, pixels: np.ndarray, cells: Box, location: Shown, part: Box, radius: float = 0) -> None:
    """A part of the image with the location's square, and a ring of this radius around one that is easily missed."""
    height, width = pixels.shape[:2]
    axis.imshow(pixels, extent=(0, width, height, 0), interpolation="nearest", zorder=0)
    left, top, step_x, step_y = cells
    x, y = left + location.column * step_x, top + location.row * step_y
    shapes: list[Callable[..., Patch]] = [partial(Rectangle, (x, y), step_x, step_y)]
    if max(step_x, step_y) < radius:
        shapes.append(partial(Circle, (x + step_x / 2, y + step_y / 2), radius))
    for shape in shapes:
        for colour, line in OUTLINE:
            axis.add_patch(shape(fill=False, edgecolor=colour, linewidth=line, zorder=2))
    axis.set(xlim=(part[0], part[0] + part[2]), ylim=(part[1] + part[3], part[1]))


def _draw_sources(axis: Axes, sources: Sources, view: View, chain: Sequence[Reassembly]) -> None:
    weights = sources.to_map().numpy()
    left, top, step_x, step_y = view.cells(sources.size, chain)
    # The square root shows small weights too: composed ones differ by orders of magnitude.
    alpha = np.sqrt(weights / max(weights.max(), 1e-12))
    colours = np.concatenate([np.broadcast_to(SOURCE, (*weights.shape, 3)), alpha[..., None]], axis=2)
    right, bottom = left + weights.shape[1] * step_x, top + weights.shape[0] * step_y
    axis.imshow(colours, extent=(left, right, bottom, top), interpolation="nearest", zorder=1)


def pack_kernels(kernels: Tensor) -> tuple[np.ndarray, bool]:
    """Kernels (G, k, k, H', W') of weights from 0 to 1 in a byte a weight, (G, H', W', k * k) uint8, and whether they
    are normalised. Then each kernel is divided by its largest weight, for precision, and a weight is its byte over the
    sum of its kernel's bytes; else a weight is its byte over 255.
    """
    flat = kernels.flatten(1, 2).permute(0, 2, 3, 1).double()
    normalised = bool(torch.allclose(flat.sum(-1), torch.ones(()).double(), atol=0.02))  # half precision included
    if normalised:
        flat = flat / flat.amax(-1, keepdim=True)
    return (255 * flat).round().to(torch.uint8).numpy(), normalised


def page_data(
    title: str, chain: Sequence[Reassembly], view: View, pixels: np.ndarray, start: tuple[int, int], group: int | None
) -> dict[str, Any]:
    """What the page's script reads of a chain, in the order in which it ran, on an image of (H, W, 3) uint8 RGB pixels.

    ``start`` is row and column of the location that is shown first, on the last output, ``group`` as
    :func:`carafe_plugin.analysis.compose` takes it: for None, the average, the page holds the kernels of all groups,
    and composes each before it averages, as that function does.
    """
    image = Image.fromarray(pixels)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=85)
    operators = []
    groups = chain_groups(chain)
    chosen = [[0] * len(chain)] if group is not None else groups  # of those that the page holds
    for index, reassembly in enumerate(chain):
        kernels = reassembly.kernels[0]
        packed, normalised = pack_kernels(kernels if group is None else kernels[[groups[group][index]]])
        operators.append(
            dict(
                name=reassembly.name,
                k=reassembly.kernels.shape[2],
                up=reassembly.up,
                down=reassembly.down,
                source=reassembly.source_size,
                output=reassembly.output_size,
                source_cells=view.cells(reassembly.source_size, chain),
                output_cells=view.cells(reassembly.output_size, chain),
                normalised=normalised,
                kernels=base64.b64encode(packed.tobytes()).decode(),
            )
        )
    about = f"{title}: {len(chain)} CARAFE++ in a row. Red squares are the locations that the green one is reassembled "
    about += "from, the deeper the more. What lies between two operators is left out, as if each location passed its "
    about += "value on."
    if len(groups) > 1:
        which = f"group {group} of" if group is not None else "the average over"
        about += f" Channels have kernels by group: this is {which} {len(groups)}."
    return dict(
        title=title,
        about=about,
        image=f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}",
        image_size=view.image_size,
        shown_width=max(DRAWN_WIDTH, image.width),
        start=start,
        groups=chosen,
        operators=operators,
    )


def write_page(path: Path, data: dict[str, Any]) -> None:
    """Write the page with ``data`` in it, completely or not at all."""
    # In a script element, nothing but "<" could end the data early.
    text = json.dumps(data).replace("<", "\\u003c")
    AtomicLocalBackend().put_text(TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/", text), path)
