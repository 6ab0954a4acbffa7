"""A demo from its command line to its table: generate, train and evaluate with our tools, compare.

A step whose result exists is skipped, and an interrupted training resumes from its newest checkpoint. A model's folder
is stamped with a digest of its whole config and of the dataset: results of another configuration are never reused.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from mmengine.config import Config
from rich import box
from rich.table import Table
from torch import nn

from carafe_plugin.engine import bare_models
from carafe_plugin.engine.console import duration, progress_bar, text_table
from carafe_plugin.engine.errors import UsageError
from carafe_plugin.openmmlab import mmcv_ops
from studies import common
from studies.common import ROOT, alone_in, console, print_errors, shown, write_json
from studies.demo.comparison import Comparison, Demo, Model, Summary
from studies.demo.generate_scenes import (
    Request,
    add_dataset_options,
    annotation_files,
    generate,
    is_complete,
    request_from,
)

STAMP = "fingerprint.txt"


class StepError(UsageError):
    """A step failed; the message says which and where its log is."""


# ---------------------------------------------------------------------------------------------------------- tools
def _die_with_parent() -> None:
    """Have Linux stop this process when its parent is killed, so that no training is left behind."""
    if sys.platform == "linux":  # elsewhere a kill -9 of the parent leaves it running
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


def run_tool(title: str, command: Sequence[str], log: Path) -> None:
    """Run one of our tools, its output in ``log``, behind a progress bar; StepError where it does not exit with 0."""
    log.parent.mkdir(parents=True, exist_ok=True)
    console.print(f"$ python {' '.join(command)} >> {shown(log)}", style="dim", markup=False)
    started = time.monotonic()
    tail: deque[str] = deque(maxlen=25)
    with (
        log.open("a") as file,
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            preexec_fn=_die_with_parent,
        ) as process,
        progress_bar(title) as progress,
    ):
        assert process.stdout is not None
        task = progress.add_task(title, total=None)
        try:
            for line in process.stdout:
                file.write(line)
                file.flush()
                tail.append(line)
                if found := re.search(r"Iter\(\w+\)\s*\[\s*(\d+)/(\d+)\]", line):
                    progress.update(task, completed=int(found[1]), total=int(found[2]))
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if process.returncode != 0:
        raise StepError(
            f"{title} failed with exit code {process.returncode}. The whole log: {log}\nIts end:\n{''.join(tail)}"
        )
    console.print(f"{title}: done in {duration(time.monotonic() - started)}")


def _run(demo: Demo, model: Model, title: str, tool: str, *options: str | Path) -> None:
    changes = [f"{key}={value}" for key, value in demo.config_options(model).items()]
    command = [f"tools/{tool}.py", model.config, *(shown(o) if isinstance(o, Path) else o for o in options)]
    command += ["--cfg-options", *changes] if changes else []
    run_tool(f"{title} {model.name}", command, demo.work_dir / f"{tool}_{model.name}.log")


def train(demo: Demo, model: Model) -> None:
    """Train the model, from its newest checkpoint if there is one."""
    _run(demo, model, "Train", "train", "--work-dir", demo.folder(model), "--resume", "auto")
    if not demo.checkpoint(model).is_file():
        raise StepError(f"Train {model.name}: tools/train.py succeeded but {demo.checkpoint(model)} is missing")


def build(demo: Demo, model: Model) -> tuple[Config, nn.Module]:
    """A model's config with the run's changes, and the model."""
    mmcv_ops.install()
    config = bare_models.read_config(str(ROOT / model.config), demo.config_options(model))
    return config, bare_models.build_model(config)


def seconds_per_iteration(folder: Path) -> float:
    """A training's median iteration time, from its logs; the first window of each start is left out as warm-up."""
    windows = [
        [entry["time"] for entry in map(json.loads, log.read_text().splitlines()) if "time" in entry]
        for log in sorted(folder.glob("*/vis_data/scalars.json"))
    ]
    if not any(windows):
        raise StepError(f"no iteration times in {folder}/*/vis_data/scalars.json")
    times = [seconds for window in windows for seconds in window[1:]]
    return statistics.median(times or [seconds for window in windows for seconds in window])


def evaluate(demo: Demo, model: Model) -> None:
    """Evaluate the trained model, keep its predictions, and its results in ``results.json``."""
    work_dir = demo.folder(model) / "test"
    shutil.rmtree(work_dir, ignore_errors=True)  # what an interrupted evaluation left
    options = (demo.checkpoint(model), "--work-dir", work_dir, "--out", demo.predictions(model))
    _run(demo, model, "Evaluate", "test", *options)
    # The logger hook leaves all metrics of an evaluation in <time>/<time>.json.
    found = [path for path in work_dir.glob("*/*.json") if path.stem == path.parent.name]
    if len(found) != 1:
        raise StepError(
            f"Evaluate {model.name}: expected one <time>/<time>.json with metrics in {work_dir}, found {len(found)}"
        )
    logged = json.loads(found[0].read_text())
    try:
        results = {key: round(logged[m.logged] * m.unit, 6) for key, m in demo.comparison.metrics.items()}
    except KeyError as error:
        raise StepError(
            f"Evaluate {model.name}: {found[0]} has no metric {error}; a model that finds nothing has none"
        ) from error
    results["parameters"] = sum(p.numel() for p in build(demo, model)[1].parameters() if p.requires_grad)
    results["seconds_per_iter"] = round(seconds_per_iteration(demo.folder(model)), 4)
    write_json(demo.results_file(model), results)


