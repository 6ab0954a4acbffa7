"""The support matrix: what is committed is of this version, and which rows the command runs; no environment is made."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("mmengine", reason="the command runs on what make env installs: mmengine is not installed")
pytest.importorskip("rich", reason="the command runs on what make env installs: rich is not installed")

from carafe_plugin._version import __version__
from carafe_plugin.engine.errors import UsageError
from release import environment, matrix, rows
from release.environment import Environment, RowFailure, Setup
from release.matrix import Matrix
from release.rows import BUILDER, ROWS, Row

PUBLISHED = {
    "3.10": ["2.14.1", "2.11.0", "2.10.0", "2.4.1", "2.1.2"],
    "3.11": ["2.15.0", "2.14.1", "2.11.0", "2.10.0", "2.4.1", "2.4.0", "2.1.2"],
    "3.12": ["2.15.0", "2.11.0", "2.10.1", "2.6.0"],
    "3.13": ["2.15.0", "2.9.1"],
    "3.14": ["2.15.0"],
}
RECORDS = json.loads(matrix.RECORDS.read_text())
by_name = {row.name: row for row in ROWS}


# ------------------------------------------------------------------------------------------------ what is committed
def test_the_committed_table_is_of_this_version():
    assert [*RECORDS] == [row.name for row in ROWS], "run make matrix"
    versions = {name: record["package"] for name, record in RECORDS.items()}
    assert set(versions.values()) == {__version__}, f"run make matrix: {versions}"
    assert {record["status"] for record in RECORDS.values()} == {"passed"}
    assert matrix.PAGE.read_text().split("\n")[2].startswith(f"carafe_plugin {__version__} ")


def test_the_committed_pages_are_those_of_the_records():
    assert rows.page(RECORDS) == matrix.PAGE.read_text(), "run make matrix"
    assert rows.in_readme(matrix.README.read_text(), RECORDS) == matrix.README.read_text(), "run make matrix"


def test_the_later_rows_are_of_one_wheel():
    wheels = {r["wheel_sha256"] for n, r in RECORDS.items() if by_name[n].build == "wheel" and "wheel_sha256" in r}
    assert wheels <= {RECORDS[BUILDER.name].get("wheel_sha256")}


# ---------------------------------------------------------------------------------------------------- which rows run
@pytest.fixture
def world(tmp_path):
    """A matrix whose rows cost nothing: what ran, what each is to give, what the index has, and a new Matrix of it."""
    state = SimpleNamespace(
        ran=[], faults={}, sources="s1", wheel=b"wheel 1", interpreters=[*PUBLISHED], published=dict(PUBLISHED)
    )

    def run_row(setup: Setup):
        state.ran.append((setup.row.name, setup.torch, setup.python))
        fault = state.faults.get(setup.row.name)
        if isinstance(fault, Exception):
            raise fault
        folder = setup.folder / ("wheel" if setup.row == BUILDER else "dist")
        wheel = setup.wheel or folder / f"{setup.row.build}.whl"
        if setup.wheel is None:
            folder.mkdir(parents=True, exist_ok=True)
            wheel.write_bytes(state.wheel)
        found = dict(torch=f"{setup.torch}+cu130", python=f"{setup.python}.7", numpy="2.1.0", build=setup.row.build)
        found |= dict(wheel=wheel.name, wheel_sha256=environment.sha256(wheel), commit="abc", processor="fast")
        found |= dict(passed=5, skipped={"no GPU": 2}, is_compiled=True, torch_compile=True, opcheck=True)
        return found | dict(status="failed" if fault else "passed", failures=[fault] if fault else [])

    def make():
        return Matrix(
            run_row,
            lambda python: state.published.get(python, []),
            {python: Path(f"/usr/bin/python{python}") for python in state.interpreters},
            lambda: state.sources,
            tmp_path / "build",
            tmp_path / "support.json",
            tmp_path / "support.md",
            tmp_path / "README.md",
        )

    def run(rows=ROWS, again=False):
        state.ran.clear()
        good = make().run(rows, again, keep=False)
        return good, [name for name, *_ in state.ran]

    (tmp_path / "README.md").write_text(f"# Read\n\n{rows.START}of an earlier form\n{rows.END}\n## More\n")
    state.readme = tmp_path / "README.md"
    state.make, state.run, state.page = make, run, tmp_path / "support.md"
    return state


NAMES = [row.name for row in ROWS]
WHEEL_ROWS = [row.name for row in ROWS if row.build in ("stable", "wheel")]


def test_all_rows_run_once_with_the_versions_that_there_are(world):
    assert world.run() == (True, NAMES)
    versions = {name: (torch, python) for name, torch, python in world.ran}
    assert versions["torch 2.4, Python 3.11"] == ("2.4.1", "3.11")
    assert versions["torch 2.10, Python 3.11"] == ("2.10.0", "3.11")
    assert versions["torch newest, Python 3.10"] == ("2.14.1", "3.10")
    assert versions["torch newest, Python 3.11"] == ("2.15.0", "3.11")
    assert versions["torch newest, Python newest"] == ("2.15.0", "3.14")
    written = world.page.read_text()
    shown = world.readme.read_text()
    assert shown.startswith(f"# Read\n\n{rows.START}\n| torch | Python | operators | torch.compile | tests |\n| --- |")
    assert (
        "| 2.15.0 (newest) | 3.14.7 (newest) | the wheel of torch 2.10, as it is | yes | 5 passed, 2 skipped |" in shown
    )
    assert shown.endswith(f"|\n\n{rows.END}\n## More\n")
    world.page.write_text("of an earlier form")
    world.readme.write_text(shown.replace("2.15.0", "2.14.0"))
    assert world.run() == (True, [])
    assert (world.page.read_text(), world.readme.read_text()) == (written, shown)
    assert world.run(again=True) == (True, NAMES)


@pytest.mark.parametrize("text", ["", rows.START, rows.END + rows.START, (rows.START + rows.END) * 2])
def test_a_readme_without_a_place_for_the_table_is_left_alone(text):
    with pytest.raises(
        UsageError, match=r"^README\.md must have the lines <!-- Support matrix.*, once each, in this order$"
    ):
        rows.in_readme(text, {})


def test_2_1_is_not_2_10(world):
    """The beginning of a version ends at a dot."""
    world.published["3.11"] = ["2.10.0", "2.1.2"]
    assert world.make().resolve(Row("2.1", "3.11", "ATen")) == ("2.1.2", "3.11")
    assert world.make().resolve(Row("newest", "3.11", "ATen")) == ("2.10.0", "3.11")


def test_a_version_that_there_is_not(world):
    world.published["3.11"] = ["2.15.0"]
    with pytest.raises(UsageError, match=re.escape("the package index has no torch 2.10 for Python 3.11")):
        world.make().resolve(BUILDER)


def test_finished_rows_outlive_a_crash(world):
    world.faults["torch 2.9, Python 3.13"] = RuntimeError("power cut")
    with pytest.raises(RuntimeError):
        world.run()
    assert list(world.make().records) == NAMES[:3]
    assert "power cut" not in world.page.read_text()
    world.faults.clear()
    assert world.run() == (True, NAMES[3:])


def test_a_failing_row_is_written_and_runs_again(world):
    name = "torch 2.6, Python 3.12"
    world.faults[name] = "ops.test_carafe::test_one: assert 1 < 0 | more"
    assert world.run() == (False, NAMES)
    assert world.make().records[name]["status"] == "failed"
    assert r"| torch 2.6, Python 3.12 | ops.test_carafe::test_one: assert 1 &lt; 0 \| more |" in world.page.read_text()
    assert "| 5 passed, 1 failed, 2 skipped |" in world.page.read_text()
    world.faults.clear()
    assert world.run() == (True, [name])
    assert "assert" not in world.page.read_text()


def test_other_sources_and_other_versions_run_again(world, monkeypatch):
    world.run()
    world.sources = "s2"
    assert world.run(rows=ROWS[:2]) == (True, NAMES[:2])
    monkeypatch.setattr(matrix, "__version__", "9.9")
    assert world.make().why(ROWS[0]) == f"of version {__version__}"
    assert world.run() == (True, NAMES)


def test_a_newer_torch_runs_again(world):
    world.run()
    world.published["3.13"] = ["2.16.0", "2.9.1"]
    assert world.run() == (True, ["torch newest, Python newest"])
    assert world.ran[0][1:] == ("2.16.0", "3.13")


def test_one_wheel_serves_all_later_rows(world):
    """Where it is lost or of other sources it is built again first, and the rows of the last one are to run."""
    assert world.run(rows=[by_name["torch 2.11, Python 3.12"]]) == (True, [BUILDER.name, "torch 2.11, Python 3.12"])
    world.run()
    (found,) = (world.make().folder / "wheel").iterdir()
    assert environment.sha256(found) == world.make().records["torch 2.11, Python 3.12"]["wheel_sha256"]
    found.unlink()
    assert world.run() == (True, [])  # nothing needs it
    world.wheel = b"wheel 2"
    assert world.run(rows=ROWS[5:6], again=True) == (True, [BUILDER.name, NAMES[5]])
    assert [row.name for row in ROWS if world.make().why(row) == "another wheel"] == NAMES[6:]
    assert world.run() == (True, NAMES[6:])


def test_no_wheel_no_row(world):
    world.faults[BUILDER.name] = "the package does not build: error: no member named"
    assert world.run() == (False, NAMES[:5])
    assert list(world.make().records) == NAMES[:5]


def test_a_row_without_an_interpreter_is_not_run(world):
    world.interpreters.remove("3.14")
    assert world.run() == (True, NAMES[:-1])
    assert "| not run: no Python 3.14 here | - |" in world.page.read_text()
    world.interpreters.append("3.14")
    assert world.run() == (True, NAMES[-1:])
    world.interpreters.remove("3.14")
    world.sources = "s2"
    world.run()
    assert world.make().records[NAMES[-1]]["status"] == "passed"  # of other sources, and better than nothing
    assert world.make().why(ROWS[-1]) == "other sources"


# ------------------------------------------------------------------------------------------------------------- parts
REPORT = """<testsuites><testsuite name="pytest">
<testcase classname="tests.ops.test_compile" name="test_it"/>
<testcase classname="tests.ops.test_autograd" name="test_opcheck[2]">{opcheck}</testcase>
<testcase classname="tests.ops.test_carafe" name="test_b"><failure message="assert 1 == 2&#10; where"/></testcase>
<testcase classname="" name="tests.ops.test_c"><error message="ImportError: no"/></testcase>
<testcase classname="tests.modules.test_d" name="test_d"><skipped message="no  mmcv"/></testcase>
<testcase classname="tests.modules.test_d" name="test_e"><skipped message="no mmcv"/></testcase>
</testsuite></testsuites>"""


@pytest.mark.parametrize("opcheck", [True, False])
def test_what_a_report_says(opcheck, tmp_path):
    file = tmp_path / "report.xml"
    file.write_text(REPORT.format(opcheck="" if opcheck else '<skipped message="from torch 2.4 on"/>'))
    found = environment.read_report(file)
    assert found["passed"] == 1 + opcheck
    assert found["failures"] == ["tests.ops.test_carafe::test_b: assert 1 == 2", "::tests.ops.test_c: ImportError: no"]
    assert found["skipped"] == {"no mmcv": 2} | ({} if opcheck else {"from torch 2.4 on": 1})
    assert found["torch_compile"] is True
    assert found["opcheck"] is opcheck


def test_a_report_of_nothing_is_a_failure(tmp_path):
    file = tmp_path / "report.xml"
    file.write_text("<testsuites><testsuite/></testsuites>")
    assert environment.read_report(file)["failures"] == ["no test has passed"]


@pytest.mark.parametrize(
    ("log", "free", "reason"),
    [
        ("ERROR: ... OSError: [Errno 28] No space left on device", 3, "the disk is full (9 GB are needed"),
        ("Killed", 0.001, "the disk is full"),
        (
            "WARNING: Retrying ... NewConnectionError\nERROR: no match (from versions: none)",
            99,
            "the package index cannot",
        ),
        ("Collecting torch\nERROR: torch-2.whl is not a supported wheel\n", 99, "ERROR: torch-2.whl is not a"),
    ],
)
def test_why_pip_failed(log, free, reason):
    assert environment.pip_reason(log, free).startswith(reason)


def test_many_failures_are_counted():
    failures = [f"test_{number}: no" for number in range(23)]
    assert rows.first_failures(dict(failures=failures)) == [*failures[:20], "and 3 more"]
    assert rows.first_failures(dict(failures=failures[:20])) == failures[:20]


def test_a_full_disk_is_a_line_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "free_gb", lambda folder: 2.5)
    setup = Setup(ROWS[0], "2.1.2", "3.10", Path(sys.executable), tmp_path)
    with pytest.raises(UsageError, match=r"^the disk is full: 2\.5 GB are free in .*, 9 GB are needed$"):
        environment.run_row(setup)
    assert not list(tmp_path.iterdir())


def answer(monkeypatch, stdout, stderr):
    """Let every process print this."""
    done = subprocess.CompletedProcess([], 0, stdout, stderr)
    monkeypatch.setattr(matrix.subprocess, "run", lambda *_, **__: done)


def test_no_network_is_a_line(monkeypatch):
    """What the machine has on its disk is not what there is."""
    answer(monkeypatch, "Available versions: 2.1.0\n", "WARNING: Retrying (Retry(total=0, connect=None))")
    with pytest.raises(UsageError, match=r"^no list of torch's versions: the package index cannot be reached"):
        matrix.published_versions("3.11")


def test_versions_of_the_index(monkeypatch):
    answer(monkeypatch, "torch (2.2.0)\nAvailable versions: 2.2.0, 2.1.0+cpu, 2.1.0\n  INSTALLED: 2.11.0\n", "")
    assert matrix.published_versions("3.11") == ["2.2.0", "2.1.0"]
    answer(monkeypatch, "", "ERROR: No matching distribution found for torch\n")
    assert matrix.published_versions("3.99") == []


def test_interpreters(tmp_path, monkeypatch):
    """One that does not run is passed over on the PATH and named where it was given."""
    shim = tmp_path / "python3.10"
    shim.write_text("#!/bin/sh\necho 'pyenv: python3.10: command not found' >&2\nexit 127\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    found = matrix.find_interpreters([])
    assert shim not in found.values()
    assert f"{sys.version_info[0]}.{sys.version_info[1]}" in found
    with pytest.raises(UsageError, match=r"^--python .*python3\.10: pyenv: python3\.10: command not found$"):
        matrix.find_interpreters([shim])
    with pytest.raises(UsageError, match=r"^--python .*/absent: does not run"):
        matrix.find_interpreters([tmp_path / "absent"])


def test_the_hash_is_of_all_that_a_row_runs(tmp_path):
    names = ("setup.py", "csrc/cpu/a.h", "carafe_plugin/ops/b.py", "tests/ops/c.py")
    for name in (*names, "carafe_plugin/openmmlab/d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    first = environment.hash_sources(tmp_path)
    seen = {first}
    for name in names:
        (tmp_path / name).write_text("changed")
        seen.add(environment.hash_sources(tmp_path))
    assert len(seen) == 5
    last = environment.hash_sources(tmp_path)
    (tmp_path / "carafe_plugin/openmmlab/d.py").write_text("changed")
    assert environment.hash_sources(tmp_path) == last


@pytest.fixture
def this_python(tmp_path):
    """An environment whose interpreter is this one."""
    made = Environment(tmp_path, tmp_path / "log")
    made.log.touch()
    made.python = Path(sys.executable)
    return made


def test_what_a_process_prints_last_is_the_answer_or_the_failure(this_python):
    assert this_python.ask("import json; print('noise'); print(json.dumps([1]))") == [1]
    with pytest.raises(RowFailure, match=r"^ImportError: undefined symbol$"):
        this_python.ask("raise ImportError('undefined symbol')")


def test_the_first_error_of_the_last_command_is_the_failure(this_python, tmp_path, monkeypatch):
    this_python.run(sys.executable, "-c", "print('error: of another command')")
    code = "print('a.cpp:3: error: no member named b'); print('error: failed building wheel'); raise SystemExit(1)"
    run = this_python.run
    monkeypatch.setattr(this_python, "run", lambda *_, **__: run(sys.executable, "-c", code))
    with pytest.raises(RowFailure, match=r"^the package does not build: a\.cpp:3: error: no member named b$"):
        this_python.build(Setup(ROWS[0], "2.1.2", "3.10", Path(sys.executable), tmp_path))
    with pytest.raises(RowFailure, match=r"^a\.whl does not install: a\.cpp:3: error: no member named b$"):
        this_python.install(Path("a.whl"))


def test_a_row_sees_nothing_of_the_calling_environment(this_python, monkeypatch):
    """Neither a backend that is asked for, nor packages of another environment, nor a machine's choice of versions."""
    for name in ("CARAFE_BACKEND", "PYTHONPATH", "TORCH_CUDA_ARCH_LIST", "PIP_CONSTRAINT"):
        monkeypatch.setenv(name, "/elsewhere")
    names = '"CARAFE_BACKEND", "PYTHONPATH", "TORCH_CUDA_ARCH_LIST", "PIP_CONSTRAINT", "CARAFE_CUDA"'
    found = this_python.ask(f"import json, os; print(json.dumps([os.environ.get(n) for n in ({names})]))")
    assert found == [None, None, None, str(this_python.folder / "no-constraints.txt"), "0"]


