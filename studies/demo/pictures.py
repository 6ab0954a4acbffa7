"""Pictures of predictions beside the ground truth.

A detector's come from a COCO file and mmdet's dumped predictions, a segmentation's from folders of label maps.
"""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Iterable, Mapping
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


def _draw(axes: Axes, image: np.ndarray, objects: Iterable[Drawn]) -> None:
    axes.imshow(image, interpolation="nearest")
    for item in objects:
        if not item.mask.any():
            continue
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
    axes.set(xticks=[], yticks=[], xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5))


def draw_comparison(
    annotations: Path, images: Path, predictions: Mapping[str, Path], out: Path, rows: int = 6, threshold: float = 0.5
) -> None:
    """Draw ground truth and every model's predictions of the same images side by side.

    The images are the first ones with several objects, whatever the models make of them.

    Args:
        annotations: A COCO instances file.
        images: The folder its file names lie in.
        predictions: By column title, the file that mmdet's ``DumpDetResults`` wrote.
        out: The PNG to write.
        rows: How many images at most.
        threshold: The least score that is drawn.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # COCO reports its progress with print
        coco = COCO(str(annotations))
    columns: dict[str, dict[int, Any]] = {}
    for title, path in predictions.items():
        with path.open("rb") as file:
            columns[title] = {item["img_id"]: item for item in pickle.load(file)}
    ids = sorted(coco.getImgIds())
    chosen = ([i for i in ids if len(coco.getAnnIds(i)) >= MIN_OBJECTS] or ids)[:rows]
    figure = Figure(figsize=(3.2 * (1 + len(columns)), 3.2 * len(chosen) + 0.7), layout="constrained")
    grid = figure.subplots(len(chosen), 1 + len(columns), squeeze=False)
    for axes, image_id in zip(grid, chosen, strict=True):
        image = np.asarray(Image.open(images / coco.loadImgs(image_id)[0]["file_name"]).convert("RGB"))
        _draw(axes[0], image, _ground_truth(coco, image_id))
        axes[0].set_ylabel(f"image {image_id}", fontsize=8)
        for axis, results in zip(axes[1:], columns.values(), strict=True):
            _draw(axis, image, _predicted(results[image_id], threshold))
    for axis, title in zip(grid[0], ["ground truth", *columns], strict=True):
        axis.set_title(title, fontsize=10)
    categories = coco.loadCats(sorted(coco.getCatIds()))
    _save(figure, {item["name"]: COLOURS[index % len(COLOURS)] for index, item in enumerate(categories)}, out)


def draw_label_maps(
    data_root: Path,
    palette: Mapping[str, tuple[int, int, int]],
    predictions: Mapping[str, Path],
    out: Path,
    rows: int = 5,
) -> None:
    """Draw images, their annotations and every model's label maps side by side.

    The images are the first ones that show several classes, whatever the models make of them.

    Args:
        data_root: A dataset in ADE20k's folders.
        palette: The colour of each class, in the order of their labels from 1; a pixel of label 0 is black.
        predictions: By column title, the folder of label maps that ``tools/test.py --out`` wrote.
        out: The PNG to write.
        rows: How many images at most.
    """
    colours = np.array([(0, 0, 0), *palette.values()], dtype=np.uint8)
    truths = sorted((data_root / "annotations" / "validation").glob("*.png"))
    chosen = ([path for path in truths if len(np.unique(np.asarray(Image.open(path)))) >= MIN_OBJECTS] or truths)[:rows]
    titles = ["image", "ground truth", *predictions]
    figure = Figure(figsize=(2.6 * len(titles), 2.6 * len(chosen) + 0.7), layout="constrained")
    grid = figure.subplots(len(chosen), len(titles), squeeze=False)
    for axes, truth in zip(grid, chosen, strict=True):
        image = Image.open(data_root / "images" / "validation" / f"{truth.stem}.jpg")
        maps = [truth, *(folder / truth.name for folder in predictions.values())]
        for axis, shown in zip(axes, [image, *(colours[np.asarray(Image.open(path))] for path in maps)], strict=True):
            axis.imshow(shown, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        axes[0].set_ylabel(truth.stem, fontsize=8)
    for axis, title in zip(grid[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
    _save(figure, {name: np.divide(colour, 255).tolist() for name, colour in palette.items()}, out)


def _save(figure: Figure, colours: Mapping[str, Any], out: Path) -> None:
    """Add a legend of named colours, and write all of the picture or nothing."""
    figure.legend(
        handles=[Patch(facecolor=colour, edgecolor="black", label=name) for name, colour in colours.items()],
        loc="outside lower center",
        ncols=len(colours),
        fontsize=9,
        frameon=False,
    )
    temporary = out.with_suffix(".partial.png")
    figure.savefig(temporary, dpi=110)
    temporary.replace(out)
