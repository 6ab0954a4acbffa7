"""Scenes as an instance-segmentation dataset in COCO format."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from studies.demo.scenes import CATEGORIES, Scene, paint_scene


def annotations_of(scene: Scene, owner: np.ndarray, image_id: int, first_id: int) -> list[dict[str, Any]]:
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


def write_split(out: Path, split: str, scenes: Iterable[Scene], version: int) -> None:
    """Write ``out/<split>/*.png`` and ``out/annotations/instances_<split>.json``."""
    (out / split).mkdir(parents=True)
    (out / "annotations").mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, scene in enumerate(scenes, 1):
        image, owner = paint_scene(scene)
        file_name = f"{image_id:06d}.png"
        Image.fromarray(image).save(out / split / file_name)
        images.append({"id": image_id, "file_name": file_name, "width": scene.size, "height": scene.size})
        annotations += annotations_of(scene, owner, image_id, first_id=len(annotations) + 1)
    content = {
        "info": {"description": f"Generated scenes, {split}", "version": str(version)},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name, "supercategory": "figure"} for i, name in enumerate(CATEGORIES, 1)],
    }
    (out / "annotations" / f"instances_{split}.json").write_text(json.dumps(content, separators=(",", ":")))


def annotation_files(out: Path, split: str) -> list[Path]:
    """The files that hold a split's annotations."""
    return [out / "annotations" / f"instances_{split}.json"]


def holds_split(out: Path, split: str, count: int) -> bool:
    """Whether a split's files are all there."""
    images = sum(1 for _ in (out / split).glob("*.png"))
    return images == count and all(path.is_file() for path in annotation_files(out, split))
