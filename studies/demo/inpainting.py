r"""Train and evaluate small Global&Local and Partial Conv networks, without and with CARAFE++, and compare them.

The counterpart of ``studies.demo.detection`` for inpainting, with the same promises: nothing is downloaded, no GPU is
needed, the same command continues what was interrupted, and results of another configuration or dataset are never
reused. The images are generated scenes in coloured light, their holes brush strokes. Filling each hole with the mean
colour of what is known is the least that a model must beat: by 1.5 dB (PSNR over the hole), else it has not learnt, and
that is an error.

Example:
    $ python -m studies.demo.inpainting
    $ python -m studies.demo.inpainting --work-dir /tmp/i --data-root /tmp/i/d \
          --train 8 --val 4 --iterations 2 --no-minimum
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mmengine
import numpy as np
import torch

from carafe_plugin.engine import bare_models
from carafe_plugin.inpainting import InpaintingMetric
from studies.common import Metric
from studies.demo.comparison import COSTS, Comparison, Demo, Model, Summary
from studies.demo.generate_scenes import Request
from studies.demo.pictures import Cell, draw_grid
from studies.demo.run import build, main

#: How much better than the mean colour a model must be, in dB over the hole.
MARGIN = 1.5
DRAWN = 5
MEAN_FILL = "mean_fill"


def to_pixels(image: torch.Tensor) -> np.ndarray:
    """Tensor[3, H, W] in [-1, 1] to an array (H, W, 3) in [0, 1]."""
    return ((image + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy()


def mean_fill(sample: dict[str, Any]) -> torch.Tensor:
    """Fill the hole, 1 in ``holes`` (1, H, W), of ``original`` (3, H, W) with the mean colour of what is known."""
    original, holes = sample["original"], sample["holes"]
    known = 1 - holes
    colour = (original * known).sum((1, 2), keepdim=True) / known.sum()
    return original * known + colour * holes


def draw(demo: Demo, models: Sequence[Model], out: Path) -> None:
    """Draw the validation images whose holes are largest: input, mask, what every model made of it, original."""
    samples = {model.title.replace(", ", ",\n"): mmengine.load(demo.predictions(model)) for model in models}
    rows = {}
    numbered = enumerate(zip(*samples.values(), strict=True), 1)
    for number, found in sorted(numbered, key=lambda item: -float(item[1][0]["holes"].sum()))[:DRAWN]:
        original, hole = found[0]["original"], found[0]["holes"]
        images = [original * (1 - hole) + hole, 2 * hole.expand(3, -1, -1) - 1]
        images += [*(sample["completed"] for sample in found), original]
        rows[f"image {number}"] = [Cell(to_pixels(image)) for image in images]
    draw_grid(["input", "mask", *samples, "original"], rows, out, 1.9)


class Inpainting(Comparison):
    """Compares with the mean colour as well, and shows what the generators cost."""

    def complete(self, demo: Demo, summary: Summary) -> Summary:
        """Add the generators' cost, and the metrics of the same holes filled with the mean colour."""
        metric = InpaintingMetric()
        for sample in mmengine.load(demo.predictions(demo.models[0])):
            metric.process({}, [{**sample, "completed": mean_fill(sample)}])
        filled = metric.compute_metrics(metric.results)
        completed = {MEAN_FILL: {name: round(filled[name], 6) for name in self.metrics}}
        for model in demo.models:
            found = bare_models.count_model(*build(demo, model), (demo.request.size, demo.request.size))
            cost = {"generator_parameters": found.parameters["generator"], "generator_flops": found.flops["generator"]}
            completed[model.name] = {**summary[model.name], **cost}
        return completed

    def remarks(self, summary: Summary) -> list[str]:
        """One line for every model: how far it is above the mean colour."""
        mean = summary[MEAN_FILL]["psnr_hole"]
        return [
            f"{name}: {found['psnr_hole'] - mean:+.2f} dB over the hole against the mean colour ({MARGIN} needed)"
            for name, found in summary.items()
            if name != MEAN_FILL
        ]

    def shortfalls(self, summary: Summary) -> list[str]:
        """One line for every model that has not learnt."""
        least = summary[MEAN_FILL]["psnr_hole"] + MARGIN
        return [
            f"{name}: psnr_hole is {found['psnr_hole']:.2f} dB, at least {least:.2f} was expected"
            for name, found in summary.items()
            if name != MEAN_FILL and not found["psnr_hole"] >= least
        ]


COMPARISON = Inpainting(
    name="demo-inpaint",
    references={MEAN_FILL: "mean colour"},
    models=(
        Model("global_local", "Global&Local", "configs/inpainting/global-local_scenes-64x64.py"),
        Model(
            "global_local_carafe", "Global&Local, CARAFE++", "configs/inpainting/global-local-carafe_scenes-64x64.py"
        ),
        Model("partial_conv", "Partial Conv", "configs/inpainting/partial-conv_scenes-64x64.py"),
        Model(
            "partial_conv_carafe", "Partial Conv, CARAFE++", "configs/inpainting/partial-conv-carafe_scenes-64x64.py"
        ),
    ),
    request=Request(seed=0, train=1000, val=100, size=64, figures=4, format="images"),
    seconds=0.25,
    metrics={
        "l1": Metric("L1", "inpainting/l1", digits=2),
        "psnr": Metric("PSNR", "inpainting/psnr", digits=2),
        "l1_hole": Metric("hole\nL1", "inpainting/l1_hole", digits=2),
        "psnr_hole": Metric("hole\nPSNR", "inpainting/psnr_hole", digits=2),
        "ssim": Metric("SSIM", "inpainting/ssim"),
    },
    costs={
        "generator_parameters": ("param.", lambda number: f"{number / 1e3:.0f}k"),
        "generator_flops": ("M", lambda number: f"{number / 1e6:.0f}"),
        "seconds_per_iter": COSTS["seconds_per_iter"],
    },
    caption="L1 in %, PSNR in dB, the generator's multiply-adds (M) and seconds per iteration",
    predictions="predictions.pkl",
    draw=draw,
)

if __name__ == "__main__":
    sys.exit(main(COMPARISON, __doc__))
