"""Measures seconds per prediction of whole models beside each other.

A prediction is everything from the image's pixels in memory to the boxes, maps or scores: normalisation, network,
suppression. Without arguments: Faster R-CNN R50 at 800x1333 with FPN, CARAFE++ in the FPN, in the backbone, in both,
beside the paper's frames per second (Table 5).

A fair comparison: weights are random, but parameters of the same name and shape have the same values in all models; the
image is the same; and two-stage detectors continue with the same boxes (their own are computed, counted and replaced),
so that no head has more or less work because of what a model's random weights happen to propose. Suppressing detections
is cheaper than in a trained model, in all of them: random weights are never confident. Models take turns, each round in
another order; a ratio is taken within its round, against the first model.

    python -m benchmarks.model --json result.json
    python -m benchmarks.model stock=mmdet::retinanet/retinanet_r50_fpn_1x_coco.py mine.py --device cuda

With --profile more rounds follow, in which kernel prediction, reassembly and what they replace are timed separately.

The JSON is written after each round, whole or not at all: an interrupted run keeps what it has measured.
Exit code: 0, or 2 for invalid arguments or a configuration that cannot be measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import command, measure, predictions
from carafe_plugin.engine.atomic import AtomicLocalBackend
from carafe_plugin.engine.cli import add_config_options, run_tool
from carafe_plugin.engine.errors import UsageError

CONFIGS = predictions.ROOT / "configs" / "mmdet"
# Name, configuration, and the paper's frames per second on its GPU (Table 5).
DEFAULT = (
    ("FPN", "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", 12.5),
    ("CARAFE++ FPN", str(CONFIGS / "faster-rcnn_r50_carafe-fpn_1x_coco.py"), 12.2),
    ("CARAFE++ backbone", str(CONFIGS / "faster-rcnn_r50-carafe_fpn_1x_coco.py"), 12.1),
    ("CARAFE++ both", str(CONFIGS / "faster-rcnn_r50-carafe_carafe-fpn_1x_coco.py"), 11.7),
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; exits with code 2 and one clear line when an argument is invalid."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model",
        description="Measure seconds per prediction of models beside each other.",
    )
    add, integer = parser.add_argument, command.positive(int)
    add(
        "configs",
        nargs="*",
        metavar="[NAME=]CONFIG",
        help="configuration files, or mmdet::..., mmseg::..., mmpretrain::...; the others are compared with the first "
        "(default: the paper's four Faster R-CNNs)",
    )
    add("--shape", type=integer, nargs=2, metavar=("H", "W"), help="image size (default: the first's)")
    add("--repeats", type=integer, default=10, help="rounds (default: 10)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--threads", type=command.threads, default=min(2, measure.cores()), help="CPU threads (default: 2)")
    add("--profile", action="store_true", help="say where the time goes, in further rounds")
    add("--json", type=command.output_file, metavar="FILE", help="write the results")
    add_config_options(parser)
    args = parser.parse_args(argv)
    if args.device.partition(":")[0] not in ("cpu", "cuda"):
        parser.error(f"--device: expected cpu or cuda, got {args.device!r}")
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch finds no CUDA device")
    args.command = command.command_line(parser, argv, args)
    return args


def named_configs(arguments: Sequence[str]) -> list[tuple[str, str, float | None]]:
    """Name, configuration and the paper's speed of every model; UsageError where two have the same name."""
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


def bench_model(args: argparse.Namespace) -> None:
    """Measures as the command line says."""
    torch.set_num_threads(args.threads)
    if torch.device(args.device).index is not None:
        torch.cuda.set_device(args.device)  # the clock waits for the current one
    named, shape = named_configs(args.configs), tuple(args.shape) if args.shape else None
    models, shape = predictions.build(named, shape, args.device, args.repeats, args.cfg_options, args.drop_in)
    record = {"schema": 1, **measure.run_record(args.command, args.device), "shape": list(shape)}
    record["repeats"] = args.repeats
    for round_ in range(args.repeats):
        for model in predictions.turns(models, round_):
            model.timing.sample()
        record |= {"rounds": round_ + 1, "models": [model.record(models[0]) for model in models]}
        write(record, args.json)
        print(f"round {round_ + 1} of {args.repeats}", file=sys.stderr)
    if args.profile:
        for entry, profile in zip(record["models"], predictions.profile(models, args.repeats), strict=True):
            entry["profile"] = profile
        write(record, args.json)
    predictions.print_table(record)
    if args.profile:
        predictions.print_profile(record["models"])


def write(record: dict[str, Any], file: Path | None) -> None:
    """Writes the result file, if one is wanted."""
    if file:
        AtomicLocalBackend().put_text(json.dumps(record, indent=1) + "\n", file)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    return run_tool(bench_model, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
