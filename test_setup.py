"""Which C++ compiler setup.py takes and what it says where there is none; for which interface of torch it compiles."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from toolkit import TORCH
from torch.utils.cpp_extension import include_paths

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


@pytest.fixture
def compile_nothing(source):
    """Builds with a compiler of two words that compiles empty files; returns its commands."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on the PATH")
    launcher, log = source.parent / "bin" / "launcher", source.parent / "commands.log"
    launcher.parent.mkdir()
    launcher.write_text(LAUNCHER.format(log=log))
    launcher.chmod(0o755)

    def compile_nothing(**variables):
        result = build(source, CXX="launcher g++", **variables)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "not compatible with the compiler" not in result.stdout + result.stderr
        commands = log.read_text().splitlines()
        assert all(command.startswith("g++ ") for command in commands)
        return [command for command in commands if "csrc/cpu/carafe.cpp" in command]

    return compile_nothing


OWN = "_C_torch{}_{}.abi3.so".format(*TORCH)


def test_a_compiler_of_several_words(source, compile_nothing):
    (command,) = compile_nothing()
    assert (source / "carafe_plugin" / ("_C.abi3.so" if TORCH >= (2, 10) else OWN)).is_file()
    assert ("-DCARAFE_ATEN" in command) == (TORCH < (2, 10))


def test_a_library_for_one_torch_bears_its_name(source, compile_nothing):
    (command,) = compile_nothing(CARAFE_ABI="aten")
    assert [path.name for path in source.rglob("*.so")].count(OWN) >= 1
    assert not (source / "carafe_plugin" / "_C.abi3.so").exists()
    assert "-DCARAFE_ATEN" in command
    assert "TORCH_TARGET_VERSION" not in command


def test_a_wrong_wish_for_an_interface_is_an_error(source):
    result = build(source, CARAFE_ABI="stable")
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1] == "CARAFE_ABI must be aten or not set, got 'stable'"


@pytest.mark.parametrize("name", ["registration.cpp", "cpu/carafe.cpp"])
def test_what_includes_torch_compiles_against_aten(name):
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not on the PATH")
    includes = [f"-isystem{path}" for path in (*include_paths(), sysconfig.get_paths()["include"])]
    flags = ["-std=c++17", "-fsyntax-only", "-fopenmp", "-Wall", "-Werror", "-Wno-psabi", "-DCARAFE_ATEN"]
    flags += ["-DPy_LIMITED_API=0x030A0000", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    result = subprocess.run([compiler, *flags, *includes, ROOT / "csrc" / name], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[:4000]


def test_the_cuda_half_compiles_against_aten(tmp_path):
    """With any toolkit, whatever CUDA this torch is made for: the objects are not linked."""
    nvcc = next(filter(None, (shutil.which("nvcc"), shutil.which("/usr/local/cuda/bin/nvcc"))), None)
    if nvcc is None:
        pytest.skip("nvcc is not on the PATH")
    includes = [f"-isystem={path}" for path in (*include_paths(), sysconfig.get_paths()["include"])]
    # Torch's headers define much for both sides that nvcc warns of.
    flags = ["-std=c++17", "-fdevice-syntax-only", "-arch=sm_90", "-Xcompiler=-fPIC", "-DCARAFE_ATEN", "-DCARAFE_PTX=0"]
    flags += ["-diag-suppress=20012,20013,20015", "--expt-relaxed-constexpr"]
    command = [nvcc, *flags, *includes, "-c", ROOT / "csrc/cuda/carafe.cu", "-o", tmp_path / "carafe.o"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[:4000]


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
