"""How the operator's cost grows: one thing varied at a time around a base point (`benchmarks.op --growth`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import report
from benchmarks.comparison import PASSES, Comparison, Settings
from benchmarks.peers import OURS
from benchmarks.problem import Problem

# Batch, channels, height and width of the base point: P4 of an FPN with fewer channels, so that a run takes minutes.
BASE = (1, 64, 50, 84)
# Side lengths double, so the size grows fourfold a step.
SIZES = ((13, 21), (25, 42), (50, 84), (100, 168), (200, 336))
VALUES: Mapping[str, Sequence[Any]] = {
    "size": SIZES,
    "channels": (16, 32, 64, 128, 256, 512),
    "kernel-size": (1, 3, 5, 7, 9),
    "scale": ("1/4", "1/3", "1/2", "1", "2", "3", "4"),
    "batch": (1, 2, 4, 8),
    "threads": (),  # 1, 2, 4, ... as many as there are
}
AXES = tuple(VALUES)
LABELS = {"size": "H * W", "kernel-size": "k", "scale": "sigma"}


class Point(NamedTuple):
    """One problem of a series."""

    axis: str  # what is varied
    value: str  # as a table shows it
    position: float  # the value as a number, for the figure
    problem: Problem
    threads: int  # of the CPU


def base(usual: Problem) -> Problem:
    """The base point, with the kernels, dtype and device of `usual`."""
    batch, channels, height, width = BASE
    return dataclasses.replace(usual, batch=batch, channels=channels, height=height, width=width)


def points(axes: Sequence[str], base: Problem, threads: int, quick: bool = False) -> Iterator[Point]:
    """The problems of each axis (threads: on CPU only, up to `threads`); with `quick` the first two of each."""
    for axis in axes:
        values = VALUES[axis]
        if axis == "threads":
            values = [*(n for n in (2**power for power in range(10)) if n < threads), threads]
            values = values if base.device == "cpu" else []
        for value in values[:2] if quick else values:
            if axis == "size":
                height, width = value
                problem = dataclasses.replace(base, height=height, width=width)
                yield Point(axis, f"{height}x{width}", float(height * width), problem, threads)
            elif axis == "scale":
                scale = Fraction(value)
                problem = dataclasses.replace(base, up=scale.numerator, down=scale.denominator)
                yield Point(axis, value, float(scale), problem, threads)
            elif axis == "threads":
                yield Point(axis, str(value), float(value), base, value)
            else:
                problem = dataclasses.replace(base, **{axis.replace("-", "_"): value})
                yield Point(axis, str(value), float(value), problem, threads)


def measure(all_points: Sequence[Point], settings: Settings) -> list[dict[str, Any]]:
    """Measures ours at each point: its record, with the axis, the value, the position and the threads."""
    threads = torch.get_num_threads()
    results = []
    for point in all_points:
        torch.set_num_threads(point.threads)
        place = point._asdict()
        results.append(place | Comparison(place.pop("problem"), OURS, settings).run())
    torch.set_num_threads(threads)
    return results


def print_tables(results: Sequence[Mapping[str, Any]], base: Problem) -> None:
    """A table for each axis: milliseconds, their ratio to the bound, and the rate of the reassembly."""
    for axis in dict.fromkeys(result["axis"] for result in results):
        headings = []
        for each in PASSES:
            headings += [f"{peer.name}, {report.TITLES[each]}" for peer in OURS] + ["bound ms"]
        table = report.make_table(
            f"Growth with {LABELS.get(axis, axis)} around {report.shape_title(vars(base))}",
            "Milliseconds (x bound); GFLOP/s of the reassembly in forward + backward.",
            LABELS.get(axis, axis),
            [*headings, "GFLOP/s"],
        )
        for result in results:
            if result["axis"] != axis:
                continue
            cells = [result["value"]]
            for each in PASSES:
                cells += [_cell(peer[each]) for peer in result["peers"]] + [f"{result['bound'][f'{each}_ms']:.3g}"]
            fused = result["peers"][-1]["forward_backward"]
            rate = result["bound"]["forward_backward_flop"] / 1e6 / fused["median_ms"] if "median_ms" in fused else 0
            table.add_row(*cells, f"{rate:.4g}")
        report.console.print(table)


def _cell(values: Mapping[str, Any]) -> str:
    if values["status"] != "ok":
        return str(values["status"])
    return f"{values['median_ms']:.4g} ({values['times_bound']:.3g})"


def plot(run: Mapping[str, Any], file: Path) -> None:
    """Draws one panel for each axis, both logarithmic: ours, with the quartiles, and the bound."""
    from matplotlib.figure import Figure

    results = run["growth"]
    axes = list(dict.fromkeys(result["axis"] for result in results))
    columns = min(3, len(axes))
    rows = -(-len(axes) // columns)
    figure = Figure((1 + 3.4 * columns, 1 + 2.9 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat[len(axes) :]:
        panel.set_axis_off()
    for panel, axis in zip(panels.flat, axes, strict=False):
        series = sorted((result for result in results if result["axis"] == axis), key=lambda each: each["position"])
        _draw_series(panel, series)
        panel.set_xlabel(LABELS.get(axis, axis), size=9)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(f"ms: {run['dtype']}, {report.processor(run)}, torch {run['machine']['torch']}", size=9)
    figure.savefig(file, dpi=150)


def _draw_series(panel: Any, series: Sequence[Mapping[str, Any]]) -> None:
    positions = [result["position"] for result in series]
    for each, line in zip(PASSES, ("-", "--"), strict=True):
        for number, (peer, colour) in enumerate(zip(OURS, ("tab:blue", "tab:orange"), strict=True)):
            measured = [(result["position"], result["peers"][number][each]) for result in series]
            measured = [(position, values) for position, values in measured if values["status"] == "ok"]
            medians = [values["median_ms"] for _, values in measured]
            low = [values["median_ms"] - values["q1_ms"] for _, values in measured]
            high = [values["q3_ms"] - values["median_ms"] for _, values in measured]
            label = f"{peer.name}, {report.TITLES[each]}"
            places = [position for position, _ in measured]
            panel.errorbar(places, medians, (low, high), color=colour, linestyle=line, marker=".", label=label)
        bounds = [result["bound"][f"{each}_ms"] for result in series]
        label = f"bound, {report.TITLES[each]}"
        panel.plot(positions, bounds, color="black", linewidth=0.8, linestyle=line, label=label)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xticks(positions, [result["value"] for result in series], size=7)
    panel.minorticks_off()
