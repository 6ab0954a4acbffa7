r"""Train and evaluate small Mask R-CNNs, without and with CARAFE++, and compare them.

The steps: generate a dataset, train each model from scratch with ``tools/train.py``, evaluate each with
``tools/test.py``, then write a table, ``summary.json`` and pictures. Nothing is downloaded and no GPU is needed. A step
that is done is skipped and an interrupted training goes on from its last checkpoint, so the same command continues.
Results of another configuration or dataset are never reused: they are removed, and said to be.

CARAFE++ upsamples in the FPN and the mask head; with ``--all`` a third model has it in the backbone too, where it
downsamples. Once there, its results stay in the summary of every later run of the same comparison.

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
from typing import Any

from studies.demo import run as demo_run
from studies.demo.generate_scenes import Request
from studies.demo.steps import Comparison, Demo, Metric, Model


def annotation_file(demo: Demo, split: str) -> Path:
    """The COCO file of a split."""
    return demo.data_root / "annotations" / f"instances_{split}.json"


def data_options(demo: Demo) -> dict[str, Any]:
    """What changes in the configs for a dataset that lies elsewhere."""
    return {
        "train_dataloader.dataset.data_root": str(demo.data_root),
        "test_dataloader.dataset.data_root": str(demo.data_root),
        "test_evaluator.ann_file": str(annotation_file(demo, "val")),
    }


def draw(demo: Demo, models: Sequence[Model], out: Path) -> None:
    """Draw outlines on validation images: the ground truth and each model's."""
    from studies.demo.pictures import draw_comparison

    predictions = {model.title: demo.predictions(model) for model in models}
    draw_comparison(annotation_file(demo, "val"), demo.data_root / "val", predictions, out)


COMPARISON = Comparison(
    name="demo",
    models=(
        Model("baseline", "Mask R-CNN", "configs/demo/mask-rcnn_r18_fpn_scenes.py"),
        Model("carafe", "Mask R-CNN, CARAFE++", "configs/demo/mask-rcnn_r18_carafe-fpn-mask-head_scenes.py"),
    ),
    more_models=(
        Model("carafe_all", "CARAFE++ everywhere", "configs/demo/mask-rcnn_r18-carafe_carafe-fpn-mask-head_scenes.py"),
    ),
    data_root="data/scenes",
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
    data_options=data_options,
    draw=draw,
)


def main(argv: Sequence[str] | None = None) -> int:
    return demo_run.main(COMPARISON, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
