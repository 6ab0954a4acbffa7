#!/usr/bin/env python
"""Print the paper's tables: its figures, each row's config, parameters and FLOPs of the built model, and our results.

    $ python -m studies.paper_tables
    $ python -m studies.paper_tables --table 4 --table 6
    $ python -m studies.paper_tables --measure --write
    $ python -m studies.paper_tables --record configs/paper/table-04_upsampling/gum.py work_dirs/gum/TIME/TIME.json

configs/paper/tables.yml lists the rows. ``--write`` puts its figures wherever they are repeated: docs/paper_tables.md,
the marked tables of the READMEs in configs/, and the results in the metafiles beside them. Parameters and FLOPs come
from studies/paper_tables/costs.json, which ``--measure`` brings up to date: it builds every model whose config has
changed and counts one forward pass over one image (a multiply-add is one FLOP; a detector's heads on 1000 boxes, a mask
head on 100; the generator of an inpainting network). Our results are the files in studies/paper_tables/results, which
``--record`` writes from what tools/test.py logs; a row without one shows the paper's figures alone.

Exit code: 0, or 2 when an argument is invalid.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from carafe_plugin.engine.atomic import AtomicLocalBackend
from carafe_plugin.engine.cli import run_tool
from carafe_plugin.engine.console import progress_bar, table_console, text_table
from carafe_plugin.engine.errors import UsageError, read_json
from studies.common import shown, write_json
from studies.paper_tables import rows as paper_rows
from studies.paper_tables.pages import PAGE, cells, headings, markdown, pages, title
from studies.paper_tables.rows import Row, Table


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    numbers = paper_rows.read_tables()
    parser.add_argument("--table", type=int, action="append", choices=numbers, help="this table alone; may be repeated")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown")
    parser.add_argument("--write", action="store_true", help="update docs/paper_tables.md, READMEs and metafiles")
    parser.add_argument("--measure", action="store_true", help="count the models of changed configs")
    parser.add_argument(
        "--record",
        nargs=2,
        metavar=("CONFIG", "JSON"),
        help="keep the metrics that tools/test.py logged for a config as our result",
    )
    parser.add_argument("--costs", type=Path, default=paper_rows.COSTS, help="file of parameters and FLOPs")
    parser.add_argument("--results", type=Path, default=paper_rows.RESULTS, help="folder of our results")
    return parser.parse_args(argv)


def measure(rows: list[Row], costs: dict[str, dict[str, Any]], path: Path) -> None:
    """Count the models that are not known yet; the file is written after each, so that nothing is lost."""
    missing = {row.config: row.counted for row in rows if not paper_rows.known_cost(row, costs)}
    with progress_bar("counting") as progress:
        for config in progress.track(missing):
            costs[config] = paper_rows.measure(config, missing[config])
            write_json(path, dict(sorted(costs.items())))


def record(config: str, source: Path, tables: dict[int, Table], folder: Path) -> Path:
    """Keep a file's metrics as our result; UsageError where no table has the config or none of its metrics is there."""
    wanted = os.path.relpath(Path(config).absolute(), paper_rows.CONFIGS) if "::" not in config else config
    lines = [(table, row, line) for table in tables.values() for row, line in table.lines if row.config == wanted]
    if not lines:
        raise UsageError(f"--record: {config} is not the config of a row in {paper_rows.TABLES}")
    metrics = read_json(source)
    try:
        found = {key for table, _, line in lines for key in table.measured(line, metrics)}
    except (ValueError, TypeError) as error:
        raise UsageError(f"--record: {source} holds no metrics of tools/test.py: {error}") from error
    if not found:
        raise UsageError(f"--record: {source} has none of the metrics of the row of {config}")
    path = paper_rows.result_file(lines[0][1], folder)
    write_json(path, {"config": lines[0][1].path, "metrics": metrics})
    return path


def paper_tables(args: argparse.Namespace) -> None:
    tables = paper_rows.read_tables()
    for name in ("markdown", "costs"):
        path = getattr(args, name)
        if path and not path.absolute().parent.is_dir():
            raise UsageError(f"--{name}: no folder {path.parent} to write {path.name} into")
    if args.table and (args.write or (args.markdown and args.markdown.resolve() == PAGE)):
        option = "--write" if args.write else f"--markdown {args.markdown}"
        raise UsageError(f"{option} writes all tables into {shown(PAGE)}: leave out --table")
    chosen = [table for number, table in tables.items() if not args.table or number in args.table]
    if args.record:
        print(f"Written: {record(args.record[0], Path(args.record[1]), tables, args.results)}")
    costs = paper_rows.read_costs(args.costs)
    if args.measure:
        measure([row for table in chosen for row in table.rows], costs, args.costs)
    console = table_console()
    left = ("method", "task", "ours", "config")
    for table in chosen:
        lines = cells(table, costs, args.results)
        console.print(text_table(title(table), headings(table), lines, left, table.note))
    if any(not paper_rows.known_cost(row, costs) for table in chosen for row in table.rows):
        console.print("?: not counted since its config changed; --measure counts it.")
    if args.markdown:
        args.markdown.write_text(markdown(chosen, costs, args.results), encoding="utf-8")
    if args.write:
        for page, text in pages(tables, costs, args.results).items():
            if not page.is_file() or page.read_text(encoding="utf-8") != text:
                AtomicLocalBackend().put_text(text, page)
                print(f"Written: {shown(page)}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(paper_tables, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
