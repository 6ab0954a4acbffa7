"""The runs of the ablation: which small model a row of the paper becomes, its training, its one result file."""

from __future__ import annotations

import copy
import dataclasses
import json
import platform
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from carafe_plugin.engine.errors import read_json
from studies.common import ROOT, digest, write_json
from studies.demo import detection, segmentation
from studies.demo import run as demo_run
from studies.demo.comparison import Comparison, Demo, Model
from studies.demo.generate_scenes import Request
from studies.paper_tables.rows import CONFIGS, Row, read_tables

RESULTS = ROOT / "studies" / "ablation" / "results"
REQUEST = Request(seed=0, train=600, val=120, size=128)
#: Where operators stand in a model. A row's are recognised by the type, which is this package's.
PARTS = ("backbone", "neck", "roi_head.mask_head", "decode_head")
OURS = "carafe_plugin.openmmlab."


def _recipe(name: str, demo: Comparison, main: str, seconds: float, metrics: Iterable[str] = ()) -> Comparison:
    """The demo's comparison with a model of its own, ``seconds`` per iteration, and the metrics that a result keeps."""
    model = Model(name, name, f"configs/demo/ablation/{name}_r18_scenes.py")
    kept = {key: demo.metrics[key] for key in metrics or demo.metrics}
    return dataclasses.replace(demo, models=(model,), seconds=seconds, metrics=kept, main=main)


FASTER = _recipe("faster-rcnn", detection.COMPARISON, "bbox_mAP", 0.5, ("bbox_mAP", "bbox_mAP_50"))
MASK = _recipe("mask-rcnn", detection.COMPARISON, "segm_mAP", 0.6)
UPERNET = _recipe("upernet", segmentation.COMPARISON, "mIoU", 0.8)
#: By table. Table 12 is of classification; its backbones are compared in the detector that Table 3 has them in.
RECIPES = {3: FASTER, 4: FASTER, 5: FASTER, 6: MASK, 7: MASK, 9: UPERNET} | {n: FASTER for n in (11, 12, 13, 14)}


@dataclass(frozen=True)
class Setup:
    """Where things are, and what changes in all runs."""

    work_dir: Path
    data_root: Path
    results: Path
    scenes: Request = REQUEST
    iterations: int | None = None

    def dataset(self, recipe: Comparison) -> tuple[Request, Path]:
        """The dataset of a recipe, and its folder. Segmentation keeps the size and figures of its own demo."""
        request, own = self.scenes, recipe.request
        if own.format == request.format:
            return request, self.data_root / f"scenes-{request.size}"
        size = request.size if request.size != REQUEST.size else own.size
        request = dataclasses.replace(request, format=own.format, figures=own.figures, size=size)
        return request, self.data_root / f"scenes-{own.format}"

    def demo(self, run: Run) -> Demo:
        """A run in the terms of the demos' steps, with its config written."""
        request, folder = self.dataset(run.recipe)
        config = self.work_dir / "configs" / f"{run.name}.py"
        config.parent.mkdir(parents=True, exist_ok=True)
        run.config.dump(config)
        model = Model(run.name, f"{run.row.method}, seed {run.seed}", str(config))
        iterations = self.iterations or run.config.train_cfg.max_iters
        return Demo(run.recipe, self.work_dir, folder, request, iterations, run.seed, (model,))


@dataclass(frozen=True)
class Run:
    """One training: a row of a table with a seed."""

    table: int
    row: Row
    seed: int
    recipe: Comparison

    @cached_property
    def config(self) -> Config:
        """The small model with the seed and the row's operators: the ``type`` and ``carafe_cfg`` of its parts."""
        config = copy.deepcopy(_read(ROOT / self.recipe.models[0].config))
        row_model = {} if "::" in self.row.config else _read(CONFIGS / self.row.config).model
        changes: dict[str, Any] = {"randomness.seed": self.seed}
        for place in PARTS:
            part = row_model
            for name in place.split("."):
                part = part.get(name) or {}
            kind = str(part.get("type"))
            if not kind.startswith(OURS):
                continue  # the toolbox's own
            operators: dict[str, Any] = {"type": f"{OURS}{config.default_scope}.{kind.rpartition('.')[2]}"}
            if carafe_cfg := part.get("carafe_cfg"):
                operators["carafe_cfg"] = carafe_cfg.to_dict()
                operators["carafe_cfg"].pop("norm_eval", None)  # for a pretrained backbone: statistics are learnt here
            changes[f"model.{place}"] = operators
        config.merge_from_dict(changes)
        return config

    @property
    def name(self) -> str:
        """Of its file: ``table-04_nearest-conv_seed-0``."""
        method = re.sub("[^a-z0-9]+", "-", self.row.method.lower()).strip("-") or "baseline"
        return f"table-{self.table:02}_{method}_seed-{self.seed}"


def plan(tables: Iterable[int], seeds: Sequence[int]) -> list[Run]:
    """All runs, in the order in which they are done: every row with one seed before the next seed."""
    known = read_tables()
    return [Run(n, row, seed, RECIPES[n]) for n in tables for seed in seeds for row in known[n].rows]


@cache
def _read(path: Path) -> Config:
    return Config.fromfile(path)


# ------------------------------------------------------------------------------------------------------ one run
def fingerprint(run: Run, setup: Setup) -> str:
    """A digest of all that decides a run's result: the whole composed config, the dataset, the changes for a trial."""
    request, _ = setup.dataset(run.recipe)
    content = [run.config.to_dict(), dataclasses.asdict(request), setup.iterations]
    return digest(json.dumps(content, sort_keys=True, default=str))[:16]


def find_result(run: Run, setup: Setup) -> dict[str, Any] | None:
    """The result of a run, or of the same run in another table; None where there is none."""
    wanted = fingerprint(run, setup)
    for path in sorted(setup.results.glob("table-*_seed-*.json"), key=lambda path: path.stem != run.name):
        result = read_json(path)
        if result["fingerprint"] == wanted:
            return result
    return None


def complete(run: Run, setup: Setup) -> None:
    """Train (from the newest checkpoint if there is one), evaluate, and write the result file."""
    demo = setup.demo(run)
    (model,) = demo.models
    demo_run.discard_stale(demo, model)
    found = demo_run.complete(demo, model)
    result = {
        "table": run.table,
        "method": run.row.method,
        "config": run.row.path,
        "recipe": run.recipe.models[0].config,
        "seed": run.seed,
        "iterations": demo.iterations,
        "metrics": {name: found[name] for name in demo.comparison.metrics},
        "parameters": found["parameters"],
        "seconds_per_iteration": found["seconds_per_iter"],
        "scenes": dataclasses.asdict(demo.request),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "fingerprint": fingerprint(run, setup),
    }
    write_json(setup.results / f"{run.name}.json", result)
