"""The support matrix: the tests of operators and modules beside one torch and Python after another, on the CPU.

    $ make matrix                                     # the rows that never ran, failed, or are of other sources
    $ python -m release.matrix --list                 # the rows, and why one is to run
    $ python -m release.matrix --only 2.1.2 3.10      # those with this torch or this Python, whatever their records say
    $ python -m release.matrix --python ~/python3.15/bin/python3.15

Each row is a fresh virtual environment in build/matrix, 3 to 7 GB, which is deleted after it: torch, what the tests
need, and this package as a wheel. Before torch 2.10 the wheel is compiled there, against ATen; beside torch 2.10 the
one for all later versions is compiled, against LibTorch's stable ABI, and later rows install that very file. Results go
into docs/support.json after every row, from which docs/support.md is written; the same command continues where an
earlier one stopped. Interpreters are found on the PATH (python3.10 and so on), among pyenv's, and by --python; a row
without one is not run. What torch and which Python are the newest, the package index tells.

Exit code: 0; 1 where a row has failed, or the network or the disk does not allow to go on; 2 when an argument is
invalid; 130 when interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from carafe_plugin._version import __version__
from carafe_plugin.engine.console import table_console
from carafe_plugin.engine.errors import UsageError
from studies.common import ROOT, digest, duration, markdown_table, print_errors, shown, text_table, write_json
from studies.demo.run import alone_in, guarded

console = table_console()
NEWEST = "newest"
FOLDER = ROOT / "build" / "matrix"
RECORDS, PAGE = ROOT / "docs" / "support.json", ROOT / "docs" / "support.md"
# Of tests/csrc nothing: its hosts are compiled without torch and are the same in every row.
TESTS = ("tests/ops", "tests/modules")
# What the tests import or read beside them. Not the package itself: they shall find the installed one.
BESIDE_TESTS = ("tests", "csrc", "pyproject.toml")
PACKAGED = (
    *("carafe_plugin", "configs", "csrc", "tools", "setup.py", "pyproject.toml", "MANIFEST.in"),
    *("README.md", "LICENSE", "CHANGELOG.md", "model-index.yml"),
)
# What a row's result depends on. Adapters, configs and tools are installed and not run.
SOURCES = (
    *("setup.py", "csrc", "carafe_plugin/*.py", "carafe_plugin/ops", "carafe_plugin/modules", *TESTS),
    *("tests/conftest.py", "tests/hide_openmmlab.py", "tests/toolkit.py", "tests/support/covering.py"),
)
NEEDED_GB = 9
TEST_TIMEOUT = 90 * 60  # seconds; five minutes are usual on two idle cores
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


@dataclass(frozen=True)
class Setup:
    """What a row runs on: exact versions, the interpreter, and the wheel that it installs."""

    row: Row
    torch: str
    python: str
    interpreter: Path
    folder: Path
    wheel: Path | None = None  # for rows that build none
    keep: bool = False


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
    records: dict[str, Record] = field(init=False)

    def __post_init__(self) -> None:
        found = json.loads(self.records_file.read_text()) if self.records_file.exists() else {}
        self.records = {row.name: found[row.name] for row in ROWS if row.name in found}
        self.published = cache(self.published)

    def resolve(self, row: Row) -> tuple[str, str]:
        """The versions of torch and Python that a row asks for today."""
        python = row.python
        if python == NEWEST:
            python = max(self._pythons_of_newest(), key=_numbers)
        versions = self.published(python)
        fitting = [v for v in versions if row.torch == NEWEST or f"{v}.".startswith(f"{row.torch}.")]
        if not fitting:
            raise UsageError(f"the package index has no torch {row.torch} for Python {python}")
        return max(fitting, key=_numbers), python

    def _pythons_of_newest(self) -> list[str]:
        """The Pythons for which there is the newest torch of all."""
        newest: dict[str, str] = {}
        minor = 10
        while versions := self.published(f"3.{minor}"):
            newest[f"3.{minor}"] = max(versions, key=_numbers)
            minor += 1
        if not newest:
            raise UsageError("the package index has no torch for Python 3.10 or later")
        last = max(newest.values(), key=_numbers)
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
        return found[0] if len(found) == 1 and _sha256(found[0]) == expected else None

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
                    print_errors([f"{row.name}: there is no wheel of {BUILDER.name} to install"])
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
            print_errors(first_failures(record))
        self.page_file.write_text(page(self.records))  # also where no row has run: its words may be new
        return good

    def _stable_wheel(self) -> Path | None:
        """The wheel, unless it has to be built: its row failed, or is of other sources."""
        return None if self.why(BUILDER) else self.wheel()

    def _without_interpreter(self, row: Row, python: str) -> None:
        console.print(f"matrix: {row.name}: not run: no Python {python} here", style="yellow")
        if self.records.get(row.name, {}).get("package") != __version__:
            self._put(row, dict(status="not run", reason=f"no Python {python} here", package=__version__))

    def _put(self, row: Row, record: Record) -> None:
        """Record a row, and write the page anew."""
        self.records = {
            each.name: record if each == row else self.records[each.name]
            for each in ROWS
            if each == row or each.name in self.records
        }
        write_json(self.records_file, self.records)
        self.page_file.write_text(page(self.records))


# ------------------------------------------------------------------------------------------------------------ one row
class RowFailure(Exception):
    """The package does not build, install or import here; the message is a line."""


def run_row(setup: Setup) -> Record:
    """Make the environment, build or install the package, run the tests; what was found."""
    folder = setup.folder / "environment"
    _check_disk(setup.folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = setup.folder / f"{re.sub('[^0-9a-z.]+', '-', setup.row.name.lower())}.log"
    log.unlink(missing_ok=True)
    edited = _first_line("git", "status", "--porcelain", "--", *SOURCES)
    commit = (_first_line("git", "rev-parse", "--short", "HEAD") or "unknown") + (", edited" if edited else "")
    record: Record = dict(status="failed", failures=[], commit=commit, processor=_processor(), build=setup.row.build)
    try:
        environment = Environment(folder, log)
        _copy(PACKAGED, environment.source)  # now: while pip is at work, somebody may edit them
        _copy(BESIDE_TESTS, environment.checkout)
        environment.create(setup)
        try:
            record.update(environment.versions())
            wheel = setup.wheel or environment.build(setup)
            record.update(wheel=wheel.name, wheel_sha256=_sha256(wheel))
            if setup.wheel is None:
                record["compiler"] = _first_line(*(shlex.split(os.environ.get("CXX", "")) or ["c++"]), "--version")
            environment.install(wheel)
            record["is_compiled"] = environment.is_compiled()
            record.update(environment.test())
        except RowFailure as failure:
            record["failures"].append(str(failure))
        record["status"] = "failed" if record["failures"] else "passed"
    finally:
        if not setup.keep:
            shutil.rmtree(folder, ignore_errors=True)
    return record


class Environment:
    """A virtual environment, and the folders beside it in which a row works."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder, self.log = folder, log
        self.python = folder / "venv" / "bin" / "python"
        self.source, self.checkout = folder / "source", folder / "checkout"

    def run(self, *command: str | Path, cwd: Path | None = None, timeout: float | None = None, **variables: str) -> int:
        """Run a command, its output into the log; returns its exit code."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("CARAFE_", "PYTHON", "TORCH", "VIRTUAL_ENV"))}
        constraints = self.folder / "no-constraints.txt"  # a machine's own would choose other versions
        constraints.touch()
        fixed = dict(
            PATH=os.pathsep.join([str(self.python.parent), os.environ["PATH"]]),
            PIP_CONSTRAINT=str(constraints),
            PIP_DISABLE_PIP_VERSION_CHECK="1",
            PIP_NO_INPUT="1",
            CARAFE_CUDA="0",
            CUDA_VISIBLE_DEVICES="-1",
        )
        words = [str(word) for word in command]
        with self.log.open("a") as log:
            log.write(f"\n$ {shlex.join(words)}\n")
            log.flush()
            done = subprocess.run(
                words, cwd=cwd, env={**kept, **fixed, **variables}, stdout=log, stderr=log, timeout=timeout, check=False
            )
        return done.returncode

    def ask(self, code: str) -> Any:
        """The JSON that Python code prints last."""
        before = self.log.stat().st_size
        if self.run(self.python, "-c", code, cwd=self.folder) != 0:
            raise RowFailure(self._last_line())
        with self.log.open() as log:
            log.seek(before)
            return json.loads(log.read().splitlines()[-1])

    def pip(self, *arguments: str | Path) -> int:
        return self.run(self.python, "-m", "pip", *arguments, cwd=self.folder)

    def create(self, setup: Setup) -> None:
        """Torch, and what building and testing need; a UsageError where they cannot be had."""
        if self.run(setup.interpreter, "-m", "venv", self.folder / "venv"):
            raise UsageError(
                f"{setup.interpreter} -m venv does not work: {self._last_line()}; its output is in {self.log}"
            )
        # torch 2.1 and 2.2 were compiled for numpy 1.
        numpy = "numpy<2" if _numbers(setup.torch) < (2, 3) else "numpy"
        packages = [f"torch=={setup.torch}", numpy, *_test_tools()]
        if setup.wheel is None:
            packages += ["setuptools>=77,<82", "wheel"]
        if self.pip("install", "--no-cache-dir", "--no-compile", "--progress-bar", "off", *packages):
            reason = pip_reason(self.log.read_text(errors="replace"), _free_gb(self.folder))
            raise UsageError(f"installing torch {setup.torch} failed: {reason}; pip's output is in {shown(self.log)}")

    def versions(self) -> Record:
        code = "import json, platform, numpy, torch; print(json.dumps(dict(python=platform.python_version(), "
        return self.ask(code + "torch=torch.__version__, numpy=numpy.__version__)))")

    def build(self, setup: Setup) -> Path:
        """The wheel, compiled here from the copied sources; that of the stable ABI is kept for other rows."""
        target = self.folder / "dist"
        if setup.row.build == "stable":
            target = setup.folder / "wheel"
            shutil.rmtree(target, ignore_errors=True)
        # A constant time in the archive: the same sources and tools give the same file.
        options = ("--no-deps", "--no-build-isolation", "--no-cache-dir", "--wheel-dir", target, self.source)
        if self.run(self.python, "-m", "pip", "wheel", *options, cwd=self.folder, SOURCE_DATE_EPOCH="315619200"):
            raise RowFailure(f"the package does not build: {self._error_line()}")
        (wheel,) = target.glob("*.whl")
        if setup.row.build == "stable" and "-abi3-" not in wheel.name:
            raise RowFailure(f"expected a wheel for every Python, cp310-abi3, the build gave {wheel.name}")
        return wheel

    def install(self, wheel: Path) -> None:
        if self.pip("install", "--no-deps", "--no-index", wheel):
            raise RowFailure(f"{wheel.name} does not install: {self._error_line()}")

    def is_compiled(self) -> bool:
        """Whether the compiled operators serve; RowFailure with what their import says."""
        code = "import os; os.environ['CARAFE_BACKEND'] = 'compiled'; import json, carafe_plugin; "
        return self.ask(code + "print(json.dumps(carafe_plugin.is_compiled()))")

    def test(self) -> Record:
        """Run the tests against what is installed; their copy has no package beside it."""
        report, work = self.folder / "report.xml", self.folder / "work"
        work.mkdir()
        (site,) = (self.folder / "venv" / "lib").glob("python3.*/site-packages")
        options: list[str | Path] = ["-q", "-n", "2", "--dist", "loadfile", "-m", "not cuda", "-p", "no:cacheprovider"]
        options += ["-p", "hide_openmmlab", "-o", "pythonpath=", f"--junitxml={report}"]
        variables = dict(
            PYTHONPATH=os.pathsep.join([str(self.checkout / "tests"), str(self.checkout / "tests" / "support")]),
            CARAFE_EXPECTED_FOLDER=str(site),
            TORCHINDUCTOR_CACHE_DIR=str(self.folder / "inductor"),
        )
        paths = [self.checkout / name for name in TESTS]
        try:
            code = self.run(self.python, "-m", "pytest", *options, *paths, cwd=work, timeout=TEST_TIMEOUT, **variables)
        except subprocess.TimeoutExpired:
            raise RowFailure(f"the tests did not end in {duration(TEST_TIMEOUT)}") from None
        if not report.exists():
            raise RowFailure(f"pytest ended with the exit code {code}: {self._error_line()}")
        found = read_report(report)
        if code not in (0, 1) or (code == 1 and not found["failures"]):
            found["failures"].append(f"pytest ended with the exit code {code}: {self._last_line()}")
        return found

    def _lines(self) -> list[str]:
        """What the last command has printed."""
        output = self.log.read_text(errors="replace").rpartition("\n$ ")[2]
        return [line.strip() for line in output.splitlines() if line.strip()]

    def _last_line(self) -> str:
        return self._lines()[-1]

    def _error_line(self) -> str:
        """The first error, which led to the others."""
        errors = [line for line in self._lines()[1:] if re.search(r"(^|[^a-z])error\b", line, re.IGNORECASE)]
        return errors[0] if errors else self._last_line()


def read_report(report: Path) -> Record:
    """What pytest's JUnit report says: counts, reasons of skips, failed tests with their first line."""
    passed, skipped, failures, names = 0, Counter[str](), [], []
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        faults = [*case.findall("failure"), *case.findall("error")]
        skip = case.find("skipped")
        if faults:
            lines = (faults[0].get("message") or faults[0].text or "").splitlines() or [""]
            failures.append(f"{name}: {lines[0]}")
        elif skip is not None:
            skipped[" ".join((skip.get("message") or "no reason").split())] += 1
        else:
            passed += 1
            names.append(name)
    if not passed:
        failures.append("no test has passed")
    return dict(
        passed=passed,
        skipped=dict(sorted(skipped.items())),
        failures=failures,
        torch_compile=any(".test_compile" in name for name in names),
        opcheck=any("opcheck" in name for name in names),
    )


