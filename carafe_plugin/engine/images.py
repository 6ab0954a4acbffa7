"""Photographs for the commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def read_image(path: Path) -> np.ndarray:
    """Read an image as (H, W, 3) uint8 RGB.

    Raises:
        ValueError: the file is truncated, damaged or no image.
    """
    import mmcv
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()  # OpenCV fills the missing part of a truncated file with grey; Pillow refuses it
    except Exception as error:  # Pillow's decoders raise anything, down to struct.error
        raise ValueError(str(error) or type(error).__name__) from error
    pixels = mmcv.imread(str(path), channel_order="rgb")
    if pixels is None:
        raise ValueError("OpenCV cannot read it")
    return pixels
