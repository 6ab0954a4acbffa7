r"""Train and evaluate small Global&Local and Partial Conv networks, without and with CARAFE++, and compare them.

The inpainting sister of ``demo.py``, with the same promises: nothing is downloaded, no GPU is needed, the same command
continues what was interrupted, and results of another configuration or dataset are never reused. The images are
generated scenes in coloured light, their holes brush strokes. A model that does not beat the mean colour of what is
known in each hole by 1.5 dB (PSNR over the hole) has not learnt, and that is an error.

Example:
    $ python -m studies.demo.inpainting
    $ python -m studies.demo.inpainting --work-dir /tmp/i --data-root /tmp/i/d \
          --train 8 --val 4 --iterations 2 --no-minimum
"""

from __future__ import annotations

import argparse
import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.table import Table

from studies.demo import generate_scenes, scenes_images
from studies.demo import run as demo_run
from studies.demo import steps as demo_steps
from studies.demo.generate_scenes import Request
from studies.demo.steps import Comparison, Demo, Metric, Model, console, shown

generate_scenes.FORMATS.setdefault("images", scenes_images)

#: How much better than the mean colour a model must be, in dB over the hole.
MARGIN = 1.5
DRAWN = 5


@dataclass(frozen=True)
class InpaintingDemo(Demo):
    """A demo whose configurations have no learning-rate schedule to adjust."""

    def config_options(self) -> dict[str, Any]:
        """What this run changes in the configs; nothing with the default options."""
        options: dict[str, Any] = {}
        if self.data_root != demo_steps.ROOT / self.comparison.data_root:
            options |= self.comparison.data_options(self)
        if self.iterations != self.comparison.iterations:
            options["train_cfg.max_iters"] = self.iterations
        if self.iterations < 100:  # too short for windows of ten iterations and checkpoints every hundred
            options |= {
                "default_hooks.logger.interval": 1,
                "log_processor.window_size": 1,
                "default_hooks.checkpoint.interval": 1,
            }
        if self.request.seed != self.comparison.request.seed:
            options["randomness.seed"] = self.request.seed
        return options


def data_options(demo: Demo) -> dict[str, Any]:
    """What changes in the configs for a dataset that lies elsewhere."""
    return {f"{split}_dataloader.dataset.data_root": str(demo.data_root) for split in ("train", "val", "test")}


def load_predictions(demo: Demo, model: Model) -> list[dict[str, Any]]:
    """What ``tools/test.py --out`` has dumped, an image each."""
    return pickle.loads(demo.predictions(model).read_bytes())


