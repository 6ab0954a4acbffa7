"""Which C++ compiler setup.py takes, and what it says where there is none."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A launcher of compilers, which here has an empty file compiled (and notes the command) to be quick.
LAUNCHER = """#!/bin/sh
echo "$@" >> "{log}"
case "$*" in *-fsyntax-only*) exec "$@" ;; esac
compiler=$1
while [ $# -gt 0 ]; do
  case "$1" in -o) output=$2 ;; -MF) touch "$2" ;; -shared) shared=-shared ;; esac
  shift
done
exec "$compiler" ${{shared:--c}} -fPIC -x c++ /dev/null -o "$output"
"""


@pytest.fixture
def source(tmp_path):
    """A copy of what setup.py reads."""
    folder = tmp_path / "source"
    for name in ("carafe_plugin", "configs", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "model-index.yml"):
        shutil.copy(ROOT / name, folder)
    return folder


def build(source, **variables):
    # ninja lies beside the interpreter, whose environment need not be activated.
    path = os.pathsep.join([str(source.parent / "bin"), sysconfig.get_path("scripts"), os.environ["PATH"]])
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=source,
        env={**os.environ, "PATH": path, "CARAFE_CUDA": "0", **variables},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on the PATH")
def test_a_compiler_of_several_words(source):
    launcher, log = source.parent / "bin" / "launcher", source.parent / "commands.log"
    launcher.parent.mkdir()
    launcher.write_text(LAUNCHER.format(log=log))
    launcher.chmod(0o755)
    result = build(source, CXX="launcher g++")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "not compatible with the compiler" not in result.stdout + result.stderr
    assert (source / "carafe_plugin" / "_C.abi3.so").is_file()
    commands = log.read_text().splitlines()
    assert all(command.startswith("g++ ") for command in commands)
    assert any("csrc/cpu/carafe.cpp" in command for command in commands)


@pytest.mark.parametrize(
    ("named", "complaint"),
    [
        (True, "g++: error: unrecognized command line option '-std=c++17'"),  # GCC 4
        (False, "<stdin>:1:10: fatal error: optional: No such file or directory"),  # an older C++ library
    ],
    ids=["CXX", "by default"],
)
def test_a_compiler_without_cxx17_is_told_in_one_line(named, complaint, source):
    compiler = source.parent / "bin" / "c++"
    compiler.parent.mkdir()
    compiler.write_text(f'#!/bin/sh\nprintf "In file included from x:\n{complaint}\nnote\n" >&2\nexit 1\n')
    compiler.chmod(0o755)
    result = build(source, CXX=str(compiler) if named else "")
    if named:
        assert result.returncode != 0
        assert result.stderr.splitlines()[-1] == f"CXX={compiler} does not compile C++17: {complaint}"
    else:
        assert result.returncode == 0, result.stderr
        line = f"the PyTorch reference serves (c++ does not compile C++17: {complaint})"
        assert line in result.stdout
    assert not list(source.rglob("*.so"))


@pytest.mark.parametrize("compiler", ["no-such-g++", "no-such-ccache g++"])
def test_a_compiler_that_does_not_exist_is_an_error(compiler, source):
    result = build(source, CXX=compiler)
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1] == f"CXX={compiler}: there is no command {compiler.split()[0]!r}"
    assert not list(source.rglob("*.so"))


def test_no_compiler_at_all_leaves_the_reference(source):
    result = build(source, CXX="", PATH="")
    assert result.returncode == 0, result.stderr
    assert "no extension, the PyTorch reference serves (no C++ compiler found; set CXX to name one)" in result.stdout
