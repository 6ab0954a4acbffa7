"""The support matrix: the tests of operators and modules beside one torch and Python after another, on the CPU.

    $ make matrix                                     # the rows that never ran, failed, or are of other sources
    $ python -m release.matrix --list                 # the rows, and why one is to run
    $ python -m release.matrix --only 2.1.2 3.10      # those with this torch or this Python, whatever their records say
    $ python -m release.matrix --python ~/python3.15/bin/python3.15

Each row is a fresh virtual environment in build/matrix, 3 to 7 GB, which is deleted after it: torch, what the tests
need, and this package as a wheel. Before torch 2.10 the wheel is compiled there, against ATen; beside torch 2.10 the
one for all later versions is compiled, against LibTorch's stable ABI, and later rows install that very file. Results go
into docs/support.json after every row, from which docs/support.md and a table in README.md are written; the same
command continues where an earlier one stopped. Interpreters are found on the PATH (python3.10 and so on), among
pyenv's, and by --python; a row without one is not run. What torch and which Python are the newest, the package index
tells.

Exit code: 0; 1 where a row has failed; 2 where an argument is invalid, or the network or the disk does not allow to go
on; 130 when interrupted.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from carafe_plugin._version import __version__
from carafe_plugin.engine.atomic import AtomicLocalBackend
from carafe_plugin.engine.cli import command
from carafe_plugin.engine.console import duration, table_console, text_table
from carafe_plugin.engine.errors import UsageError
from release.environment import Setup, free_gb, hash_sources, pip_reason, run_row, sha256
from release.rows import (
    BUILDER,
    HEADINGS,
    NEWEST,
    ROOT,
    ROWS,
    Record,
    Row,
    first_failures,
    in_readme,
    in_words,
    numbers,
    page,
    table_rows,
)
from studies.common import alone_in

console = table_console()
FOLDER = ROOT / "build" / "matrix"
RECORDS, PAGE, README = ROOT / "docs" / "support.json", ROOT / "docs" / "support.md", ROOT / "README.md"


@dataclass
class Matrix:
    """Where the matrix lies, and what answers its questions; tests put others in the place."""

    run_row: Callable[[Setup], Record]
    published: Callable[[str], list[str]]  # a Python's torch versions, newest first; none: there are none for it
    interpreters: Mapping[str, Path]
    sources: Callable[[], str]  # a digest of today's
    folder: Path = FOLDER
    records_file: Path = RECORDS
    page_file: Path = PAGE
    readme_file: Path = README
    records: dict[str, Record] = field(init=False)

    def __post_init__(self) -> None:
        found = json.loads(self.records_file.read_text()) if self.records_file.exists() else {}
        self.records = {row.name: found[row.name] for row in ROWS if row.name in found}
        self.published = cache(self.published)

    def resolve(self, row: Row) -> tuple[str, str]:
        """The versions of torch and Python that a row asks for today."""
        python = row.python
        if python == NEWEST:
            python = max(self._pythons_of_newest(), key=numbers)
        versions = self.published(python)
        fitting = [v for v in versions if row.torch == NEWEST or f"{v}.".startswith(f"{row.torch}.")]
        if not fitting:
            raise UsageError(f"the package index has no torch {row.torch} for Python {python}")
        return max(fitting, key=numbers), python

    def _pythons_of_newest(self) -> list[str]:
        """The Pythons for which there is the newest torch of all."""
        newest: dict[str, str] = {}
        minor = 10
        while versions := self.published(f"3.{minor}"):
            newest[f"3.{minor}"] = max(versions, key=numbers)
            minor += 1
        if not newest:
            raise UsageError("the package index has no torch for Python 3.10 or later")
        last = max(newest.values(), key=numbers)
        return [python for python, version in newest.items() if version == last]

    def why(self, row: Row, torch: str | None = None) -> str | None:
        """Why a row is to run; None where its record stands. ``torch`` is the version that it asks for today."""
        record = self.records.get(row.name)
        if record is None:
            return "never ran"
        if record["status"] != "passed":
            return "failed" if record["status"] == "failed" else record["reason"]
        if record["package"] != __version__:
            return f"of version {record['package']}"
        if record["sources"] != self.sources():
            return "other sources"
        if torch not in (None, record["torch"].partition("+")[0]):
            return f"there is torch {torch} now"
        if row.build == "wheel" and record["wheel_sha256"] != self.records.get(BUILDER.name, {}).get("wheel_sha256"):
            return "another wheel"
        return None

    def wheel(self) -> Path | None:
        """The wheel of all later versions, if it is still the one of the record."""
        expected = self.records.get(BUILDER.name, {}).get("wheel_sha256")
        found = sorted((self.folder / "wheel").glob("*.whl"))
        return found[0] if len(found) == 1 and sha256(found[0]) == expected else None

    def run(self, rows: Sequence[Row], again: bool, keep: bool) -> bool:
        """Run the rows that are to run; returns whether all of these have a record of success, or no interpreter."""
        good = True
        waiting = list(rows)
        while waiting:
            row = waiting.pop(0)
            torch, python = self.resolve(row)
            if not (again or self.why(row, torch)):
                console.print(f"matrix: {row.name}: done ({self.records[row.name]['date']})")
                continue
            interpreter = self.interpreters.get(python)
            if interpreter is None:
                self._without_interpreter(row, python)
                continue
            wheel = None
            if row.build == "wheel" and (wheel := self._stable_wheel()) is None:
                if BUILDER in rows[: rows.index(row)] and BUILDER not in waiting:
                    _print_error(f"{row.name}: there is no wheel of {BUILDER.name} to install")
                    good = False
                    continue
                waiting[:0] = [BUILDER, row]
                rows = [BUILDER, *rows]
                continue
            setup = Setup(row, torch, python, interpreter, self.folder, wheel, keep)
            start = time.monotonic()
            console.print(f"matrix: {row.name}: torch {torch}, {interpreter}")
            sources = self.sources()
            record = self.run_row(setup)
            record.update(package=__version__, sources=sources, date=time.strftime("%Y-%m-%d"))
            self._put(row, record)
            good &= record["status"] == "passed"
            console.print(f"matrix: {row.name}: {in_words(record)}, {duration(time.monotonic() - start)}")
            for failure in first_failures(record):
                _print_error(failure)
        self._write_pages()  # also where no row has run: their words may be new
        return good

    def _stable_wheel(self) -> Path | None:
        """The wheel, unless it has to be built: its row failed, or is of other sources."""
        return None if self.why(BUILDER) else self.wheel()

    def _without_interpreter(self, row: Row, python: str) -> None:
        console.print(f"matrix: {row.name}: not run: no Python {python} here", style="yellow")
        if self.records.get(row.name, {}).get("package") != __version__:
            self._put(row, dict(status="not run", reason=f"no Python {python} here", package=__version__))

    def _put(self, row: Row, record: Record) -> None:
        """Record a row, and write the pages anew."""
        self.records = {
            each.name: record if each == row else self.records[each.name]
            for each in ROWS
            if each == row or each.name in self.records
        }
        AtomicLocalBackend().put_text(json.dumps(self.records, indent=2) + "\n", self.records_file)
        self._write_pages()

    def _write_pages(self) -> None:
        readme = in_readme(self.readme_file.read_text(), self.records)
        for text, path in ((page(self.records), self.page_file), (readme, self.readme_file)):
            AtomicLocalBackend().put_text(text, path)


# ------------------------------------------------------------------------------------------------- what there is
def published_versions(python: str) -> list[str]:
    """The torch versions that the package index has for a Python such as '3.11'; none where it has none."""
    options = ["--python-version", python, "--only-binary=:all:", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "index", "versions", "torch", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not re.search(r"Retry\(total=0|Could not fetch", done.stderr):
        if found := re.search(r"^Available versions: (.*)$", done.stdout, re.MULTILINE):
            return [version for version in found[1].split(", ") if "+" not in version]
        if "No matching distribution" in done.stderr:
            return []
    raise UsageError(f"no list of torch's versions: {pip_reason(done.stderr, free_gb(ROOT))}")


def find_interpreters(given: Iterable[Path]) -> dict[str, Path]:
    """Usable interpreters by 'major.minor': those given come before the PATH's, and these before pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    on_path = filter(None, (shutil.which(f"python3.{minor}") for minor in range(10, 21)))
    others = [Path(name) for name in on_path] + sorted(pyenv.glob("3.*/bin/python")) + [Path(sys.executable)]
    found: dict[str, Path] = {}
    for candidate in [*given, *others]:
        version, fault = _ask_interpreter(candidate)
        if version:
            found.setdefault(version, candidate.absolute())
        elif candidate in given:
            raise UsageError(f"--python {candidate}: {fault}")
    return found


