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

import numpy as np
from PIL import Image

from studies.common import Metric
from studies.demo.comparison import Comparison, Demo, Model
from studies.demo.generate_scenes import Request
from studies.demo.pictures import MIN_OBJECTS, Cell, draw_grid
from studies.demo.run import main

DRAWN = 5


def draw(demo: Demo, models: Sequence[Model], out: Path) -> None:
    """Draw the first validation images with several classes, their label maps and every model's."""
    metainfo = demo.load_config(models[0]).metainfo
    colours = np.array([(0, 0, 0), *metainfo.palette], dtype=np.uint8)  # by label, which count from 1
    truths = sorted((demo.data_root / "annotations" / "validation").glob("*.png"))
    chosen = [path for path in truths if len(np.unique(np.asarray(Image.open(path)))) >= MIN_OBJECTS] or truths
    rows = {}
    for truth in chosen[:DRAWN]:
        image = np.asarray(Image.open(demo.data_root / "images" / "validation" / f"{truth.stem}.jpg"))
        maps = [truth, *(demo.predictions(model) / truth.name for model in models)]
        rows[truth.stem] = [Cell(image), *(Cell(colours[np.asarray(Image.open(path))]) for path in maps)]
    legend = dict(zip(metainfo.classes, (colours[1:] / 255).tolist(), strict=True))
    draw_grid(["image", "ground truth", *(model.title for model in models)], rows, out, 2.6, legend)


COMPARISON = Comparison(
    name="demo-seg",
    models=(
        Model("baseline", "UperNet", "configs/demo/upernet_r18_scenes.py"),
        Model("carafe", "UperNet, CARAFE++", "configs/demo/upernet_r18-carafe_carafe-upernet_scenes.py"),
    ),
    request=Request(seed=0, train=600, val=120, size=160, figures=32, format="ade20k"),
    seconds=0.6,
    metrics={"mIoU": Metric("mIoU", "mIoU", 0.01), "aAcc": Metric("pixel accuracy", "aAcc", 0.01)},
    minimum={"mIoU": 0.30},
    predictions="predictions",
    draw=draw,
)

if __name__ == "__main__":
    sys.exit(main(COMPARISON, __doc__))
