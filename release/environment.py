"""One row of the support matrix: its virtual environment, the package built or installed there, and its tests."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from carafe_plugin.engine.console import duration
from carafe_plugin.engine.errors import UsageError
from release.rows import ROOT, TESTS, Record, Row, in_readme, numbers

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
    edited = _first_line("git", "status", "--porcelain", "--", *(f":(glob){source}" for source in SOURCES))
    commit = (_first_line("git", "rev-parse", "--short", "HEAD") or "unknown") + (", edited" if edited else "")
    record: Record = dict(status="failed", failures=[], commit=commit, processor=_processor(), build=setup.row.build)
    try:
        environment = Environment(folder, log)
        _copy(PACKAGED, environment.source)  # now: while pip is at work, somebody may edit them
        readme = environment.source / "README.md"
        readme.write_text(in_readme(readme.read_text(), {}))  # it is in the wheel, which no earlier result may change
        _copy(BESIDE_TESTS, environment.checkout)
        environment.create(setup)
        try:
            record.update(environment.versions())
            wheel = setup.wheel or environment.build(setup)
            record.update(wheel=wheel.name, wheel_sha256=sha256(wheel))
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
        numpy = "numpy<2" if numbers(setup.torch) < (2, 3) else "numpy"
        packages = [f"torch=={setup.torch}", numpy, *_test_tools()]
        if setup.wheel is None:
            packages += ["setuptools>=77,<82", "wheel"]
        if self.pip("install", "--no-cache-dir", "--no-compile", "--progress-bar", "off", *packages):
            reason = pip_reason(self.log.read_text(errors="replace"), free_gb(self.folder))
            raise UsageError(f"installing torch {setup.torch} failed: {reason}; pip's output is in {self.log}")

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


def pip_reason(log: str, free: float) -> str:
    """Why pip has failed, in a few words (tools/setup_env.sh says the same)."""
    if "No space left on device" in log or free < 0.01:
        return f"the disk is full ({NEEDED_GB} GB are needed in build/matrix and in TMPDIR)"
    network = r"from versions: none|Max retries|Retry\(total=0|Could not fetch|NewConnectionError|NameResolutionError"
    network += r"|ProxyError|ConnectTimeout|SSLError|Connection (broken|reset|aborted|refused)|RemoteDisconnected"
    network += r"|IncompleteRead|[Tt]imed out"
    if re.search(network, log):
        return "the package index cannot be reached, or a download broke off"
    errors = re.findall(r"^.*\berror\b.*$", log, re.IGNORECASE | re.MULTILINE)
    return (errors or log.splitlines() or ["no output"])[-1].strip()


def _check_disk(folder: Path) -> None:
    if (free := free_gb(folder)) < NEEDED_GB:
        raise UsageError(f"the disk is full: {free:.1f} GB are free in {folder}, {NEEDED_GB} GB are needed")


def free_gb(folder: Path) -> float:
    """The room that is left on a folder's disk."""
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


def hash_sources(root: Path = ROOT) -> str:
    """A digest of all that a row's result depends on."""
    files = {
        path.relative_to(root): path
        for pattern in SOURCES
        for found in root.glob(pattern)
        for path in (found.rglob("*") if found.is_dir() else [found])
        if path.suffix in (".py", ".h", ".cpp", ".cu")
    }
    found = hashlib.sha256("\n".join(map(str, sorted(files))).encode())
    for name in sorted(files):
        found.update(files[name].read_bytes())
    return found.hexdigest()[:16]


def sha256(path: Path) -> str:
    """A file's digest."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
