"""What a user can mend, and how a command tells it from a bug."""

from __future__ import annotations

import codecs
import json
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from carafe_plugin.images import shorten

_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_RUN = ("mmengine.runner.runner", "__init__")


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


def construction_fault(error: BaseException) -> str | None:
    """What MMEngine could not build from a configuration, and why, in one line; None where the cause lies elsewhere.

    Whoever wrote the configuration can mend it: an unknown type, a misspelt option, a value that a constructor refuses.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    built = [place for place, frame in enumerate(frames) if _is_building(frame)]
    if not built:
        return None
    place, last = built[-1], frames[-1].f_globals.get("__name__", "")
    known = frames[place].f_locals
    settings = known["args"] if "args" in known else known.get("cfg")
    if isinstance(settings, Mapping):
        kind = known.get("obj_type") or settings.get("type") or "?"
        plain = [f"{key}={_brief(value)}" for key, value in settings.items() if key != "type" and _brief(value)]
        what = f"{getattr(kind, '__name__', kind)}({shorten(plain) if plain else ''})"
    else:
        what = frames[place].f_code.co_name.removeprefix("build_").replace("__init__", "the run")
    reason = error.args[0] if error.args and isinstance(error.args[0], str) else str(error) or type(error).__name__
    reason = f"{reason.partition(' Please check whether')[0]:.500}"  # MMEngine goes on, and may show whole settings
    foreign = place < len(frames) - 1 and not last.startswith("carafe_plugin.")
    return f"{what}: {reason}" + (f" (raised in {last})" if foreign else "")


def _brief(value: Any) -> str:
    """A setting that is a number, a text or a type; of others, nothing."""
    if isinstance(value, Mapping):
        return str(value.get("type", ""))
    return repr(value) if isinstance(value, (str, int, float)) else ""


def _is_building(frame: FrameType) -> bool:
    module, name = str(frame.f_globals.get("__name__")), frame.f_code.co_name
    return module.startswith("mmengine.") and (name.startswith("build_") or (module, name) == _RUN)
