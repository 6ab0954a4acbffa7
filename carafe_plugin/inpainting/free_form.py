"""Free-form holes: random brush strokes, generated and reproducible."""

from __future__ import annotations

import cv2
import numpy as np


def free_form_mask(
    rng: np.random.Generator,
    size: tuple[int, int],
    strokes: tuple[int, int] = (1, 4),
    vertices: tuple[int, int] = (4, 12),
    width: tuple[float, float] = (12 / 256, 40 / 256),
    most: float = 0.6,
) -> np.ndarray:
    """Draw brush strokes as a hand would, to and fro.

    After Yu et al., Free-Form Image Inpainting with Gated Convolution, ICCV 2019 (the paper's reference [45]): a stroke
    starts anywhere and is a chain of straight lines of one width with round joints; every second line turns back; a
    line's direction deviates from 72 degrees by up to 24, its length is normal around an eighth of the image's diagonal
    (standard deviation a sixteenth, from nothing to a quarter); the whole is flipped at random. Widths are those of a
    256 x 256 image, in proportion.

    Args:
        rng (np.random.Generator): the only source of randomness.
        size (tuple[int, int]): height and width in pixels.
        strokes (tuple[int, int]): the fewest and the most strokes.
        vertices (tuple[int, int]): the fewest and the most lines of a stroke.
        width (tuple[float, float]): the least and the largest width of a stroke, in parts of the shorter edge.
        most (float): the largest share of the image that may be hole; a mask beyond it is redrawn.

    Returns:
        (H, W) uint8, 1 in the hole. There is always a hole, and always something left.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> mask = free_form_mask(np.random.default_rng(0), (64, 96))
        >>> mask.shape, bool(0 < mask.mean() <= 0.6)
        ((64, 96), True)
    """
    height, columns = size
    if min(size) < 4:
        raise ValueError(f"size must be at least 4 x 4, got {height} x {columns}")
    for name, (low, high) in (("strokes", strokes), ("vertices", vertices), ("width", width)):
        if low <= 0 or high < low:
            raise ValueError(f"{name} must be (least, most) with 0 < least <= most, got {(low, high)}")
    if not 0.2 <= most <= 1:  # below it, redrawing might never end
        raise ValueError(f"most must be from 0.2 to 1, got {most}")
    for _ in range(100):
        mask: np.ndarray = np.zeros(size, np.uint8)
        for _ in range(rng.integers(*strokes, endpoint=True)):
            _draw_stroke(mask, rng, int(rng.integers(*vertices, endpoint=True)), rng.uniform(*width) * min(size))
        if rng.random() < 0.5:
            mask = mask[::-1]
        if rng.random() < 0.5:
            mask = mask[:, ::-1]
        if mask.any() and mask.mean() <= most and not mask.all():
            return np.ascontiguousarray(mask)
    raise ValueError(f"no mask of {strokes} strokes of width {width} leaves {1 - most:.0%} of the image: ask for less")


def _draw_stroke(mask: np.ndarray, rng: np.random.Generator, vertices: int, width: float) -> None:
    limits = np.array(mask.shape[::-1]) - 1.0  # x, y
    unit = float(np.hypot(*mask.shape)) / 8
    thickness = max(round(width), 1)
    at = rng.uniform(0, 1, 2) * limits
    for vertex in range(vertices):
        angle = np.deg2rad(72 + rng.uniform(-24, 24))
        if vertex % 2 == 0:
            angle = 2 * np.pi - angle
        length = float(np.clip(rng.normal(unit, unit / 2), 0, 2 * unit))
        to = np.clip(at + length * np.array([np.sin(angle), np.cos(angle)]), 0, limits)
        start, end = ((round(float(x)), round(float(y))) for x, y in (at, to))
        cv2.line(mask, start, end, 1, thickness)
        cv2.circle(mask, end, thickness // 2, 1, -1)
        at = to
