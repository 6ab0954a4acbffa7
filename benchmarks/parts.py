"""Where the seconds of a prediction go: kernel prediction, reassembly, what they replace, and the rest."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks import measure
from carafe_plugin.modules.kernel_prediction import KernelPrediction

PARTS = (
    "channel compressor",
    "content encoder",
    "norm and activation",
    "reassembly",
    "interpolation",
    "max pooling",
    "rest",
)
CHILDREN = {
    "channel_compressor": "channel compressor",
    "compressor_norm": "norm and activation",
    "compressor_act": "norm and activation",
    "content_encoder": "content encoder",
}


class Clock:
    """Adds up the time of parts of one prediction, and how often each ran."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._started: list[float] = []

    def now(self) -> float:
        """The time when all that was asked for is done."""
        measure.synchronize(self.device)
        return time.perf_counter()

    def start(self, *_: object) -> None:
        """A part begins; parts may contain parts."""
        self._started.append(self.now())

    def stop(self, part: str) -> None:
        """The part that began last ends."""
        self.seconds[part] += self.now() - self._started.pop()
        self.calls[part] += 1


@contextlib.contextmanager
def watched(model: nn.Module, clock: Clock) -> Iterator[None]:
    """Times, inside the block, what `PARTS` names: by hooks on modules, and around `F.interpolate`.

    'reassembly' holds a whole module of this package here; `split` takes its children off again.
    """
    handles = []

    def watch(module: nn.Module, part: str) -> None:
        handles.append(module.register_forward_pre_hook(clock.start))
        handles.append(module.register_forward_hook(lambda *_: clock.stop(part)))

    for module in model.modules():
        if isinstance(module, KernelPrediction):
            watch(module, "reassembly")
            for name, part in CHILDREN.items():
                if getattr(module, name) is not None:
                    watch(getattr(module, name), part)
        elif isinstance(module, nn.MaxPool2d):
            watch(module, "max pooling")
    interpolate = F.interpolate

    def timed_interpolate(*arguments: Any, **settings: Any) -> torch.Tensor:
        clock.start()
        result = interpolate(*arguments, **settings)
        clock.stop("interpolation")
        return result

    F.interpolate = timed_interpolate
    try:
        yield
    finally:
        F.interpolate = interpolate
        for handle in handles:
            handle.remove()


def split(model: nn.Module, predict: Callable[[], object], device: str) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds of one prediction for each of `PARTS`, and how often each ran.

    What reassembly takes is what its module takes beyond its children: the fused operator, or pixel shuffle, normaliser
    and operator. A GPU is waited for around every part, so the sum exceeds an undisturbed prediction there.
    """
    clock = Clock(device)
    with watched(model, clock):
        begin = clock.now()
        predict()
        total = clock.now() - begin
    seconds = {part: clock.seconds[part] for part in PARTS}
    seconds["reassembly"] -= sum(seconds[part] for part in set(CHILDREN.values()))
    seconds["rest"] = total - sum(seconds.values())
    return seconds, {part: clock.calls[part] for part in PARTS if clock.calls[part]}


def summary(samples: Sequence[Mapping[str, float]], calls: Mapping[str, int]) -> dict[str, Any]:
    """Medians over predictions of each part and of the total, in milliseconds."""
    whole = [{**sample, "total": sum(sample.values())} for sample in samples]
    parts = {part: round(1e3 * statistics.median(sample[part] for sample in whole), 4) for part in whole[0]}
    return {"parts_ms": parts, "calls": dict(calls)}


def show(models: Sequence[Mapping[str, Any]], console: Console) -> None:
    """A column for each model: milliseconds of each part and, from the second on, what it takes beyond the first."""
    table = Table(
        title="Where a prediction's milliseconds go (+ beyond the first model)",
        caption="Medians of predictions of their own, with hooks; the rest of two models differs by what machines do.",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("part")
    for model in models:
        table.add_column(model["name"], justify="right")
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
    console.print(table)
