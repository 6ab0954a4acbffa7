"""Scenes as a semantic-segmentation dataset in the folders and with the labels of ADE20k.

An annotation is an image of one channel. A pixel of which nothing is said has 0 and is neither trained nor measured
(``reduce_zero_label=True`` in mmseg); classes count from 1. Here the background is a class like the categories. Left at
0 it would take the figures' outlines out of all judgement: a model could paint them as wide as it liked. So no pixel of
a generated scene has 0; each has the category that is seen there, be its object a figure or a crowd.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from studies.demo.scenes import CATEGORIES, Scene, paint_scene

#: In the order of their labels, from 1.
CLASSES = ("background", *CATEGORIES)
FOLDERS = {"train": "training", "val": "validation"}
#: Full colour resolution: a category is told by its hue, and many figures are a few pixels wide.
QUALITY = 95


def label_map(scene: Scene, owner: np.ndarray) -> np.ndarray:
    """The label of each pixel, uint8, the shape of ``owner``."""
    labels = [CLASSES.index(item.category) + 1 for item in scene.objects]
    # The last entry is the one that owner's -1 picks.
    return np.array([*labels, CLASSES.index("background") + 1], dtype=np.uint8)[owner]


def write_split(out: Path, split: str, scenes: Iterable[Scene], version: int) -> None:
    """Write ``out/images/<split>/*.jpg`` and ``out/annotations/<split>/*.png``."""
    images, annotations = (out / kind / FOLDERS[split] for kind in ("images", "annotations"))
    images.mkdir(parents=True)
    annotations.mkdir(parents=True)
    for number, scene in enumerate(scenes, 1):
        image, owner = paint_scene(scene)
        Image.fromarray(image).save(images / f"{number:06d}.jpg", quality=QUALITY, subsampling=0)
        Image.fromarray(label_map(scene, owner)).save(annotations / f"{number:06d}.png")


def annotation_files(out: Path, split: str) -> list[Path]:
    """The files that hold a split's annotations."""
    return sorted((out / "annotations" / FOLDERS[split]).glob("*.png"))


def holds_split(out: Path, split: str, count: int) -> bool:
    """Whether a split's files are all there."""
    images = sum(1 for _ in (out / "images" / FOLDERS[split]).glob("*.jpg"))
    return images == count == len(annotation_files(out, split))
