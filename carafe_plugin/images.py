"""Image files: which of them a folder has and lacks, and what is in them."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

T = TypeVar("T")
Image.init()
_NO_PIXELS = ("BUFR", "GRIB", "HDF5", "WMF", "EPS", "MPEG")  # Pillow knows them, and needs other programs for them
#: What the names of images end in, in small letters: the formats that Pillow reads, and OpenCV's own.
IMAGE_ENDINGS = (
    *(ending for ending, kind in Image.EXTENSION.items() if kind in {*Image.OPEN, "MPO"} - {*_NO_PIXELS}),
    *(".exr", ".hdr", ".pic"),
)
#: Those of the formats in which pictures are written: they hold RGB of 8 bits.
WRITTEN_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".tif", ".tiff", ".webp")


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


def sample(files: Sequence[T], least: int = 200, seconds: float = 10) -> Iterator[T]:
    """Files to look into where all would take minutes: in an order of chance, always the same one, ``least`` of them
    and what else there is time for.
    """
    end = time.monotonic() + seconds
    for number, file in enumerate(random.Random(0).sample(files, len(files))):
        if number >= least and time.monotonic() > end:
            return
        yield file


_ORIENTATION, _TRANSPOSED = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values that swap height and width


def read_header(path: str | Path, turned: bool = True) -> tuple[tuple[int, int], str, str | None]:
    """The (height, width) of an image, Pillow's mode and its format, without decoding it; ``turned`` where OpenCV turns
    it as its EXIF data say the camera was held. Raises OSError or Pillow's DecompressionBombError where it is missing
    or unknown.
    """
    with Image.open(path) as image:
        size = image.height, image.width
        orientation = None
        if turned:
            with suppress(Exception):  # the reader of EXIF data raises anything; OpenCV passes over what is broken
                orientation = image.getexif().get(_ORIENTATION)
        if orientation in _TRANSPOSED:
            import cv2  # here alone: the benchmarks import this module where there is no OpenCV

            pixels = cv2.imread(str(path))  # whether it turns depends on the format: not WebP and AVIF
            if pixels is None:
                raise OSError(f"OpenCV cannot read {path}")
            size = pixels.shape[:2]
        return size, image.mode, image.format


def shorten(names: Iterable[object], most: int = 10) -> str:
    """The first of several names, and how many there are: ``a, b, ... (12)``."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:most]) + (f", ... ({len(listed)})" if len(listed) > most else "") or "none"


def decode(path: str | Path) -> Image.Image:
    """Read an image completely, as it is stored; the first page of several. Raises ValueError where it is missing,
    damaged or not an image.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except Exception as error:  # Pillow's decoders raise anything, down to struct.error
        raise ValueError(str(error) or type(error).__name__) from error


def count_pages(path: str | Path) -> int:
    """How many pages (frames of an animation, images of a TIFF file) an image file has; 1 where Pillow cannot tell."""
    with suppress(Exception), Image.open(path) as image:  # those behind the first may be damaged
        return getattr(image, "n_frames", 1)
    return 1


def read_upright(path: str | Path, mode: str = "RGB") -> Image.Image:
    """Read an image completely, turned as its EXIF data say, in Pillow's ``mode``. Raises ValueError, saying why, where
    it is missing, damaged or not an image, or has pixels of more than 8 bits (Pillow would cut them off at 255).
    """
    return upright(decode(path), mode)


def upright(image: Image.Image, mode: str = "RGB") -> Image.Image:
    """What :func:`decode` read, as :func:`read_upright` returns it."""
    try:
        turned = ImageOps.exif_transpose(image)
        if turned.mode in ("I", "F") or turned.mode.startswith("I;"):
            raise ValueError(f"its pixels have more than 8 bits (mode {turned.mode})")
        converted = turned.convert(mode)
    except Exception as error:  # the reader of EXIF data raises anything, too
        raise ValueError(str(error) or type(error).__name__) from error
    if turned.mode not in ("RGB", "RGBA", "P"):  # a profile describes the colours before the conversion
        converted.info.pop("icc_profile", None)
    return converted


def to_eight_bits(image: Image.Image) -> Image.Image:
    """An image of 16 bits by the upper 8 of them, as OpenCV has it; any other as it is."""
    if not (image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM")):  # Pillow scales PPM's to 16
        return image
    upper = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    upper.info = image.info
    return upper
