"""Generate a small dataset of textured scenes: instances (COCO), label maps (ADE20k's folders) or images alone.

A scene holds figures with thin and detailed outlines (stars, rings, crosses, crescents, gears, keys) before a textured
background. Figures hide one another, some are small, some scenes hold a crowd of equal figures (in COCO one annotation
with ``iscrowd=1``) and some are empty. Everything follows from the seed: the same arguments with the same versions of
numpy and Pillow give the same bytes, scene ``i`` of a split does not depend on how many scenes there are, and all
formats show the same scenes (``images`` in coloured light).

Example:
    $ python -m studies.demo.generate_scenes --out data/scenes --seed 0 --train 600 --val 120 --size 160
    $ python -m studies.demo.generate_scenes --out data/scenes-ade20k --format ade20k --figures 32
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from carafe_plugin.engine.cli import run_tool
from carafe_plugin.engine.console import progress_bar
from carafe_plugin.engine.errors import UsageError
from studies.common import integer, writing_into
from studies.demo.scenes import CATEGORIES, FIGURES, SPLITS, Scene, paint_lit_scene, paint_scene, scenes

#: Raise this whenever the same arguments give other scenes, so that existing datasets are written anew.
VERSION = 1
MARKER = "scenes.json"
MIN_SIZE, MAX_SIZE = 64, 1024
#: Label maps: the classes in the order of their labels, from 1.
CLASSES = ("background", *CATEGORIES)
#: Full colour resolution: a category is told by its hue, and many figures are a few pixels wide.
QUALITY = 95


# -------------------------------------------------------------------------------------------------------- formats
@dataclass(frozen=True)
class Format:
    """How a dataset is stored; ``{}`` in a pattern, which starts at the dataset's folder, is the split."""

    write: Callable[[Path, str, Iterable[Scene]], None]
    images: str
    annotations: str  # the files which tell one dataset from another
    folders: Mapping[str, str] = field(default_factory=lambda: {split: split for split in SPLITS})


