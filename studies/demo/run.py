"""A demo from its command line to its table: the steps in order, except those that are done."""

from __future__ import annotations

import argparse
import fcntl
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.table import Table

from carafe_plugin.engine.errors import UsageError
from studies.common import (
    ROOT,
    console,
    duration,
    integer,
    print_errors,
    shown,
    text_table,
    write_json,
    writing_into,
)
from studies.demo.comparison import Comparison, Demo, Model, Summary
from studies.demo.generate_scenes import Request, add_dataset_options, generate, is_complete, request_from
from studies.demo.steps import StepError, belongs, discard_stale, is_evaluated, results, train_and_evaluate


def plan(demo: Demo) -> Table:
    """What will be done, and about how long each step takes."""
    request = demo.request
    step = f"generate {request.train} + {request.val} scenes in {shown(demo.data_root)}"
    seconds = (request.train + request.val) * (0.02 + 0.002 * request.figures)
    steps = [(step, seconds, is_complete(demo.data_root, request))]
    for model in demo.models:
        known = belongs(demo, model)
        seconds = demo.iterations * demo.comparison.seconds + 20
        steps.append((f"train {model.title}", seconds, known and demo.checkpoint(model).is_file()))
        steps.append((f"evaluate {model.title}", 30, known and is_evaluated(demo, model)))
    steps.append((f"table, summary.json and pictures in {shown(demo.work_dir)}", 20, False))
    lines = [[step, duration(seconds), "done" if done else "to do"] for step, seconds, done in steps]
    headings = ["step", "about", "state"]
    return text_table("The demo on two CPU cores", headings, lines, left=headings, frame=box.HEAVY_HEAD)


def compared(demo: Demo) -> list[Model]:
    """The requested models, and those with results of the same comparison from an earlier run."""
    every = (*demo.comparison.models, *demo.comparison.more_models)
    return [m for m in every if m in demo.models or (is_evaluated(demo, m) and belongs(demo, m))]


def run(demo: Demo) -> Summary:
    """Do every step that is not done yet."""
    console.print(plan(demo))
    if generate(demo.data_root, demo.request):
        console.print(f"Generate: wrote the dataset to {shown(demo.data_root)}")
    for model in demo.models:
        discard_stale(demo, model)
    for model in demo.models:
        train_and_evaluate(demo, model)
    models = compared(demo)
    summary = demo.comparison.complete(demo, {model.name: results(demo, model) for model in models})
    write_json(demo.work_dir / "summary.json", summary)
    demo.comparison.draw(demo, models, demo.work_dir / "predictions.png")
    return summary


def add_run_options(
    parser: argparse.ArgumentParser, work_dir: str, data_root: str, iterations: int | None, request: Request
) -> None:
    """The options of demos and ablations: folders, whose defaults are below the root, and what all trainings share."""
    for option, default, text in (
        ("--work-dir", work_dir, "folder of logs, checkpoints and results"),
        ("--data-root", data_root, "folder of the generated images"),
    ):
        parser.add_argument(option, type=Path, default=ROOT / default, help=f"{text} (default: {default})")
    text = f"of each training (default: {iterations or 'as in its config'})"
    parser.add_argument("--iterations", type=integer(1), default=iterations, metavar="N", help=text)
    add_dataset_options(parser, request)


def parse_args(comparison: Comparison, description: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line of a demo."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--no-minimum", action="store_true", help="succeed however little the models have learnt, for a short trial"
    )
    if comparison.more_models:
        titles = ", ".join(model.title for model in comparison.more_models)
        parser.add_argument("--all", action="store_true", help=f"with a further model: {titles}")
    work_dir = f"work_dirs/{comparison.name}"
    add_run_options(parser, work_dir, comparison.data_root, comparison.iterations, comparison.request)
    return parser.parse_args(argv)


def demo_from(comparison: Comparison, args: argparse.Namespace) -> Demo:
    """The demo that the command line asks for."""
    more_models = comparison.more_models if getattr(args, "all", False) else ()
    request = request_from(args, comparison.request.format)
    folders = (args.work_dir.resolve(), args.data_root.resolve())
    return Demo(comparison, *folders, request, args.iterations, (*comparison.models, *more_models))


def guarded(work: Callable[[], int], *folders: Path) -> int:
    """Do work in the user's folders and return its exit code; an interrupt or what a user can mend is one line."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with writing_into(*folders):
            return work()
    except KeyboardInterrupt:
        console.print("\n[yellow]Interrupted. The same command resumes from here.[/yellow]")
        return 130
    except UsageError as error:
        print_errors([str(error)])
        return 1
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def alone_in(work_dir: Path, name: str = "demo") -> Iterator[None]:
    """Be the only process that works in a folder; StepError where another one does."""
    work_dir.mkdir(parents=True, exist_ok=True)
    with (work_dir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StepError(f"another {name} is running in {work_dir}") from None
        yield


def main(comparison: Comparison, description: str | None, argv: Sequence[str] | None) -> int:
    """Run the demo that the command line asks for; returns the exit code."""
    args = parse_args(comparison, description, argv)
    demo = demo_from(comparison, args)

    def work() -> int:
        with alone_in(demo.work_dir):
            summary = run(demo)
        console.print(comparison.table(demo, summary))
        for line in comparison.remarks(summary):
            console.print(line, markup=False)
        console.print(f"Written: {shown(demo.work_dir / 'summary.json')}, {shown(demo.work_dir / 'predictions.png')}")
        missed = [] if args.no_minimum else comparison.shortfalls(summary)
        print_errors(missed)
        return 1 if missed else 0

    return guarded(work, demo.work_dir, demo.data_root)
