#!/usr/bin/env python
"""Detect objects in images: pictures with boxes and masks, and one COCO-style JSON file.

The JSON is a COCO dataset with predictions in place of annotations: images (id, file_name, width, height),
categories (id, name; the ids of the configuration's test annotations where that file exists, else 1, 2, ... in
the order of the classes) and annotations (image_id, category_id, bbox as x, y, width, height in pixels, score and,
from a model with masks, segmentation as compressed RLE). pycocotools.coco.COCO reads it, and its annotations
are what COCO.loadRes takes. Of a panoptic model the pictures show the segmentation, and the JSON has the objects alone.

Example:
    $ python tools/infer.py photos/ --config CONFIG --checkpoint CHECKPOINT --out-dir found --score-thr 0.5

The exit code is 0; 1 when images were skipped because they cannot be read; 2 when nothing could be started.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from carafe_plugin.engine import prediction
from carafe_plugin.engine.atomic import AtomicLocalBackend
from carafe_plugin.engine.cli import add_config_options, command
from carafe_plugin.engine.config import load_config, prediction_pipeline
from carafe_plugin.engine.console import progress_bar
from carafe_plugin.engine.errors import UsageError
from carafe_plugin.engine.evaluation import drawable
from carafe_plugin.engine.processes import choose_device
from carafe_plugin.images import read_image


def score(text: str) -> float:
    """A score threshold from the command line."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text}")
    return value


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", metavar="IMAGE-OR-FOLDER", help="an image file, or a folder of them")
    parser.add_argument("--config", required=True, help="configuration file of a detector (mmdet)")
    parser.add_argument("--checkpoint", required=True, help="its checkpoint")
    parser.add_argument("--out-dir", required=True, help="folder for results.json and pictures/")
    parser.add_argument("--score-thr", type=score, default=0.3, help="leave out what scores less (default: 0.3)")
    parser.add_argument("--device", help="cpu, cuda:0, ... (default: the first GPU where there is one, else cpu)")
    add_config_options(parser)


def infer(args: argparse.Namespace) -> int:
    """Detect as the command line says; 1 when images were skipped."""
    os.environ.setdefault("MPLBACKEND", "Agg")  # drawing into files needs no display
    images = prediction.find_images(Path(args.images))
    out_dir = Path(args.out_dir)
    if out_dir.exists() and not out_dir.is_dir():
        raise UsageError(f"--out-dir is a folder; {out_dir.absolute()} is a file")
    cfg = load_config(args.config, args.cfg_options)
    model = prediction.load_detector(cfg, args.checkpoint, choose_device(args.device), args.drop_in)
    from mmdet.apis import inference_detector
    from mmdet.registry import VISUALIZERS

    pipeline = prediction_pipeline(model.cfg)
    visualizer = VISUALIZERS.build(dict(type="DetLocalVisualizer", name="infer"))
    visualizer.dataset_meta = model.dataset_meta
    classes = model.dataset_meta["classes"]
    categories = prediction.category_ids(model.cfg, classes)
    named = [dict(id=number, name=name) for number, name in zip(categories, classes, strict=True)]
    listed: dict[str, list] = dict(images=[], categories=named, annotations=[])
    skipped, panoptic = [], False
    with progress_bar("detecting") as progress:
        for image_id, path in enumerate(progress.track(images), 1):
            try:
                pixels = read_image(path)
            except ValueError as error:
                skipped.append(path)
                progress.console.print(f"skipped, cannot be read: {path} ({error})", markup=False)
                continue
            sample = inference_detector(model, str(path), test_pipeline=pipeline).cpu()
            panoptic |= "pred_panoptic_seg" in sample
            if "pred_instances" in sample:  # a panoptic model may have none
                sample.pred_instances = sample.pred_instances[sample.pred_instances.scores >= args.score_thr]
                listed["annotations"] += prediction.to_coco(sample.pred_instances, image_id, categories)
            sample = drawable(sample, model.dataset_meta)
            visualizer.add_datasample(path.name, pixels, sample, draw_gt=False, pred_score_thr=args.score_thr)
            prediction.write_picture(out_dir / "pictures" / path.name, visualizer.get_image())
            height, width = pixels.shape[:2]
            listed["images"].append(dict(id=image_id, file_name=path.name, width=width, height=height))
    for number, result in enumerate(listed["annotations"], 1):
        result["id"] = number
    results = out_dir / "results.json"
    AtomicLocalBackend().put_text(json.dumps(listed), results)
    print(f"{len(listed['annotations'])} objects in {len(listed['images'])} images: {results}, {out_dir / 'pictures'}")
    if panoptic:
        print(f"{results} lists objects alone: the panoptic segmentation is in the pictures")
    if skipped:
        print(f"{len(skipped)} of {len(images)} images could not be read and were skipped", file=sys.stderr)
    return int(bool(skipped))


main = command(infer, add_options, __doc__)

if __name__ == "__main__":
    sys.exit(main())