def _ask_interpreter(path: Path) -> tuple[str | None, str]:
    """Its version, or what keeps it from making an environment in which extensions compile."""
    code = "import ensurepip, os, sys, sysconfig, venv; header = sysconfig.get_paths()['include'] + '/Python.h'\n"
    code += "sys.version_info >= (3, 10) or sys.exit('Python 3.10 or later is needed')\n"
    code += "os.path.exists(header) or sys.exit(f'there is no {header}')\nprint('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([path, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"does not run: {error}"
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or ["does not run"])[-1]
    return done.stdout.strip(), ""


# ------------------------------------------------------------------------------------------------------------ command
def _print_error(line: str) -> None:
    console.print(f"error: {line}", style="red", markup=False)


def select(words: Sequence[str]) -> list[Row]:
    """The rows whose torch, Python or both ('2.11/3.12') are one of the words."""
    names = [{row.torch, row.python, f"{row.torch}/{row.python}"} for row in ROWS]
    if unknown := [word for word in words if not any(word in each for each in names)]:
        there = ", ".join(f"{row.torch}/{row.python}" for row in ROWS)
        raise UsageError(
            f"--only: expected versions of torch, of Python, or both, among {there}, got {', '.join(unknown)}"
        )
    return [row for row, each in zip(ROWS, names, strict=True) if each & set(words)]


