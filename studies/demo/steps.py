"""The steps of a demo: what it compares, training and evaluating each model with our tools, reading the results.

A demo (``demo.py``, ``demo_seg.py``) describes its :class:`Comparison`; ``demo_run.py`` puts the steps in order.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from studies.demo.generate_scenes import Request, annotation_files

ROOT = Path(__file__).resolve().parents[2]

console = Console(highlight=False, soft_wrap=True)


class StepError(RuntimeError):
    """A step failed; the message says which and where its log is."""


# ---------------------------------------------------------------------------------------------------- description
@dataclass(frozen=True)
class Model:
    """One model of the comparison: its key in summary.json, its name for people, its config below the root."""

    name: str
    title: str
    config: str


@dataclass(frozen=True)
class Metric:
    """One number of an evaluation: its column title, its name in the tool's log, and its unit there."""

    title: str
    logged: str
    unit: float = 1.0


@dataclass(frozen=True)
class Comparison:
    """What a demo compares, and how its results are judged and shown.

    Attributes:
        name: Of the folder below ``work_dirs`` that is its default.
        models: What is always compared.
        more_models: What is compared as well if everything is asked for.
        data_root: Where the configs look for the dataset, below the root.
        request: The dataset, by default.
        iterations: Of each training, as the configs have it.
        seconds: Per iteration on two cores, for the estimates that are shown.
        metrics: By key in summary.json.
        minimum: By key in summary.json. Below it a model has not learnt, and the comparison would mean nothing.
        predictions: The name of the file or folder that ``tools/test.py --out`` writes.
        data_options: The changes in the configs for a dataset that lies elsewhere.
        draw: Draws the models' predictions into a file.
    """

    name: str
    models: tuple[Model, ...]
    more_models: tuple[Model, ...]
    data_root: str
    request: Request
    iterations: int
    seconds: float
    metrics: Mapping[str, Metric]
    minimum: Mapping[str, float]
    predictions: str
    data_options: Callable[[Demo], dict[str, Any]]
    draw: Callable[[Demo, Sequence[Model], Path], None]


@dataclass(frozen=True)
class Demo:
    """A comparison, what of it is asked for, where things are and how long to train."""

    comparison: Comparison
    work_dir: Path
    data_root: Path
    request: Request
    iterations: int
    models: tuple[Model, ...]

    def folder(self, model: Model) -> Path:
        return self.work_dir / model.name

    def checkpoint(self, model: Model) -> Path:
        return self.folder(model) / f"iter_{self.iterations}.pth"

    def metrics_file(self, model: Model) -> Path:
        return self.folder(model) / "metrics.json"

    def predictions(self, model: Model) -> Path:
        return self.folder(model) / self.comparison.predictions

    def config_options(self) -> dict[str, Any]:
        """What this run changes in the configs; nothing with the default options."""
        options: dict[str, Any] = {}
        if self.data_root != ROOT / self.comparison.data_root:
            options |= self.comparison.data_options(self)
        if self.iterations != self.comparison.iterations:
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
        if self.request.seed != self.comparison.request.seed:
            options["randomness.seed"] = self.request.seed
        return options


def load_config(demo: Demo, model: Model) -> Any:
    """The model's config with this run's changes."""
    from mmengine.config import Config

    config = Config.fromfile(ROOT / model.config)
    config.merge_from_dict(demo.config_options())
    return config


# ---------------------------------------------------------------------------------------------------------- tools
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
    console.print(f"$ python {' '.join(command)} >> {shown(log)}", style="dim", markup=False)
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
    console.print(f"{title}: done in {duration(time.monotonic() - started)}")


def train(demo: Demo, model: Model) -> None:
    """Train the model, from its newest checkpoint if there is one."""
    command = ["tools/train.py", model.config, "--work-dir", shown(demo.folder(model)), "--resume", "auto"]
    run_tool(f"Train {model.name}", command + _option_arguments(demo), demo.work_dir / f"train_{model.name}.log")
    if not demo.checkpoint(model).is_file():
        raise StepError(f"Train {model.name}: tools/train.py succeeded but {demo.checkpoint(model)} is missing")


