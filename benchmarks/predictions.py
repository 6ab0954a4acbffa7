"""Whole models side by side: seconds per prediction, and where they go."""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import benchmark

from benchmarks import measure, report
from carafe_plugin.engine import bare_models
from carafe_plugin.engine.errors import UsageError
from carafe_plugin.modules.kernel_prediction import KernelPrediction

ROOT = Path(__file__).resolve().parents[1]
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
    predict: Callable[[], object]
    kept: dict[str, int]  # how many boxes of its own a two-stage detector kept
    timing: measure.Timing

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
        return record


def build(
    named: Sequence[tuple[str, str, float | None]],
    shape: tuple[int, int] | None,
    device: str,
    repeats: int,
    options: Mapping[str, Any] | None = None,
    drop_in: bool = False,
) -> tuple[list[Model], tuple[int, int]]:
    """The models, ready to predict, and the size of the image: `shape`, or the first configuration's.

    `drop_in` makes mmcv's layer 'carafe' ours. Raises UsageError where a configuration cannot be read or built, or its
    model cannot predict at this size.
    """
    cfgs = [bare_models.read_config(config, options, drop_in) for _, config, _ in named]
    shape = shape or bare_models.image_shape(cfgs[0])
    networks: list[Any] = []  # BaseModel, but for mmengine's types
    for cfg in cfgs:
        torch.manual_seed(0)
        networks.append(bare_models.build_model(cfg))
    bare_models.share_parameters(networks)
    models = []
    for (name, config, fps), cfg, network in zip(named, cfgs, networks, strict=True):
        kept = bare_models.fix_boxes(network.to(device), shape)
        # One prediction, as a toolbox's runner makes it.
        predict = torch.inference_mode()(functools.partial(network.test_step, bare_models.one_image(cfg, shape)))
        timing = measure.Timing(predict, estimate=measure.SAMPLE_SECONDS, repeats=repeats)
        try:  # A GPU needs a few to warm up: its libraries choose their kernels as they go.
            for _ in range(1 if device == "cpu" else 3):
                timing.estimate = measure.seconds(predict)
        except (RuntimeError, NotImplementedError) as error:
            raise UsageError(f"{name} ({config}) cannot predict: {error}") from error
        models.append(Model(name, config, fps, network, predict, kept, timing))
    return models, shape


def turns(models: Sequence[Model], round_: int) -> list[Model]:
    """The order of a round: each starts with another model, every other one runs backwards."""
    start = round_ % len(models)
    order = [*models[start:], *models[:start]]
    return order[::-1] if round_ // len(models) % 2 else order


def print_table(record: Mapping[str, Any]) -> None:
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


# --------------------------------------------------------------------------------------------- where the time goes


def profile(models: Sequence[Model], repeats: int) -> list[dict[str, Any]]:
    """Where each model's time goes, from `repeats` further rounds: the record of each."""
    samples: dict[str, list[dict[str, float]]] = {model.name: [] for model in models}
    calls: dict[str, dict[str, int]] = {}
    for round_ in range(repeats):
        for model in turns(models, round_):
            seconds, calls[model.name] = split(model.network, model.predict)
            samples[model.name].append(seconds)
    return [profile_record(samples[model.name], calls[model.name]) for model in models]


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


def print_profile(models: Sequence[Mapping[str, Any]]) -> None:
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
