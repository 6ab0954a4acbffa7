r"""Train and evaluate small Mask R-CNNs, without and with CARAFE++, and compare them.

The steps: generate a dataset; train each model from scratch with ``tools/train.py`` and evaluate it with
``tools/test.py``; then write a table, ``summary.json`` and pictures. Nothing is downloaded and no GPU is needed. A step
that is done is skipped and an interrupted training resumes from its last checkpoint, so the same command continues.
Results of another configuration or dataset are never reused: they are removed, with a message.

CARAFE++ upsamples in the FPN and the mask head; with ``--all`` a third model has it in the backbone too, where it
downsamples. Its results then stay in the summary of every later run of the same comparison.

Example:
    $ python -m studies.demo.detection
    $ python -m studies.demo.detection --all
    $ python -m studies.demo.detection --work-dir /tmp/tiny --data-root /tmp/tiny/data \
          --train 8 --val 4 --iterations 2 --no-minimum
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import mmengine
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from studies.common import Metric
from studies.demo.comparison import Comparison, Demo, Model
from studies.demo.generate_scenes import Request
from studies.demo.pictures import COLOURS, MIN_OBJECTS, Cell, Drawn, draw_grid
from studies.demo.run import main

DRAWN, MIN_SCORE = 6, 0.5


def draw(demo: Demo, models: Sequence[Model], out: Path) -> None:
    """Outline the ground truth and each model's predictions on the first validation images with several objects."""
    with contextlib.redirect_stdout(io.StringIO()):  # COCO reports its progress with print
        coco = COCO(str(demo.data_root / "annotations" / "instances_val.json"))
    found = [{item["img_id"]: item["pred_instances"] for item in mmengine.load(demo.predictions(m))} for m in models]
    ids = sorted(coco.getImgIds())
    rows = {}
    for image_id in ([i for i in ids if len(coco.imgToAnns[i]) >= MIN_OBJECTS] or ids)[:DRAWN]:
        image = np.asarray(Image.open(demo.data_root / "val" / coco.imgs[image_id]["file_name"]).convert("RGB"))
        objects = [
            Drawn(coco.annToMask(item), item["category_id"] - 1, "crowd" if item["iscrowd"] else "")
            for item in coco.imgToAnns[image_id]
        ]
        cells = [Cell(image, objects)]
        for predicted in (predictions[image_id] for predictions in found):
            each = zip(predicted["masks"], predicted["labels"], predicted["scores"], strict=True)
            kept = [
                Drawn(coco_mask.decode(mask), int(label), f"{float(score):.2f}")
                for mask, label, score in each
                if score >= MIN_SCORE
            ]
            cells.append(Cell(image, kept))
        rows[f"image {image_id}"] = cells
    names = [item["name"] for item in coco.loadCats(sorted(coco.getCatIds()))]
    draw_grid(["ground truth", *(m.title for m in models)], rows, out, 3.2, dict(zip(names, COLOURS, strict=False)))


COMPARISON = Comparison(
    name="demo",
    models=(
        Model("baseline", "Mask R-CNN", "configs/demo/mask-rcnn_r18_fpn_scenes.py"),
        Model("carafe", "Mask R-CNN, CARAFE++", "configs/demo/mask-rcnn_r18_carafe-fpn-mask-head_scenes.py"),
    ),
    more_models=(
        Model("carafe_all", "CARAFE++ everywhere", "configs/demo/mask-rcnn_r18-carafe_carafe-fpn-mask-head_scenes.py"),
    ),
    request=Request(seed=0, train=600, val=120, size=160),
    seconds=1.1,
    metrics={
        "bbox_mAP": Metric("box AP", "coco/bbox_mAP"),
        "bbox_mAP_50": Metric("AP50", "coco/bbox_mAP_50"),
        "segm_mAP": Metric("mask AP", "coco/segm_mAP"),
        "segm_mAP_50": Metric("AP50", "coco/segm_mAP_50"),
    },
    minimum={"bbox_mAP_50": 0.40, "segm_mAP_50": 0.25},
    predictions="predictions.pkl",
    draw=draw,
)

if __name__ == "__main__":
    sys.exit(main(COMPARISON, __doc__))
