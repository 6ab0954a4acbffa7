"""What came out of a study: means, spreads and paired tests over seeds, as a page and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure  # without pyplot: no display, no state
from scipy.stats import ttest_rel

from carafe_plugin.engine.console import markdown_table
from studies.real.recipes import STUDIES, Study
from studies.real.runs import Run, Setup, find_result

Results = dict[str, dict[int, dict[str, Any]]]  # by the variant's name, then by seed


def collect(runs: Sequence[Run], setup: Setup) -> Results:
    """The results so far of some runs of a study."""
    found: Results = {}
    for run in runs:
        if result := find_result(run, setup):
            found.setdefault(run.variant.name, {})[run.seed] = result
    return found


def spread(values: Sequence[float]) -> str:
    """``34.1 ± 0.6``: the mean and, of several seeds, the sample's standard deviation."""
    mean = statistics.mean(values)
    return f"{mean:.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def against(results: dict[int, dict[str, Any]], baseline: dict[int, dict[str, Any]], metric: str) -> str:
    """The mean difference from the baseline over the seeds of both, and of three or more a paired t-test's p value.

    Example:
        >>> runs = [{seed: dict(metrics=dict(mIoU=value)) for seed, value in enumerate(values)}
        ...         for values in ([50.5, 52.0, 51.5], [50.0, 51.0, 50.0])]
        >>> against(*runs, "mIoU")
        '+1.0 (p = 0.07)'
    """
    seeds = sorted(results.keys() & baseline.keys())
    if not seeds:
        return ""
    one, other = ([each[seed]["metrics"][metric] for seed in seeds] for each in (results, baseline))
    difference = f"{statistics.mean(one) - statistics.mean(other):+.1f}"
    if len(seeds) < 3 or one == other:
        return difference
    return f"{difference} (p = {ttest_rel(one, other).pvalue:.2f})"


def lines(study: Study, found: Results) -> tuple[list[str], list[list[str]]]:
    """Headings and lines, the same for the console and the page."""
    metrics = study.metrics
    main = next(iter(metrics))
    headings = ["model", "seeds", *(metric.title for metric in metrics.values())]
    headings += ["against the first", "trained parameters", "s/it"]
    baseline = found.get(study.variants[0].name, {})
    rows = []
    for variant in study.variants:
        results = found.get(variant.name)
        if not results:
            continue
        values = [spread([result["metrics"][metric] for result in results.values()]) for metric in metrics]
        seconds = statistics.median(result["seconds_per_iteration"] for result in results.values())
        compared = "" if results is baseline else against(results, baseline, main)
        parameters = f"{next(iter(results.values()))['parameters']:,}"
        rows.append(
            [variant.title, " ".join(map(str, sorted(results))), *values, compared, parameters, f"{seconds:.2f}"]
        )
    return headings, rows


def write(name: str, found: Results, folder: Path) -> list[Path]:
    """Write ``study-A.md`` and ``study-A.png``; returns their paths."""
    study = STUDIES[name]
    page, plot = (folder / f"study-{name}.{ending}" for ending in ("md", "png"))
    headings, rows = lines(study, found)
    first = next(iter(next(iter(found.values())).values()))
    paragraphs = [
        f"# Study {name}: {study.title}",
        f"Each model is `{study.config}` with another operator, trained for {first['iterations']} iterations by the "
        "recipe in that file, which was written for the first model alone. In points: the mean over the seeds ± the "
        "standard deviation of the sample; the difference from the first model over the seeds that both have, with the "
        "p value of a paired t-test where there are three. The paper's figures are of other data and longer schedules.",
        markdown_table(headings, rows),
        f"![metrics during training]({plot.name})",
        f"Written by `python -m studies.real --study {name} --report`; one file a run lies beside.",
    ]
    page.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    draw(study, found, plot)
    return [page, plot]


def draw(study: Study, found: Results, path: Path) -> None:
    """Every run's evaluations during training, and every model's mean and spread in the end."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    curves, end = figure.subplots(1, 2, width_ratios=(3, 2))
    main = next(iter(study.metrics))
    shown = [variant for variant in study.variants if variant.name in found]
    for place, variant in enumerate(shown):
        colour = f"C{place % 10}"
        for seed, result in sorted(found[variant.name].items()):
            steps, values = zip(*result["curve"], strict=True)
            curves.plot(
                steps, values, color=colour, lw=1, label=variant.title if seed == min(found[variant.name]) else None
            )
        points = [result["metrics"][main] for result in found[variant.name].values()]
        end.plot(points, [place] * len(points), "o", color="0.6", markersize=4)
        error = statistics.stdev(points) if len(points) > 1 else 0
        end.errorbar(statistics.mean(points), place, xerr=error, fmt="D", color=colour, markersize=5, capsize=3)
    title = study.metrics[main].title
    curves.set(xlabel="iteration", ylabel=f"{title}, validation", title="during training")
    curves.legend(fontsize=7)
    end.set_yticks(range(len(shown)), [variant.title for variant in shown])
    end.invert_yaxis()
    end.set(xlabel=f"{title}: seeds, mean and standard deviation", title="in the end")
    for axes in (curves, end):
        axes.grid(alpha=0.3)
    figure.suptitle(study.title)
    figure.savefig(path, dpi=110)
