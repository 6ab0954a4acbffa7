"""What all studies share: the project's root, and how they print and write."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from carafe_plugin.engine.atomic import AtomicLocalBackend

ROOT = Path(__file__).resolve().parents[1]

console = Console(highlight=False, soft_wrap=True)


def text_table(
    title: str, headings: Sequence[str], lines: Iterable[Sequence[str]], left: Collection[str], caption: str = ""
) -> Table:
    """A table for a console; the columns ``left`` are left-justified and may be wrapped."""
    table = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    table.caption = caption or None
    for name in headings:
        table.add_column(name, justify="left" if name in left else "right", overflow="fold", no_wrap=name not in left)
    for line in lines:
        table.add_row(*line)
    return table


def markdown_table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """The same in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [headings, ["---"] * len(headings), *lines])


def print_errors(lines: Iterable[str]) -> None:
    """Print each line as an error."""
    for line in lines:
        console.print(f"error: {line}", style="red", markup=False)


def shown(path: Path) -> str:
    """The path relative to the root if it is inside; the tools run there."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def duration(seconds: float) -> str:
    """A time for people: ``3 min 05 s``."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def write_json(path: Path, content: Any) -> None:
    """Write all of ``content`` or nothing; missing folders are made."""
    AtomicLocalBackend().put_text(json.dumps(content, indent=2) + "\n", path)
