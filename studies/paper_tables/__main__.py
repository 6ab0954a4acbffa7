#!/usr/bin/env python
"""Print the paper's tables: its figures, each row's config, parameters and FLOPs of the built model, and our results.

    $ python -m studies.paper_tables
    $ python -m studies.paper_tables --table 4 --table 6
    $ python -m studies.paper_tables --measure --markdown docs/paper_tables.md
    $ python -m studies.paper_tables --record configs/paper/table-04_upsampling/gum.py work_dirs/gum/TIME/TIME.json

configs/paper/tables.yml lists the rows. Parameters and FLOPs come from studies/paper_tables/costs.json, which
``--measure`` brings up to date: it builds every model whose config has changed and counts one forward pass over one
image (a multiply-add is one FLOP; a detector's heads on 1000 boxes, a mask head on 100). Results of ours are the files
in studies/paper_tables/results, which ``--record`` writes from what tools/test.py logs; a row without one is the
paper's alone.

Exit code: 0, or 2 when something that was given does not fit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table as RichTable

from carafe_plugin.engine.cli import run_tool
from carafe_plugin.engine.errors import UsageError, reading_named_files
from studies.paper_tables import rows as paper_rows
from studies.paper_tables.rows import Row, Table

NOT_RUN = "not run"
TWO_DECIMALS = ("mIoU", "pixel accuracy", "top-1", "top-5")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "paper_tables.md"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--table", type=int, action="append", metavar="N", help="this table alone; may be repeated")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown")
    parser.add_argument("--measure", action="store_true", help="count the models whose configs have changed")
    parser.add_argument(
        "--record",
        nargs=2,
        metavar=("CONFIG", "JSON"),
        help="keep the metrics that tools/test.py logged for a config as our result",
    )
    parser.add_argument("--costs", type=Path, default=paper_rows.COSTS, help="file of parameters and FLOPs")
    parser.add_argument("--results", type=Path, default=paper_rows.RESULTS, help="folder of our results")
    return parser.parse_args(argv)


def cells(table: Table, costs: dict[str, dict[str, Any]], results: Path) -> Iterator[list[str]]:
    """The lines of a table as texts: method, the paper's figures, parameters, GFLOPs, our result, config."""
    for row, line, first in table.lines:
        cost = paper_rows.known_cost(row, costs) if first else None
        size = [f"{cost['parameters'] / 1e6:.2f}" if cost else "?", "-"]
        if row.counted:
            size[1] = f"{cost['flops'] / 1e9:.1f}" if cost else "?"
        yield [
            row.method if first else "",
            *(_figure(column, value) for column, value in zip(table.columns, line, strict=True)),
            *(size if first else ["", ""]),
            ours(table, row, line, results),
            row.path if first else "",
        ]


def _figure(column: str, value: Any) -> str:
    """A figure with the paper's digits: two decimals of mIoU, pixel accuracy and top-k, one of AP."""
    if value is None:
        return ""
    return f"{value:.2f}" if column in TWO_DECIMALS and not isinstance(value, str) else str(value)


def ours(table: Table, row: Row, line: list[Any], results: Path) -> str:
    """Our figures in the order of the table's columns."""
    metrics = paper_rows.read_metrics(row, results)
    if metrics is None:
        return NOT_RUN
    found = table.measured(line, metrics)
    return " / ".join(
        f"{found[column]:.2f}" if column in found else "-" for column in table.columns if column != "task"
    )


def headings(table: Table) -> list[str]:
    return ["method", *table.columns, "M param.", "GFLOPs", "ours", "config"]


def title(table: Table) -> str:
    return f"Table {table.table}: {table.title} ({table.data})"


