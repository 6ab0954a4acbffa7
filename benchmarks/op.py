"""Measures `carafe_plugin.ops.carafe` against the other ways to compute it, and against other ways to rescale.

For each shape: forward, forward + backward (to features and kernels), peak additional memory and what autograd keeps,
of each peer, beside a bound of the hardware measured in the same run. Two rows are ours: `carafe`, the public operator,
from masks; and `fused`, what the modules call, from the content encoder's output. A peer is compared with the one that
has the same inputs: first its results, then its time. Peers take turns, and each is given the median of its turns;
compilation and warm-up do not count.

    python -m benchmarks.op --device cpu --json result.json --plot result.png
    python -m benchmarks.op --growth --json growth.json --plot growth.png

With --growth: how the cost of ours grows, one thing varied at a time around a base point.

Exit code: 0; 1 when ours fails or a peer's result differs from ours; 2 for invalid arguments.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])
from benchmarks import command, report
from benchmarks.comparison import PASSES, Problem
from benchmarks.peers import OURS, PEERS
from benchmarks.report import Record

# The base point is P4 of an FPN with fewer channels, so that a run takes minutes.
BASE = {"batch": 1, "channels": 64, "height": 50, "width": 84}
VALUES: Mapping[str, Sequence[str]] = {
    "size": ("13x21", "25x42", "50x84", "100x168", "200x336"),  # fourfold a step
    "channels": ("16", "32", "64", "128", "256", "512"),
    "kernel-size": ("1", "3", "5", "7", "9"),
    "scale": ("1/4", "1/3", "1/2", "1", "2", "3", "4"),
    "batch": ("1", "2", "4", "8"),
    "threads": (),  # 1, 2, 4, ... as many as there are
}
LABELS = {"size": "H * W", "kernel-size": "k", "scale": "sigma"}


def points(axes: Sequence[str], base: Problem, threads: int, quick: bool = False) -> Iterator[tuple[Problem, Record]]:
    """The problems of each axis (threads: on CPU only, up to `threads`), with `quick` the first two of each.

    Beside each is what its record says of it: the axis, the value, its position in a figure, and the threads.
    """
    for axis in axes:
        values = VALUES[axis]
        if axis == "threads" and base.device == "cpu":
            values = [*(str(2**power) for power in range(10) if 2**power < threads), str(threads)]
        for value in values[:2] if quick else values:
            changes: dict[str, Any] = {}
            if axis == "size":
                changes["height"], changes["width"] = map(int, value.split("x"))
            elif axis == "scale":
                changes["up"], changes["down"] = Fraction(value).as_integer_ratio()
            elif axis != "threads":
                changes[axis.replace("-", "_")] = int(value)
            position = float(changes["height"] * changes["width"] if axis == "size" else Fraction(value))
            place = {"axis": axis, "value": value, "position": position}
            place["threads"] = int(value) if axis == "threads" else threads
            yield dataclasses.replace(base, **changes), place


def measure_growth(options: argparse.Namespace, record: Record) -> None:
    """Adds the record of ours at each point and prints tables."""
    base = options.problems[0] if options.shapes else dataclasses.replace(options.problems[0], **BASE)
    record["growth"] = []
    for problem, point in points(list(dict.fromkeys(options.growth or VALUES)), base, options.threads, options.quick):
        torch.set_num_threads(point["threads"])
        record["growth"].append(point | options.comparison(problem, OURS).run())
    torch.set_num_threads(options.threads)
    print_growth(record["growth"], base)


def print_growth(results: Sequence[Record], base: Problem) -> None:
    """A table for each axis: milliseconds, their ratio to the bound, and the rate of the reassembly."""
    headings = []
    for each in PASSES:
        headings += [f"{peer.name}, {report.TITLES[each]}" for peer in OURS] + ["bound ms"]
    caption = "Milliseconds (x bound); GFLOP/s of the reassembly in forward + backward."
    for axis, series in itertools.groupby(results, lambda result: result["axis"]):
        label = LABELS.get(axis, axis)
        title = f"Growth with {label} around {report.shape_title(vars(base))}"
        table = report.make_table(title, caption, label, [*headings, "GFLOP/s"])
        for result in series:
            cells = [result["value"]]
            for each in PASSES:
                for values in (peer[each] for peer in result["peers"]):
                    ok = values["status"] == "ok"
                    cells.append(("{median_ms:.4g} ({times_bound:.3g})" if ok else "{status}").format(**values))
                cells.append(f"{result['bound'][f'{each}_ms']:.3g}")
            fused = result["peers"][-1]["forward_backward"]
            rate = result["bound"]["forward_backward_flop"] / 1e6 / fused["median_ms"] if "median_ms" in fused else 0
            table.add_row(*cells, f"{rate:.4g}")
        report.console.print(table)


def plot_growth(run: Record, file: Path) -> None:
    """Draws one panel for each axis, both logarithmic: ours, with the quartiles, and the bound."""
    import numpy as np
    from matplotlib.figure import Figure

    axes = {axis: list(series) for axis, series in itertools.groupby(run["growth"], lambda result: result["axis"])}
    columns = min(3, len(axes))
    rows = -(-len(axes) // columns)
    figure = Figure((1 + 3.4 * columns, 1 + 2.9 * rows), layout="constrained")
    for number, (axis, series) in enumerate(axes.items(), 1):
        panel: Any = figure.add_subplot(rows, columns, number)
        positions = [result["position"] for result in series]
        for each, line in zip(PASSES, ("-", "--"), strict=True):
            for row, (peer, colour) in enumerate(zip(OURS, ("tab:blue", "tab:orange"), strict=True)):
                measured = [result["peers"][row][each] for result in series]
                low, median, high = (
                    np.array([values.get(name, np.nan) for values in measured])
                    for name in ("q1_ms", "median_ms", "q3_ms")
                )
                label, style = f"{peer.name}, {report.TITLES[each]}", {"color": colour, "linestyle": line}
                panel.errorbar(positions, median, (median - low, high - median), marker=".", label=label, **style)
            bounds = [result["bound"][f"{each}_ms"] for result in series]
            label = f"bound, {report.TITLES[each]}"
            panel.plot(positions, bounds, color="black", linewidth=0.8, linestyle=line, label=label)
        panel.set(xscale="log", yscale="log")
        panel.set_xticks(positions, [result["value"] for result in series], size=7)
        panel.minorticks_off()
        panel.set_xlabel(LABELS.get(axis, axis), size=9)
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(f"ms: {run['dtype']}, {report.processor(run)}, torch {run['machine']['torch']}", size=9)
    figure.savefig(file, dpi=150)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; exits with code 2 and one clear line when an argument is invalid."""
    parser = command.make_parser("op", "Measure the CARAFE operator against other ways to compute it.", OURS, PEERS)
    parser.add_argument(
        "--growth",
        nargs="*",
        choices=VALUES,
        metavar="AXIS",
        help=f"instead: how ours grows with {', '.join(VALUES)} [all of them], one at a time around a base point, "
        "which one of --shapes may set",
    )
    return command.parse(parser, arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    options = parse_arguments(arguments)
    if options.growth is None:
        return command.compare(options)
    return command.run(options, functools.partial(measure_growth, options), plot_growth)


if __name__ == "__main__":
    sys.exit(main())
