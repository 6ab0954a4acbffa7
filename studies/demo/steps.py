"""The steps of a demo: train and evaluate each model with our tools, and read the results.

A step whose result exists is skipped, and an interrupted training resumes from its newest checkpoint. A model's folder
is stamped with a digest of its whole config and of the dataset: results of another configuration are never reused.
"""

from __future__ import annotations

import ctypes
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
from pathlib import Path

from rich.progress import MofNCompleteColumn, Progress

from carafe_plugin.engine import bare_models
from carafe_plugin.engine.errors import UsageError
from carafe_plugin.openmmlab import mmcv_ops
from studies.common import ROOT, console, duration, shown, write_json
from studies.demo.comparison import Demo, Model, Summary
from studies.demo.generate_scenes import annotation_files, is_complete

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
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    started = time.monotonic()
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
        bar as progress,
    ):
        assert process.stdout is not None
        task = progress.add_task(title, total=None)
        tail: list[str] = []
        try:
            for line in process.stdout:
                file.write(line)
                file.flush()
                tail = [*tail, line][-25:]
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


def _run(demo: Demo, model: Model, verb: str, *command: str) -> None:
    options = [f"{key}={value}" for key, value in demo.config_options().items()]
    log = demo.work_dir / f"{'train' if verb == 'Train' else 'test'}_{model.name}.log"
    run_tool(f"{verb} {model.name}", [*command, *(["--cfg-options", *options] if options else [])], log)


def train(demo: Demo, model: Model) -> None:
    """Train the model, from its newest checkpoint if there is one."""
    folder, checkpoint = demo.folder(model), demo.checkpoint(model)
    _run(demo, model, "Train", "tools/train.py", model.config, "--work-dir", shown(folder), "--resume", "auto")
    if not checkpoint.is_file():
        raise StepError(f"Train {model.name}: tools/train.py succeeded but {checkpoint} is missing")


def evaluate(demo: Demo, model: Model) -> None:
    """Evaluate the trained model, keep its predictions, and its metrics in ``metrics.json``."""
    work_dir = demo.folder(model) / "test"
    shutil.rmtree(work_dir, ignore_errors=True)  # what an interrupted evaluation left
    checkpoint, *folders = map(shown, (demo.checkpoint(model), work_dir, demo.predictions(model)))
    options = ("--work-dir", folders[0], "--out", folders[1])
    _run(demo, model, "Evaluate", "tools/test.py", model.config, checkpoint, *options)
    # The logger hook leaves all metrics of an evaluation in <time>/<time>.json.
    found = [path for path in work_dir.glob("*/*.json") if path.stem == path.parent.name]
    if len(found) != 1:
        raise StepError(
            f"Evaluate {model.name}: expected one <time>/<time>.json with metrics in {work_dir}, found {len(found)}"
        )
    logged = json.loads(found[0].read_text())
    metrics = demo.comparison.metrics
    if missing := [metric.logged for metric in metrics.values() if metric.logged not in logged]:
        raise StepError(
            f"Evaluate {model.name}: {found[0]} has no metric {missing[0]!r}; a model that finds nothing has none"
        )
    chosen = {name: round(logged[metric.logged] * metric.unit, 6) for name, metric in metrics.items()}
    write_json(demo.metrics_file(model), chosen)


def is_evaluated(demo: Demo, model: Model) -> bool:
    """Whether the model's metrics and predictions exist."""
    return demo.metrics_file(model).is_file() and demo.predictions(model).exists()


def train_and_evaluate(demo: Demo, model: Model) -> None:
    """Do what is not done yet for a model."""
    if not demo.checkpoint(model).is_file():
        train(demo, model)
    if not is_evaluated(demo, model):
        evaluate(demo, model)


# ----------------------------------------------------------------------------------------------------- belonging
def _fingerprint(demo: Demo, model: Model) -> str:
    """A digest of all that decides a model's result: its whole config and the annotations."""
    config = json.dumps(demo.load_config(model).to_dict(), sort_keys=True, default=str)
    digest = hashlib.sha256(config.encode())
    for file in annotation_files(demo.data_root, demo.request):
        digest.update(file.read_bytes())
    return digest.hexdigest()


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


# -------------------------------------------------------------------------------------------------------- results
def count_parameters(demo: Demo, model: Model) -> int:
    """Build the model and count what it learns."""
    mmcv_ops.install()
    built = bare_models.build_model(bare_models.read_config(str(ROOT / model.config), demo.config_options()))
    return sum(parameter.numel() for parameter in built.parameters() if parameter.requires_grad)


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


def summarise(demo: Demo, models: Sequence[Model]) -> Summary:
    """Collect the models' results and write ``summary.json``."""
    results = {
        model.name: {
            **json.loads(demo.metrics_file(model).read_text()),
            "parameters": count_parameters(demo, model),
            "seconds_per_iter": round(seconds_per_iteration(demo.folder(model)), 4),
        }
        for model in models
    }
    summary = demo.comparison.complete(demo, results)
    write_json(demo.work_dir / "summary.json", summary)
    return summary
