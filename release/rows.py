"""The rows of the support matrix, and what docs/support.md and README.md show of their records."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carafe_plugin._version import __version__
from carafe_plugin.engine.console import markdown_table
from carafe_plugin.engine.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
NEWEST = "newest"
# Of tests/csrc nothing: its hosts are compiled without torch and are the same in every row.
TESTS = ("tests/ops", "tests/modules")
Record = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """An environment: the beginning of a torch version, or 'newest'; a Python, or the newest that this torch has."""

    torch: str
    python: str
    build: str  # 'ATen': compiled here; 'stable': compiled here for all later ones; 'wheel': that one, as it is

    @property
    def name(self) -> str:
        return f"torch {self.torch}, Python {self.python}"


ROWS = (
    Row("2.1.2", "3.10", "ATen"),
    Row("2.4", "3.11", "ATen"),
    Row("2.6", "3.12", "ATen"),
    Row("2.9", "3.13", "ATen"),
    Row("2.10", "3.11", "stable"),
    Row("2.11", "3.12", "wheel"),
    Row(NEWEST, "3.10", "wheel"),
    Row(NEWEST, "3.11", "wheel"),
    Row(NEWEST, NEWEST, "wheel"),
)
(BUILDER,) = (row for row in ROWS if row.build == "stable")
BUILDS = {
    "ATen": "compiled there, ATen",
    "stable": "compiled there, stable ABI",
    "wheel": f"the wheel of torch {BUILDER.torch}, as it is",
}
START, END = "<!-- Support matrix: written by `make matrix` -->\n", "<!-- End of the support matrix -->\n"
HEADINGS = ("torch", "Python", "numpy", "operators", "compiled", "torch.compile", "opcheck", "tests", "date")


def in_words(record: Record) -> str:
    """The tests' outcome."""
    if record["status"] == "not run":
        return f"not run: {record['reason']}"
    if "passed" not in record:
        return "failed before the tests"
    failed = f", {len(record['failures'])} failed" if record["failures"] else ""
    return f"{record['passed']} passed{failed}, {sum(record['skipped'].values())} skipped"


def first_failures(record: Record) -> list[str]:
    """The first of many."""
    failures, more = record["failures"][:20], len(record["failures"]) - 20
    return [*failures, f"and {more} more"] if more > 0 else failures


def table_rows(records: Mapping[str, Record]) -> list[list[str]]:
    """A line for each row."""
    lines = []
    for row in ROWS:
        record = records.get(row.name, dict(status="not run", reason="not yet"))
        versions = []
        for name, asked in (("torch", row.torch), ("python", row.python)):
            newest = f" ({NEWEST})" if asked == NEWEST and name in record else ""
            versions.append(record.get(name, asked).partition("+")[0] + newest)
        middle = [record.get("numpy", "-"), BUILDS[row.build]]
        answers = [_answer(record, name) for name in ("is_compiled", "torch_compile", "opcheck")]
        lines.append([*versions, *middle, *answers, in_words(record), record.get("date", "-")])
    return lines


def _answer(record: Record, name: str) -> str:
    return ("yes" if record[name] else "no") if name in record else "-"


def page(records: Mapping[str, Record]) -> str:
    """docs/support.md."""
    ran = {row: records[row.name] for row in ROWS if records.get(row.name, {}).get("status") in ("passed", "failed")}
    versions = sorted({record["package"] for record in records.values()})
    tests = " and ".join(f"`{name}`" for name in TESTS)
    about = f"""carafe_plugin {", ".join(versions) or __version__} on the CPU. `make matrix` writes this page: each row
    is a fresh virtual environment with torch as the package index has it, this package installed as a wheel, and the
    tests of operators and modules ({tests}), which need no OpenMMLab package. Beside torch 2.1 to 2.9 the wheel is
    compiled against that torch; one wheel, compiled beside torch {BUILDER.torch}, is installed unchanged in all later
    rows. `docs/support.json` has the records."""
    about = textwrap.fill(" ".join(about.split()), 120)
    parts = ["# Support matrix", about, markdown_table(HEADINGS, table_rows(records))]
    if failed := [[row.name, _cell(line)] for row, record in ran.items() for line in first_failures(record)]:
        parts += ["## What failed", markdown_table(["row", "failure"], failed)]
    skips: dict[str, list[str]] = {}
    for row, record in ran.items():
        for reason, count in record.get("skipped", {}).items():
            skips.setdefault(reason, []).append(f"{count} ({row.name})")
    if skips:
        lines = [[_cell(reason), ", ".join(counts)] for reason, counts in sorted(skips.items())]
        parts += ["## What was skipped", markdown_table(["reason", "tests"], lines)]
    if ran:
        lines = [
            [row.name, record["commit"], record["sources"], record.get("compiler", "-"), record.get("wheel", "-")]
            + [record.get("wheel_sha256", "-")[:16], record["processor"]]
            for row, record in ran.items()
        ]
        headings = ["row", "commit", "sources", "compiler", "wheel", "its SHA-256 begins", "processor"]
        parts += ["## What ran where", markdown_table(headings, lines)]
    return "\n\n".join(parts) + "\n"


def in_readme(text: str, records: Mapping[str, Record]) -> str:
    """README.md with the main columns of the table between its two marks."""
    chosen = [HEADINGS.index(name) for name in ("torch", "Python", "operators", "torch.compile", "tests")]
    lines = [[line[place] for place in chosen] for line in (HEADINGS, *table_rows(records))]
    parts = re.fullmatch(f"(.*{re.escape(START)}).*({re.escape(END)}.*)", text, re.DOTALL)
    if parts is None or text.count(START) != 1 or text.count(END) != 1:
        raise UsageError(f"README.md must have the lines {START.strip()} and {END.strip()}, once each, in this order")
    return f"{parts[1]}\n{markdown_table(lines[0], lines[1:])}\n\n{parts[2]}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def numbers(version: str) -> tuple[int, ...]:
    """A version as it is compared."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0]))
