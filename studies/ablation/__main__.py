#!/usr/bin/env python
"""Compare the operators of the paper's tables on generated scenes: small models, trained from scratch, several seeds.

    $ python -m studies.ablation                      # Tables 4 and 6 with three seeds each: 48 trainings
    $ python -m studies.ablation --table 3 --table 5
    $ python -m studies.ablation --plan               # what is done and what is to do
    $ python -m studies.ablation --report             # tables and plots of the results so far

Each row's operators (the types and carafe_cfg of its backbone, neck and heads in configs/) are put into the small model
of configs/demo/ablation. The same model of another table counts for both. A run is trained with tools/train.py,
evaluated with tools/test.py, and leaves one file in studies/ablation/results. The same command continues where an
earlier one stopped: runs with a result are skipped, an interrupted training resumes from its last checkpoint.

Training a small model from scratch is not the paper's setting, whose backbones are pretrained on ImageNet.

Exit code: 0; 1 where a run failed or a baseline's box AP50 is below 0.30, so that the differences mean little; 2 when
an argument is invalid; 130 when interrupted.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from carafe_plugin.engine.cli import run_tool
from carafe_plugin.engine.console import duration, table_console, text_table
from studies.ablation import report as ablation_report
from studies.ablation.runs import RECIPES, REQUEST, RESULTS, Run, Setup, complete, find_result, plan
from studies.common import alone_in, console, integer, print_errors, shown
from studies.demo.generate_scenes import generate, request_from
from studies.demo.run import StepError, add_run_options, guarded
from studies.paper_tables.rows import read_tables

DEFAULT_TABLES = (4, 6)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--table", type=int, action="append", choices=RECIPES, help="may be repeated (default: 4 and 6)"
    )
    text = "of the trainings (default: 0 1 2)"
    parser.add_argument("--seeds", type=integer(0), nargs="+", default=[0, 1, 2], metavar="S", help=text)
    parser.add_argument("--plan", action="store_true", help="say what is done and what is to do, and stop")
    parser.add_argument("--report", action="store_true", help="write tables and plots of the results so far, and stop")
    text = "one file a run, tables and plots (default: studies/ablation/results)"
    parser.add_argument("--results", type=Path, default=RESULTS, help=text)
    add_run_options(parser, "work_dirs/ablation", "data", None, REQUEST)
    return parser.parse_args(argv)


def run_all(to_do: list[Run], setup: Setup) -> list[str]:
    """Train and evaluate, one after the other, saying how long it will still take; returns a line for each failure."""
    seconds: list[float] = []
    failures = []
    for index, run in enumerate(to_do):
        if find_result(run, setup):  # another row had the same model
            continue
        each = statistics.mean(seconds) if seconds else 20 + run.config.train_cfg.max_iters * run.recipe.seconds
        left = duration((len(to_do) - index) * each)
        console.rule(f"{index + 1} of {len(to_do)}: Table {run.table}, {run.row.method}, seed {run.seed}; {left} left")
        started = time.monotonic()
        try:
            complete(run, setup)
        except StepError as error:  # the others can still be run
            print_errors([str(error)])
            failures.append(f"{run.name} failed: {error}")
        seconds.append(time.monotonic() - started)
    return failures


def report(runs: list[Run], setup: Setup) -> list[str]:
    """Write each table's means and plot; returns a line for every baseline that has not learnt enough."""
    tables = read_tables()
    wide = table_console(120)
    weak = []
    for number in dict.fromkeys(run.table for run in runs):
        of_table = [run for run in runs if run.table == number]
        found = ablation_report.collect(tables[number], of_table, setup)
        if not found.rows:
            console.print(f"Table {number}: no results yet")
            continue
        wide.print(text_table(found.title, *ablation_report.texts(found), ("method", "seeds")))
        for path in ablation_report.write(found, setup.results):
            console.print(f"Written: {shown(path)}", markup=False)
        weak += ablation_report.weak_baselines(found)
    return weak


def ablation(args: argparse.Namespace) -> int:
    folders = (args.work_dir.resolve(), args.data_root.resolve(), args.results.resolve())
    setup = Setup(*folders, request_from(args, REQUEST.format), args.iterations)
    runs = plan(dict.fromkeys(args.table or DEFAULT_TABLES), list(dict.fromkeys(args.seeds)))
    to_do = [run for run in runs if find_result(run, setup) is None]
    every, left = (Counter(run.table for run in some) for some in (runs, to_do))
    for number, count in every.items():
        console.print(f"Table {number}: {count} runs, {count - left[number]} done, {left[number]} to do")
    if args.plan:
        return 0

    def work() -> int:
        failures = []
        if not args.report:
            with alone_in(setup.work_dir, "ablation"):
                for request, folder in dict.fromkeys(setup.dataset(run.recipe) for run in to_do):
                    generate(folder, request)
                failures = run_all(to_do, setup)
        faults = failures + report(runs, setup)
        print_errors(faults)
        return 1 if faults else 0

    return guarded(work, *folders)


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(ablation, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