def test_rows_by_torch_python_or_both():
    assert matrix.select(["2.1.2", "2.11/3.12"]) == [ROWS[0], ROWS[5]]
    assert matrix.select(["3.10"]) == [row for row in ROWS if row.python == "3.10"]
    assert matrix.select(["newest/newest"]) == [ROWS[-1]]


@pytest.mark.parametrize("words", [["3.9"], ["2.1.2", "2.11/3.11"]])
def test_versions_that_no_row_has(words, capsys):
    assert matrix.main(["--list", "--only", *words]) == 2
    expected = "error: --only: expected versions of torch, of Python, or both, among 2.1.2/3.10, 2.4/3.11, "
    assert expected in capsys.readouterr().err


def test_list_asks_nobody(capsys, monkeypatch):
    monkeypatch.setattr(matrix, "published_versions", lambda python: pytest.fail("asked"))
    assert matrix.main(["--list", "--only", "2.1.2", "2.11"]) == 0
    output = capsys.readouterr().out
    assert "2.1.2" in output
    assert "2.11" in output
    assert "2.6" not in output


def test_one_at_a_time_and_an_interrupt_is_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(matrix, "FOLDER", tmp_path)

    def meanwhile(*_, **__):
        assert matrix.main([]) == 2
        raise KeyboardInterrupt

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(Matrix, "run", meanwhile)
    assert matrix.main([]) == 130
    output = capsys.readouterr()
    assert output.err == f"error: another matrix is running in {tmp_path}\n"
    assert "Interrupted. The same command resumes from here." in output.out


def test_a_full_disk_in_the_middle_is_a_line(tmp_path, capsys, monkeypatch):
    def write(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(matrix, "FOLDER", tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(Matrix, "run", write)
    assert matrix.main([]) == 2
    assert capsys.readouterr().err == "error: the disk is full: [Errno 28] No space left on device\n"
