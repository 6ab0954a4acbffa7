"""Pictures from files: found below a folder, and read as people see them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageOps

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".tif", ".tiff", ".webp")


def find_images(folder: Path) -> list[str]:
    """The images of a folder and of all folders below it, linked ones too, by name; as text, there may be millions."""
    return sorted(
        str(Path(parent, name))
        for parent, names in _walk(folder)
        for name in names
        if name.lower().endswith(IMAGE_ENDINGS)
    )


def _walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    seen = set()  # a link may lead back to a folder above it
    for parent, folders, names in os.walk(folder, followlinks=True):
        status = Path(parent).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        yield parent, names


def read_upright(path: str | Path, mode: str = "RGB") -> Image.Image:
    """Read an image completely, turned as its EXIF data say, in Pillow's ``mode``.

    Raises:
        ValueError: it is missing, truncated, damaged or no image, or has pixels of more than 8 bits (Pillow would cut
            them off at 255); the message says which.
    """
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode in ("I", "F") or upright.mode.startswith("I;"):
                raise ValueError(f"its pixels have more than 8 bits (mode {upright.mode})")
            converted = upright.convert(mode)
            if upright.mode not in ("RGB", "RGBA", "P"):  # a profile is of the colours that were
                converted.info.pop("icc_profile", None)
            return converted
    except Exception as error:  # Pillow's decoders raise anything, down to struct.error
        raise ValueError(str(error) or type(error).__name__) from error
