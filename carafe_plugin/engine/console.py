"""What commands print: tables that a file or a pipe gets whole, and progress in terminals alone."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn


def table_console(width: int = 190) -> Console:
    """A console as wide as the terminal, or ``width`` characters in a file or a pipe, which get whole tables."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def progress_bar(task: str, amount: ProgressColumn | None = None) -> Progress:
    """A progress bar on stderr, empty where that is not a terminal; by default it shows a count."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = (TextColumn(task), BarColumn(), amount or MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
