"""What a user can mend, and how a command tells it from a bug."""

from __future__ import annotations

import codecs
import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class UsageError(Exception):
    """Something that the user can put right; the message says what was expected, what came, and where."""


class ProcessError(UsageError):
    """What one process of a distributed run has found and the others may not have: it says so, whatever its rank."""


class CheckpointError(UsageError):
    """A checkpoint cannot be used; the message says which file and why."""


def note(text: str) -> None:
    """Say on stderr, in a line, what a command goes on with and what it has not looked at."""
    print(f"note: {text}", file=sys.stderr)


@contextmanager
def reading_named_files() -> Iterator[None]:
    """Turn a missing file into a :class:`UsageError`, around code that opens what a configuration or option names.

    A missing file that this package's engine wanted for itself is a bug, and keeps its traceback.
    """
    try:
        yield
    except FileNotFoundError as error:
        _, _, *below = traceback.walk_tb(error.__traceback__)  # this frame, and the one with the code that is guarded
        modules = [str(frame.f_globals.get("__name__")) for frame, _ in below]
        modules = [name for name in modules if name.partition(".")[0] not in sys.stdlib_module_names]
        if modules and modules[-1].startswith("carafe_plugin.engine."):
            raise
        if error.filename:
            raise UsageError(f"no such file or folder: {Path(error.filename).absolute()}") from error
        # From a data loader's worker, with the worker's traceback in its text: the last line is the error.
        raise ProcessError((str(error).strip() or "a file is missing").splitlines()[-1]) from error


def check_no_mark(path: Path) -> None:
    """Raise a UsageError for a file that begins with a byte order mark, as some editors and PowerShell write it: no
    toolbox reads on past it. What is wrong otherwise is for whoever reads all of the file.
    """
    try:
        with path.open("rb") as file:
            marked = file.read(3).startswith(_MARKS)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    if marked:
        raise UsageError(f"{path} begins with a byte order mark: save it as UTF-8 without one")


def read_text(path: Path) -> str:
    """Read a file in UTF-8. Raises UsageError where it cannot be read, or is of another encoding."""
    check_no_mark(path)
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"cannot read {path} ({path.stat().st_size} bytes; not UTF-8): {error}") from error


def read_json(path: Path) -> Any:
    """Read a JSON file in UTF-8. Raises UsageError, which says where in the file, if it cannot be read."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        size = path.stat().st_size
        raise UsageError(f"cannot read {path} ({size} bytes; truncated, or not JSON): {error}") from error
