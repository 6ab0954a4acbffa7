"""The files that repeat the paper's figures, written from the tables: docs/paper_tables.md, READMEs and metafiles."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from carafe_plugin.engine.console import markdown_table
from carafe_plugin.engine.errors import UsageError, read_json
from studies.common import ROOT, shown
from studies.paper_tables.rows import COLUMNS, CONFIGS, RESULTS, TABLES, Row, Table, figure, known_cost, result_file

PAGE = ROOT / "docs" / "paper_tables.md"
NOT_RUN = "not run"
#: A README's figures stand in a Markdown table between these lines, in the columns whose heading ends in ", paper".
START = "<!-- Columns of the paper's figures: written by `python -m studies.paper_tables --write` -->\n"
END = "<!-- End of the paper's figures -->\n"
#: A table's first column, or the task of a line, -> the task's name in a metafile.
METAFILE_TASKS = {
    "box": "Object Detection",
    "mask": "Instance Segmentation",
    "top-1": "Image Classification",
    "mIoU": "Semantic Segmentation",
    "L1 (%)": "Inpainting",
}

Tables = dict[int, Table]


def pages(tables: Tables, costs: dict[str, dict[str, Any]], results: Path = RESULTS) -> dict[Path, str]:
    """What every file that repeats the paper's figures should contain."""
    readmes = {path: fill_readme(path, tables) for path in sorted(CONFIGS.glob("*/README.md"))}
    metafiles = {path: fill_metafile(path, tables) for path in sorted(CONFIGS.glob("*/metafile.yml"))}
    return {**readmes, **metafiles, PAGE: markdown(tables.values(), costs, results)}


# ----------------------------------------------------------------------------------------------------- the tables
def headings(table: Table) -> list[str]:
    return ["method", *table.columns, "M param.", "GFLOPs", "ours", "config"]


def title(table: Table) -> str:
    return f"Table {table.table}: {table.title} ({table.data})"


def cells(table: Table, costs: dict[str, dict[str, Any]], results: Path) -> Iterator[list[str]]:
    """The lines of a table as texts: method, the paper's figures, parameters, GFLOPs, our result, config."""
    for row in table.rows:
        cost = known_cost(row, costs)
        size = ["?", "?" if row.counted else "-"]
        if cost:
            size[0] = f"{cost['parameters'] / 1e6:.2f}"
        if cost and row.counted:
            size[1] = f"{cost['flops'] / 1e9:.1f}"
        method, path = row.method, row.path
        for line in row.paper:
            figures = [figure(column, value) for column, value in zip(table.columns, line, strict=True)]
            yield [method, *figures, *size, ours(table, row, line, results), path]
            method, path, size = "", "", ["", ""]


def ours(table: Table, row: Row, line: list[Any], results: Path) -> str:
    """Our figures in the order of the table's columns."""
    path = result_file(row, results)
    if not path.is_file():
        return NOT_RUN
    found = table.measured(line, read_json(path)["metrics"])
    columns = (column for column in table.columns if column != "task")
    return " / ".join(f"{found[column]:.2f}" if column in found else "-" for column in columns)


def markdown(tables: Iterable[Table], costs: dict[str, dict[str, Any]], results: Path) -> str:
    parts = [
        "# The paper's tables",
        "The figures are the paper's (arXiv 2012.04733) except in the last columns: parameters and FLOPs are counted "
        "on the built model (a multiply-add is one FLOP; one image of 800 x 1333 for detectors, 512 x 512 for "
        "segmentation, 224 x 224 for classification; for inpainting the generator alone, at 256 x 256), and 'ours' is "
        "what we measured, in the order of the paper's columns. Where the paper leaves a choice, our decision is "
        "documented beside the configs: [configs/paper](../configs/paper/README.md), "
        "[configs/inpainting](../configs/inpainting/README.md).",
        "Written by `python -m studies.paper_tables --write`.",
    ]
    for table in tables:
        lines = [[*line, _link(path)] for *line, path in cells(table, costs, results)]
        parts += [f"## {title(table)}", markdown_table(headings(table), lines)]
        parts += [table.note] if table.note else []
    return "\n\n".join(parts) + "\n"


