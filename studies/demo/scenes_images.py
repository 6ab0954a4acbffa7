"""Scenes as plain folders of images, for tasks that need no annotation: what fills the holes is in the image itself.

The scenes are those of ``scenes.py`` in coloured light that changes over the image, as it does in photographs: one
colour everywhere is then a poor guess at what is missing, and the surroundings are a good one.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from studies.demo.scenes import Scene, paint_scene

#: The light's colours are those of a grid of so many cells, and smooth between them.
LIGHT_CELLS = 3


def paint_lit_scene(scene: Scene) -> np.ndarray:
    """The scene in its light, uint8 (size, size, 3) in RGB."""
    rng = np.random.default_rng([scene.noise_seed, 1])  # not the grain's numbers
    cells = rng.uniform(0.15, 0.85, (LIGHT_CELLS, LIGHT_CELLS, 3)).astype(np.float32)
    size = (scene.size, scene.size)
    channels = [Image.fromarray(cells[..., i]).resize(size, Image.Resampling.BICUBIC) for i in range(3)]
    light = np.stack([np.asarray(channel) for channel in channels], axis=-1)
    image = paint_scene(scene)[0] / 255
    lit = light + image - image.mean((0, 1))
    return (np.clip(lit, 0, 1) * 255).round().astype(np.uint8)


def write_split(out: Path, split: str, scenes: Iterable[Scene], version: int) -> None:
    """Write ``out/<split>/*.png``."""
    folder = out / split
    folder.mkdir(parents=True)
    for number, scene in enumerate(scenes, 1):
        Image.fromarray(paint_lit_scene(scene)).save(folder / f"{number:06d}.png")


def annotation_files(out: Path, split: str) -> list[Path]:
    """The files that tell one dataset from another: here the images themselves."""
    return sorted((out / split).glob("*.png"))


def holds_split(out: Path, split: str, count: int) -> bool:
    """Whether a split's files are all there."""
    return len(annotation_files(out, split)) == count
