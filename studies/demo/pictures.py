"""Pictures of predictions beside the ground truth.

A detector's are drawn from a COCO file and mmdet's dumped predictions, a segmentation's from folders of label maps.
"""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from carafe_plugin.engine.atomic import AtomicLocalBackend

#: Told apart by people with any colour vision (Okabe and Ito), and seen on dark and light backgrounds.
COLOURS = ("#e69f00", "#56b4e9", "#00c48f", "#f0e442", "#ff2d2d", "#e288bb", "#4d7cff", "#ffffff")
MIN_OBJECTS = 4


@dataclass(frozen=True)
class Drawn:
    """One outlined object; ``note`` stands above its box."""

    mask: np.ndarray
    label: int
    note: str = ""


def _ground_truth(coco: COCO, image_id: int) -> list[Drawn]:
    labels = {category: index for index, category in enumerate(sorted(coco.getCatIds()))}
    return [
        Drawn(coco.annToMask(item), labels[item["category_id"]], "crowd" if item["iscrowd"] else "")
        for item in coco.loadAnns(coco.getAnnIds(image_id))
    ]


def _predicted(prediction: Mapping[str, Any], threshold: float) -> list[Drawn]:
    found = prediction["pred_instances"]
    return [
        Drawn(coco_mask.decode(mask), int(label), f"{float(score):.2f}")
        for mask, label, score in zip(found["masks"], found["labels"], found["scores"], strict=True)
        if score >= threshold
    ]


@dataclass(frozen=True)
class Cell:
    """One picture of a grid: an image, and what is outlined on it."""

    image: np.ndarray
    objects: Sequence[Drawn] = ()

    def draw(self, axes: Axes) -> None:
        """Draw it."""
        axes.imshow(self.image, interpolation="nearest")
        for item in self.objects:
            if item.mask.any():
                _outline(axes, item)
        axes.set(xticks=[], yticks=[], xlim=(-0.5, self.image.shape[1] - 0.5), ylim=(self.image.shape[0] - 0.5, -0.5))


def _outline(axes: Axes, item: Drawn) -> None:
    colour = COLOURS[item.label % len(COLOURS)]
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
            cell.draw(axes)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=10)
    if legend:
        patches = [Patch(facecolor=colour, edgecolor="black", label=name) for name, colour in legend.items()]
        figure.legend(handles=patches, loc="outside lower center", ncols=len(legend), fontsize=9, frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    AtomicLocalBackend().put(content.getvalue(), out)


def draw_comparison(
    annotations: Path, images: Path, predictions: Mapping[str, Path], out: Path, rows: int = 6, threshold: float = 0.5
) -> None:
    """Draw ground truth (a COCO file) and predictions (mmdet's ``DumpDetResults`` files, by column title) side by side.

    The images are the first ones with several objects, whatever the models make of them.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # COCO reports its progress with print
        coco = COCO(str(annotations))
    columns: list[dict[int, Any]] = []
    for path in predictions.values():
        columns.append({item["img_id"]: item for item in pickle.loads(path.read_bytes())})
    ids = sorted(coco.getImgIds())
    pictures = {}
    for image_id in ([i for i in ids if len(coco.getAnnIds(i)) >= MIN_OBJECTS] or ids)[:rows]:
        image = np.asarray(Image.open(images / coco.loadImgs(image_id)[0]["file_name"]).convert("RGB"))
        drawn = [_ground_truth(coco, image_id), *(_predicted(results[image_id], threshold) for results in columns)]
        pictures[f"image {image_id}"] = [Cell(image, objects) for objects in drawn]
    names = [item["name"] for item in coco.loadCats(sorted(coco.getCatIds()))]
    legend = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    draw_grid(["ground truth", *predictions], pictures, out, 3.2, legend)


def draw_label_maps(
    data_root: Path,
    palette: Mapping[str, tuple[int, int, int]],
    predictions: Mapping[str, Path],
    out: Path,
    rows: int = 5,
) -> None:
    """Draw images in ADE20k's folders, their annotations and every model's folder of label maps side by side.

    The images are the first ones that show several classes. The palette's RGB colours are of labels from 1; 0 is black.
    """
    colours = np.array([(0, 0, 0), *palette.values()], dtype=np.uint8)
    truths = sorted((data_root / "annotations" / "validation").glob("*.png"))
    chosen = [path for path in truths if len(np.unique(np.asarray(Image.open(path)))) >= MIN_OBJECTS] or truths
    pictures = {}
    for truth in chosen[:rows]:
        image = np.asarray(Image.open(data_root / "images" / "validation" / f"{truth.stem}.jpg"))
        maps = [truth, *(folder / truth.name for folder in predictions.values())]
        pictures[truth.stem] = [Cell(image), *(Cell(colours[np.asarray(Image.open(path))]) for path in maps)]
    legend = {name: np.divide(colour, 255).tolist() for name, colour in palette.items()}
    draw_grid(["image", "ground truth", *predictions], pictures, out, 2.6, legend)