def is_evaluated(demo: Demo, model: Model) -> bool:
    """Whether the model's results and predictions exist."""
    return demo.results_file(model).is_file() and demo.predictions(model).exists()


def complete(demo: Demo, model: Model) -> dict[str, float]:
    """Do what is not done yet for a model: its metrics, how many parameters it learns, and seconds per iteration."""
    if not demo.checkpoint(model).is_file():
        train(demo, model)
    if not is_evaluated(demo, model):
        evaluate(demo, model)
    return json.loads(demo.results_file(model).read_text())


# ----------------------------------------------------------------------------------------------------- belonging
def _fingerprint(demo: Demo, model: Model) -> str:
    """A digest of all that decides a model's result: its whole config and the annotations."""
    config = json.dumps(demo.load_config(model).to_dict(), sort_keys=True, default=str)
    return common.digest(config, annotation_files(demo.data_root, demo.request))


def belongs(demo: Demo, model: Model) -> bool:
    """Whether the contents of the model's folder come from this configuration and dataset."""
    file = demo.folder(model) / STAMP
    complete = is_complete(demo.data_root, demo.request)
    return complete and file.is_file() and file.read_text() == _fingerprint(demo, model)


def discard_stale(demo: Demo, model: Model) -> None:
    """Remove another configuration's or dataset's leftovers; StepError where the folder holds what no demo wrote."""
    if belongs(demo, model):
        return
    folder = demo.folder(model)
    if folder.exists():
        if any(folder.iterdir()) and not (folder / STAMP).is_file():
            raise StepError(f"{folder} was not written by the demo (it has no {STAMP}): give another --work-dir")
        message = f"{shown(folder)} belongs to another configuration or dataset: removed"
        console.print(message, style="yellow", markup=False)
        shutil.rmtree(folder)
    for name in ("summary.json", "predictions.png"):
        (demo.work_dir / name).unlink(missing_ok=True)
    folder.mkdir(parents=True)
    (folder / STAMP).write_text(_fingerprint(demo, model))


# ------------------------------------------------------------------------------------------------------ the demos
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
    models = compared(demo)
    summary = demo.comparison.complete(demo, {model.name: complete(demo, model) for model in models})
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
    parser.add_argument("--iterations", type=common.integer(1), default=iterations, metavar="N", help=text)
    add_dataset_options(parser, request)


def parse_demo(comparison: Comparison, description: str | None, argv: Sequence[str] | None) -> Demo:
    """The demo that the command line asks for."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--no-minimum", action="store_true", help="succeed however little the models have learnt, for a short trial"
    )
    more = comparison.more_models
    if more:
        titles = ", ".join(model.title for model in more)
        parser.add_argument("--all", action="store_true", help=f"with a further model: {titles}")
    config = Config.fromfile(ROOT / comparison.models[0].config)
    folders = (f"work_dirs/{comparison.name}", config.train_dataloader.dataset.data_root)
    add_run_options(parser, *folders, config.train_cfg.max_iters, comparison.request)
    args = parser.parse_args(argv)
    return Demo(
        comparison,
        work_dir=args.work_dir.resolve(),
        data_root=args.data_root.resolve(),
        request=request_from(args, comparison.request.format),
        iterations=args.iterations,
        seed=args.seed,
        models=(*comparison.models, *(more if more and args.all else ())),
        judged=not args.no_minimum,
    )


def guarded(work: Callable[[], int], *folders: Path) -> int:
    """Do work in the user's folders and return its exit code; an interrupt or what a user can mend is one line."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with common.writing_into(*folders):
            return work()
    except KeyboardInterrupt:
        console.print("\n[yellow]Interrupted. The same command resumes from here.[/yellow]")
        return 130
    except UsageError as error:
        print_errors([str(error)])
        return 1
    finally:
        signal.signal(signal.SIGTERM, previous)


def main(comparison: Comparison, description: str | None, argv: Sequence[str] | None = None) -> int:
    """Run the demo that the command line asks for; returns the exit code."""
    demo = parse_demo(comparison, description, argv)

    def work() -> int:
        with alone_in(demo.work_dir):
            summary = run(demo)
        console.print(comparison.table(demo, summary))
        for line in comparison.remarks(summary):
            console.print(line, markup=False)
        console.print(f"Written: {shown(demo.work_dir / 'summary.json')}, {shown(demo.work_dir / 'predictions.png')}")
        missed = comparison.shortfalls(summary) if demo.judged else []
        print_errors(missed)
        return 1 if missed else 0

    return guarded(work, demo.work_dir, demo.data_root)
