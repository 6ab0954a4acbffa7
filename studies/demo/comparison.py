"""What a demo compares, how its results are judged and shown, and where one run of it keeps its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmengine.config import Config
from rich import box
from rich.table import Table

from carafe_plugin.engine.config import load_config
from carafe_plugin.engine.console import text_table
from studies.common import ROOT, Metric
from studies.demo.generate_scenes import Request

Summary = dict[str, dict[str, float]]  # what summary.json holds: each model's results


@dataclass(frozen=True)
class Model:
    """One model of the comparison: its key in summary.json, its name for people, its config below the root."""

    name: str
    title: str
    config: str


#: What a model costs, by key in summary.json: the column's title, and how it is written.
Costs = Mapping[str, tuple[str, Callable[[float], str]]]
COSTS: Costs = {"parameters": ("parameters", "{:,}".format), "seconds_per_iter": ("s/it", "{:.2f}".format)}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a demo compares; a subclass may add results of its own and judge them.

    ``metrics``, ``minimum`` and ``costs`` are by key in summary.json.
    """

    name: str  # of its default folder below ``work_dirs``
    models: tuple[Model, ...]  # whose configs agree on the dataset's folder and the number of iterations
    more_models: tuple[Model, ...] = ()  # added by ``--all``
    references: Mapping[str, str] = field(default_factory=dict)  # what :meth:`complete` adds: keys, names for people
    request: Request  # the default dataset
    seconds: float  # per iteration on two cores, for the estimates of the plan
    metrics: Mapping[str, Metric]
    main: str = ""  # the metric that a plot shows
    minimum: Mapping[str, float] = field(default_factory=dict)  # below it nothing is compared
    costs: Costs = field(default_factory=lambda: COSTS)
    caption: str = ""  # below the table
    predictions: str  # the file or folder that ``tools/test.py --out`` writes
    draw: Callable[[Demo, Sequence[Model], Path], None]  # draws the models' predictions into a file

    def complete(self, demo: Demo, summary: Summary) -> Summary:
        """Add what the models' evaluations do not contain."""
        return summary

    def table(self, demo: Demo, summary: Summary) -> Table:
        """One row per model; narrow enough for a terminal of 80 columns."""
        size = f"{demo.request.val} generated scenes, {demo.request.size} x {demo.request.size}"
        figures = {key: (metric.title, f"{{:.{metric.digits}f}}".format) for key, metric in self.metrics.items()}
        columns = {**figures, **self.costs}
        titles = {**self.references, **{model.name: model.title for model in (*self.models, *self.more_models)}}
        lines = [
            [titles[name], *(text(found[key]) if key in found else "" for key, (_, text) in columns.items())]
            for name, found in summary.items()
        ]
        return text_table(
            f"{size}; {demo.iterations} iterations from scratch",
            ["model", *(title for title, _ in columns.values())],
            lines,
            left=("model",),
            caption=self.caption,
            frame=box.HEAVY_HEAD,
        )

    def remarks(self, summary: Summary) -> list[str]:
        """Lines below the table."""
        return []

    def shortfalls(self, summary: Summary) -> list[str]:
        """One line for every result below its minimum."""
        return [
            f"{name}: {metric} is {result[metric]:.3f}, at least {least:.2f} was expected"
            for name, result in summary.items()
            for metric, least in self.minimum.items()
            if result[metric] < least
        ]


@dataclass(frozen=True)
class Demo:
    """One run of a comparison: where its files are, the dataset, how long to train, and which models."""

    comparison: Comparison
    work_dir: Path
    data_root: Path
    request: Request
    iterations: int
    seed: int  # of the trainings
    models: tuple[Model, ...]
    judged: bool = True  # whether a result below its minimum is an error

    def folder(self, model: Model) -> Path:
        return self.work_dir / model.name

    def checkpoint(self, model: Model) -> Path:
        return self.folder(model) / f"iter_{self.iterations}.pth"

    def results_file(self, model: Model) -> Path:
        return self.folder(model) / "results.json"

    def predictions(self, model: Model) -> Path:
        return self.folder(model) / self.comparison.predictions

    def config_options(self, model: Model) -> dict[str, Any]:
        """What this run changes in the model's config; nothing with the default options."""
        config = Config.fromfile(ROOT / model.config)
        options: dict[str, Any] = {}
        data_root = config.train_dataloader.dataset.data_root
        if self.data_root != ROOT / data_root:
            splits = [split for split in ("train", "val", "test") if config.get(f"{split}_dataloader")]
            options |= {f"{split}_dataloader.dataset.data_root": str(self.data_root) for split in splits}
            if ann_file := config.test_evaluator.get("ann_file"):
                options["test_evaluator.ann_file"] = str(self.data_root / Path(ann_file).relative_to(data_root))
        if self.iterations != config.train_cfg.max_iters:
            options["train_cfg.max_iters"] = self.iterations
            if "param_scheduler" in config:
                warm_up = max(1, self.iterations // 10)
                options |= {"param_scheduler.0.end": warm_up, "param_scheduler.1.begin": warm_up}
                options["param_scheduler.1.end"] = self.iterations
            if self.iterations < 100:  # too short for windows of ten iterations and checkpoints every fifty
                options |= {"default_hooks.logger.interval": 1, "log_processor.window_size": 1}
                options["default_hooks.checkpoint.interval"] = 1
        if self.seed != config.randomness.seed:
            options["randomness.seed"] = self.seed
        return options

    def load_config(self, model: Model) -> Config:
        """The model's config with this run's changes."""
        return load_config(str(ROOT / model.config), self.config_options(model))
