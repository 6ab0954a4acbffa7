"""A demo from its command line to its table: the steps of ``demo_steps.py`` in order, without those that are done."""

from __future__ import annotations

import argparse
import fcntl
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.table import Table

from studies.demo.generate_scenes import add_dataset_options, generate, integer, is_complete, request_from
from studies.demo.steps import (
    ROOT,
    Comparison,
    Demo,
    Model,
    StepError,
    belongs,
    console,
    discard_stale,
    duration,
    evaluate,
    is_evaluated,
    shown,
    summarise,
    train,
)


def show_plan(demo: Demo) -> None:
    """Say what will be done and about how long it takes."""
    # Without the dataset nothing that lies there can be told to belong to it.
    known = is_complete(demo.data_root, demo.request)
    table = Table(title="The demo on two CPU cores")
    for title in ("step", "about", "state"):
        table.add_column(title)

    def add(step: str, about: str, done: bool) -> None:
        table.add_row(step, about, "done" if known and done else "to do")

    request = demo.request
    seconds = (request.train + request.val) * (0.02 + 0.002 * request.figures)
    add(f"generate {request.train} + {request.val} scenes in {shown(demo.data_root)}", duration(seconds), True)
    for model in demo.models:
        seconds = demo.iterations * demo.comparison.seconds
        add(f"train {model.title}", duration(seconds + 20), demo.checkpoint(model).is_file())
    for model in demo.models:
        add(f"evaluate {model.title}", "30 s", is_evaluated(demo, model))
    add(f"table, summary.json and pictures in {shown(demo.work_dir)}", "20 s", False)
    console.print(table)


def _discard_all_stale(demo: Demo) -> None:
    for model in demo.models:
        discard_stale(demo, model)


def compared(demo: Demo) -> list[Model]:
    """The models that were asked for, and those whose results an earlier run has left for the same comparison."""
    every = (*demo.comparison.models, *demo.comparison.more_models)
    return [m for m in every if m in demo.models or (is_evaluated(demo, m) and belongs(demo, m))]


def run(demo: Demo) -> dict[str, dict[str, float]]:
    """Do every step that is not done yet."""
    if is_complete(demo.data_root, demo.request):
        _discard_all_stale(demo)
    show_plan(demo)
    if generate(demo.data_root, demo.request):
        console.print(f"Generate: wrote the dataset to {shown(demo.data_root)}")
        _discard_all_stale(demo)
    for model in demo.models:
        if not demo.checkpoint(model).is_file():
            train(demo, model)
    for model in demo.models:
        if not is_evaluated(demo, model):
            evaluate(demo, model)
    models = compared(demo)
    summary = summarise(demo, models)
    demo.comparison.draw(demo, models, demo.work_dir / "predictions.png")
    return summary


def result_table(comparison: Comparison, summary: dict[str, dict[str, float]], iterations: int) -> Table:
    """One row per model; narrow enough for a terminal of 80 columns."""
    table = Table(title=f"Generated scenes, {iterations} iterations from scratch")
    table.add_column("model", no_wrap=True)
    for title in (*(metric.title for metric in comparison.metrics.values()), "parameters", "s/it"):
        table.add_column(title, justify="right", no_wrap=True)
    titles = {model.name: model.title for model in (*comparison.models, *comparison.more_models)}
    for name, result in summary.items():
        table.add_row(
            titles[name],
            *(f"{result[metric]:.3f}" for metric in comparison.metrics),
            f"{result['parameters']:,}",
            f"{result['seconds_per_iter']:.2f}",
        )
    return table


def shortfalls(comparison: Comparison, summary: dict[str, dict[str, float]]) -> list[str]:
    """One line for every result below its minimum."""
    return [
        f"{name}: {metric} is {result[metric]:.3f}, at least {least:.2f} was expected"
        for name, result in summary.items()
        for metric, least in comparison.minimum.items()
        if result[metric] < least
    ]


def parse_args(comparison: Comparison, description: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=ROOT / "work_dirs" / comparison.name, help="where results go")
    parser.add_argument("--data-root", type=Path, default=ROOT / comparison.data_root, help="where the dataset goes")
    parser.add_argument(
        "--iterations",
        type=integer(1),
        default=comparison.iterations,
        help=f"of each training (default: {comparison.iterations})",
    )
    parser.add_argument(
        "--no-minimum", action="store_true", help="succeed however little the models have learnt, for a short trial"
    )
    if comparison.more_models:
        titles = ", ".join(model.title for model in comparison.more_models)
        parser.add_argument("--all", action="store_true", help=f"with a further model: {titles}")
    add_dataset_options(parser, comparison.request)
    return parser.parse_args(argv)


def demo_from(comparison: Comparison, args: argparse.Namespace) -> Demo:
    """The demo that the command line asks for."""
    more_models = comparison.more_models if getattr(args, "all", False) else ()
    return Demo(
        comparison,
        args.work_dir.resolve(),
        args.data_root.resolve(),
        request_from(args, comparison.request.format),
        args.iterations,
        (*comparison.models, *more_models),
    )


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


Summary = dict[str, dict[str, float]]  # each model's results
Result = TypeVar("Result")


def guarded(work: Callable[[], int]) -> int:
    """Do what gives an exit code; an interrupt or what the user can put right is one line, not a traceback."""
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return work()
    except KeyboardInterrupt:
        console.print("\n[yellow]Interrupted. The same command goes on from here.[/yellow]")
        return 130
    except (StepError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 1
    finally:
        signal.signal(signal.SIGTERM, previous)


def supervise(
    work_dir: Path, work: Callable[[], Result], report: Callable[[Result], int], *, name: str = "demo"
) -> int:
    """Do a demo's work, alone in its folder; returns the exit code, that of the report unless the work fails."""

    def alone() -> int:
        work_dir.mkdir(parents=True, exist_ok=True)
        with (work_dir / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StepError(f"another {name} is running in {work_dir}") from None
            result = work()
        return report(result)

    return guarded(alone)


def main(comparison: Comparison, description: str | None, argv: Sequence[str] | None) -> int:
    """Run the demo that the command line asks for; returns the exit code."""
    args = parse_args(comparison, description, argv)
    demo = demo_from(comparison, args)

    def report(summary: Summary) -> int:
        console.print(result_table(comparison, summary, demo.iterations))
        console.print(f"Written: {shown(demo.work_dir / 'summary.json')}, {shown(demo.work_dir / 'predictions.png')}")
        missed = [] if args.no_minimum else shortfalls(comparison, summary)
        for line in missed:
            console.print(f"error: {line}", style="red", markup=False)
        return 1 if missed else 0

    return supervise(demo.work_dir, lambda: run(demo), report)
