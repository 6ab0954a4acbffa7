"""Train and evaluate two small Mask R-CNNs, without and with CARAFE++, and compare them.

The steps: generate a dataset, train each model from scratch with ``tools/train.py``, evaluate each with
``tools/test.py``, then write a table, ``summary.json`` and pictures. Nothing is downloaded and no GPU is needed. A step
that is done is skipped and an interrupted training goes on from its last checkpoint, so the same command continues.
Results of another configuration or dataset are never reused: they are removed, and said to be.

Example:
    $ python tools/demo.py
    $ python tools/demo.py --work-dir /tmp/tiny --data-root /tmp/tiny/data --train 8 --val 4 --iterations 2 --no-minimum
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from generate_scenes import Request, add_dataset_options, generate, integer, is_complete
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
METRICS = ("bbox_mAP", "bbox_mAP_50", "segm_mAP", "segm_mAP_50")
#: Below these a model has not learnt, and the comparison would mean nothing.
MINIMUM = {"bbox_mAP_50": 0.40, "segm_mAP_50": 0.25}
DEFAULTS = Request(seed=0, train=600, val=120, size=160)
ITERATIONS = 280
SECONDS_PER_ITERATION = 1.1  # on two cores, for the estimates that are shown

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Model:
    """One model of the comparison: its key in summary.json, its name for people, its config below the root."""

    name: str
    title: str
    config: str


MODELS = (
    Model("baseline", "Mask R-CNN", "configs/demo/mask-rcnn_r18_fpn_scenes.py"),
    Model("carafe", "Mask R-CNN, CARAFE++", "configs/demo/mask-rcnn_r18_carafe-fpn-mask-head_scenes.py"),
)


class StepError(RuntimeError):
    """A step failed; the message says which and where its log is."""


@dataclass(frozen=True)
class Demo:
    """Where things are and how long to train."""

    work_dir: Path
    data_root: Path
    request: Request
    iterations: int

    def folder(self, model: Model) -> Path:
        return self.work_dir / model.name

    def checkpoint(self, model: Model) -> Path:
        return self.folder(model) / f"iter_{self.iterations}.pth"

    def metrics_file(self, model: Model) -> Path:
        return self.folder(model) / "metrics.json"

    def predictions_file(self, model: Model) -> Path:
        return self.folder(model) / "predictions.pkl"

    def annotations(self, split: str) -> Path:
        return self.data_root / "annotations" / f"instances_{split}.json"

    def config_options(self) -> dict[str, Any]:
        """What this run changes in the configs; nothing with the default options."""
        options: dict[str, Any] = {}
        if self.data_root != ROOT / "data" / "scenes":
            options |= {
                "train_dataloader.dataset.data_root": str(self.data_root),
                "test_dataloader.dataset.data_root": str(self.data_root),
                "test_evaluator.ann_file": str(self.annotations("val")),
            }
        if self.iterations != ITERATIONS:
            warm_up = max(1, self.iterations // 10)
            options |= {
                "train_cfg.max_iters": self.iterations,
                "param_scheduler.0.end": warm_up,
                "param_scheduler.1.begin": warm_up,
                "param_scheduler.1.end": self.iterations,
            }
            if self.iterations < 100:  # too short for windows of ten iterations and checkpoints every fifty
                options |= {
                    "default_hooks.logger.interval": 1,
                    "log_processor.window_size": 1,
                    "default_hooks.checkpoint.interval": 1,
                }
        if self.request.seed != DEFAULTS.seed:
            options["randomness.seed"] = self.request.seed
        return options


# ---------------------------------------------------------------------------------------------------------- steps
def _die_with_parent() -> None:
    """Have Linux stop this process when its parent is killed, so that no training is left behind."""
    with contextlib.suppress(AttributeError):  # another system: a kill -9 of the parent leaves it running
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


def run_tool(title: str, command: Sequence[str], log: Path) -> None:
    """Run one of our tools with its output in ``log`` and a progress bar on the console.

    Raises:
        StepError: It did not exit with 0.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    console.print(f"$ python {' '.join(command)} >> {_shown(log)}", style="dim", markup=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("/"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    tail: list[str] = []
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        preexec_fn=_die_with_parent,
    )
    try:
        assert process.stdout is not None
        with log.open("a") as file, bar as progress:
            task = progress.add_task(title, total=None)
            for line in process.stdout:
                file.write(line)
                file.flush()
                tail = [*tail, line][-25:]
                if found := re.search(r"Iter\(\w+\)\s*\[\s*(\d+)/(\d+)\]", line):
                    progress.update(task, completed=int(found[1]), total=int(found[2]))
        code = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
    if code != 0:
        raise StepError(f"{title} failed with exit code {code}. The whole log: {log}\nIts end:\n{''.join(tail)}")
    console.print(f"{title}: done in {_duration(time.monotonic() - started)}")


def train(demo: Demo, model: Model) -> None:
    """Train the model, from its newest checkpoint if there is one."""
    command = ["tools/train.py", model.config, "--work-dir", _shown(demo.folder(model)), "--resume", "auto"]
    run_tool(f"Train {model.name}", command + _option_arguments(demo), demo.work_dir / f"train_{model.name}.log")
    if not demo.checkpoint(model).is_file():
        raise StepError(f"Train {model.name}: tools/train.py succeeded but {demo.checkpoint(model)} is missing")


def evaluate(demo: Demo, model: Model) -> None:
    """Evaluate the trained model and keep its COCO metrics in ``metrics.json``."""
    work_dir = demo.folder(model) / "test"
    shutil.rmtree(work_dir, ignore_errors=True)  # what an interrupted evaluation left
    command = [
        "tools/test.py",
        model.config,
        _shown(demo.checkpoint(model)),
        "--work-dir",
        _shown(work_dir),
        "--out",
        _shown(demo.predictions_file(model)),
    ]
    run_tool(f"Evaluate {model.name}", command + _option_arguments(demo), demo.work_dir / f"test_{model.name}.log")
    # The logger hook leaves all metrics of an evaluation in <time>/<time>.json.
    found = [path for path in work_dir.glob("*/*.json") if path.stem == path.parent.name]
    if len(found) != 1:
        raise StepError(
            f"Evaluate {model.name}: expected one <time>/<time>.json with metrics in {work_dir}, found {len(found)}"
        )
    metrics = json.loads(found[0].read_text())
    try:
        chosen = {name: metrics[f"coco/{name}"] for name in METRICS}
    except KeyError as error:
        raise StepError(
            f"Evaluate {model.name}: {found[0]} has no metric {error}; a model that detects nothing has none"
        ) from None
    _write_json(demo.metrics_file(model), chosen)


def discard_stale(demo: Demo, model: Model) -> None:
    """Remove what another configuration or dataset has left in the model's folder.

    Raises:
        StepError: The folder holds something that no demo wrote.
    """
    folder, stamp = demo.folder(model), _fingerprint(demo, model)
    file = folder / "fingerprint.txt"
    if file.is_file() and file.read_text() == stamp:
        return
    if folder.exists():
        if any(folder.iterdir()) and not file.is_file():
            raise StepError(f"{folder} was not written by the demo (it has no {file.name}): give another --work-dir")
        message = f"{_shown(folder)} belongs to another configuration or dataset: removed"
        console.print(message, style="yellow", markup=False)
        shutil.rmtree(folder)
    for name in ("summary.json", "predictions.png"):
        (demo.work_dir / name).unlink(missing_ok=True)
    folder.mkdir(parents=True)
    file.write_text(stamp)


def _discard_all_stale(demo: Demo) -> None:
    for model in MODELS:
        discard_stale(demo, model)


def _fingerprint(demo: Demo, model: Model) -> str:
    """A digest of all that decides a model's result: its whole config and the annotations."""
    config = json.dumps(load_config(demo, model).to_dict(), sort_keys=True, default=str)
    digest = hashlib.sha256(config.encode())
    for split in ("train", "val"):
        digest.update(demo.annotations(split).read_bytes())
    return digest.hexdigest()


def load_config(demo: Demo, model: Model) -> Any:
    """The model's config with this run's changes."""
    from mmengine.config import Config

    config = Config.fromfile(ROOT / model.config)
    config.merge_from_dict(demo.config_options())
    return config


# -------------------------------------------------------------------------------------------------------- results
def count_parameters(demo: Demo, model: Model) -> int:
    """Build the model and count what it learns."""
    from mmdet.registry import MODELS as DETECTORS
    from mmengine.registry import init_default_scope

    init_default_scope("mmdet")
    built = DETECTORS.build(load_config(demo, model).model)
    return sum(parameter.numel() for parameter in built.parameters() if parameter.requires_grad)


def seconds_per_iteration(folder: Path) -> float:
    """The median iteration time of a training, from its logs.

    Each line of a log is the mean over one window. The first of each start is left out: it holds the warm-up.
    """
    times: list[float] = []
    first: list[float] = []
    for log in sorted(folder.glob("*/vis_data/scalars.json")):
        window = [entry["time"] for entry in map(json.loads, log.read_text().splitlines()) if "time" in entry]
        first += window[:1]
        times += window[1:]
    if not first:
        raise StepError(f"no iteration times in {folder}/*/vis_data/scalars.json")
    return statistics.median(times or first)


def summarise(demo: Demo) -> dict[str, dict[str, float]]:
    """Collect all results and write ``summary.json``."""
    summary = {
        model.name: {
            **json.loads(demo.metrics_file(model).read_text()),
            "parameters": count_parameters(demo, model),
            "seconds_per_iter": round(seconds_per_iteration(demo.folder(model)), 4),
        }
        for model in MODELS
    }
    _write_json(demo.work_dir / "summary.json", summary)
    return summary


def result_table(summary: dict[str, dict[str, float]], iterations: int) -> Table:
    """One row per model; narrow enough for a terminal of 80 columns."""
    table = Table(title=f"Generated scenes, {iterations} iterations from scratch")
    table.add_column("model", no_wrap=True)
    for title in ("box AP", "AP50", "mask AP", "AP50", "parameters", "s/it"):
        table.add_column(title, justify="right", no_wrap=True)
    for model in MODELS:
        result = summary[model.name]
        table.add_row(
            model.title,
            *(f"{result[name]:.3f}" for name in METRICS),
            f"{result['parameters']:,}",
            f"{result['seconds_per_iter']:.2f}",
        )
    return table


def shortfalls(summary: dict[str, dict[str, float]]) -> list[str]:
    """One line for every result below its minimum."""
    return [
        f"{name}: {metric} is {result[metric]:.3f}, at least {least:.2f} was expected"
        for name, result in summary.items()
        for metric, least in MINIMUM.items()
        if result[metric] < least
    ]


# -------------------------------------------------------------------------------------------------------- helpers
def _shown(path: Path) -> str:
    """The path from the root where it lies below it; the tools run there."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _option_arguments(demo: Demo) -> list[str]:
    options = [f"{key}={value}" for key, value in demo.config_options().items()]
    return ["--cfg-options", *options] if options else []


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def _write_json(path: Path, content: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def evaluated(demo: Demo, model: Model) -> bool:
    """Whether the model's metrics and predictions are there."""
    return demo.metrics_file(model).is_file() and demo.predictions_file(model).is_file()


def show_plan(demo: Demo) -> None:
    """Say what will be done and about how long it takes."""
    # Without the dataset nothing that lies there can be told to belong to it.
    known = is_complete(demo.data_root, demo.request)
    table = Table(title="The demo on two CPU cores")
    for title in ("step", "about", "state"):
        table.add_column(title)

    def add(step: str, about: str, done: bool) -> None:
        table.add_row(step, about, "done" if known and done else "to do")

    add(f"generate {demo.request.train} + {demo.request.val} scenes in {_shown(demo.data_root)}", "20 s", True)
    for model in MODELS:
        seconds = demo.iterations * SECONDS_PER_ITERATION
        add(f"train {model.title}", _duration(seconds + 20), demo.checkpoint(model).is_file())
    for model in MODELS:
        add(f"evaluate {model.title}", "30 s", evaluated(demo, model))
    add(f"table, summary.json and pictures in {_shown(demo.work_dir)}", "20 s", False)
    console.print(table)


# ------------------------------------------------------------------------------------------------------------ main
def run(demo: Demo) -> dict[str, dict[str, float]]:
    """Do every step that is not done yet."""
    if is_complete(demo.data_root, demo.request):
        _discard_all_stale(demo)
    show_plan(demo)
    if generate(demo.data_root, demo.request):
        console.print(f"Generate: wrote the dataset to {_shown(demo.data_root)}")
        _discard_all_stale(demo)
    for model in MODELS:
        if not demo.checkpoint(model).is_file():
            train(demo, model)
    for model in MODELS:
        if not evaluated(demo, model):
            evaluate(demo, model)
    summary = summarise(demo)
    from demo_pictures import draw_comparison

    predictions = {model.title: demo.predictions_file(model) for model in MODELS}
    draw_comparison(demo.annotations("val"), demo.data_root / "val", predictions, demo.work_dir / "predictions.png")
    return summary


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=ROOT / "work_dirs" / "demo", help="where results go")
    parser.add_argument("--data-root", type=Path, default=ROOT / "data" / "scenes", help="where the dataset goes")
    parser.add_argument(
        "--iterations", type=integer(1), default=ITERATIONS, help=f"of each training (default: {ITERATIONS})"
    )
    parser.add_argument(
        "--no-minimum", action="store_true", help="succeed however little the models have learnt, for a short trial"
    )
    add_dataset_options(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    demo = Demo(
        args.work_dir.resolve(),
        args.data_root.resolve(),
        Request(args.seed, args.train, args.val, args.size),
        args.iterations,
    )
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        demo.work_dir.mkdir(parents=True, exist_ok=True)
        with (demo.work_dir / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StepError(f"another demo is running in {demo.work_dir}") from None
            summary = run(demo)
    except KeyboardInterrupt:
        console.print("\n[yellow]Interrupted. The same command goes on from here.[/yellow]")
        return 130
    except (StepError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 1
    finally:
        signal.signal(signal.SIGTERM, previous)
    console.print(result_table(summary, demo.iterations))
    console.print(f"Written: {_shown(demo.work_dir / 'summary.json')}, {_shown(demo.work_dir / 'predictions.png')}")
    missed = [] if args.no_minimum else shortfalls(summary)
    for line in missed:
        console.print(f"error: {line}", style="red", markup=False)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
