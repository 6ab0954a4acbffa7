#!/usr/bin/env python
"""Measure seconds per prediction of whole models beside each other.

A prediction is everything from the image's pixels in memory to the boxes, maps or scores: normalisation, network,
suppression. Without arguments: Faster R-CNN R50 at 800x1333 with FPN, CARAFE++ in the FPN, in the backbone, in both,
beside the paper's frames per second (Table 5).

Fair beside each other: weights are random, but parameters of the same name and shape have the same values in all
models; the image is the same; and two-stage detectors go on with the same boxes (their own are computed, counted and
replaced), so that heads do not gain or lose work by what a model's random weights happen to propose. Suppressing
detections is cheaper than in a trained model, in all of them: random weights are sure of nothing. Models take turns,
each round in another order; a ratio is taken within its round, against the first model.

    python -m benchmarks.model --json result.json
    python -m benchmarks.model stock=mmdet::retinanet/retinanet_r50_fpn_1x_coco.py mine.py --device cuda

With --profile more rounds follow, in which kernel prediction, reassembly and what they replace are timed apart.

The JSON is written after each round, whole or not at all: a run that is cut off keeps what it has measured.
Exit code: 0, or 2 when something that was given does not fit.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

import carafe_plugin
from benchmarks import measure, parts
from carafe_plugin.engine import bare_models
from carafe_plugin.engine.atomic import AtomicLocalBackend
from carafe_plugin.engine.cli import add_config_options, run_tool
from carafe_plugin.engine.errors import UsageError

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "mmdet"
# Name, configuration, and the paper's frames per second on its GPU (Table 5).
DEFAULT = (
    ("FPN", "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", 12.5),
    ("CARAFE++ FPN", str(CONFIGS / "faster-rcnn_r50_carafe-fpn_1x_coco.py"), 12.2),
    ("CARAFE++ backbone", str(CONFIGS / "faster-rcnn_r50-carafe_fpn_1x_coco.py"), 12.1),
    ("CARAFE++ both", str(CONFIGS / "faster-rcnn_r50-carafe_carafe-fpn_1x_coco.py"), 11.7),
)


class Model(NamedTuple):
    """One of the models that take turns.

    Attributes:
        name: in the table.
        config: where it comes from.
        paper_fps: what the paper measured, if it did.
        network: the model itself.
        predict: one prediction.
        parameters: their number.
        kept: the boxes of its own that a two-stage detector kept.
        timing: its samples.
    """

    name: str
    config: str
    paper_fps: float | None
    network: torch.nn.Module
    predict: Callable[[], object]
    parameters: int
    kept: dict[str, int]
    timing: measure.Timing


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Measure seconds per prediction of models beside each other.")
    parser.add_argument(
        "configs",
        nargs="*",
        metavar="[NAME=]CONFIG",
        help="configuration files, or mmdet::..., mmseg::..., mmpretrain::...; the first is what the others are "
        "compared with (default: the paper's four Faster R-CNNs)",
    )
    parser.add_argument("--shape", type=int, nargs=2, metavar=("H", "W"), help="image size (default: the first's)")
    parser.add_argument("--repeats", type=int, default=10, help="rounds (default: 10)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, default=min(2, measure.cores()), help="CPU threads (default: 2)")
    parser.add_argument("--profile", action="store_true", help="say where the time goes, in further rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    add_config_options(parser)
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", "benchmarks/model.py", *(sys.argv[1:] if argv is None else argv)])
    return args


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be measured."""
    for name in ("repeats", "threads"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name}: expected a positive int, got {getattr(args, name)}")
    if args.shape and min(args.shape) < 1:
        raise UsageError(f"--shape: expected two positive sizes, got {args.shape[0]} {args.shape[1]}")
    if args.threads > measure.cores():
        raise UsageError(f"--threads: {args.threads} asked for, {measure.cores()} cores available")
    if args.device.partition(":")[0] not in ("cpu", "cuda"):
        raise UsageError(f"--device: expected cpu or cuda, got {args.device!r}")
    if args.device != "cpu" and not torch.cuda.is_available():
        raise UsageError(f"--device {args.device}: torch finds no CUDA device")
    if args.json and not args.json.absolute().parent.is_dir():
        raise UsageError(f"--json: no folder {args.json.parent} to write {args.json.name} into")


def named_configs(arguments: Sequence[str]) -> list[tuple[str, str, float | None]]:
    """Name, configuration and the paper's speed of every model asked for.

    Raises:
        UsageError: two have the same name.
    """
    if not arguments:
        return list(DEFAULT)
    named: list[tuple[str, str, float | None]] = []
    for argument in arguments:
        name, separator, config = argument.partition("=")
        named.append((name, config, None) if separator else (Path(argument).stem, argument, None))
    names = [name for name, _, _ in named]
    if len(set(names)) < len(names):
        raise UsageError(f"every model needs a name of its own (NAME=CONFIG), got {', '.join(names)}")
    return named


def predict_one(network: Any, data: dict[str, list]) -> object:
    """One prediction, as a toolbox's runner makes it."""
    with torch.inference_mode():
        return network.test_step(data)


def build(args: argparse.Namespace) -> tuple[list[Model], tuple[int, int]]:
    """The models, ready to predict, and the size of the image."""
    named = named_configs(args.configs)
    cfgs = [bare_models.read_config(config, args.cfg_options, args.drop_in) for _, config, _ in named]
    shape = tuple(args.shape) if args.shape else bare_models.image_shape(cfgs[0])
    networks = []
    for cfg in cfgs:
        torch.manual_seed(0)
        networks.append(bare_models.build_model(cfg))
    bare_models.share_parameters(networks)
    models = []
    for (name, config, fps), cfg, network in zip(named, cfgs, networks, strict=True):
        network.to(args.device)
        kept = bare_models.fix_boxes(network, shape)

        predict = functools.partial(predict_one, network, bare_models.one_image(cfg, shape))
        parameters = sum(parameter.numel() for parameter in network.parameters())
        timing = measure.Timing(predict, estimate=measure.SAMPLE_SECONDS, repeats=args.repeats)
        models.append(Model(name, config, fps, network, predict, parameters, kept, timing))
    return models, shape