def evaluate(demo: Demo, model: Model) -> None:
    """Evaluate the trained model, keep its predictions, and its metrics in ``metrics.json``."""
    work_dir = demo.folder(model) / "test"
    shutil.rmtree(work_dir, ignore_errors=True)  # what an interrupted evaluation left
    command = [
        "tools/test.py",
        model.config,
        shown(demo.checkpoint(model)),
        "--work-dir",
        shown(work_dir),
        "--out",
        shown(demo.predictions(model)),
    ]
    run_tool(f"Evaluate {model.name}", command + _option_arguments(demo), demo.work_dir / f"test_{model.name}.log")
    # The logger hook leaves all metrics of an evaluation in <time>/<time>.json.
    found = [path for path in work_dir.glob("*/*.json") if path.stem == path.parent.name]
    if len(found) != 1:
        raise StepError(
            f"Evaluate {model.name}: expected one <time>/<time>.json with metrics in {work_dir}, found {len(found)}"
        )
    logged = json.loads(found[0].read_text())
    try:
        chosen = {
            name: round(logged[metric.logged] * metric.unit, 6) for name, metric in demo.comparison.metrics.items()
        }
    except KeyError as error:
        raise StepError(
            f"Evaluate {model.name}: {found[0]} has no metric {error}; a model that finds nothing has none"
        ) from None
    write_json(demo.metrics_file(model), chosen)


def is_evaluated(demo: Demo, model: Model) -> bool:
    """Whether the model's metrics and predictions are there."""
    return demo.metrics_file(model).is_file() and demo.predictions(model).exists()


# --------------------------------------------------------------------------------------------------------- belonging
def _fingerprint(demo: Demo, model: Model) -> str:
    """A digest of all that decides a model's result: its whole config and the annotations."""
    config = json.dumps(load_config(demo, model).to_dict(), sort_keys=True, default=str)
    digest = hashlib.sha256(config.encode())
    for file in annotation_files(demo.data_root, demo.request):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _stamp_file(demo: Demo, model: Model) -> Path:
    return demo.folder(model) / "fingerprint.txt"


def belongs(demo: Demo, model: Model) -> bool:
    """Whether what lies in the model's folder comes from this configuration and dataset."""
    file = _stamp_file(demo, model)
    return file.is_file() and file.read_text() == _fingerprint(demo, model)


def discard_stale(demo: Demo, model: Model) -> None:
    """Remove what another configuration or dataset has left in the model's folder.

    Raises:
        StepError: The folder holds something that no demo wrote.
    """
    if belongs(demo, model):
        return
    folder, file = demo.folder(model), _stamp_file(demo, model)
    if folder.exists():
        if any(folder.iterdir()) and not file.is_file():
            raise StepError(f"{folder} was not written by the demo (it has no {file.name}): give another --work-dir")
        message = f"{shown(folder)} belongs to another configuration or dataset: removed"
        console.print(message, style="yellow", markup=False)
        shutil.rmtree(folder)
    for name in ("summary.json", "predictions.png"):
        (demo.work_dir / name).unlink(missing_ok=True)
    folder.mkdir(parents=True)
    file.write_text(_fingerprint(demo, model))


# -------------------------------------------------------------------------------------------------------- results
def count_parameters(demo: Demo, model: Model) -> int:
    """Build the model and count what it learns."""
    from mmengine.registry import init_default_scope

    from carafe_plugin.openmmlab import mmcv_ops

    mmcv_ops.install()
    config = load_config(demo, model)
    registry = importlib.import_module(f"{config.default_scope}.registry")
    init_default_scope(config.default_scope)
    built = registry.MODELS.build(config.model)
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


def summarise(demo: Demo, models: Sequence[Model]) -> dict[str, dict[str, float]]:
    """Collect the models' results and write ``summary.json``."""
    summary = {
        model.name: {
            **json.loads(demo.metrics_file(model).read_text()),
            "parameters": count_parameters(demo, model),
            "seconds_per_iter": round(seconds_per_iteration(demo.folder(model)), 4),
        }
        for model in models
    }
    write_json(demo.work_dir / "summary.json", summary)
    return summary


# -------------------------------------------------------------------------------------------------------- helpers
def shown(path: Path) -> str:
    """The path from the root where it lies below it; the tools run there."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def write_json(path: Path, content: Any) -> None:
    """Write all of it or nothing."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)


def _option_arguments(demo: Demo) -> list[str]:
    options = [f"{key}={value}" for key, value in demo.config_options().items()]
    return ["--cfg-options", *options] if options else []
