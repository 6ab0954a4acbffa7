"""The Data Science Bowl of 2018, stage 1, as Kaggle distributes it: microscopy, and a mask image for each nucleus."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from carafe_plugin.engine.dataset_layout import Dataset, Folder, Source, check_splits, link, write_labels
from carafe_plugin.engine.errors import UsageError, note
from carafe_plugin.images import decode, list_images, shorten, to_eight_bits

SPLITS = ("train", "val")
_FILES = {split: f"instances_{split}.json" for split in SPLITS}
_VAL_SHARE = 0.24  # of the images, at most
_LIKE = 4  # levels of 256 by which the mean colours of images from one plate may differ


def convert(source: Path, out: Path, progress: Progress) -> Iterator[str]:
    """Link the images of a download into train/ and val/, and write its masks in COCO's format; yields what is wrong
    with it, and then writes nothing.

    Masks that overlap stay as they are, and empty ones are left out: lines on stderr say how many.
    """
    if (inner := source / "stage1_train").is_dir():  # of an archive that holds the folder itself
        source = inner
    folders = sorted(path for path in source.iterdir() if (path / "images").is_dir())
    unlabelled = [path.name for path in folders if not (path / "masks").is_dir() or not list_images(path / "masks")]
    if len(unlabelled) == len(folders):
        yield f"no folder in {source} holds images/ and masks/ with a mask; of Kaggle's stages, stage1_train does"
        return
    if unlabelled:
        yield f"{len(unlabelled)} of the {len(folders)} images in {source} have no masks: {shorten(unlabelled)}"
    faulty, empty = bool(unlabelled), 0
    overlapping: list[Path] = []
    images: dict[Path, tuple[tuple[int, int], np.ndarray]] = {}
    objects: dict[Path, list[dict[str, Any]]] = {}
    for folder in progress.track(folders, description="masks"):
        try:
            path, size, colour = _read_image(folder / "images")
            covered, objects[path] = np.zeros(size, int), []
            for name in list_images(folder / "masks") if folder.name not in unlabelled else ():
                mask = _read_mask(folder / "masks" / name, path, size)
                covered += mask
                if mask.any():
                    objects[path].append(_annotation(mask))
                else:
                    empty += 1
        except UsageError as error:
            yield str(error)
            faulty = True
        else:
            images[path] = size, colour
            overlapping += [path] if (covered > 1).any() else []
    if faulty:
        return
    if empty:
        note(f"{empty} masks in {source} are empty and are left out")
    if overlapping:
        note(f"masks of {len(overlapping)} images in {source} overlap, and stay as they are")
    sizes, colours = zip(*images.values(), strict=True)
    split = dict(zip(images, split_look_alikes([path.name for path in images], sizes, colours), strict=True))
    if len(set(split.values())) < len(SPLITS):
        yield f"the {len(images)} images in {source} look alike in size and colour: none can be set apart for val"
        return
    for part in SPLITS:
        _write_split(part, {path: images[path][0] for path in images if split[path] == part}, objects, out)


def _read_image(folder: Path) -> tuple[Path, tuple[int, int], np.ndarray]:
    """The only image of a folder, its (height, width) and its mean colour, as the toolboxes read it."""
    names = list_images(folder)
    if len(names) != 1:
        raise UsageError(f"{folder} must hold one image, and holds {len(names)}: {shorten(names)}")
    try:
        image = to_eight_bits(decode(folder / names[0]))
    except ValueError as error:
        raise UsageError(f"cannot read {folder / names[0]}: {error}") from error
    colour = np.asarray(image.convert("RGB")).reshape(-1, 3).mean(0)
    return folder / names[0], (image.height, image.width), colour


def _read_mask(path: Path, image: Path, size: tuple[int, int]) -> np.ndarray:
    """Where a mask image is not black, whatever it is transparent; it must have the (height, width) of its image."""
    try:
        mask = decode(path)
    except ValueError as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    pixels: np.ndarray = np.asarray(mask.convert("RGB") if mask.mode in ("P", "PA") else mask)
    if pixels.ndim == 3:
        pixels = pixels[..., : 1 if mask.mode == "LA" else 3].max(-1)
    if pixels.shape != size:
        found, expected = (" x ".join(map(str, each)) for each in (pixels.shape, size))
        raise UsageError(f"mask {path} is {found}, its image {image} is {expected} (height x width)")
    return pixels != 0


def _annotation(mask: np.ndarray) -> dict[str, Any]:
    from pycocotools import mask as coco  # in here: of the other datasets, none needs it to be laid out

    runs = coco.encode(np.asfortranarray(mask, np.uint8))
    box, area = coco.toBbox(runs).tolist(), int(coco.area(runs))
    return dict(bbox=box, area=area, segmentation=dict(size=list(mask.shape), counts=runs["counts"].decode("ascii")))


def split_look_alikes(
    names: Sequence[str], sizes: Sequence[tuple[int, int]], colours: Sequence[np.ndarray]
) -> list[str]:
    """The split of each image, so that look-alikes are on one side: those of one plate have one size, and mean colours
    in a chain of small steps. Where all are alike, there is no val.

    Groups go to val while it has room, in an order of chance that their images' names decide.
    """
    groups: dict[int, list[int]] = {}
    for number, group in enumerate(_groups(sizes, np.stack(colours))):
        groups.setdefault(group, []).append(number)
    order = sorted(groups.values(), key=lambda group: min(zlib.crc32(names[number].encode()) for number in group))
    val: list[int] = []
    for group in order:
        if len(val) + len(group) <= _VAL_SHARE * len(names):
            val += group
    if not val and len(groups) > 1:
        val = min(order, key=len)
    return [SPLITS[number in set(val)] for number in range(len(names))]


def _groups(sizes: Sequence[tuple[int, int]], colours: np.ndarray) -> np.ndarray:
    """A number for each image, the same where a chain of images of its size, each step small, leads to another."""
    pixels = np.array(sizes)
    close = (abs(colours[:, None] - colours[None]).max(-1) <= _LIKE) & (pixels[:, None] == pixels[None]).all(-1)
    found = np.arange(len(sizes))
    while (smallest := np.where(close, found[None], len(sizes)).min(1)).tolist() != found.tolist():
        found = smallest
    return found


def _write_split(split: str, sizes: dict[Path, tuple[int, int]], objects: dict[Path, list], out: Path) -> None:
    folder, images, annotations = out / split, [], []
    if folder.is_dir():
        for old in folder.iterdir():
            if old.is_symlink():  # of an earlier download
                old.unlink()
    for number, (path, (height, width)) in enumerate(sizes.items(), 1):
        link(path, folder / path.name)
        images.append(dict(id=number, file_name=path.name, width=width, height=height))
        annotations += [dict(image_id=number, category_id=1, iscrowd=0, **found) for found in objects[path]]
    content = dict(
        images=images,
        annotations=[dict(id=number, **annotation) for number, annotation in enumerate(annotations, 1)],
        categories=[dict(id=1, name="nucleus")],
    )
    write_labels(content, out / "annotations" / _FILES[split])


DSB2018 = Dataset(
    "data/dsb2018",
    (*(Folder(split, 0) for split in SPLITS), Folder("annotations", len(SPLITS), files=tuple(_FILES.values()))),
    partial(check_splits, splits={split: (f"annotations/{name}", split) for split, name in _FILES.items()}, masks=True),
    source=Source(
        (
            "stage1_train",
            "data-science-bowl-2018/stage1_train",
            "kaggle-dsbowl-2018-dataset-fixes/stage1_train",
            "kaggle-dsbowl-2018-dataset-fixes-master/stage1_train",
        ),
        (),
        "stage1_train.zip",
        "",
    ),
    convert=convert,
)