def show(table: Table, lines: list[list[str]], console: Console) -> None:
    """Print one table."""
    view = RichTable(title=title(table), title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    view.caption = table.note or None
    for name in headings(table):
        left = name in ("method", "task", "ours", "config")
        view.add_column(name, justify="left" if left else "right", overflow="fold", no_wrap=not left)
    for line in lines:
        view.add_row(*line)
    console.print(view)


def markdown(tables: list[tuple[Table, list[list[str]]]]) -> str:
    """All tables as one page."""
    parts = [
        "# The paper's tables",
        "The figures are the paper's (arXiv 2012.04733) but for the last columns: parameters and FLOPs are counted on "
        "the built model (a multiply-add is one FLOP; one image of 800 x 1333 for detectors, 512 x 512 for "
        "segmentation, 224 x 224 for classification), and 'ours' is what we measured, in the order of the paper's "
        "columns. What was decided where the paper leaves a choice stands beside the configs: "
        "[configs/paper](../configs/paper/README.md).",
        "Written by `python -m studies.paper_tables --markdown docs/paper_tables.md`.",
    ]
    for table, lines in tables:
        parts.append(f"## {title(table)}")
        names = headings(table)
        rows = [names, ["---"] * len(names), *(line[:-1] + [_link(line[-1])] for line in lines)]
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
        if table.note:
            parts.append(table.note)
    return "\n\n".join(parts) + "\n"


def _link(path: str) -> str:
    if not path or "::" in path:
        return f"`{path}`" if path else ""
    return f"[{path.removeprefix('configs/')}](../{path})"


def measure(rows: list[Row], costs: dict[str, dict[str, Any]], path: Path) -> None:
    """Count the models that are not known yet; the file is written after each, so that nothing is lost."""
    missing = {row.config: row.counted for row in rows if not paper_rows.known_cost(row, costs)}
    for config in track(missing, "Counting", transient=True, disable=not sys.stdout.isatty()):
        costs[config] = paper_rows.measure(config, missing[config])
        write_json(path, dict(sorted(costs.items())))


def record(config: str, source: Path, tables: dict[int, Table], folder: Path) -> Path:
    """Keep the metrics in ``source`` as our result of a config.

    Raises:
        UsageError: The config is no row's, or the file holds none of the metrics of its tables.
    """
    wanted = os.path.relpath(Path(config).absolute(), paper_rows.CONFIGS) if "::" not in config else config
    lines = [(table, row, line) for table in tables.values() for row, line, _ in table.lines if row.config == wanted]
    if not lines:
        raise UsageError(f"--record: {config} is the config of no row in {paper_rows.TABLES}")
    try:
        with reading_named_files():
            metrics = json.loads(source.read_text(encoding="utf-8"))
        found = {key for table, _, line in lines for key in table.measured(line, metrics)}
    except (ValueError, TypeError) as error:
        raise UsageError(f"--record: {source} holds no metrics of tools/test.py: {error}") from error
    if not found:
        raise UsageError(f"--record: {source} has none of the metrics of the row of {config}")
    path = paper_rows.result_file(lines[0][1], folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"config": lines[0][1].path, "metrics": metrics})
    return path


def write_json(path: Path, content: Any) -> None:
    """Write all of it or nothing."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def paper_tables(args: argparse.Namespace) -> None:
    """Do what the command line says."""
    tables = paper_rows.read_tables()
    unknown = sorted(set(args.table or ()) - tables.keys())
    if unknown:
        raise UsageError(f"--table: expected one of {', '.join(map(str, tables))}, got {unknown[0]}")
    for name in ("markdown", "costs"):
        path = getattr(args, name)
        if path and not path.absolute().parent.is_dir():
            raise UsageError(f"--{name}: no folder {path.parent} to write {path.name} into")
    chosen = [table for number, table in tables.items() if not args.table or number in args.table]
    if args.record:
        print(f"Written: {record(args.record[0], Path(args.record[1]), tables, args.results)}")
    if args.markdown and args.table and args.markdown.resolve() == PAGE:
        raise UsageError(f"--markdown {args.markdown} is the page of all tables: leave out --table")
    costs = paper_rows.read_costs(args.costs)
    if args.measure:
        measure([row for table in chosen for row in table.rows], costs, args.costs)
    console = Console() if Console().is_terminal else Console(width=190)
    filled = [(table, list(cells(table, costs, args.results))) for table in chosen]
    for table, lines in filled:
        show(table, lines, console)
    if any(not paper_rows.known_cost(row, costs) for table in chosen for row in table.rows):
        console.print("?: not counted since its config changed; --measure counts it.")
    if args.markdown:
        args.markdown.write_text(markdown(filled), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_tool(paper_tables, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