def _save(pixels: np.ndarray, path: Path, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def write_coco(out: Path, split: str, scenes: Iterable[Scene]) -> None:
    """Write ``out/<split>/*.png`` and ``out/annotations/instances_<split>.json``: visible masks as compressed RLE."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, scene in enumerate(scenes, 1):
        image, owner = paint_scene(scene)
        file_name = f"{image_id:06d}.png"
        _save(image, out / split / file_name)
        images.append({"id": image_id, "file_name": file_name, "width": scene.size, "height": scene.size})
        for index, item in enumerate(scene.objects):
            visible = coco_mask.encode(np.asfortranarray(owner == index, dtype=np.uint8))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": CATEGORIES.index(item.category) + 1,
                    "iscrowd": int(item.crowd),
                    "area": float(coco_mask.area(visible)),
                    "bbox": coco_mask.toBbox(visible).tolist(),
                    "segmentation": {"size": list(owner.shape), "counts": visible["counts"].decode("ascii")},
                }
            )
    content = {
        "info": {"description": f"Generated scenes, {split}", "version": str(VERSION)},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name, "supercategory": "figure"} for i, name in enumerate(CATEGORIES, 1)],
    }
    file = out / "annotations" / f"instances_{split}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, separators=(",", ":")))


def write_ade20k(out: Path, split: str, scenes: Iterable[Scene]) -> None:
    """Write ``out/images/<split>/*.jpg`` and ``out/annotations/<split>/*.png``, the splits named as in ADE20k.

    The background is a class too. As 0, which is neither trained nor measured (mmseg's ``reduce_zero_label``), it would
    take the figures' outlines out of the evaluation: a model could paint them as wide as it liked.
    """
    folder = FORMATS["ade20k"].folders[split]
    for number, scene in enumerate(scenes, 1):
        image, owner = paint_scene(scene)
        _save(image, out / "images" / folder / f"{number:06d}.jpg", quality=QUALITY, subsampling=0)
        shown = [*(item.category for item in scene.objects), "background"]  # the last for owner's -1
        labels = np.array([CLASSES.index(category) + 1 for category in shown], dtype=np.uint8)
        _save(labels[owner], out / "annotations" / folder / f"{number:06d}.png")


def write_images(out: Path, split: str, scenes: Iterable[Scene]) -> None:
    """Write ``out/<split>/*.png``: what fills a hole is in the image itself."""
    for number, scene in enumerate(scenes, 1):
        _save(paint_lit_scene(scene), out / split / f"{number:06d}.png")


FORMATS = {
    "coco": Format(write_coco, "{}/*.png", "annotations/instances_{}.json"),
    "ade20k": Format(
        write_ade20k, "images/{}/*.jpg", "annotations/{}/*.png", {"train": "training", "val": "validation"}
    ),
    "images": Format(write_images, "{}/*.png", "{}/*.png"),
}


# ------------------------------------------------------------------------------------------------------- datasets
@dataclass(frozen=True)
class Request:
    """What a dataset on disk was made from; stored beside it as ``scenes.json``."""

    seed: int
    train: int
    val: int
    size: int
    version: int = VERSION
    figures: int = FIGURES
    format: str = "coco"


def _files(out: Path, request: Request, kind: str, split: str) -> list[Path]:
    """The files of one split; ``kind`` is ``"images"`` or ``"annotations"``."""
    form = FORMATS[request.format]
    return sorted(out.glob(getattr(form, kind).format(form.folders[split])))


def annotation_files(out: Path, request: Request) -> list[Path]:
    """The files that hold the annotations of both splits."""
    return [file for split in SPLITS for file in _files(out, request, "annotations", split)]


def is_complete(out: Path, request: Request) -> bool:
    """Whether ``out`` already holds exactly the requested dataset."""
    try:
        stored = Request(**json.loads((out / MARKER).read_text()))
    except (OSError, ValueError, TypeError):
        return False
    a_file_each = "*" in FORMATS[request.format].annotations
    return stored == request and all(
        len(_files(out, request, "images", split)) == count
        and len(_files(out, request, "annotations", split)) == (count if a_file_each else 1)
        for split, count in (("train", request.train), ("val", request.val))
    )


def generate(out: Path, request: Request) -> bool:
    """Write the dataset, all of it or nothing, unless it is complete already; returns whether anything was written.

    Raises UsageError where ``out`` holds something that this script did not write.
    """
    if is_complete(out, request):
        return False
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MARKER).is_file())):
        raise UsageError(
            f"{out} exists and was not written by this script (it has no {MARKER}); give another path or remove it"
        )
    partial = out.with_name(f".{out.name}.partial")
    with writing_into(out, partial):
        shutil.rmtree(partial, ignore_errors=True)
        for split in SPLITS:
            count = getattr(request, split)
            described = scenes(request.seed, split, count, request.size, request.figures)
            with progress_bar(f"writing {split}") as progress:
                FORMATS[request.format].write(partial, split, progress.track(described, total=count))
        (partial / MARKER).write_text(json.dumps(asdict(request)))
        if out.exists():
            shutil.rmtree(out)
        partial.replace(out)
    return True


def add_dataset_options(parser: argparse.ArgumentParser, defaults: Request) -> None:
    """The options that decide what the dataset contains."""
    for name, type_, text in (
        ("seed", integer(0), "everything follows from it"),
        ("train", integer(1), "number of training images"),
        ("val", integer(1), "number of validation images"),
        ("size", integer(MIN_SIZE, MAX_SIZE), "height and width of an image in pixels"),
        ("figures", integer(1), "the most figures in a scene"),
    ):
        default = getattr(defaults, name)
        parser.add_argument(f"--{name}", type=type_, default=default, help=f"{text} (default: {default})", metavar="N")


def request_from(args: argparse.Namespace, format: str) -> Request:
    """The request that :func:`add_dataset_options` asks for."""
    return Request(args.seed, args.train, args.val, args.size, figures=args.figures, format=format)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generate a dataset of textured scenes.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--format", choices=list(FORMATS), default="coco", help="instances, label maps or images alone (default: coco)"
    )
    add_dataset_options(parser, Request(seed=0, train=600, val=120, size=160))
    return parser.parse_args(argv)


def write_dataset(args: argparse.Namespace) -> None:
    written = generate(args.out, request_from(args, args.format))
    print(f"{args.out}: {args.train} + {args.val} images {'written' if written else 'already complete, nothing to do'}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(write_dataset, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