def warm_up(models: Sequence[Model], device: str) -> None:
    """Predictions that do not count: memory is allocated, and what fails fails before the first round.

    A GPU needs a few: its libraries choose their kernels as they go.
    """
    for model in models:
        try:
            for _ in range(1 if device == "cpu" else 3):
                model.timing.estimate = measure.seconds(model.predict, device)
        except (RuntimeError, NotImplementedError) as error:
            raise UsageError(f"{model.name} ({model.config}) does not predict: {error}") from error


def turns(models: Sequence[Model], round_: int) -> list[Model]:
    """The order of a round: each starts with another model, every other one runs backwards."""
    start = round_ % len(models)
    order = [*models[start:], *models[:start]]
    return order[::-1] if round_ // len(models) % 2 else order


def summary(model: Model, first: Model) -> dict[str, Any]:
    """What was measured of one model, so far."""
    own, reference = model.timing.samples, first.timing.samples
    ratios = [one / other for one, other in zip(own, reference, strict=True)]
    record: dict[str, Any] = {
        "name": model.name,
        "config": public_name(model.config),
        "parameters": model.parameters,
        "seconds": round(statistics.median(own), 6),
        "seconds_min": round(min(own), 6),
        "seconds_max": round(max(own), 6),
        "ratio": round(statistics.median(ratios), 5),
        "ratio_min": round(min(ratios), 5),
        "ratio_max": round(max(ratios), 5),
        "samples": [round(sample, 6) for sample in own],
        "kept": dict(model.kept),
    }
    if model.paper_fps and first.paper_fps:
        record |= {"paper_fps": model.paper_fps, "paper_ratio": round(first.paper_fps / model.paper_fps, 5)}
    return record


def public_name(config: str) -> str:
    """A configuration's name without where it lies on this machine."""
    path = Path(config)
    if path.is_absolute():
        return str(path.relative_to(CONFIGS.parents[1])) if path.is_relative_to(CONFIGS.parents[1]) else path.name
    return config


def show(report: dict[str, Any], console: Console) -> None:
    """Print the table."""
    machine = report["machine"]
    processor = machine.get("gpu", f"{machine['cpu']}, {machine['threads']} threads")
    table = Table(
        title=f"Seconds per prediction at {report['shape'][0]}x{report['shape'][1]}, {report['rounds']} rounds: "
        f"{processor}, torch {machine['torch']}",
        caption="Medians. A ratio compares within a round; below it, its extremes.",
        title_justify="left",
        caption_justify="left",
    )
    for heading in ("model", "seconds", "min to max", "x first", "ratios", "paper: fps", "x first", "own boxes"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for model in report["models"]:
        paper = [f"{model['paper_fps']}", f"{model['paper_ratio']:.3f}"] if "paper_fps" in model else ["", ""]
        table.add_row(
            model["name"],
            f"{model['seconds']:.4g}",
            f"{model['seconds_min']:.4g} to {model['seconds_max']:.4g}",
            f"{model['ratio']:.3f}",
            f"{model['ratio_min']:.3f} to {model['ratio_max']:.3f}",
            *paper,
            ", ".join(f"{number} {name}" for name, number in model["kept"].items()) or "-",
        )
    console.print(table)


def profile(models: Sequence[Model], repeats: int, device: str) -> list[dict[str, Any]]:
    """Where each model's time goes, from `repeats` further rounds."""
    samples: dict[str, list[dict[str, float]]] = {model.name: [] for model in models}
    calls: dict[str, dict[str, int]] = {}
    for round_ in range(repeats):
        for model in turns(models, round_):
            seconds, calls[model.name] = parts.split(model.network, model.predict, device)
            samples[model.name].append(seconds)
    return [parts.summary(samples[model.name], calls[model.name]) for model in models]


def bench_model(args: argparse.Namespace) -> None:
    """Measure as the command line says."""
    check(args)
    torch.set_num_threads(args.threads)
    models, shape = build(args)
    warm_up(models, args.device)
    report: dict[str, Any] = {
        "schema": 1,
        "command": args.command.replace(str(args.json), args.json.name) if args.json else args.command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "revision": measure.revision(),
        "version": carafe_plugin.__version__,
        "backend": "compiled" if carafe_plugin.is_compiled(args.device.partition(":")[0]) else "fallback",
        "device": args.device,
        "shape": list(shape),
        "repeats": args.repeats,
        "machine": measure.machine(args.device),
    }
    for round_ in range(args.repeats):
        for model in turns(models, round_):
            model.timing.sample(args.device)
        report |= {"rounds": round_ + 1, "models": [summary(model, models[0]) for model in models]}
        write(report, args.json)
        print(f"round {round_ + 1} of {args.repeats}", file=sys.stderr)
    if args.profile:
        for record, profiled in zip(report["models"], profile(models, args.repeats, args.device), strict=True):
            record["profile"] = profiled
        write(report, args.json)
    # A terminal is as wide as it is; a file or a pipe gets the whole table.
    console = Console() if Console().is_terminal else Console(width=150)
    show(report, console)
    if args.profile:
        parts.show(report["models"], console)


def write(report: dict[str, Any], file: Path | None) -> None:
    """Write the result file, if one is wanted."""
    if file:
        AtomicLocalBackend().put_text(json.dumps(report, indent=1) + "\n", file)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_tool(bench_model, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
