"""Generate a small instance-segmentation dataset of textured scenes, in COCO format.

A scene holds figures with thin and detailed outlines (stars, rings, crosses, crescents, gears, keys) before a textured
background. Figures hide one another, some are small, some scenes hold a crowd of equal figures (one annotation with
``iscrowd=1``) and some hold none at all. Everything follows from the seed: the same arguments with the same versions of
numpy and Pillow give the same bytes, and scene ``i`` of a split does not depend on how many scenes there are.

Example:
    $ python tools/generate_scenes.py --out data/scenes --seed 0 --train 600 --val 120 --size 160
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from rich.progress import track
from scenes import CATEGORIES, SPLITS, Scene, paint_scene, scenes

#: Raise this whenever the same arguments give other scenes, so that datasets already on disk are written anew.
VERSION = 1
MARKER = "scenes.json"
MIN_SIZE, MAX_SIZE = 64, 1024


def coco_annotations(scene: Scene, owner: np.ndarray, image_id: int, first_id: int) -> list[dict[str, Any]]:
    """COCO annotations of the visible masks, as compressed RLE, numbered from ``first_id``."""
    annotations = []
    for index, item in enumerate(scene.objects):
        rle = coco_mask.encode(np.asfortranarray(owner == index, dtype=np.uint8))
        annotations.append(
            {
                "id": first_id + index,
                "image_id": image_id,
                "category_id": CATEGORIES.index(item.category) + 1,
                "iscrowd": int(item.crowd),
                "area": float(coco_mask.area(rle)),
                "bbox": coco_mask.toBbox(rle).tolist(),
                "segmentation": {"size": list(owner.shape), "counts": rle["counts"].decode("ascii")},
            }
        )
    return annotations


def write_coco(out: Path, seed: int, split: str, count: int, size: int) -> None:
    """Write ``out/<split>/*.png`` and ``out/annotations/instances_<split>.json``."""
    (out / split).mkdir(parents=True)
    (out / "annotations").mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    progress = track(
        enumerate(scenes(seed, split, count, size), 1),
        f"Writing {split}",
        total=count,
        transient=True,
        disable=not sys.stdout.isatty(),
    )
    for image_id, scene in progress:
        image, owner = paint_scene(scene)
        file_name = f"{image_id:06d}.png"
        Image.fromarray(image).save(out / split / file_name)
        images.append({"id": image_id, "file_name": file_name, "width": size, "height": size})
        annotations += coco_annotations(scene, owner, image_id, first_id=len(annotations) + 1)
    content = {
        "info": {"description": f"Generated scenes, {split}", "version": str(VERSION)},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name, "supercategory": "figure"} for i, name in enumerate(CATEGORIES, 1)],
    }
    (out / "annotations" / f"instances_{split}.json").write_text(json.dumps(content, separators=(",", ":")))


@dataclass(frozen=True)
class Request:
    """What a dataset on disk was made from; stored beside it as ``scenes.json``."""

    seed: int
    train: int
    val: int
    size: int
    version: int = VERSION


def is_complete(out: Path, request: Request) -> bool:
    """Whether ``out`` already holds exactly the requested dataset."""
    try:
        stored = json.loads((out / MARKER).read_text())
    except (OSError, ValueError):
        return False
    counts = {split: sum(1 for _ in (out / split).glob("*.png")) for split in SPLITS}
    return (
        stored == asdict(request)
        and counts == {"train": request.train, "val": request.val}
        and all((out / "annotations" / f"instances_{split}.json").is_file() for split in SPLITS)
    )


def generate(out: Path, request: Request) -> bool:
    """Write the dataset unless it is complete already.

    It is written beside ``out`` and moved there at the end, so ``out`` never holds half a dataset.

    Returns:
        Whether anything was written.

    Raises:
        FileExistsError: ``out`` holds something that this script did not write.
    """
    if is_complete(out, request):
        return False
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MARKER).is_file())):
        raise FileExistsError(
            f"--out {out} exists and was not written by this script (it has no {MARKER}); "
            "give another path or remove it"
        )
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for split in SPLITS:
        write_coco(partial, request.seed, split, getattr(request, split), request.size)
    (partial / MARKER).write_text(json.dumps(asdict(request)))
    if out.exists():
        shutil.rmtree(out)
    partial.replace(out)
    return True


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """An argparse type: an integer within bounds."""
    expected = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


def add_dataset_options(parser: argparse.ArgumentParser) -> None:
    """The options that decide what the dataset contains."""
    parser.add_argument("--seed", type=integer(0), default=0, help="everything follows from it (default: 0)")
    parser.add_argument("--train", type=integer(1), default=600, help="number of training images (default: 600)")
    parser.add_argument("--val", type=integer(1), default=120, help="number of validation images (default: 120)")
    parser.add_argument(
        "--size",
        type=integer(MIN_SIZE, MAX_SIZE),
        default=160,
        help="height and width of an image in pixels (default: 160)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Generate an instance-segmentation dataset in COCO format.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    add_dataset_options(parser)
    args = parser.parse_args(argv)
    try:
        written = generate(args.out, Request(args.seed, args.train, args.val, args.size))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {args.train} + {args.val} images {'written' if written else 'already there, nothing to do'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
