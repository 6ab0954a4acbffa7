#!/usr/bin/env python
"""Compare operators on real images, with pretrained backbones and several seeds.

    $ CARAFE_DATA_ROOT=~/data python -m studies.real --study A                # every model, seeds 0 to 2
    $ python -m studies.real --study A --models bilinear carafe --seeds 0     # some of them
    $ python -m studies.real --study A --plan                                 # what is done and what is to do
    $ python -m studies.real --study A --report                               # table and plot of the results so far

The data are laid out by tools/prepare_data.py; the environment variable CARAFE_DATA_ROOT says where (default: data).
Weights of the backbone come from a package, or are named by --weights. A run is trained with tools/train.py, evaluated
with tools/test.py, and leaves one file in studies/real/results. The same command continues where an earlier one
stopped: runs with a result are skipped, an interrupted training resumes from its last checkpoint. Two can be at work at
once, on other --models or --seeds.

Exit code: 0; 1 where a run failed; 2 when an argument is invalid; 130 when interrupted.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from carafe_plugin.engine.cli import run_tool
from carafe_plugin.engine.console import duration, table_console, text_table
from studies.common import ROOT, alone_in, console, integer, print_errors, shown
from studies.demo.run import StepError, guarded
from studies.real import report as real_report
from studies.real.recipes import STUDIES
from studies.real.runs import RESULTS, Run, Setup, complete, find_result, plan, pretrained


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--study", choices=list(STUDIES), required=True, help="which one")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="some of its models (default: all)")
    text = "of the trainings (default: 0 1 2)"
    parser.add_argument("--seeds", type=integer(0), nargs="+", default=[0, 1, 2], metavar="S", help=text)
    parser.add_argument("--plan", action="store_true", help="say what is done and what is to do, and stop")
    parser.add_argument("--report", action="store_true", help="write table and plot of the results so far, and stop")
    parser.add_argument(
        "--weights", type=Path, help="the backbone's weights (default: of the package that brings them)"
    )
    text = "folder of logs and checkpoints (default: work_dirs/real)"
    parser.add_argument("--work-dir", type=Path, default=ROOT / "work_dirs" / "real", help=text)
    text = "one file a run, table and plot (default: studies/real/results)"
    parser.add_argument("--results", type=Path, default=RESULTS, help=text)
    text = "of each training (default: as in its config), for a trial"
    parser.add_argument("--iterations", type=integer(1), metavar="N", help=text)
    return parser.parse_args(argv)


def run_all(to_do: list[Run], setup: Setup) -> list[str]:
    """Train and evaluate, one after the other, saying how long it will still take; returns a line for each failure."""
    seconds: list[float] = []
    failures = []
    for index, run in enumerate(to_do):
        if find_result(run, setup):  # another process has done it
            continue
        iterations = run.config(setup).train_cfg.max_iters
        each = statistics.mean(seconds) if seconds else 60 + iterations * run.recipe.seconds
        left = duration((len(to_do) - index) * each)
        console.rule(f"{index + 1} of {len(to_do)}: {run.variant.title}, seed {run.seed}; {left} left")
        started = time.monotonic()
        try:
            with alone_in(setup.work_dir / "locks" / run.name, "study"):
                complete(run, setup)
        except StepError as error:  # the others can still be run
            print_errors([str(error)])
            failures.append(f"{run.name} failed: {error}")
        seconds.append(time.monotonic() - started)
    return failures


def write_report(study: str, runs: list[Run], setup: Setup) -> None:
    found = real_report.collect(runs, setup)
    if not found:
        console.print(f"Study {study}: no results yet")
        return
    headings, rows = real_report.lines(STUDIES[study], found)
    table_console(140).print(text_table(STUDIES[study].title, headings, rows, ("model", "seeds")))
    for path in real_report.write(study, found, setup.results):
        console.print(f"Written: {shown(path)}", markup=False)


def real(args: argparse.Namespace) -> int:
    setup = Setup(args.work_dir.resolve(), args.results.resolve(), args.weights, args.iterations)
    runs = plan([args.study], args.models, list(dict.fromkeys(args.seeds)))
    to_do = [run for run in runs if find_result(run, setup) is None]
    console.print(f"Study {args.study}: {len(runs)} runs, {len(runs) - len(to_do)} done, {len(to_do)} to do")
    if args.plan:
        return 0

    def work() -> int:
        failures = []
        if to_do and not args.report:
            pretrained(STUDIES[args.study], setup)
            failures = run_all(to_do, setup)
        # Of all models and seeds: another process may have done others.
        seeds = sorted({*args.seeds, *range(5)})
        write_report(args.study, plan([args.study], None, seeds), setup)
        print_errors(failures)
        return 1 if failures else 0

    return guarded(work, setup.work_dir, setup.results)


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(real, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
