"""The rows of the paper's tables, as configs/paper/tables.yml lists them, and what is known of each row's config."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from carafe_plugin.engine import bare_models
from carafe_plugin.engine.errors import read_json
from studies import common
from studies.common import ROOT, Metric

CONFIGS = ROOT / "configs"
TABLES = CONFIGS / "paper" / "tables.yml"
COSTS = ROOT / "studies" / "paper_tables" / "costs.json"
RESULTS = ROOT / "studies" / "paper_tables" / "results"


#: The metric of a column; its title is that of a metafile, and ``{}`` the task in the table's or mmdet's words.
COLUMNS = {
    "AP": Metric("{} AP", "coco/{}_mAP", 100, 1),
    "AP50": Metric("", "coco/{}_mAP_50", 100, 1),
    "AP75": Metric("", "coco/{}_mAP_75", 100, 1),
    "APS": Metric("", "coco/{}_mAP_s", 100, 1),
    "APM": Metric("", "coco/{}_mAP_m", 100, 1),
    "APL": Metric("", "coco/{}_mAP_l", 100, 1),
    "top-1": Metric("Top 1 Accuracy", "accuracy/top1", digits=2),
    "top-5": Metric("Top 5 Accuracy", "accuracy/top5", digits=2),
    "mIoU": Metric("mIoU", "mIoU", digits=2),
    "pixel accuracy": Metric("pixel accuracy", "aAcc", digits=2),
    "L1 (%)": Metric("l1", "inpainting/l1", digits=2),
    "PSNR (dB)": Metric("PSNR", "inpainting/psnr", digits=2),
}
TASKS = {"box": "bbox", "mask": "segm"}


def figure(column: str, value: Any) -> str:
    """A figure with the paper's digits; empty where there is none."""
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.{COLUMNS[column].digits if column in COLUMNS else 1}f}"


@dataclass(frozen=True)
class Row:
    """One method of a table."""

    method: str  # in the table's words
    config: str  # a file below ``configs/``, or ``mmdet::...``
    paper: list[list[Any]]  # one list a line
    counted: bool = True  # whether the forward pass's FLOPs are counted; parameters always are

    @property
    def path(self) -> str:
        """The config as our tools take it, from the root of the project."""
        return self.config if "::" in self.config else f"configs/{self.config}"


@dataclass(frozen=True)
class Table:
    """One table: its number, title, the data it was measured on, its columns, rows and a note."""

    table: int
    title: str
    data: str
    columns: list[str]
    rows: list[Row]
    note: str = ""

    def measured(self, line: list[Any], metrics: dict[str, float]) -> dict[str, float]:
        """What ``metrics``, of tools/test.py, hold for the columns of one line of the table."""
        task, found = TASKS[self.task(line)], {}
        for name in self.columns:
            column = COLUMNS.get(name)
            if column and (value := metrics.get(column.logged.format(task))) is not None:
                found[name] = value * column.unit
        return found

    def task(self, line: list[Any]) -> str:
        """The task of one line of a table of detectors."""
        return line[0] if self.columns[0] == "task" else "box"

    @property
    def lines(self) -> list[tuple[Row, list[Any]]]:
        """Every line with its row."""
        return [(row, line) for row in self.rows for line in row.paper]


def read_tables() -> dict[int, Table]:
    """All tables by number."""
    described = yaml.safe_load(TABLES.read_text(encoding="utf-8"))
    tables = [Table(**{**table, "rows": [Row(**row) for row in table["rows"]]}) for table in described]
    return {table.table: table for table in tables}


# ----------------------------------------------------------------------------------------------------------- costs
def digest(config: str) -> str:
    """A digest of a config's text and that of every file of ours that it builds on; a toolbox's counts by its name."""
    if "::" in config:
        return common.digest(config)[:16]
    return common.digest("", _chain(CONFIGS / config))[:16]


def _chain(path: Path) -> Iterator[Path]:
    """A config file and, in order, the files of ours that its ``_base_`` names."""
    yield path
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", "") == "_base_":
            for node in ast.walk(statement.value):
                if isinstance(node, ast.Constant) and (base := (path.parent / str(node.value)).resolve()).is_file():
                    yield from _chain(base)


def read_costs(path: Path = COSTS) -> dict[str, dict[str, Any]]:
    """What was measured of the built models, by config; empty where nothing was."""
    return read_json(path) if path.is_file() else {}


def known_cost(row: Row, costs: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The cost of a row's model; None where it was not measured, or on another text of its config."""
    cost = costs.get(row.config)
    return cost if cost and cost["digest"] == digest(row.config) else None


def measure(config: str, counted: bool = True) -> dict[str, Any]:
    """Build a config's model; count its parameters and, if ``counted``, one forward pass's FLOPs (multiply-adds).

    Of an inpainting network only the generator counts: the discriminator is there for training alone. ``uncounted``
    lists the operators without a count. Raises UsageError where the config or its model is unusable.
    """
    cfg = bare_models.read_config(config if "::" in config else str(CONFIGS / config))
    shape, model = bare_models.image_shape(cfg), bare_models.build_model(cfg)
    found = bare_models.count_model(cfg, model, shape) if counted else None
    return {
        "digest": digest(config),
        "shape": list(shape),
        "parameters": sum(parameter.numel() for parameter in getattr(model, "generator", model).parameters()),
        "flops": found.flops[""] if found else None,
        "uncounted": sorted(found.uncounted) if found else [],
    }


# --------------------------------------------------------------------------------------------------------- results
def result_file(row: Row, folder: Path = RESULTS) -> Path:
    """Where our result is kept: ``{"config": ..., "metrics": {...}}``, the same for the same config in every table."""
    return folder / (re.sub(r"[^\w.-]+", "_", row.config.removesuffix(".py")) + ".json")