def to_pixels(image: torch.Tensor) -> np.ndarray:
    """(3, H, W) in [-1, 1] -> (H, W, 3) in [0, 1]."""
    return ((image + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy()


def mean_fill(sample: dict[str, Any]) -> torch.Tensor:
    """The original with the mean colour of what is known in its hole, (3, H, W) in [-1, 1]."""
    original, holes = sample["original"], sample["holes"]
    known = 1 - holes
    colour = (original * known).sum((1, 2), keepdim=True) / known.sum()
    return original * known + colour * holes


def measure_mean_fill(demo: Demo) -> dict[str, float]:
    """The same metrics of the same holes, filled with the mean colour."""
    from carafe_plugin.inpainting import InpaintingMetric

    metric = InpaintingMetric()
    for sample in load_predictions(demo, demo.models[0]):
        metric.process({}, [{**sample, "completed": mean_fill(sample)}])
    found = metric.compute_metrics(metric.results)
    return {name: round(found[name], 6) for name in demo.comparison.metrics}


def draw(demo: Demo, models: Sequence[Model], out: Path) -> None:
    """Draw the validation images whose holes are largest: input, mask, what every model made of it, original."""
    samples = {model.title: load_predictions(demo, model) for model in models}
    first = samples[models[0].title]
    chosen = sorted(range(len(first)), key=lambda i: -float(first[i]["holes"].sum()))[:DRAWN]
    columns = ["input", "mask", *samples, "original"]
    figure = Figure(figsize=(1.6 * len(columns), 1.6 * len(chosen) + 0.5), dpi=130, layout="constrained")
    axes = figure.subplots(len(chosen), len(columns), squeeze=False)
    for row, index in zip(axes, chosen, strict=True):
        original, hole = first[index]["original"], first[index]["holes"]
        pictures = [to_pixels(original * (1 - hole) + hole), hole[0].numpy()]
        pictures += [to_pixels(found[index]["completed"]) for found in samples.values()]
        for axis, picture in zip(row, [*pictures, to_pixels(original)], strict=True):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_axis_off()
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title.replace(", ", "\n"), fontsize=9)
    figure.savefig(out)


COMPARISON = Comparison(
    name="demo-inpaint",
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
    more_models=(),
    data_root="data/scenes-images",
    request=Request(seed=0, train=1000, val=100, size=64, figures=4, format="images"),
    iterations=700,
    seconds=0.25,
    metrics={
        "l1": Metric("L1 %", "inpainting/l1"),
        "psnr": Metric("PSNR dB", "inpainting/psnr"),
        "l1_hole": Metric("hole L1", "inpainting/l1_hole"),
        "psnr_hole": Metric("hole PSNR", "inpainting/psnr_hole"),
        "ssim": Metric("SSIM", "inpainting/ssim"),
    },
    minimum={},
    predictions="predictions.pkl",
    data_options=data_options,
    draw=draw,
)


def cost(demo: Demo, model: Model) -> dict[str, int]:
    """Parameters of the generator, and its multiply-adds for one image."""
    from mmengine.registry import MODELS, DefaultScope

    from carafe_plugin.analysis.complexity import count

    size = demo.request.size
    with DefaultScope.overwrite_default_scope("mmengine"):
        generator = MODELS.build(demo_steps.load_config(demo, model).model.generator).eval()
    found = count(generator, torch.zeros(1, 3, size, size), holes=torch.zeros(1, 1, size, size))
    return {"generator_parameters": found.parameters[""], "generator_flops": found.flops[""]}


def run(demo: InpaintingDemo) -> dict[str, dict[str, float]]:
    """Do every step that is not done yet, then add the mean colour's results and the generators' cost."""
    results = demo_run.run(demo)
    summary: dict[str, dict[str, float]] = {"mean_fill": measure_mean_fill(demo)}
    for model in demo.models:
        summary[model.name] = results[model.name] | cost(demo, model)
    demo_steps.write_json(demo.work_dir / "summary.json", summary)
    return summary


def result_table(demo: Demo, summary: dict[str, dict[str, float]]) -> Table:
    """One row per model; narrow enough for a terminal of 80 columns."""
    size = demo.request.size
    title = f"{demo.request.val} generated scenes, {size} x {size}; {demo.iterations} iterations from scratch"
    table = Table(
        title=title, caption="L1 in %, PSNR in dB, the generator's multiply-adds (M) and seconds per iteration"
    )
    table.add_column("model", no_wrap=True)
    for heading in ("L1", "PSNR", "in hole", "PSNR", "SSIM", "param.", "M", "s/it"):
        table.add_column(heading, justify="right", no_wrap=True)
    titles = {"mean_fill": "mean colour", **{model.name: model.title for model in demo.models}}
    for name, found in summary.items():
        costs = ["", "", ""]
        if "generator_flops" in found:
            costs = [
                f"{found['generator_parameters'] / 1e3:.0f}k",
                f"{found['generator_flops'] / 1e6:.0f}",
                f"{found['seconds_per_iter']:.2f}",
            ]
        measured = (f"{found[key]:.3f}" if key == "ssim" else f"{found[key]:.2f}" for key in demo.comparison.metrics)
        table.add_row(titles[name], *measured, *costs)
    return table


def shortfalls(summary: dict[str, dict[str, float]]) -> list[str]:
    """One line for every model that has not learnt."""
    least = summary["mean_fill"]["psnr_hole"] + MARGIN
    return [
        f"{name}: psnr_hole is {found['psnr_hole']:.2f} dB, at least {least:.2f} was expected"
        for name, found in summary.items()
        if name != "mean_fill" and not found["psnr_hole"] >= least
    ]


def gains(summary: dict[str, dict[str, float]]) -> list[str]:
    """One line for every model: how far it is above the mean colour."""
    least = summary["mean_fill"]["psnr_hole"]
    return [
        f"{name}: {found['psnr_hole'] - least:+.2f} dB over the hole against the mean colour ({MARGIN} needed)"
        for name, found in summary.items()
        if name != "mean_fill"
    ]


def demo_from(args: argparse.Namespace) -> InpaintingDemo:
    """The demo that the command line asks for."""
    request = generate_scenes.request_from(args, COMPARISON.request.format)
    folders = (args.work_dir.resolve(), args.data_root.resolve())
    return InpaintingDemo(COMPARISON, *folders, request, args.iterations, COMPARISON.models)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo that the command line asks for; returns the exit code."""
    args = demo_run.parse_args(COMPARISON, __doc__, argv)
    demo = demo_from(args)

    def report(summary: demo_run.Summary) -> int:
        console.print(result_table(demo, summary))
        for line in gains(summary):
            console.print(line, markup=False)
        console.print(f"Written: {shown(demo.work_dir / 'summary.json')}, {shown(demo.work_dir / 'predictions.png')}")
        missed = [] if args.no_minimum else shortfalls(summary)
        for line in missed:
            console.print(f"error: {line}", style="red", markup=False)
        return 1 if missed else 0

    return demo_run.supervise(demo.work_dir, lambda: run(demo), report)


if __name__ == "__main__":
    sys.exit(main())
