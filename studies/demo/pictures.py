"""Grids of pictures: images, and objects outlined on them."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from carafe_plugin.engine.atomic import AtomicLocalBackend

#: Told apart by people with any colour vision (Okabe and Ito), and seen on dark and light backgrounds.
COLOURS = ("#e69f00", "#56b4e9", "#00c48f", "#f0e442", "#ff2d2d", "#e288bb", "#4d7cff", "#ffffff")
MIN_OBJECTS = 4  # that an image shows; it is drawn whatever the models make of it


@dataclass(frozen=True)
class Drawn:
    """One outlined object; ``note`` stands above its box."""

    mask: np.ndarray
    label: int
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """One picture of a grid: an image, and what is outlined on it."""

    image: np.ndarray
    objects: Iterable[Drawn] = ()


def _outline(axes: Axes, item: Drawn) -> None:
    colour = COLOURS[item.label]
    axes.contourf(item.mask, levels=[0.5, 1.5], colors=[colour], alpha=0.35)
    # A dark line below the coloured one keeps the outline visible on a figure of the same colour.
    axes.contour(item.mask, levels=[0.5], colors=["black"], linewidths=2.4)
    axes.contour(item.mask, levels=[0.5], colors=[colour], linewidths=1.3)
    rows, columns = np.nonzero(item.mask)
    axes.text(
        columns.min(),
        max(rows.min() - 2, 7),
        item.note,
        color="white",
        fontsize=6.5,
        clip_on=True,
        bbox={"facecolor": "black", "alpha": 0.6, "pad": 0.6, "edgecolor": "none"} if item.note else None,
    )


def draw_grid(
    titles: Sequence[str],
    rows: Mapping[str, Sequence[Cell]],
    out: Path,
    inches: float,
    legend: Mapping[str, Any] | None = None,
) -> None:
    """Draw a grid of pictures, all of it or nothing: rows by label, each picture ``inches`` wide."""
    size = (inches * len(titles), inches * len(rows) + (0.7 if legend else 0.5))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    grid = figure.subplots(len(rows), len(titles), squeeze=False)
    for line, (label, cells) in zip(grid, rows.items(), strict=True):
        line[0].set_ylabel(label, fontsize=8)
        for axes, cell in zip(line, cells, strict=True):
            height, width = cell.image.shape[:2]
            axes.imshow(cell.image, interpolation="nearest")
            for item in cell.objects:
                if item.mask.any():
                    _outline(axes, item)
            axes.set(xticks=[], yticks=[], xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=10)
    if legend:
        patches = [Patch(facecolor=colour, edgecolor="black", label=name) for name, colour in legend.items()]
        figure.legend(handles=patches, loc="outside lower center", ncols=len(legend), fontsize=9, frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    AtomicLocalBackend().put(content.getvalue(), out)
