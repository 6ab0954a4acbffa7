#!/usr/bin/env python
"""Detect objects in images: pictures with boxes and masks, and one COCO-style JSON file.

The JSON is a COCO dataset with predictions in place of annotations: ``images`` (id, file_name, width, height),
``categories`` (id, name; the ids of the configuration's test annotations where that file is at hand, else 1, 2, ... in
the order of the classes) and ``annotations`` (image_id, category_id, bbox as x, y, width, height in pixels, score and,
from a model with masks, segmentation as compressed RLE). ``pycocotools.coco.COCO`` reads it, and its ``annotations``
are what ``COCO.loadRes`` takes.

Example:
    $ python tools/infer.py photos/ --config CONFIG --checkpoint CHECKPOINT --out-dir found --score-thr 0.5

The exit code is 0; 1 when images were skipped because they cannot be read; 2 when nothing could be started.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from carafe_plugin.engine.atomic import AtomicLocalBackend
from carafe_plugin.engine.checkpoint import read_checkpoint
from carafe_plugin.engine.cli import add_config_options, run_tool
from carafe_plugin.engine.config import dataset_configs, import_adapters, load_config
from carafe_plugin.engine.errors import UsageError
from carafe_plugin.engine.images import read_image

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


def score(text: str) -> float:
    """A score threshold from the command line."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text}")
    return value


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Detect objects in images.")
    parser.add_argument("images", metavar="IMAGE-OR-FOLDER", help="an image file, or a folder of them")
    parser.add_argument("--config", required=True, help="configuration file of a detector (mmdet)")
    parser.add_argument("--checkpoint", required=True, help="its checkpoint")
    parser.add_argument("--out-dir", required=True, help="folder for results.json and pictures/")
    parser.add_argument("--score-thr", type=score, default=0.3, help="leave out what scores less (default: 0.3)")
    parser.add_argument("--device", help="cpu, cuda:0, ... (default: the first GPU where there is one, else cpu)")
    add_config_options(parser)
    return parser.parse_args(argv)


def find_images(path: Path) -> list[Path]:
    """The image that ``path`` is, or the images directly in the folder that it is, by name."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"no such image or folder: {path.absolute()}")
    images = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_ENDINGS and file.is_file())
    if not images:
        raise UsageError(f"no images ({', '.join(IMAGE_ENDINGS)}) in folder {path.absolute()}")
    return images


def load_detector(args: argparse.Namespace) -> Any:
    """Build mmdet's detector from the command line, with the checkpoint's weights and classes."""
    cfg = load_config(args.config, args.cfg_options)
    scope = cfg.get("default_scope", "mmdet")
    if scope not in (None, "mmdet"):
        raise UsageError(f"tools/infer.py serves detectors (mmdet); {args.config} is of the scope {scope}")
    device = args.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error
    import_adapters("mmdet", drop_in=args.drop_in)
    if "://" not in args.checkpoint:
        read_checkpoint(args.checkpoint)
    from mmdet.apis import init_detector

    return init_detector(cfg, args.checkpoint, device=device)


def category_ids(cfg: Config, classes: Sequence[str]) -> list[int]:
    """The category id of every class: the test annotations' where they name all classes, else 1, 2, ..."""
    dataset = next(dataset_configs(cfg.test_dataloader.dataset))
    annotations = Path(dataset.get("data_root") or "", dataset.get("ann_file") or "")
    if annotations.suffix == ".json" and annotations.is_file():
        content = json.loads(annotations.read_text())
        categories = content.get("categories", []) if isinstance(content, dict) else []
        ids = {category["name"]: category["id"] for category in categories}
        if set(classes) <= set(ids):
            return [ids[name] for name in classes]
    return list(range(1, len(classes) + 1))


