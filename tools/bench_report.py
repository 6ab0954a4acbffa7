"""How `bench_op.py` shows what it measured: tables on the terminal and a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

OURS = "carafe"
TITLES = {"forward": "forward", "forward_backward": "forward + backward"}
# A terminal is as wide as it is; a file or a pipe gets the whole table.
_console = Console() if Console().is_terminal else Console(width=150)


def is_sound(result: dict[str, Any]) -> bool:
    """Whether ours was measured and no peer disagreed with it."""
    statuses = [(peer["name"], peer[each]["status"]) for peer in result["peers"] for each in TITLES]
    return all(status == "ok" or (name != OURS and status != "wrong result") for name, status in statuses)


def print_header(report: dict[str, Any]) -> None:
    """Says what runs, where and on what."""
    machine = report["machine"]
    processor = machine.get("gpu", f"{machine['cpu']} ({machine['instruction_set']}), {machine['threads']} threads")
    _console.print(
        f"carafe_plugin {report['version']} ({report['backend']}), {report['dtype']} on {report['device']}: "
        f"{processor}, torch {machine['torch']}",
        highlight=False,
    )
    if report["quick"]:
        _console.print("A quick run: the sizes are too small for the numbers to mean anything.", style="yellow")


def shape_title(shape: dict[str, int]) -> str:
    """A problem in words, without what is usual."""
    title = f"{shape['channels']} x {shape['height']} x {shape['width']}, up {shape['up']}, k {shape['kernel_size']}"
    if shape["group_size"] > 1:
        title += f", {shape['group_size']} groups"
    return title + (f", batch {shape['batch']}" if shape["batch"] > 1 else "")


def print_table(result: dict[str, Any], each: str) -> None:
    """One pass of one problem: a row for each peer."""
    bound = result["bound"]
    table = Table(
        title=f"{shape_title(result['shape'])}: {TITLES[each]}",
        caption=f"bound {bound[each + '_ms']:.3g} ms: {bound[each + '_flop'] / 1e9:.3g} GFLOP at "
        f"{bound['matmul_flop_per_s'] / 1e9:.4g} GFLOP/s, {bound[each + '_bytes'] / 1e6:.4g} MB at "
        f"{bound[each + '_copy_bytes_per_s'] / 1e9:.3g} GB/s",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("peer", no_wrap=True)
    for heading in ("median ms", "quartiles", "min to max", "turns", "x ours", "x bound", "peak MB", "error"):
        table.add_column(heading, justify="right", no_wrap=heading != "error")
    for peer in result["peers"]:
        values = peer[each]
        style = "bold" if peer["name"] == OURS else None
        error = f"{values['error']:.0e}" if "error" in values else ("-" if peer["equal"] else "another function")
        if values["status"] != "ok":
            table.add_row(peer["name"], values["status"], *[""] * 6, values["detail"], style="red")
            continue
        table.add_row(
            peer["name"],
            f"{values['median_ms']:.4g}",
            f"{values['q1_ms']:.4g} to {values['q3_ms']:.4g}",
            f"{values['min_ms']:.4g} to {values['max_ms']:.4g}",
            str(values["repeats"]),
            f"{values['times_ours']:.3g}" if "times_ours" in values else "",
            f"{values['times_bound']:.3g}",
            f"{values['peak_bytes'] / 1e6:.4g}",
            error,
            style=style,
        )
    _console.print(table)


def plot(report: dict[str, Any], file: Path) -> None:
    """Draws the medians on a logarithmic axis with their quartiles, one panel for each problem and pass."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = report["results"]
    peers = len(results[0]["peers"])
    size = (1.5 + 3.4 * len(results), 1.6 + 0.56 * peers)
    figure, axes = pyplot.subplots(2, len(results), figsize=size, squeeze=False, layout="constrained", sharey=True)
    for column, result in enumerate(results):
        for row, each in enumerate(TITLES):
            axis = axes[row][column]
            for position, peer in enumerate(result["peers"]):
                values = peer[each]
                if values["status"] != "ok":
                    text = axis.get_yaxis_transform()
                    axis.text(0.02, position, values["status"], va="center", size=8, color="0.4", transform=text)
                    continue
                median = values["median_ms"]
                spread = [[median - values["q1_ms"]], [values["q3_ms"] - median]]
                colour = "tab:orange" if peer["name"] == OURS else ("tab:blue" if peer["equal"] else "0.7")
                axis.barh(position, median, color=colour, xerr=spread, error_kw={"elinewidth": 1})
                label = f" {median:.3g}" if median < 1000 else f" {median:.0f}"
                axis.text(values["q3_ms"], position, label, va="center", size=8)
            axis.axvline(result["bound"][f"{each}_ms"], color="black", linestyle="--", linewidth=1)
            axis.set_xscale("log")
            axis.set_xlim(right=axis.get_xlim()[1] * 2)  # room for the longest bar's label
            axis.set_title(f"{shape_title(result['shape'])}\n{TITLES[each]}", size=9)
            axis.set_yticks(range(peers), [peer["name"] for peer in result["peers"]], size=8)
    axes[0][0].invert_yaxis()  # shared, so all panels
    for axis in axes[1]:
        axis.set_xlabel("ms (dashed: the hardware's bound)", size=8)
    machine = report["machine"]
    processor = machine.get("gpu", f"{machine['cpu']}, {machine['threads']} threads")
    figure.suptitle(f"{report['dtype']}, {processor}, torch {machine['torch']}", size=9)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