def show(matrix: Matrix, rows: Iterable[Row]) -> None:
    """What ran, what is to run and why, and which interpreters there are; asks no package index."""
    chosen = [row.name for row in rows]
    lines = [
        [*line, matrix.why(row) or ""]
        for row, line in zip(ROWS, table_rows(matrix.records), strict=True)
        if row.name in chosen
    ]
    console.print(text_table("", [*HEADINGS, "to run"], lines, left=HEADINGS[:4]))
    for python, path in sorted(matrix.interpreters.items(), key=lambda item: numbers(item[0])):
        console.print(f"Python {python}: {path}")
    for row in ROWS:
        if row.name in chosen and row.python not in (NEWEST, *matrix.interpreters):
            console.print(f"{row.name}: no Python {row.python} here; --python names one", style="yellow")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--list", action="store_true", help="say what is done and what is to do, and stop")
    text = "run the rows of these versions of torch, of Python, or both (2.11/3.12), also where their records stand"
    parser.add_argument("--only", nargs="+", default=[], metavar="VERSION", help=text)
    parser.add_argument("--again", action="store_true", help="run all rows, also where their records stand")
    text = "an interpreter; may be repeated (default: python3.x on the PATH, and pyenv's)"
    parser.add_argument("--python", type=Path, action="append", default=[], metavar="PATH", help=text)
    parser.add_argument("--keep", action="store_true", help="leave the last environment in build/matrix/environment")


def run(args: argparse.Namespace) -> int:
    """Show the rows, or run those that are to run."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        rows = select(args.only) if args.only else list(ROWS)
        matrix = Matrix(run_row, published_versions, find_interpreters(args.python), hash_sources)
        good = True
        if not args.list:
            with alone_in(FOLDER, "matrix"):
                good = matrix.run(rows, again=args.again or bool(args.only), keep=args.keep)
        show(matrix, rows)
        return 0 if good else 1
    except KeyboardInterrupt:
        console.print("Interrupted. The same command resumes from here.", style="yellow")
        return 130
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UsageError(f"the disk is full: {error}") from error
        raise


main = command(run, add_options, __doc__)


if __name__ == "__main__":
    sys.exit(main())