def pip_reason(log: str, free_gb: float) -> str:
    """Why pip has failed, in a few words (tools/setup_env.sh says the same)."""
    if "No space left on device" in log or free_gb < 0.01:
        return f"the disk is full ({NEEDED_GB} GB are needed in build/matrix and in TMPDIR)"
    network = r"from versions: none|Max retries|Retry\(total=0|Could not fetch|NewConnectionError|NameResolutionError"
    network += r"|ProxyError|ConnectTimeout|SSLError|Connection (broken|reset|aborted|refused)|RemoteDisconnected"
    network += r"|IncompleteRead|[Tt]imed out"
    if re.search(network, log):
        return "the package index cannot be reached, or a download broke off"
    errors = re.findall(r"^.*\berror\b.*$", log, re.IGNORECASE | re.MULTILINE)
    return (errors or log.splitlines() or ["no output"])[-1].strip()


def _check_disk(folder: Path) -> None:
    if (free := _free_gb(folder)) < NEEDED_GB:
        raise UsageError(f"the disk is full: {free:.1f} GB are free in {shown(folder)}, {NEEDED_GB} GB are needed")


def _free_gb(folder: Path) -> float:
    return shutil.disk_usage(folder).free / 1e9


def _copy(names: Iterable[str], target: Path) -> None:
    """Copy files and folders of the project, without what was built."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=ignore)
        else:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


def _test_tools() -> list[str]:
    """What the tests need, in the versions that pyproject.toml names, or the last before that an older Python has."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.findall(r'"((?:hypothesis|ninja|pytest|pytest-xdist)(?:==[^"]*)?)"', text)
    return [requirement.replace("==", "<=") for requirement in found]


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
    raise UsageError(f"no list of torch's versions: {pip_reason(done.stderr, _free_gb(ROOT))}")


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


def hash_sources(root: Path = ROOT) -> str:
    """A digest of all that a row's result depends on."""
    files = {
        path.relative_to(root): path
        for pattern in SOURCES
        for found in root.glob(pattern)
        for path in (found.rglob("*") if found.is_dir() else [found])
        if path.suffix in (".py", ".h", ".cpp", ".cu")
    }
    return digest("\n".join(map(str, sorted(files))), (files[name] for name in sorted(files)))[:16]


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.partition("\n")[0].strip()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return f"{found[1] if found else platform.machine()}, {os.cpu_count()} cores"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0]))


