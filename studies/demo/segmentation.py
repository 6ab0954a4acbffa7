r"""Train and evaluate two small UperNets, without and with CARAFE++ in all four places, and compare them.

The semantic-segmentation sister of ``demo.py``, with the same steps and the same promises: nothing is downloaded, no
GPU is needed, the same command continues what was interrupted, and results of another configuration or dataset are
never reused. The scenes are denser, and the dataset is in ADE20k's folders.

Example:
    $ python -m studies.demo.segmentation
    $ python -m studies.demo.segmentation --work-dir /tmp/s --data-root /tmp/s/data \
          --train 8 --val 4 --iterations 2 --no-minimum
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from studies.demo import run as demo_run
from studies.demo.generate_scenes import Request
from studies.demo.steps import Comparison, Demo, Metric, Model, load_config


def data_options(demo: Demo) -> dict[str, Any]:
    """What changes in the configs for a dataset that lies elsewhere."""
    return {f"{split}_dataloader.dataset.data_root": str(demo.data_root) for split in ("train", "test")}


def draw(demo: Demo, models: Sequence[Model], out: Path) -> None:
    """Draw the label maps of validation images: the ground truth and each model's."""
    from studies.demo.pictures import draw_label_maps

    predictions = {model.title: demo.predictions(model) for model in models}
    metainfo = load_config(demo, models[0]).metainfo
    draw_label_maps(demo.data_root, dict(zip(metainfo.classes, metainfo.palette, strict=True)), predictions, out)


COMPARISON = Comparison(
    name="demo-seg",
    models=(
        Model("baseline", "UperNet", "configs/demo/upernet_r18_scenes.py"),
        Model("carafe", "UperNet, CARAFE++", "configs/demo/upernet_r18-carafe_carafe-upernet_scenes.py"),
    ),
    more_models=(),
    data_root="data/scenes-ade20k",
    request=Request(seed=0, train=600, val=120, size=160, figures=32, format="ade20k"),
    iterations=500,
    seconds=0.6,
    metrics={"mIoU": Metric("mIoU", "mIoU", 0.01), "aAcc": Metric("pixel accuracy", "aAcc", 0.01)},
    minimum={"mIoU": 0.30},
    predictions="predictions",
    data_options=data_options,
    draw=draw,
)


def main(argv: Sequence[str] | None = None) -> int:
    return demo_run.main(COMPARISON, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
