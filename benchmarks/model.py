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
With --compare-memory a second process, which hands freed memory back to the system, plays a round after each of ours.

The JSON is written after each round, whole or not at all: an interrupted run keeps what it has measured.
Exit code: 0, or 2 for invalid arguments or a configuration that cannot be measured.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import multiprocessing
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import benchmark

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])
from benchmarks import command, measure, report
from carafe_plugin.engine import bare_models
from carafe_plugin.engine.atomic import AtomicLocalBackend
from carafe_plugin.engine.cli import add_config_options, run_tool
from carafe_plugin.engine.errors import UsageError
from carafe_plugin.engine.memory import add_memory_option, keep_memory
from carafe_plugin.modules.carafe import KernelPrediction

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "mmdet"
# Name, configuration, and the paper's frames per second on its GPU (Table 5).
DEFAULT = (
    ("FPN", "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", 12.5),
    ("CARAFE++ FPN", str(CONFIGS / "faster-rcnn_r50_carafe-fpn_1x_coco.py"), 12.2),
    ("CARAFE++ backbone", str(CONFIGS / "faster-rcnn_r50-carafe_fpn_1x_coco.py"), 12.1),
    ("CARAFE++ both", str(CONFIGS / "faster-rcnn_r50-carafe_carafe-fpn_1x_coco.py"), 11.7),
)
CHILDREN = {
    "channel_compressor": "channel compressor",
    "content_encoder": "content encoder",
    "compressor_norm": "norm and activation",
    "compressor_act": "norm and activation",
}
PARTS = (*dict.fromkeys(CHILDREN.values()), "reassembly", "interpolation", "max pooling", "rest")


@dataclass
class Model:
    """One of the models that take turns."""

    name: str
    config: str
    paper_fps: float | None  # what the paper measured, if it did
    network: nn.Module
    kept: dict[str, int]  # how many boxes of its own a two-stage detector kept
    timing: measure.Timing  # of a prediction
    splits: list[dict[str, float]] = field(default_factory=list)  # seconds of each part, from further predictions
    calls: dict[str, int] = field(default_factory=dict)  # of each part in a prediction

    def record(self, first: Model) -> dict[str, Any]:
        """What has been measured so far, beside the first model."""
        own = self.timing.samples
        ratios = [one / other for one, other in zip(own, first.timing.samples, strict=True)]
        path = Path(self.config)
        if path.is_absolute():  # where it lies on this machine is not for others
            path = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(path.name)
        record: dict[str, Any] = {
            "name": self.name,
            "config": str(path),
            "parameters": sum(parameter.numel() for parameter in self.network.parameters()),
            "samples": [round(sample, 6) for sample in own],
            "kept": dict(self.kept),
        }
        for name, values, digits in (("seconds", own, 6), ("ratio", ratios, 5)):
            record[name] = round(statistics.median(values), digits)
            record[f"{name}_min"], record[f"{name}_max"] = round(min(values), digits), round(max(values), digits)
        if self.paper_fps and first.paper_fps:
            record |= {"paper_fps": self.paper_fps, "paper_ratio": round(first.paper_fps / self.paper_fps, 5)}
        if self.splits:
            record["profile"] = profile_record(self.splits, self.calls)
        return record


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; exits with code 2 and one clear line when an argument is invalid."""
    description = "Measure seconds per prediction of models beside each other."
    parser = argparse.ArgumentParser("python -m benchmarks.model", description=description)
    add = parser.add_argument
    add(
        "configs",
        nargs="*",
        metavar="[NAME=]CONFIG",
        help="configuration files, or mmdet::..., mmseg::..., mmpretrain::...; the others are compared with the first "
        "(default: the paper's four Faster R-CNNs)",
    )
    add("--shape", type=command.integer, nargs=2, metavar=("H", "W"), help="image size (default: the first's)")
    add("--repeats", type=command.integer, default=10, help="rounds (default: 10)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--threads", type=command.threads, default=min(2, measure.cores()), help="CPU threads (default: 2)")
    add("--profile", action="store_true", help="say where the time goes, in further rounds")
    add("--json", type=command.output_file, metavar="FILE", help="write the results")
    add_config_options(parser)
    add_memory_option(parser)
    add("--compare-memory", action="store_true", help="say what keeping memory is worth")
    args = parser.parse_args(argv)
    if args.device.partition(":")[0] not in ("cpu", "cuda"):
        parser.error(f"--device: expected cpu or cuda, got {args.device!r}")
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch finds no CUDA device")
    if args.compare_memory and (args.device != "cpu" or not args.keep_memory):
        parser.error("--compare-memory compares with memory kept: it takes no --no-keep-memory and no --device cuda")
    args.command = command.command_line(parser, argv, args)
    return args


def named_configs(arguments: Sequence[str]) -> Sequence[tuple[str, str, float | None]]:
    """Name, configuration and the paper's speed of every model; UsageError where two have the same name."""
    named = []
    for argument in arguments:
        name, separator, config = argument.partition("=")
        named.append((name, config, None) if separator else (Path(argument).stem, argument, None))
    names = [name for name, _, _ in named]
    if len(set(names)) < len(names):
        raise UsageError(f"every model needs a name of its own (NAME=CONFIG), got {', '.join(names)}")
    return named or DEFAULT


