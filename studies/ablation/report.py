"""What came out of the ablation: means with their spread, as a page and a plot, beside the paper's figures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure  # without pyplot: no display, no state

from carafe_plugin.engine.console import markdown_table
from studies.ablation.runs import Run, Setup, find_result
from studies.demo.comparison import Comparison
from studies.paper_tables.rows import Row, Table

MINIMUM = 0.30  # of a baseline's box AP50: below it a model has not learnt, and differences would mean nothing


@dataclass(frozen=True)
class Method:
    """A row with its results, in the order of the seeds, and the paper's figure that compares with them."""

    row: Row
    results: list[dict[str, Any]]
    paper: float

    def points(self, metric: str) -> tuple[list[float], float, float]:
        """A metric in points: of every seed, the mean, and the sample's standard deviation."""
        values = [100 * result["metrics"][metric] for result in self.results]
        return values, statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0

    def text(self, metric: str) -> str:
        """``34.1 ± 0.6``: the mean and, of several seeds, their spread."""
        values, mean, spread = self.points(metric)
        return f"{mean:.1f} ± {spread:.1f}" if len(values) > 1 else f"{mean:.1f}"


@dataclass(frozen=True)
class Found:
    """The results of one table: of those rows that have any."""

    table: Table
    recipe: Comparison
    rows: list[Method]

    @property
    def title(self) -> str:
        return f"Table {self.table.table} on generated scenes: {self.table.title.partition(',')[0]}"


def collect(table: Table, runs: Sequence[Run], setup: Setup) -> Found:
    """The results so far of some runs of a table."""
    methods = []
    for row in table.rows:
        results = [result for run in runs if run.row == row and (result := find_result(run, setup))]
        if results:
            # The last line is the task's that a table is about; its first figure is AP, mIoU or top-1.
            paper = next(figure for figure in row.paper[-1] if isinstance(figure, (int, float)))
            methods.append(Method(row, results, paper))
    return Found(table, runs[0].recipe, methods)


def texts(found: Found) -> tuple[list[str], list[list[str]]]:
    """Headings and lines, the same for the console and the page."""
    metrics = found.recipe.metrics
    headings = ["method", "seeds", *(metric.title for metric in metrics.values()), "parameters", "s/it", "paper"]
    lines = [
        [
            method.row.method,
            " ".join(str(result["seed"]) for result in method.results),
            *map(method.text, metrics),
            f"{method.results[0]['parameters']:,}",
            f"{statistics.median(result['seconds_per_iteration'] for result in method.results):.2f}",
            str(method.paper),
        ]
        for method in found.rows
    ]
    return headings, lines


def write(found: Found, folder: Path) -> list[Path]:
    """Write ``table-NN.md`` and ``table-NN.png``; returns their paths."""
    page, plot = (folder / f"table-{found.table.table:02}.{ending}" for ending in ("md", "png"))
    headings, lines = texts(found)
    first = found.rows[0].results[0]
    scenes = first["scenes"]
    # Table 12's figures are top-1 of classification; its backbones stand in a detector here.
    other_task = "" if found.table.table != 12 else " It is top-1 of a classifier: here its backbones carry a detector."
    paragraphs = [
        f"# {found.title}",
        f"Each model (`{first['recipe']}`) was trained from scratch for {first['iterations']} iterations on "
        f"{scenes['train']} generated scenes of {scenes['size']} x {scenes['size']} pixels and evaluated on "
        f"{scenes['val']}. In points: the mean over the seeds ± the standard deviation of the sample. s/it is the "
        f"median with {first['threads']} thread(s), with other work beside it: no benchmark. The last column is the "
        f"paper's on {found.table.data}, trained for its full schedule, detectors and segmenters on backbones "
        f"pretrained on ImageNet: orders may be compared, figures not.{other_task}",
        markdown_table(headings, lines),
        f"![means and seeds]({plot.name})",
        f"Written by `python -m studies.ablation --table {found.table.table} --report`; one file a run lies beside.",
    ]
    page.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    draw(found, plot)
    return [page, plot]


def draw(found: Found, path: Path) -> None:
    """Every seed and the mean of every method, beside the paper's figures."""
    figure = Figure(figsize=(9, 1.2 + 0.4 * len(found.rows)), layout="constrained")
    scenes, paper = figure.subplots(1, 2, sharey=True)
    for row, method in enumerate(found.rows):
        values, mean, spread = method.points(found.recipe.main)
        scenes.plot(values, [row] * len(values), "o", color="0.6", markersize=4)
        scenes.errorbar(mean, row, xerr=spread, fmt="D", color="C0", markersize=5, capsize=3)
        paper.plot(method.paper, row, "D", color="C1", markersize=5)
    scenes.set_yticks(range(len(found.rows)), [method.row.method for method in found.rows])
    scenes.invert_yaxis()
    unit = found.recipe.metrics[found.recipe.main].title
    scenes.set(title="generated scenes", xlabel=f"{unit}: seeds, mean and standard deviation")
    paper.set(title=f"the paper, {found.table.data}", xlabel=next(c for c in found.table.columns if c != "task"))
    for axes in (scenes, paper):
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle(f"Table {found.table.table}: {found.table.title.partition(',')[0]}")
    figure.savefig(path, dpi=110)


def weak_baselines(found: Found) -> list[str]:
    """A line for every baseline, a row without anything of this package, whose mean box AP50 is below the minimum."""
    if "bbox_mAP_50" not in found.recipe.metrics:
        return []
    means = {m.row.method: m.points("bbox_mAP_50")[1] / 100 for m in found.rows if "::" in m.row.config}
    return [
        f"Table {found.table.table}, {method}: the baseline's box AP50 is {mean:.3f}, at least {MINIMUM:.2f} was "
        "expected: the differences mean little"
        for method, mean in means.items()
        if mean < MINIMUM
    ]
