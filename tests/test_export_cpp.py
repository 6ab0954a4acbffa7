"""docs/run_package.cpp, built as it says, runs packages in a process without Python: against the model."""

import importlib
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from toolkit import TORCH, needs_torch
from torch import nn
from torch.utils import cpp_extension

from carafe_plugin import CARAFEDownsample, CARAFEUpsample, export, is_compiled

pytestmark = needs_torch(2, 6, "carafe_plugin.export")

ROOT = Path(__file__).resolve().parents[1]
SIZE = (2, 8, 31, 43)


class Pyramid(nn.Module):
    """Two outputs of different sizes."""

    def __init__(self):
        super().__init__()
        self.down, self.up = CARAFEDownsample(8), CARAFEUpsample(8, up_group=2, normalizer="sigmoid_normalized")
        for module in (self.down, self.up):
            nn.init.normal_(module.content_encoder.weight, std=0.2)  # else all weights of a kernel would be alike

    def forward(self, features):
        coarse = self.down(features)
        return self.up(coarse, output_size=features.shape[2:]), coarse


def compile_with_torch(source, target, *flags):
    """By a C++ compiler, against the headers and libraries of the installed torch."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler: {compiler[0]} is not on the PATH")
    folders = cpp_extension.library_paths()
    command = [*compiler, "-std=c++17", *flags, str(source), "-o", str(target)]
    command += [f"-I{folder}" for folder in cpp_extension.include_paths()]
    command += [f"{option}{folder}" for folder in folders for option in ("-L", "-Wl,-rpath,")]
    command += ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    return target


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compile_with_torch(ROOT / "docs" / "run_package.cpp", tmp_path_factory.mktemp("program") / "run_package")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Pyramid().eval()


@pytest.fixture(scope="module")
def package(model, tmp_path_factory, program):  # the program first: it skips where there is no compiler
    """One way and the other: ``package(standalone)``."""
    folder, done = tmp_path_factory.mktemp("packages"), {}

    def compiled(standalone):
        if standalone not in done:
            path = folder / f"standalone_{standalone}.pt2"
            arguments = (model, (torch.randn(*SIZE),), path)
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:  # a compiler has threads
                done[standalone] = process.submit(export.to_aoti, *arguments, standalone=standalone).result()
        return done[standalone]

    return compiled


def run(program, folder, *arguments):
    """In an environment that names neither Python nor a library."""
    return subprocess.run([program, *map(str, arguments)], cwd=folder, env={}, capture_output=True, text=True)


def size_of(shape):
    return "x".join(map(str, shape))


def check(program, folder, model, package, *libraries):
    features = torch.randn(*SIZE)
    features.numpy().tofile(folder / "input.f32")
    with torch.no_grad():
        expected = model(features)
    done = run(program, folder, package, "input.f32", size_of(SIZE), "output", *libraries)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(f"output {i}: {list(each.shape)}\n" for i, each in enumerate(expected))
    for i, each in enumerate(expected):
        values = np.fromfile(folder / f"output{i}.f32", dtype=np.float32).reshape(each.shape)
        torch.testing.assert_close(torch.from_numpy(values), each, rtol=2e-5, atol=2e-5)  # its own exponential


def test_standalone_package(program, package, model, tmp_path):
    check(program, tmp_path, model, package(True))


def test_package_that_calls_our_library(program, package, model, tmp_path):
    if not is_compiled("cpu"):
        pytest.skip("the compiled operator is not built: there is no library to load")
    library = importlib.import_module("carafe_plugin._C").__file__
    check(program, tmp_path, model, package(False), library)
    without = run(program, tmp_path, package(False), "input.f32", size_of(SIZE), "output")
    assert without.returncode == 1
    assert "Could not find schema for carafe_plugin::carafe" in without.stderr


def test_library_bound_at_once(program, package, model, tmp_path):
    """As compilers of some systems link: then no name of Python's may be asked for."""
    flags = ["-shared", "-fPIC", "-Wl,-z,now", f"-I{sysconfig.get_paths()['include']}"]
    interface = "-DTORCH_TARGET_VERSION=0x020a000000000000" if TORCH >= (2, 10) else "-DCARAFE_ATEN"
    flags += [interface, "-DPy_LIMITED_API=0x030a0000"]
    library = compile_with_torch(ROOT / "csrc" / "registration.cpp", tmp_path / "registration.so", *flags)
    check(program, tmp_path, model, package(True), library)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected MODEL.pt2 INPUT.f32 SIZE OUTPUT [LIBRARY ...]"),
        (("absent.pt2", "input.f32", "2x3", "output", "absent.so"), "absent.so"),
        (("PACKAGE", "input.f32", "2x3", "output"), "input.f32 must hold 24 bytes"),
        (("PACKAGE", "absent.f32", "2x3", "output"), "absent.f32 must hold 24 bytes"),
    ],
)
def test_mistakes_end_in_one_line(program, package, tmp_path, arguments, message):
    (tmp_path / "input.f32").write_bytes(bytes(28))
    done = run(program, tmp_path, *(package(True) if each == "PACKAGE" else each for each in arguments))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr.splitlines()[0]