def build(args: argparse.Namespace) -> tuple[list[Model], tuple[int, int]]:
    """The models, ready to predict, and the size of the image, by default that of the first configuration.

    Raises UsageError where a configuration cannot be read or built, or its model cannot predict at this size.
    """
    named = named_configs(args.configs)
    cfgs = [bare_models.read_config(config, args.cfg_options, args.drop_in) for _, config, _ in named]
    shape = tuple(args.shape) if args.shape else bare_models.image_shape(cfgs[0])
    networks: list[Any] = []  # BaseModel, but for mmengine's types
    for cfg in cfgs:
        torch.manual_seed(0)
        networks.append(bare_models.build_model(cfg))
    bare_models.share_parameters(networks)
    models = []
    for (name, config, fps), cfg, network in zip(named, cfgs, networks, strict=True):
        kept = bare_models.fix_boxes(network.to(args.device), shape)
        # One prediction, as a toolbox's runner makes it.
        predict = torch.inference_mode()(functools.partial(network.test_step, bare_models.one_image(cfg, shape)))
        timing = measure.Timing(predict, estimate=measure.SAMPLE_SECONDS, repeats=args.repeats)
        try:  # A GPU needs a few to warm up: its libraries choose their kernels as they go.
            for _ in range(1 if args.device == "cpu" else 3):
                timing.estimate = measure.seconds(predict)
        except (RuntimeError, NotImplementedError) as error:
            raise UsageError(f"{name} ({config}) cannot predict: {error}") from error
        models.append(Model(name, config, fps, network, kept, timing))
    return models, shape


def turns(models: Sequence[Model], round_: int) -> list[Model]:
    """The order of a round: each starts with another model, every other one runs backwards."""
    start = round_ % len(models)
    order = [*models[start:], *models[:start]]
    return order[::-1] if round_ // len(models) % 2 else order


def play(models: Sequence[Model], round_: int) -> None:
    """Gives every model its turn of a round."""
    for model in turns(models, round_):
        model.timing.sample()


