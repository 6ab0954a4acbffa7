"""How the benchmarks show what they measured: tables on the terminal and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from carafe_plugin.engine.console import table_console

TITLES = {"forward": "forward", "forward_backward": "forward + backward"}
console = table_console(160)
Record = dict[str, Any]


def is_ours(peer: Record) -> bool:
    """Whether the others are compared with it."""
    return peer["name"] == peer["reference"]


def make_table(title: str, caption: str | None, first: str, headings: Sequence[str]) -> Table:
    """An empty table with a title: a column of names on the left, and columns of numbers."""
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=heading != "error")
    return table


def print_header(report: Record) -> None:
    """Prints what runs, where and on what."""
    console.print(
        f"carafe_plugin {report['version']} ({report['backend']}), {report['dtype']} on {report['device']}: "
        f"{processor(report)}, torch {report['machine']['torch']}",
        highlight=False,
    )
    if settings := report["machine"].get("environment"):
        console.print("with " + " ".join(f"{name}={value}" for name, value in settings.items()), highlight=False)
    if report["quick"]:
        console.print("A quick run: few turns, and not every peer.", style="yellow")


def processor(report: Record) -> str:
    """The processor that computed, in words."""
    machine = report["machine"]
    path = machine.get("cpu_path") or machine["instruction_set"]
    return machine.get("gpu") or f"{machine['cpu']} ({path}), {machine['threads']} threads"


def shape_title(shape: Record) -> str:
    """A problem in words, without what is usual."""
    scale = f"down {shape['down']}" if shape["down"] > 1 else f"up {shape['up']}"
    title = f"{shape['channels']} x {shape['height']} x {shape['width']}, {scale}, k {shape['kernel_size']}"
    if shape["group_size"] > 1:
        title += f", {shape['group_size']} groups"
    return title + (f", batch {shape['batch']}" if shape["batch"] > 1 else "")


def print_bounds(results: Sequence[Record]) -> None:
    """What ours, in every layout and dtype that was measured, takes as multiples of the hardware's bound."""
    titles = [shape_title(result["shape"]).replace(", ", "\n", 1) for result in results]
    table = make_table(
        "Multiples of the bound: forward, forward + backward",
        "The bound is that of the run's dtype, whatever a row's is.",
        "ours",
        titles,
    )
    bounds = [[f"{result['bound'][f'{each}_ms']:.3g}" for each in TITLES] for result in results]
    table.add_row("bound, ms", *map(", ".join, bounds), end_section=True)
    names = dict.fromkeys(
        peer["name"] for result in results for peer in result["peers"] if is_ours(peer) or peer["variant"]
    )
    for name in names:
        cells = []
        for result in results:
            found = [peer for peer in result["peers"] if peer["name"] == name]
            values = [peer[each] for peer in found for each in TITLES]
            texts = [f"{v['times_bound']:.2f}" if v["status"] == "ok" else v["status"] for v in values]
            cells.append(", ".join(texts))
        table.add_row(name, *cells)
    console.print(table)


def print_table(result: Record, each: str) -> None:
    """One pass of one problem: a row for each peer, those of the same inputs together."""
    bound = result["bound"]
    backward = each != "forward"
    headings = ["median ms", "quartiles", "min to max", "turns", "x ours", "x bound", "peak MB", "x needed"]
    headings += ["saved MB" if backward else "parameters", "error"]
    table = make_table(
        f"{shape_title(result['shape'])}: {TITLES[each]}",
        f"bound {bound[each + '_ms']:.3g} ms: {bound[each + '_flop'] / 1e9:.3g} GFLOP at "
        f"{bound['matmul_flop_per_s'] / 1e9:.4g} GFLOP/s, {bound[each + '_bytes'] / 1e6:.4g} MB at "
        f"{bound[each + '_copy_bytes_per_s'] / 1e9:.3g} GB/s; memory is compared with "
        f"{bound[each + '_needed_bytes'] / 1e6:.4g} MB",
        "peer",
        headings,
    )
    # Ours lead, each followed by what computes the same of the same inputs; other functions come last.
    names = [peer["name"] for peer in result["peers"] if is_ours(peer)]
    order = sorted(result["peers"], key=lambda peer: (not peer["equal"], names.index(peer["reference"])))
    for before, peer in zip([None, *order], order, strict=False):
        if before and (before["reference"], before["equal"]) != (peer["reference"], peer["equal"]):
            table.add_section()
        values = peer[each]
        if values["status"] != "ok":
            table.add_row(peer["name"], values["status"], *[""] * (len(headings) - 2), values["detail"], style="red")
            continue
        error = f"{values['error']:.0e}" if "error" in values else ("-" if peer["equal"] else "another function")
        last = f"{peer['parameters']:,}" if peer.get("parameters") and not backward else ""
        if "saved_bytes" in values:
            last = f"{values['saved_bytes'] / 1e6:.4g}"
        table.add_row(
            peer["name"],
            f"{values['median_ms']:.4g}",
            f"{values['q1_ms']:.4g} to {values['q3_ms']:.4g}",
            f"{values['min_ms']:.4g} to {values['max_ms']:.4g}",
            str(values["repeats"]),
            f"{values['times_ours']:.3g}" if "times_ours" in values else "",
            f"{values['times_bound']:.3g}",
            f"{values['peak_bytes'] / 1e6:.4g}",
            f"{values['times_needed_memory']:.3g}",
            last,
            error,
            style="bold" if is_ours(peer) else None,
        )
    console.print(table)


def plot(report: Record, file: Path) -> None:
    """Draws the medians on a logarithmic axis with their quartiles, one panel for each problem and pass."""
    from matplotlib.figure import Figure

    results = report["results"]
    most = max(len(result["peers"]) for result in results)
    figure = Figure((1.5 + 4.2 * len(results), 1.6 + 0.5 * most), layout="constrained")
    axes = figure.subplots(2, len(results), squeeze=False)
    for column, result in enumerate(results):
        for row, each in enumerate(TITLES):
            _draw_panel(axes[row][column], result, each)
    for axis in axes[1]:
        axis.set_xlabel("ms (dashed: the hardware's bound)", size=8)
    figure.suptitle(f"{report['dtype']}, {processor(report)}, torch {report['machine']['torch']}", size=9)
    figure.savefig(file, dpi=150)


def _draw_panel(axis: Any, result: Record, each: str) -> None:
    for position, peer in enumerate(result["peers"]):
        values = peer[each]
        if values["status"] != "ok":
            text = axis.get_yaxis_transform()
            axis.text(0.02, position, values["status"], va="center", size=8, color="0.4", transform=text)
            continue
        median = values["median_ms"]
        spread = [[median - values["q1_ms"]], [values["q3_ms"] - median]]
        colour = "tab:blue" if peer["equal"] else "0.7"
        if is_ours(peer) or peer["variant"]:
            colour = "tab:orange" if is_ours(peer) else "navajowhite"
        axis.barh(position, median, color=colour, xerr=spread, error_kw={"elinewidth": 1})
        label = f" {median:.3g}" if median < 1000 else f" {median:.0f}"
        axis.text(values["q3_ms"], position, label, va="center", size=8)
    axis.axvline(result["bound"][f"{each}_ms"], color="black", linestyle="--", linewidth=1)
    axis.set_xscale("log")
    axis.set_xlim(right=axis.get_xlim()[1] * 2)  # room for the longest bar's label
    axis.set_title(f"{shape_title(result['shape'])}\n{TITLES[each]}", size=9)
    axis.set_yticks(range(len(result["peers"])), [peer["name"] for peer in result["peers"]], size=8)
    axis.invert_yaxis()
