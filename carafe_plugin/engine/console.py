"""What commands print: tables that a file or a pipe gets whole, and progress in terminals alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table


def table_console(width: int = 190) -> Console:
    """A console as wide as the terminal, or ``width`` characters in a file or a pipe, which get whole tables."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def progress_bar(task: str, amount: ProgressColumn | None = None) -> Progress:
    """A progress bar on stderr, empty where that is not a terminal; by default it shows a count."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = (TextColumn(task), BarColumn(), amount or MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def text_table(
    title: str,
    headings: Sequence[str],
    lines: Iterable[Sequence[str]],
    left: Collection[str],
    caption: str = "",
    frame: box.Box = box.SIMPLE_HEAD,
) -> Table:
    """A table for a console; the columns ``left`` are left-justified and may be wrapped."""
    table = Table(title=title, title_justify="left", caption_justify="left", box=frame)
    table.caption = caption or None
    for name in headings:
        table.add_column(name, justify="left" if name in left else "right", overflow="fold", no_wrap=name not in left)
    for line in lines:
        table.add_row(*line)
    return table


def markdown_table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """The same in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [headings, ["---"] * len(headings), *lines])


def duration(seconds: float) -> str:
    """A time for people: ``3 min 05 s``."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