class SecondProcess:
    """The same models in a process that hands freed memory back to the system: what a process has kept, it cannot
    hand back without a trace, so that one alone could not be measured both ways.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit what is kept
        self._connection, theirs = context.Pipe()
        args = argparse.Namespace(**{**vars(args), "keep_memory": False})
        self._process = context.Process(target=_serve, args=(args, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._answer: dict[str, Any] = self._receive()

    def __enter__(self) -> SecondProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()  # which ends it
        self._process.join()

    def play(self, round_: int) -> None:
        """Has it play a round."""
        self._connection.send(round_)
        self._answer = self._receive()

    def record(self, models: Sequence[Model]) -> dict[str, Any]:
        """What it has measured so far, beside these models, which keep memory."""
        for record, model in zip(self._answer["models"], models, strict=True):
            pairs = zip(record["samples"], model.timing.samples, strict=True)
            record["times_kept"] = round(statistics.median(one / other for one, other in pairs), 5)
        return self._answer

    def _receive(self) -> dict[str, Any]:
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()
            raise UsageError(f"the second process ended with exit code {self._process.exitcode}") from None


def _serve(args: argparse.Namespace, connection: Connection) -> None:
    """What the second process does: a round for every number that comes."""

    def rounds(args: argparse.Namespace) -> None:
        torch.set_num_threads(args.threads)
        keep_memory(args, args.device)
        models, _ = build(args)
        connection.send({})
        with contextlib.suppress(EOFError):
            while True:
                play(models, connection.recv())
                records = [model.record(models[0]) for model in models]
                connection.send({"models": records, "resident_peak_bytes": measure.peak_resident_bytes()})

    sys.exit(run_tool(rounds, args))


def bench_model(args: argparse.Namespace) -> None:
    """Measures as the command line says."""
    torch.set_num_threads(args.threads)
    if torch.device(args.device).index is not None:
        torch.cuda.set_device(args.device)  # the clock waits for the current one
    kept = keep_memory(args, args.device)
    if args.compare_memory and not kept:
        raise UsageError("--compare-memory: this process does not keep memory, so there is nothing to compare")
    models, shape = build(args)
    record = {"schema": 1, **measure.run_record(args.command, args.device)}
    record |= {"shape": list(shape), "repeats": args.repeats, "keeps_memory": kept}

    def write() -> None:
        record["models"] = [model.record(models[0]) for model in models]
        if other:
            record["resident_peak_bytes"] = measure.peak_resident_bytes()
            record["handing_back"] = other.record(models)
        if args.json:
            AtomicLocalBackend().put_text(json.dumps(record, indent=1) + "\n", args.json)

    with SecondProcess(args) if args.compare_memory else contextlib.nullcontext() as other:
        for round_ in range(args.repeats):
            play(models, round_)
            if other:
                other.play(round_)
            record["rounds"] = round_ + 1
            write()
            print(f"round {round_ + 1} of {args.repeats}", file=sys.stderr)
    if args.profile:
        for round_ in range(args.repeats):
            for model in turns(models, round_):
                seconds, model.calls = split(model.network, model.timing.work)
                model.splits.append(seconds)
        write()
    print_table(record)
    if args.profile:
        print_profile(record["models"])


def split(model: nn.Module, predict: Callable[[], object]) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds of one prediction for each of `PARTS`, and how often each ran.

    Hooks on modules and around `F.interpolate` take the times; reassembly is what its module takes beyond its children.
    A GPU is waited for around every part, so the sum exceeds an undisturbed prediction there.
    """
    seconds, calls, started = dict.fromkeys(PARTS, 0.0), Counter[str](), list[float]()
    interpolate = F.interpolate

    def start(*_: object) -> None:  # parts may contain parts
        started.append(benchmark.timer())

    def stop(part: str) -> None:
        seconds[part] += benchmark.timer() - started.pop()
        calls[part] += 1

    def timed_interpolate(*arguments: Any, **settings: Any) -> torch.Tensor:
        start()
        result = interpolate(*arguments, **settings)
        stop("interpolation")
        return result

    watched: list[tuple[nn.Module, str]] = []
    for module in model.modules():
        if isinstance(module, KernelPrediction):
            children = [(getattr(module, name), part) for name, part in CHILDREN.items()]
            watched += [(module, "reassembly"), *((child, part) for child, part in children if child is not None)]
        elif isinstance(module, nn.MaxPool2d):
            watched.append((module, "max pooling"))
    with contextlib.ExitStack() as stack:
        for module, part in watched:
            stack.callback(module.register_forward_pre_hook(start).remove)
            stack.callback(module.register_forward_hook(lambda *_, part=part: stop(part)).remove)
        stack.callback(setattr, F, "interpolate", interpolate)
        F.interpolate = timed_interpolate
        begin = benchmark.timer()
        predict()
        total = benchmark.timer() - begin
    seconds["reassembly"] -= sum(seconds[part] for part in set(CHILDREN.values()))
    seconds["rest"] = total - sum(seconds.values())
    return seconds, dict(calls)