# ------------------------------------------------------------------------------------------------------------ the page
BUILDS = {
    "ATen": "compiled there, ATen",
    "stable": "compiled there, stable ABI",
    "wheel": f"the wheel of torch {BUILDER.torch}, as it is",
}
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
        numbers = [record.get("numpy", "-"), BUILDS[row.build]]
        answers = [_answer(record, name) for name in ("is_compiled", "torch_compile", "opcheck")]
        lines.append([*versions, *numbers, *answers, in_words(record), record.get("date", "-")])
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


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


# ------------------------------------------------------------------------------------------------------------ command
def select(words: Sequence[str]) -> list[Row]:
    """The rows whose torch, Python or both ('2.11/3.12') are one of the words."""
    names = [{row.torch, row.python, f"{row.torch}/{row.python}"} for row in ROWS]
    if unknown := [word for word in words if not any(word in each for each in names)]:
        there = ", ".join(f"{row.torch}/{row.python}" for row in ROWS)
        raise ValueError(f"expected versions of torch, of Python, or both, among {there}, got {', '.join(unknown)}")
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
    for python, path in sorted(matrix.interpreters.items(), key=lambda item: _numbers(item[0])):
        console.print(f"Python {python}: {path}")
    for row in ROWS:
        if row.name in chosen and row.python not in (NEWEST, *matrix.interpreters):
            console.print(f"{row.name}: no Python {row.python} here; --python names one", style="yellow")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    description, _, epilog = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="say what is done and what is to do, and stop")
    text = "run the rows of these versions of torch, of Python, or both (2.11/3.12), also where their records stand"
    parser.add_argument("--only", nargs="+", metavar="VERSION", help=text)
    parser.add_argument("--again", action="store_true", help="run all rows, also where their records stand")
    text = "an interpreter; may be repeated (default: python3.x on the PATH, and pyenv's)"
    parser.add_argument("--python", type=Path, action="append", default=[], metavar="PATH", help=text)
    parser.add_argument("--keep", action="store_true", help="leave the last environment in build/matrix/environment")
    args = parser.parse_args(argv)
    try:
        rows = select(args.only) if args.only else list(ROWS)
    except ValueError as error:
        parser.error(f"argument --only: {error}")

    def work() -> int:
        matrix = Matrix(run_row, published_versions, find_interpreters(args.python), hash_sources)
        if args.list:
            show(matrix, rows)
            return 0
        with alone_in(FOLDER, "matrix"):
            good = matrix.run(rows, again=args.again or bool(args.only), keep=args.keep)
        show(matrix, rows)
        return 0 if good else 1

    return guarded(work, FOLDER, RECORDS.parent)


if __name__ == "__main__":
    sys.exit(main())
