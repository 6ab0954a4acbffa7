"""What all studies share: the project's root, how they print and write, and a folder to themselves."""

from __future__ import annotations

import argparse
import errno
import fcntl
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from carafe_plugin.engine.atomic import AtomicLocalBackend
from carafe_plugin.engine.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Metric:
    """One number of an evaluation: its title, its name in the log of tools/test.py, the value of a logged 1."""

    title: str
    logged: str
    unit: float = 1.0
    digits: int = 3


def print_errors(lines: Iterable[str]) -> None:
    """Print each line as an error."""
    for line in lines:
        console.print(f"error: {line}", style="red", markup=False)


def shown(path: Path) -> str:
    """The path relative to the root if it is inside; the tools run there."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def digest(text: str, files: Iterable[Path] = ()) -> str:
    """A digest of a text and of the contents of files."""
    found = hashlib.sha256(text.encode())
    for file in files:
        found.update(file.read_bytes())
    return found.hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write all of ``content`` or nothing; missing folders are made."""
    AtomicLocalBackend().put_text(json.dumps(content, indent=2) + "\n", path)


@contextmanager
def writing_into(*folders: Path) -> Iterator[None]:
    """Turn an OSError caused by the user's folders or a full disk into a UsageError; others keep their tracebacks."""
    try:
        yield
    except OSError as error:
        named = Path(error.filename or "").absolute()  # in a folder, or above one that cannot be made
        blamed = any(named.is_relative_to(f.absolute()) or f.absolute().is_relative_to(named) for f in folders)
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or (error.filename and blamed):
            raise UsageError(str(error)) from error
        raise


@contextmanager
def alone_in(work_dir: Path, name: str = "demo") -> Iterator[None]:
    """Be the only process that works in a folder; UsageError where another one does."""
    work_dir.mkdir(parents=True, exist_ok=True)
    with (work_dir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another {name} is running in {work_dir}") from None
        yield


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """An argparse type: an integer within bounds."""
    bounds = f"of at least {low}" if high is None else f"from {low} to {high}"

    def parse(text: str) -> int:
        if text.isdecimal() and low <= int(text) and (high is None or int(text) <= high):
            return int(text)
        raise argparse.ArgumentTypeError(f"expected an integer {bounds}, got {text!r}")

    return parse
