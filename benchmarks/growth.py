"""How the operator's cost grows: one thing varied at a time around a base point (`bench_op.py --growth`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks import report
from benchmarks.peers import OURS
from benchmarks.problem import Problem
from benchmarks.runner import PASSES, Benchmark, Options

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


@dataclass(frozen=True)
class Point:
    """One problem of a series.

    Attributes:
        axis: what is varied.
        value: its value, as a table shows it.
        position: the same as a number, for the figure.
        problem: the problem.
        threads: CPU threads.
    """

    axis: str
    value: str
    position: float
    problem: Problem
    threads: int


def points(axes: Sequence[str], base: Problem, threads: int, quick: bool = False) -> Iterator[Point]:
    """The problems of each axis, in order; with `quick` the first two of each.

    Args:
        axes: of `AXES`.
        base: every axis's usual value.
        threads: most CPU threads, and the usual number.
        quick: whether to stop early.
    """
    for axis in axes:
        values = VALUES[axis] or [n for n in (2**power for power in range(10)) if n < threads] + [threads]
        for value in values[:2] if quick else values:
            problem, used = base, threads
            position = float(value) if isinstance(value, int) else 0.0
            if axis == "size":
                height, width = value
                problem = dataclasses.replace(base, height=height, width=width)
                position = float(height * width)
                value = f"{height}x{width}"
            elif axis == "scale":
                up, _, down = value.partition("/")
                problem = dataclasses.replace(base, up=int(up), down=int(down or 1))
                position = int(up) / int(down or 1)
            elif axis == "threads":
                used = value
            else:
                name = axis.replace("-", "_")
                problem = dataclasses.replace(base, **{name: value})
            yield Point(axis, str(value), position, problem, used)


def measure_growth(all_points: Sequence[Point], options: Options) -> list[dict[str, Any]]:
    """Measures ours at each point: its record, with the axis, the value and the threads."""
    threads = torch.get_num_threads()
    results = []
    for point in all_points:
        torch.set_num_threads(point.threads)
        result = Benchmark(point.problem, OURS, options).run()
        place = {"axis": point.axis, "value": point.value, "position": point.position, "threads": point.threads}
        results.append(place | result)
    torch.set_num_threads(threads)
    return results


def print_growth(results: Sequence[Mapping[str, Any]], base: Problem) -> None:
    """A table for each axis: milliseconds, their ratio to the bound, and nanoseconds for each output element."""
    for axis in dict.fromkeys(result["axis"] for result in results):
        series = [result for result in results if result["axis"] == axis]
        table = Table(
            title=f"Growth with {LABELS.get(axis, axis)} around {report.shape_title(vars(base))}",
            caption="Milliseconds (x bound); GFLOP/s of the reassembly in forward + backward.",
            title_justify="left",
            caption_justify="left",
        )
        table.add_column(LABELS.get(axis, axis))
        for each in PASSES:
            for peer in OURS:
                table.add_column(f"{peer.name}, {report.TITLES[each]}", justify="right")
            table.add_column("bound ms", justify="right")
        table.add_column("GFLOP/s", justify="right")
        for result in series:
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


def plot_growth(run: Mapping[str, Any], file: Path) -> None:
    """Draws one panel for each axis, both logarithmic: ours, with the quartiles, and the bound."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = run["growth"]
    axes = list(dict.fromkeys(result["axis"] for result in results))
    columns = min(3, len(axes))
    rows = -(-len(axes) // columns)
    size = (1 + 3.4 * columns, 1 + 2.9 * rows)
    figure, panels = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
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
    pyplot.close(figure)


def _draw_series(panel: Any, series: Sequence[Mapping[str, Any]]) -> None:
    for each, line in zip(PASSES, ("-", "--"), strict=True):
        for number, (peer, colour) in enumerate(zip(OURS, ("tab:blue", "tab:orange"), strict=True)):
            measured = [result for result in series if result["peers"][number][each]["status"] == "ok"]
            values = [result["peers"][number][each] for result in measured]
            medians = [value["median_ms"] for value in values]
            low = [value["median_ms"] - value["q1_ms"] for value in values]
            high = [value["q3_ms"] - value["median_ms"] for value in values]
            positions = [result["position"] for result in measured]
            label = f"{peer.name}, {report.TITLES[each]}"
            panel.errorbar(positions, medians, (low, high), color=colour, linestyle=line, marker=".", label=label)
        bounds = [result["bound"][f"{each}_ms"] for result in series]
        positions = [result["position"] for result in series]
        panel.plot(
            positions, bounds, color="black", linewidth=0.8, linestyle=line, label=f"bound, {report.TITLES[each]}"
        )
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xticks([result["position"] for result in series], [result["value"] for result in series], size=7)
    panel.minorticks_off()