def _link(path: str) -> str:
    if not path or "::" in path:
        return f"`{path}`" if path else ""
    return f"[{path.removeprefix('configs/')}](../{path})"


# -------------------------------------------------------------------------------------------------------- READMEs
def fill_readme(path: Path, tables: Tables) -> str:
    """A README's text with the paper's figures in its marked tables; a note behind a figure stays.

    Raises UsageError where a row names a toolbox's config that is not in the tables.
    """
    figures = _figures(tables)
    parts = re.split(f"({re.escape(START)}.*?{re.escape(END)})", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for index in range(1, len(parts), 2):
        before, heading, rule, *lines, after = re.split(r"\n(?=\||\n<!)", parts[index])
        names = {place: name.strip() for place, name in enumerate(heading.split("|"))}
        for number, line in enumerate(lines):
            row = line.split("|")
            of_row = figures.get(_config(row[1], path, figures), {})
            for place, name in names.items():
                if name.endswith(", paper"):
                    note = row[place].strip().lstrip("0123456789.")
                    filled = of_row.get(name.removesuffix(", paper"), "") + note
                    row[place] = f" {filled} " if filled else " "
            lines[number] = "|".join(row)
        parts[index] = "\n".join([before, heading, rule, *lines, after])
    return "".join(parts)


def _figures(tables: Tables) -> dict[str, dict[str, str]]:
    """By config, its figures by their names in READMEs, as ``box AP`` or ``mIoU``."""
    found: dict[str, dict[str, str]] = {}
    for table in tables.values():
        for row, line in table.lines:
            for column, value in zip(table.columns, line, strict=True):
                name = f"{table.task(line)} {column}" if column.startswith("AP") else column
                found.setdefault(row.config, {})[name] = figure(column, value)
    return found


def _config(cell: str, readme: Path, figures: dict[str, dict[str, str]]) -> str:
    """The config of a row of a README: what its first cell links to, or a toolbox's by its file name."""
    if link := re.search(r"\]\((.+?)\)", cell):
        return os.path.relpath(readme.parent / link[1], CONFIGS)
    named = [config for config in figures if cell.strip(" `").endswith(config.rpartition("/")[2])]
    if len(named) != 1:
        raise UsageError(f"{shown(readme)}: expected the name of one config of {shown(TABLES)}, got{cell.rstrip()}")
    return named[0]


# ------------------------------------------------------------------------------------------------------- metafiles
_RESULTS = re.compile(r"(    Config: configs/(\S+)\n    Metadata:\n(?:      .+\n)+    Results:)\n(?:      .+\n)+")


def fill_metafile(path: Path, tables: Tables) -> str:
    """The text of a metafile with the paper's figures as the results of every model that has any."""
    return _RESULTS.sub(lambda found: f"{found[1]}\n{_results(found[2], tables)}", path.read_text(encoding="utf-8"))


def _results(config: str, tables: Tables) -> str:
    """A config's figures in the table that says most of it, in the form of a metafile."""
    found = [(table, row) for table in tables.values() for row in table.rows if row.config == config]
    if not found:
        raise UsageError(f"configs/{config} has results in its metafile and is not a row of {shown(TABLES)}")
    table, row = max(found, key=lambda place: len(place[1].paper))
    text = ""
    for line in row.paper:
        task = table.columns[0] if table.columns[0] in METAFILE_TASKS else table.task(line)
        text += f"      - Task: {METAFILE_TASKS[task]}\n"
        text += f"        Dataset: {table.data}, the paper's figures (Table {table.table})\n        Metrics:\n"
        for column, value in zip(table.columns, line, strict=True):
            if name := COLUMNS[column].title.format(task) if column in COLUMNS else "":
                text += f"          {name}: {figure(column, value)}\n"
    return text
