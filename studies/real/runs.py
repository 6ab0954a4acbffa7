"""The runs of a study on real images: their configurations, trainings and result files."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import platform
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from carafe_plugin.engine import bare_models
from carafe_plugin.engine.conversion import write_checkpoint
from carafe_plugin.engine.errors import UsageError, read_json
from carafe_plugin.engine.pretrained import SOURCES
from carafe_plugin.openmmlab import mmcv_ops
from studies.common import ROOT, digest, write_json
from studies.demo.run import StepError, run_tool, seconds_per_iteration
from studies.real.recipes import STUDIES, Study, Variant

RESULTS = ROOT / "studies" / "real" / "results"


@dataclass(frozen=True)
class Setup:
    """Where things are, and what changes in all runs.

    ``weights`` is the file that a backbone starts from, None for the one of the installed package that brings it.
    """

    work_dir: Path
    results: Path = RESULTS
    weights: Path | None = None
    iterations: int | None = None


@dataclass(frozen=True)
class Run:
    """One training: a variant of a study with a seed."""

    study: str
    variant: Variant
    seed: int

    @property
    def recipe(self) -> Study:
        return STUDIES[self.study]

    @property
    def name(self) -> str:
        """Of its file: ``A_carafe_seed-0``."""
        return f"{self.study}_{self.variant.name}_seed-{self.seed}"

    def config(self, setup: Setup) -> Config:
        """The study's configuration with the variant's changes; the backbone's weights are not in it yet."""
        config = copy.deepcopy(Config.fromfile(ROOT / self.recipe.config))
        changes = {"randomness.seed": self.seed, **self.variant.changes}
        if setup.iterations:
            first = max(1, setup.iterations // 10)
            changes |= {"train_cfg.max_iters": setup.iterations, "train_cfg.val_interval": setup.iterations}
            changes |= {"param_scheduler.0.end": first, "param_scheduler.1.begin": first}
            changes["param_scheduler.1.end"] = setup.iterations
            if setup.iterations < 100:  # too short for the usual windows
                changes |= {"default_hooks.logger.interval": 1, "log_processor.window_size": 1}
        config.merge_from_dict(changes)
        return config


def plan(studies: Iterable[str], names: Iterable[str] | None, seeds: Iterable[int]) -> list[Run]:
    """All runs, in the order in which they are done: every model with one seed before the next seed."""
    wanted = None if names is None else set(names)
    runs = []
    for study in studies:
        variants = STUDIES[study].variants
        if wanted is not None and (unknown := wanted - {variant.name for variant in variants}):
            known = ", ".join(variant.name for variant in variants)
            raise UsageError(f"--models: study {study} has no {', '.join(sorted(unknown))}; it has {known}")
        chosen = [variant for variant in variants if wanted is None or variant.name in wanted]
        runs += [Run(study, variant, seed) for seed in seeds for variant in chosen]
    return runs


def fingerprint(run: Run, setup: Setup) -> str:
    """A digest of all that decides a run's result but the data: its configuration, and the weights' kind.

    Where the data lie, and in which of two lossless forms, does not count.
    """
    config = json.dumps(run.config(setup).to_dict(), sort_keys=True, default=str)
    root = str(Path(os.environ.get("CARAFE_DATA_ROOT", "data")))
    return digest(config.replace(root, "data").replace(".webp", ".png") + run.recipe.weights)[:16]


def find_result(run: Run, setup: Setup) -> dict[str, Any] | None:
    """The result of a run; None where there is none, or one of another configuration."""
    path = setup.results / f"{run.name}.json"
    result = read_json(path) if path.is_file() else None
    return result if result and result["fingerprint"] == fingerprint(run, setup) else None


def pretrained(study: Study, setup: Setup) -> Path:
    """The backbone's weights in the names of MMSegmentation or MMDetection, converted where that has not been done."""
    toolbox = "mmseg" if Config.fromfile(ROOT / study.config).default_scope == "mmseg" else "mmdet"
    target = setup.work_dir / "pretrained" / f"{study.weights}_{toolbox}.pth"
    if target.is_file():
        return target
    source = setup.weights
    if source is None:
        package, file = study.package
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise UsageError(
                f"--weights must name the file {Path(file).name} of the package {package.replace('_', '-')}, which is "
                "not installed"
            )
        source = Path(next(iter(spec.submodule_search_locations))) / file
    weights = SOURCES[study.weights].read(source, toolbox)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(dict(meta=dict(source=source.name, kind=study.weights), state_dict=weights), target)
    return target


def complete(run: Run, setup: Setup) -> None:
    """Train (from the newest checkpoint if there is one), evaluate, and write the result file."""
    config = run.config(setup)
    config.model.backbone.init_cfg = dict(type="Pretrained", checkpoint=str(pretrained(run.recipe, setup)))
    folder, file = setup.work_dir / run.name, setup.work_dir / "configs" / f"{run.name}.py"
    stamp = folder / "fingerprint.txt"
    wanted = fingerprint(run, setup)
    if folder.exists() and not (stamp.is_file() and stamp.read_text() == wanted):
        if any(folder.iterdir()) and not stamp.is_file():
            raise StepError(f"{folder} was not written by this study: give another --work-dir")
        shutil.rmtree(folder)  # of another configuration
    folder.mkdir(parents=True, exist_ok=True)
    stamp.write_text(wanted)
    file.parent.mkdir(parents=True, exist_ok=True)
    config.dump(file)

    iterations = config.train_cfg.max_iters
    checkpoint = folder / f"iter_{iterations}.pth"
    if not checkpoint.is_file():
        command = ["tools/train.py", str(file), "--work-dir", str(folder), "--resume", "auto"]
        run_tool(f"Train {run.name}", command, setup.work_dir / f"train_{run.name}.log")
    tested = folder / "test"
    shutil.rmtree(tested, ignore_errors=True)  # what an interrupted evaluation left
    command = ["tools/test.py", str(file), str(checkpoint), "--work-dir", str(tested)]
    run_tool(f"Evaluate {run.name}", command, setup.work_dir / f"test_{run.name}.log")
    logged = _logged(tested)
    mmcv_ops.install()
    model = bare_models.build_model(bare_models.read_config(str(file), {}))
    result = {
        "study": run.study,
        "model": run.variant.name,
        "config": run.recipe.config,
        "changes": dict(run.variant.changes),
        "weights": run.recipe.weights,
        "seed": run.seed,
        "iterations": iterations,
        "metrics": {name: round(logged[m.logged] * m.unit, 4) for name, m in run.recipe.metrics.items()},
        "curve": curve(folder, run.recipe.curve),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds_per_iteration": round(seconds_per_iteration(folder), 4),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "fingerprint": wanted,
    }
    write_json(setup.results / f"{run.name}.json", result)


def _logged(folder: Path) -> dict[str, float]:
    """All metrics of an evaluation, which MMEngine leaves in <time>/<time>.json."""
    found = [path for path in folder.glob("*/*.json") if path.stem == path.parent.name]
    if len(found) != 1:
        raise StepError(f"expected one <time>/<time>.json with metrics in {folder}, found {len(found)}")
    return json.loads(found[0].read_text())


def curve(folder: Path, metric: str) -> list[tuple[int, float]]:
    """A metric of the evaluations during a training: iteration and value, in their order."""
    values: dict[int, float] = {}
    for log in sorted(folder.glob("*/vis_data/scalars.json")):
        for entry in map(json.loads, log.read_text().splitlines()):
            if metric in entry:
                values[entry["step"]] = round(entry[metric], 4)
    return sorted(values.items())
