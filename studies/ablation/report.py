"""What came out of the ablation: means with their spread, as a page and a plot, beside the paper's figures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure  # without pyplot: no display, no state

from studies.ablation.runs import Recipe, Run, Setup, find_result
from studies.common import markdown_table
from studies.paper_tables.rows import Row, Table

MINIMUM = 0.30  # of a baseline's box AP50: below it a model has not learnt, and differences would mean nothing
POINTS = 100.0


@dataclass(frozen=True)
class Method:
    """A row with its results, in the order of the seeds, and the paper's figure that compares with them."""

    row: Row
    results: list[dict[str, Any]]
    paper: float

    def values(self, metric: str) -> list[float]:
        """A metric of every seed, in points."""
        return [POINTS * result["metrics"][metric] for result in self.results]

    @property
    def is_baseline(self) -> bool:
        """Whether nothing of this package is in the row's model."""
        return "::" in self.row.config


@dataclass(frozen=True)
class Found:
    """The results of one table: of those rows that have any."""

    table: Table
    recipe: Recipe
    rows: list[Method]

    @property
    def title(self) -> str:
        return f"Table {self.table.table} on generated scenes: {self.table.title.partition(',')[0]}"


def collect(table: Table, runs: Sequence[Run], setup: Setup) -> Found:
    """The results so far of some runs of a table."""
    methods = []
    for row in table.rows:
        found = [find_result(run, setup) for run in runs if run.row == row]
        results = [result for result in found if result]
        # The last line is the task's that a table is about; its first figure is AP, mIoU or top-1.
        figures = [figure for figure in row.paper[-1] if isinstance(figure, (int, float))]
        if results:
            methods.append(Method(row, results, figures[0]))
    return Found(table, runs[0].recipe, methods)


def mean_and_spread(values: Sequence[float]) -> str:
    """``34.1 +- 0.6``: the mean and the sample's standard deviation."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def texts(found: Found) -> tuple[list[str], list[list[str]]]:
    """Headings and lines, the same for the console and the page."""
    metrics = found.recipe.comparison.metrics
    headings = ["method", "seeds", *(metric.title for metric in metrics.values()), "parameters", "s/it", "paper"]
    lines = [
        [
            method.row.method,
            " ".join(str(result["seed"]) for result in method.results),
            *(mean_and_spread(method.values(metric)) for metric in metrics),
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
    names = [method.row.method for method in found.rows]
    rows = range(len(names))
    figure = Figure(figsize=(9, 1.2 + 0.4 * len(names)), layout="constrained")
    scenes, paper = figure.subplots(1, 2, sharey=True)
    for row, method in zip(rows, found.rows, strict=True):
        values = method.values(found.recipe.main)
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        scenes.plot(values, [row] * len(values), "o", color="0.6", markersize=4)
        scenes.errorbar(statistics.mean(values), row, xerr=spread, fmt="D", color="C0", markersize=5, capsize=3)
        paper.plot(method.paper, row, "D", color="C1", markersize=5)
    scenes.set_yticks(list(rows), names)
    scenes.invert_yaxis()
    unit = found.recipe.comparison.metrics[found.recipe.main].title
    scenes.set(title="generated scenes", xlabel=f"{unit}: seeds, mean and standard deviation")
    paper.set(title=f"the paper, {found.table.data}", xlabel=next(c for c in found.table.columns if c != "task"))
    for axes in (scenes, paper):
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle(f"Table {found.table.table}: {found.table.title.partition(',')[0]}")
    figure.savefig(path, dpi=110)


def weak_baseline(found: Found) -> list[str]:
    """A line for a baseline whose mean box AP50 is below the minimum."""
    if "bbox_mAP_50" not in found.recipe.comparison.metrics:
        return []
    lines = []
    for method in found.rows:
        mean = statistics.mean(method.values("bbox_mAP_50")) / POINTS
        if method.is_baseline and mean < MINIMUM:
            lines.append(
                f"Table {found.table.table}, {method.row.method}: the baseline's box AP50 is {mean:.3f}, at least "
                f"{MINIMUM:.2f} was expected: the differences mean little"
            )
    return lines
