r"""Train and evaluate two small UperNets, without and with CARAFE++ in all four places, and compare them.

The counterpart of ``studies.demo.detection`` for semantic segmentation, with the same steps and the same promises:
nothing is downloaded, no GPU is needed, the same command continues what was interrupted, and results of another
configuration or dataset are never reused. The scenes are denser, and the dataset is in ADE20k's folders.

Example:
    $ python -m studies.demo.segmentation
    $ python -m studies.demo.segmentation --work-dir /tmp/s --data-root /tmp/s/data \
          --train 8 --val 4 --iterations 2 --no-minimum
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from studies.demo.comparison import Comparison, Demo, Metric, Model
from studies.demo.generate_scenes import Request
from studies.demo.pictures import draw_label_maps
from studies.demo.run import main


class Segmentation(Comparison):
    """Draws label maps."""

    def draw(self, demo: Demo, models: Sequence[Model], out: Path) -> None:
        """Draw the label maps of validation images: the ground truth and each model's."""
        predictions = {model.title: demo.predictions(model) for model in models}
        metainfo = demo.load_config(models[0]).metainfo
        draw_label_maps(demo.data_root, dict(zip(metainfo.classes, metainfo.palette, strict=True)), predictions, out)


COMPARISON = Segmentation(
    name="demo-seg",
    models=(
        Model("baseline", "UperNet", "configs/demo/upernet_r18_scenes.py"),
        Model("carafe", "UperNet, CARAFE++", "configs/demo/upernet_r18-carafe_carafe-upernet_scenes.py"),
    ),
    data_root="data/scenes-ade20k",
    data_options={f"{split}_dataloader.dataset.data_root": "" for split in ("train", "test")},
    request=Request(seed=0, train=600, val=120, size=160, figures=32, format="ade20k"),
    iterations=500,
    seconds=0.6,
    metrics={"mIoU": Metric("mIoU", "mIoU", 0.01), "aAcc": Metric("pixel accuracy", "aAcc", 0.01)},
    minimum={"mIoU": 0.30},
    predictions="predictions",
)

if __name__ == "__main__":
    sys.exit(main(COMPARISON, __doc__, None))