def profile_record(samples: Sequence[Mapping[str, float]], calls: Mapping[str, int]) -> dict[str, Any]:
    """Medians over predictions of each part and of the total, in milliseconds."""
    whole = [{**sample, "total": sum(sample.values())} for sample in samples]
    parts = {part: round(1e3 * statistics.median(sample[part] for sample in whole), 4) for part in whole[0]}
    return {"parts_ms": parts, "calls": dict(calls)}


def print_table(record: report.Record) -> None:
    """A row for each model."""
    table = report.make_table(
        f"Seconds per prediction at {record['shape'][0]}x{record['shape'][1]}, {record['rounds']} rounds: "
        f"{report.processor(record)}, torch {record['machine']['torch']}",
        "Medians. A ratio compares within a round; beside it, its extremes.",
        "model",
        ("seconds", "min to max", "x first", "ratios", "paper: fps", "x first", "own boxes"),
    )
    for model in record["models"]:
        table.add_row(
            model["name"],
            f"{model['seconds']:.4g}",
            f"{model['seconds_min']:.4g} to {model['seconds_max']:.4g}",
            f"{model['ratio']:.3f}",
            f"{model['ratio_min']:.3f} to {model['ratio_max']:.3f}",
            *([f"{model['paper_fps']}", f"{model['paper_ratio']:.3f}"] if "paper_fps" in model else ["", ""]),
            ", ".join(f"{number} {name}" for name, number in model["kept"].items()) or "-",
        )
    report.console.print(table)
    if other := record.get("handing_back"):
        print_memory_table(record, other)


def print_memory_table(record: report.Record, other: report.Record) -> None:
    """A row for each model: what it takes where freed memory is handed back to the system."""
    peaks = [f"{each['resident_peak_bytes'] / 1e9:.3g} GB" for each in (record, other)]
    table = report.make_table(
        "Seconds with freed memory kept, handed back",
        f"At most resident: {peaks[0]}, {peaks[1]}.",
        "model",
        ("kept", "handed back", "x kept"),
    )
    for kept, back in zip(record["models"], other["models"], strict=True):
        table.add_row(kept["name"], f"{kept['seconds']:.4g}", f"{back['seconds']:.4g}", f"{back['times_kept']:.3f}")
    report.console.print(table)


def print_profile(models: Sequence[report.Record]) -> None:
    """A column for each model: milliseconds of each part and, from the second on, what it takes beyond the first."""
    table = report.make_table(
        "Where a prediction's milliseconds go (+ beyond the first model)",
        "Medians of further predictions, with hooks; the rest differs between models by what the machine does.",
        "part",
        [model["name"] for model in models],
    )
    first = models[0]["profile"]
    for part in (*PARTS, "total"):
        cells = []
        for model in models:
            profile = model["profile"]
            milliseconds, calls = profile["parts_ms"][part], profile["calls"].get(part)
            text = f"{milliseconds:.4g}" + (f" in {calls}" if calls else "")
            cells.append(text if profile is first else f"{text} ({milliseconds - first['parts_ms'][part]:+.3g})")
        if part == "total":
            table.add_section()
        table.add_row(part, *cells)
    report.console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    return run_tool(bench_model, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
