"""tools/setup_env.sh with a pip that only says what it is asked for: its steps, and what it says where one fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = "awk basename bash cat df dirname env find grep head mkdir rm sort tail"


@dataclass(frozen=True)
class Family:
    name: str
    venv: str
    newest: int  # Python 3.
    log: str
    steps: tuple[str, ...]  # the first package of each
    mmcv: str
    compiled_mmcv: str
    library: str


ONEDL = Family(
    "onedl",
    ".venv",
    13,
    "build/env.log",
    (
        "setuptools>=80,<82",
        "torch==2.11.0",
        "onedl-mmcv==2.3.6",
        "onedl-mmengine==0.10.12",
        "rich",
        "onnx==1.23.2",
        "-e",
    ),
    "onedl-mmcv==2.3.6",
    "onedl-mmcv==2.3.6",
    "_C.abi3.so",
)
OPENMMLAB = Family(
    "openmmlab",
    ".venv-openmmlab",
    11,
    "build/env-openmmlab.log",
    ("setuptools>=64,<70", "torch==2.1.2", "mmcv-lite==2.1.0", "mmengine==0.10.7", "rich", "-e"),
    "mmcv-lite==2.1.0",
    "mmcv==2.1.0",
    "_C_torch2_1.abi3.so",
)


class Checkout:
    """A folder with the script, an environment in it, and a PATH of its own."""

    def __init__(self, folder: Path, family: Family) -> None:
        self.folder = folder
        self.family = family
        self.venv = folder / family.venv
        self.calls = folder / "calls.txt"
        for name in ("tools", "csrc", "bin"):
            (folder / name).mkdir()
        for name in ("tools/setup_env.sh", "setup.py", "pyproject.toml"):
            shutil.copy(ROOT / name, folder / name)
        for name in PROGRAMS.split():
            program = shutil.which(name)
            assert program, f"{name} is not installed"
            (folder / "bin" / name).symlink_to(program)
        self.program("c++", "exit 0")

    def program(self, name: str, text: str) -> None:
        path = self.folder / name if "/" in name else self.folder / "bin" / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)

    def environment(self, pip: str = "exit 0") -> Path:
        """An environment without any package, whose pip does what ``pip`` says; returns its folder of packages."""
        venv.create(self.venv, symlinks=True)
        python = self.venv / "bin" / "python"
        python.rename(python.with_name("real"))
        note = f'echo "${{PIP_NO_BUILD_ISOLATION-unset}} $*" >> {self.calls}'
        self.program(
            f"{self.family.venv}/bin/python",
            f"""case "$*" in
            "-m pip --version") exit 0 ;;
            "-m pip install"* | "-m pip uninstall"*) {note}; {pip} ;;
            *"sys.version_info[:2]"*) exit 0 ;;
            *) exec {python.with_name("real")} "$@" ;;
            esac""",
        )
        (packages,) = self.venv.glob("lib/python3.*/site-packages")
        return packages

    def run(self, **variables: str) -> subprocess.CompletedProcess:
        environment = dict(PATH=str(self.folder / "bin"), HOME=str(self.folder), TMPDIR=str(self.folder))
        if self.family is not ONEDL:  # which is the default
            environment["FAMILY"] = self.family.name
        script = self.folder / "tools" / "setup_env.sh"
        command = ["bash", str(script)]
        return subprocess.run(command, env=environment | variables, capture_output=True, text=True, timeout=120)

    def installed(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture(params=[ONEDL, OPENMMLAB], ids=lambda family: family.name)
def checkout(tmp_path: Path, request: pytest.FixtureRequest) -> Checkout:
    return Checkout(tmp_path, request.param)


def error(result: subprocess.CompletedProcess) -> str:
    """The only line on stderr, of a script that has failed."""
    assert result.returncode == 1, result.stdout
    (line,) = [line for line in result.stderr.splitlines() if "libGL" not in line]
    assert line.startswith("env: error: "), line
    return line.removeprefix("env: error: ")


def test_steps_and_their_order(checkout: Checkout) -> None:
    checkout.environment()
    result = checkout.run(PIP_NO_BUILD_ISOLATION="1")
    assert result.returncode == 0, result.stderr
    calls = checkout.installed()
    steps = checkout.family.steps
    assert len(calls) == len(steps)
    assert all(f" {name}" in call for name, call in zip(steps, calls, strict=True)), calls
    assert all("(about" in line for line in result.stdout.splitlines() if "installing" in line), result.stdout
    mmcv = calls[steps.index(checkout.family.mmcv)].split()
    # Where its build sees torch it compiles, and what pip has kept may be compiled for another torch.
    assert mmcv[0] == "unset"
    assert "--no-build-isolation" not in mmcv
    assert "--no-cache-dir" in mmcv
    assert result.stdout.splitlines()[-1].startswith("env: ready (Python 3.")


def package(folder: Path, name: str, **modules: str) -> None:
    """Write a package of modules with these texts."""
    (folder / name).mkdir(exist_ok=True)
    for module, text in (("__init__", ""), *modules.items()):
        (folder / name / f"{module}.py").write_text(text)


def test_compiled_mmcv_is_built_beside_torch_and_checked(checkout: Checkout) -> None:
    packages = checkout.environment()
    assert error(checkout.run(MMCV="compiled")) == "mmcv does not import: ModuleNotFoundError: No module named 'mmcv'"
    checkout.calls.unlink()

    package(packages, "mmcv", _ext="raise ImportError('undefined symbol')")
    package(packages, "torch")
    message = error(checkout.run(MMCV="compiled"))
    assert message == "mmcv was compiled, and its operators do not load: ImportError: undefined symbol"
    family = checkout.family
    (first, *again) = [call for call in checkout.installed() if " install " in call and "mmcv" in call]
    assert family.mmcv in first
    assert "--no-build-isolation" not in first
    assert all(
        call.endswith(f"--no-deps --no-build-isolation --force-reinstall {family.compiled_mmcv}") for call in again
    )
    assert ["--no-cache-dir" in call for call in again] == [False, True]
    # Under another name, the same files: what is not compiled goes before, or its removal later would take them along.
    other = [f"unset -m pip uninstall --yes {family.mmcv.split('==')[0]}"] if family is OPENMMLAB else []
    assert [call for call in checkout.installed() if "uninstall" in call] == other
    checkout.calls.unlink()

    package(packages, "mmcv", _ext="")
    assert checkout.run(MMCV="compiled").returncode == 0
    assert not [call for call in checkout.installed() if "mmcv" in call and "--no-build-isolation" in call]


def test_another_compiled_mmcv_is_not_replaced(checkout: Checkout) -> None:
    package(checkout.environment(), "mmcv", _ext="")
    message = error(checkout.run())
    mmcv = checkout.family.mmcv
    assert message.startswith(f"another mmcv is installed here, with its operators, and {mmcv} would replace")
    assert not [call for call in checkout.installed() if "mmcv" in call]


def test_an_environment_without_pip_is_kept(checkout: Checkout) -> None:
    packages = checkout.environment()
    (packages / "precious.py").touch()
    python = checkout.venv / "bin" / "python"
    python.write_text(python.read_text().replace('"-m pip --version") exit 0', '"-m pip --version") exit 1'))
    python.write_text(python.read_text().replace("*) exec", '"-m ensurepip") exit 0 ;;\n*) exec'))
    assert checkout.run().returncode == 0
    assert (packages / "precious.py").exists()


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
            "the disk is full",
        ),
        (
            "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(...)': /simple/torch/\n"
            "ERROR: No matching distribution found for setuptools<82,>=80",
            "the package index cannot be reached, or a download broke off",
        ),
        # what pip makes of half a file
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "the package index cannot be"),
        (
            "pip._vendor.urllib3.exceptions.ProtocolError: IncompleteRead(5 read, 9 expected)",
            "the package index cannot",
        ),
        (
            "note\nERROR: No matching distribution found for torch\nhint",
            "ERROR: No matching distribution found for torch",
        ),
    ],
)
def test_what_pip_cannot_do_is_one_line(checkout: Checkout, says: str, reason: str) -> None:
    (checkout.folder / "says.txt").write_text(f"{says}\n")
    checkout.environment(pip=f"cat {checkout.folder / 'says.txt'}; exit 1")
    message = error(checkout.run())
    assert message.startswith(f"installing the build tools failed: {reason}")
    assert message.endswith(f"; pip's output is in {checkout.family.log}; make env resumes from here")
    assert (checkout.folder / checkout.family.log).read_text() == f"{says}\n"


@pytest.mark.parametrize("version", ["3.9.2", "newest + 1"])
def test_other_pythons_are_refused(checkout: Checkout, version: str) -> None:
    version = version.replace("newest + 1", f"3.{checkout.family.newest + 1}.0")
    major, minor, _ = version.split(".")
    # What the script asks, answered for that version.
    real = f'exec {sys.executable} -c "import sys; sys.version_info = ({major}, {minor}, 0); $2"'
    checkout.program("python3", f'case "$1" in --version) echo "Python {version}" ;; -c) {real} ;; *) exit 1 ;; esac')
    expected = f"Python 3.10 to 3.{checkout.family.newest} is needed, found Python {version} as python3"
    assert error(checkout.run()) == expected
    assert error(checkout.run(CARAFE_ENV="current")) == expected
    assert not checkout.venv.exists()


def test_no_python_at_all(checkout: Checkout) -> None:
    needed = f"Python 3.10 to 3.{checkout.family.newest} is needed"
    assert error(checkout.run()) == f"{needed}, and no python3 was found"
    assert error(checkout.run(CARAFE_ENV="current")) == "CARAFE_ENV=current: no python3 on the PATH"


def test_without_a_compiler_the_reference_serves(checkout: Checkout) -> None:
    checkout.environment()
    (checkout.folder / "bin" / "c++").unlink()
    result = checkout.run()
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if "reference" in line]
    assert line == (
        "env: carafe_plugin is not compiled and runs on its slower PyTorch reference: "
        "no C++ compiler (c++) on the PATH (Debian: g++)"
    )
    assert checkout.installed()[-1].endswith("-e .")
    message = error(checkout.run(MMCV="compiled"))
    assert message == "mmcv cannot be compiled: no C++ compiler (c++) on the PATH (Debian: g++)"


def installed(packages: Path, requirement: str, *files: str) -> Path:
    """Write what tells of an installed package; without INSTALLER, of one whose installation broke off."""
    name, version = requirement.split("==")
    folder = packages / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    for file in ("METADATA", *files):
        (folder / file).write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


def test_what_was_interrupted_is_installed_again(checkout: Checkout) -> None:
    packages = checkout.environment()
    torch, mmcv = checkout.family.steps[1:3]
    installed(packages, torch)
    installed(packages, mmcv, "INSTALLER")
    result = checkout.run()
    assert f"env: installing again what was interrupted: {torch.replace('==', '-')}" in result.stdout
    calls = "\n".join(checkout.installed())
    assert torch in calls
    assert f" {mmcv}" not in calls


def test_wrong_wish(checkout: Checkout) -> None:
    checkout.environment()
    assert error(checkout.run(MMCV="yes")) == "MMCV must be 'compiled' or unset, got 'yes'"
    assert error(checkout.run(FAMILY="mmlab")) == "FAMILY must be 'onedl' or 'openmmlab', got 'mmlab'"
    assert checkout.installed() == []


def test_families_are_not_mixed(checkout: Checkout) -> None:
    """They import under the same names: what is installed of the one would be written over by the other."""
    (other,) = {ONEDL, OPENMMLAB} - {checkout.family}
    name = other.steps[3].split("==")[0]
    installed(checkout.environment(), other.steps[3], "INSTALLER")
    assert error(checkout.run()) == (
        f"{name} is of the other family than FAMILY={checkout.family.name}: use another environment, or "
        f"FAMILY={other.name}"
    )
    assert checkout.installed() == []


def test_no_step_brings_other_versions_than_the_familys(checkout: Checkout) -> None:
    """Such as numpy 2, which torchvision's or a tool's own requirement may bring, beside a torch that knows numpy 1."""
    seen = checkout.folder / "constraints.txt"
    checkout.environment(pip=f'[ "$6" = --constraint ] && cat "$7" >> {seen}')
    assert checkout.run().returncode == 0
    constraints = seen.read_text().splitlines()
    steps = len(checkout.family.steps)
    assert constraints.count(checkout.family.mmcv) == len(checkout.installed()) == steps
    of_numpy_1 = [line for line in constraints if line.startswith(("numpy==1.", "opencv-python==4.11."))]
    assert len(of_numpy_1) == (2 * steps if checkout.family is OPENMMLAB else 0)


def test_libraries_have_an_environment_above_the_others(checkout: Checkout) -> None:
    """Its own packages come first, those of the environment below are seen, and nothing is installed twice."""
    checkout.environment()
    above = checkout.folder / ".venv-libraries"
    venv.create(above, symlinks=True)
    (above / "bin" / "python").rename(above / "bin" / "real")
    checkout.program(
        ".venv-libraries/bin/python",
        f"""case "$*" in
        "-m pip install"*) echo "libraries $*" >> {checkout.calls} ;;
        *) exec {above / "bin" / "real"} "$@" ;;
        esac""",
    )
    if checkout.family is OPENMMLAB:
        assert error(checkout.run(LIBRARIES="yes")) == "LIBRARIES=yes needs FAMILY=onedl, got 'openmmlab'"
        return
    (packages,) = checkout.venv.glob("lib/python3.*/site-packages")
    (packages / "below.py").write_text("name = 'below'")
    (packages / "below.pth").write_text(str(checkout.folder / "bin"))
    result = checkout.run(LIBRARIES="yes")
    assert result.returncode == 0, result.stderr
    (installed_there,) = [call for call in checkout.installed() if call.startswith("libraries")]
    assert "timm==" in installed_there
    assert "ultralytics==" in installed_there
    code = f"import below, sys; print(below.name, {str(checkout.folder / 'bin')!r} in sys.path)"
    seen = subprocess.run([above / "bin" / "real", "-c", code], capture_output=True, text=True)
    assert seen.stdout.split() == ["below", "True"], seen.stderr


@pytest.mark.parametrize("installed_mmcv", ["mmcv", "compiled_mmcv"])
def test_mmcv_that_is_there_is_kept(checkout: Checkout, installed_mmcv: str) -> None:
    packages = checkout.environment()
    installed(packages, getattr(checkout.family, installed_mmcv), "INSTALLER")
    package(packages, "mmcv", _ext="")
    assert checkout.run().returncode == 0
    assert not [call for call in checkout.installed() if call.endswith(checkout.family.mmcv)]


def test_a_package_built_from_here_is_not_built_again(checkout: Checkout) -> None:
    packages = checkout.environment()
    information = installed(packages, "carafe_plugin==0.1", "INSTALLER")
    (information / "RECORD").write_text("carafe_plugin-0.1.dist-info/RECORD,,\n")
    (checkout.folder / "carafe_plugin").mkdir()
    library = checkout.folder / "carafe_plugin" / checkout.family.library
    library.touch()
    url = information / "direct_url.json"

    def builds() -> bool:
        checkout.calls.unlink(missing_ok=True)
        assert checkout.run().returncode == 0
        return any(call.endswith("-e .") for call in checkout.installed())

    url.write_text('{"url": "file:///another/checkout"}')
    assert builds()
    url.write_text(f'{{"url": "{checkout.folder.resolve().as_uri()}"}}')
    assert not builds()
    library.rename(library.with_name("_C_torch2_0.abi3.so"))  # another environment's, of the same checkout
    assert builds()
    library.touch()
    source = checkout.folder / "csrc" / "new.h"
    source.touch()
    os.utime(source, (information.stat().st_mtime + 9,) * 2)
    assert builds()