def to_coco(instances: Any, image_id: int, categories: Sequence[int]) -> list[dict]:
    """Mmdet's predictions for one image as COCO results.

    Args:
        instances: mmdet's ``InstanceData`` with bboxes (N, 4; x1, y1, x2, y2), scores, labels (N) and perhaps masks
            (N, H, W).
        image_id: the id of the image.
        categories: the category id of every label.
    """
    from pycocotools import mask as coco_mask

    results = []
    for index, (x1, y1, x2, y2) in enumerate(instances.bboxes.tolist()):
        result: dict[str, Any] = dict(
            image_id=image_id,
            category_id=categories[int(instances.labels[index])],
            bbox=[round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)],
            score=round(float(instances.scores[index]), 5),
        )
        area = result["bbox"][2] * result["bbox"][3]
        if "masks" in instances:
            mask = np.asfortranarray(np.asarray(instances.masks[index]), dtype=np.uint8)
            rle = coco_mask.encode(mask)
            area = coco_mask.area(rle)
            result["segmentation"] = dict(size=list(rle["size"]), counts=rle["counts"].decode())
        results.append(result | dict(area=float(area), iscrowd=0))
    return results


def write_picture(path: Path, pixels: np.ndarray) -> None:
    """Write (H, W, 3) uint8 RGB pixels to ``path``, completely or not at all."""
    import cv2

    ending = path.suffix if path.suffix.lower() in IMAGE_ENDINGS else ".png"
    encoded = cv2.imencode(ending, np.ascontiguousarray(pixels[..., ::-1]))[1]
    AtomicLocalBackend().put(encoded.tobytes(), path)


def infer(args: argparse.Namespace) -> int:
    """Detect as the command line says; 1 when images were skipped."""
    images = find_images(Path(args.images))
    out_dir = Path(args.out_dir)
    if out_dir.exists() and not out_dir.is_dir():
        raise UsageError(f"--out-dir is a folder; {out_dir.absolute()} is a file")
    model = load_detector(args)
    from mmdet.apis import inference_detector
    from mmdet.registry import VISUALIZERS

    pipeline = _pipeline(model.cfg)
    visualizer = VISUALIZERS.build(dict(type="DetLocalVisualizer", name="infer"))
    visualizer.dataset_meta = model.dataset_meta
    classes = model.dataset_meta["classes"]
    categories = category_ids(model.cfg, classes)
    listed: dict[str, list] = dict(
        images=[],
        categories=[dict(id=number, name=name) for number, name in zip(categories, classes, strict=True)],
        annotations=[],
    )
    skipped = []
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = (TextColumn("detecting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for image_id, path in enumerate(progress.track(images), 1):
            try:
                pixels = read_image(path)
            except ValueError as error:
                skipped.append(path)
                console.print(f"skipped, cannot be read: {path} ({error})", markup=False)
                continue
            sample = inference_detector(model, str(path), test_pipeline=pipeline).cpu()
            sample.pred_instances = sample.pred_instances[sample.pred_instances.scores >= args.score_thr]
            visualizer.add_datasample(path.name, pixels, sample, draw_gt=False, pred_score_thr=args.score_thr)
            write_picture(out_dir / "pictures" / path.name, visualizer.get_image())
            height, width = pixels.shape[:2]
            listed["images"].append(dict(id=image_id, file_name=path.name, width=width, height=height))
            listed["annotations"] += to_coco(sample.pred_instances, image_id, categories)
    for number, result in enumerate(listed["annotations"], 1):
        result["id"] = number
    results = out_dir / "results.json"
    AtomicLocalBackend().put_text(json.dumps(listed), results)
    print(f"{len(listed['annotations'])} objects in {len(listed['images'])} images: {results}, {out_dir / 'pictures'}")
    if skipped:
        print(f"{len(skipped)} of {len(images)} images could not be read and were skipped", file=sys.stderr)
    return int(bool(skipped))


def _pipeline(cfg: Config) -> Any:
    from mmcv.transforms import Compose
    from mmdet.utils import get_test_pipeline_cfg

    # Predicting needs no ground truth, and a folder of photos has none.
    return Compose([step for step in get_test_pipeline_cfg(cfg) if "LoadAnnotations" not in str(step.get("type"))])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    os.environ.setdefault("MPLBACKEND", "Agg")  # drawing into files needs no display
    return run_tool(infer, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
