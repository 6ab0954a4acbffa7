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

import sys
from collections.abc import Sequence
from pathlib import Path

from studies.demo.comparison import Comparison, Demo, Metric, Model
from studies.demo.generate_scenes import Request
from studies.demo.pictures import draw_comparison
from studies.demo.run import main

ANNOTATIONS = "annotations/instances_val.json"


class Detection(Comparison):
    """Draws outlines."""

    def draw(self, demo: Demo, models: Sequence[Model], out: Path) -> None:
        """Draw outlines on validation images: the ground truth and each model's."""
        predictions = {model.title: demo.predictions(model) for model in models}
        draw_comparison(demo.data_root / ANNOTATIONS, demo.data_root / "val", predictions, out)


COMPARISON = Detection(
    name="demo",
    models=(
        Model("baseline", "Mask R-CNN", "configs/demo/mask-rcnn_r18_fpn_scenes.py"),
        Model("carafe", "Mask R-CNN, CARAFE++", "configs/demo/mask-rcnn_r18_carafe-fpn-mask-head_scenes.py"),
    ),
    more_models=(
        Model("carafe_all", "CARAFE++ everywhere", "configs/demo/mask-rcnn_r18-carafe_carafe-fpn-mask-head_scenes.py"),
    ),
    data_root="data/scenes",
    data_options={
        "train_dataloader.dataset.data_root": "",
        "test_dataloader.dataset.data_root": "",
        "test_evaluator.ann_file": ANNOTATIONS,
    },
    request=Request(seed=0, train=600, val=120, size=160),
    iterations=280,
    seconds=1.1,
    metrics={
        "bbox_mAP": Metric("box AP", "coco/bbox_mAP"),
        "bbox_mAP_50": Metric("AP50", "coco/bbox_mAP_50"),
        "segm_mAP": Metric("mask AP", "coco/segm_mAP"),
        "segm_mAP_50": Metric("AP50", "coco/segm_mAP_50"),
    },
    minimum={"bbox_mAP_50": 0.40, "segm_mAP_50": 0.25},
    predictions="predictions.pkl",
)

if __name__ == "__main__":
    sys.exit(main(COMPARISON, __doc__, None))
