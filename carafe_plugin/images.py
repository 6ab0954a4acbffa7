"""Image files: which of them a folder has and lacks, and what is in them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


def list_images(folder: str | Path, suffix: str | None = None) -> list[str]:
    """The images of a folder and of all folders below it, linked ones too: sorted paths below it, with slashes, as
    text, as there may be millions. ``suffix``, to the letter, replaces ``IMAGE_ENDINGS``, which count in any case.

    No file is opened or asked for its size, so links that lead nowhere are listed. Hidden files are left out.
    """
    images, seen, waiting = [], set(), [""]
    while waiting:
        below = waiting.pop()
        status = Path(folder, below).stat()
        if (status.st_dev, status.st_ino) in seen:  # a link may lead back to where it lies
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(Path(folder, below)) as entries:
            for entry in entries:
                if entry.is_dir():
                    waiting.append(f"{below}{entry.name}/")
                elif entry.name.startswith("."):
                    continue
                elif entry.name.endswith(suffix) if suffix else entry.name.lower().endswith(IMAGE_ENDINGS):
                    images.append(below + entry.name)
    return sorted(images)


def file_faults(folder: Path, names: Iterable[str], source: str, sizes: bool = True) -> list[str]:
    """Which of the files ``names`` a folder lacks, and which are there with nothing in them, as messages that call them
    ``source`` ('images of a.json').

    ``sizes`` has it look for empty files, which asks for every file's size: on a network file system minutes for a
    hundred thousand, while listing each folder once, which finds the missing ones, takes seconds.
    """
    places = {name: os.path.split(name) for name in names}
    found: dict[tuple[str, str], int | None] = {}
    for below in dict.fromkeys(parent for parent, _ in places.values()):
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder / below) as entries:
            for entry in entries:
                if entry.is_file():
                    found[below, entry.name] = entry.stat().st_size if sizes else None
    missing = [name for name, place in places.items() if place not in found]
    empty = [name for name, place in places.items() if found.get(place) == 0]
    faults = [("missing", missing), ("empty", empty)]
    return [
        f"{len(faulty)} of the {len(places)} {source} are {fault} in {folder}: {shorten(sorted(faulty))}"
        for fault, faulty in faults
        if faulty
    ]


def shorten(names: Iterable[object], most: int = 10) -> str:
    """The first of several names, and how many there are: ``a, b, ... (12)``."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:most]) + (f", ... ({len(listed)})" if len(listed) > most else "") or "none"


def decode(path: str | Path) -> Image.Image:
    """Read an image completely, as it is stored. Raises ValueError where it is missing, damaged or not an image."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except Exception as error:  # Pillow's decoders raise anything, down to struct.error
        raise ValueError(str(error) or type(error).__name__) from error


def read_upright(path: str | Path, mode: str = "RGB") -> Image.Image:
    """Read an image completely, turned as its EXIF data say, in Pillow's ``mode``. Raises ValueError, saying why, where
    it is missing, damaged or not an image, or has pixels of more than 8 bits (Pillow would cut them off at 255).
    """
    image = decode(path)
    try:
        upright = ImageOps.exif_transpose(image)
        if upright.mode in ("I", "F") or upright.mode.startswith("I;"):
            raise ValueError(f"its pixels have more than 8 bits (mode {upright.mode})")
        converted = upright.convert(mode)
    except Exception as error:  # the reader of EXIF data raises anything, too
        raise ValueError(str(error) or type(error).__name__) from error
    if upright.mode not in ("RGB", "RGBA", "P"):  # a profile describes the colours before the conversion
        converted.info.pop("icc_profile", None)
    return converted


def read_image(path: Path) -> np.ndarray:
    """Read an image as MMCV does, as (H, W, 3) uint8 RGB. Raises ValueError as :func:`decode` does."""
    import mmcv

    decode(path)  # OpenCV fills the missing part of a truncated file with grey; Pillow refuses it
    pixels = mmcv.imread(str(path), channel_order="rgb")
    if pixels is None:
        raise ValueError("OpenCV cannot read it")
    return pixels
