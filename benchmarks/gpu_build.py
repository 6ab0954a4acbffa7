"""Builds one half of the extension in place, for one GPU alone, with a C++ compiler whose libraries work beside torch.

    python -m benchmarks.gpu_build cpu|cuda [--root DIR] [--json FILE]

Imports neither torch nor the package, so that both halves can be built at the same time. TORCH_CUDA_ARCH_LIST names the
GPU. A compiler that links libstdc++ statically (some that CXX names do) makes libraries that crash beside torch where
they should report an error: every candidate first makes a small library, which is loaded beside torch, and the first
whose library works builds the half; the result is loaded too, and the next candidate tried where that fails.

Exit code: 0; 1 when no compiler makes a library that works; 2 for invalid arguments.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HALVES = {"cpu": ("0", "_C"), "cuda": ("only", "_C_cuda")}  # what CARAFE_CUDA says, and the library
SHARED_LIBRARY = "libstdc++.so.6"
# What crashes where a library has a C++ library of its own beside torch's: an error with a number in its message.
SMALL = """#include <sstream>
#include <stdexcept>
extern "C" int works() {
  try {
    std::ostringstream message;
    message << "expected " << 42L;
    throw std::runtime_error(message.str());
  } catch (const std::exception& error) {
    return std::string("expected 42") == error.what();
  }
}
"""
LOAD = """import ctypes, sys, torch
library = ctypes.CDLL(sys.argv[1])
sys.exit(len(sys.argv) > 2 and library.works() != 1)
"""
# Of the running process, beside torch: the C++ library to link with where a compiler would take its own archive.
LOADED = """import torch
print(next((line.split()[-1] for line in open("/proc/self/maps") if "/libstdc++.so" in line), ""))
"""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler by its command, and what the environment says for it besides."""

    command: str
    variables: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([*(f"{name}={value}" for name, value in self.variables.items()), self.command])


def candidates() -> Iterator[Compiler]:
    """The compiler that CXX names, then the plain ones on the PATH, then each of these with torch's own C++ library."""
    named = os.environ.get("CXX")
    found = [shutil.which(name, path=folder) for name in ("g++", "c++") for folder in os.get_exec_path()]
    commands = [named] if named else []
    commands += {os.path.realpath(path): path for path in reversed([*filter(None, found)])}.values()
    yield from map(Compiler, commands)
    if shared := subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True).stdout.strip():
        for command in commands:
            yield Compiler(command, {"LDFLAGS": f"{os.environ.get('LDFLAGS', '')} {shared}".strip()})


def complaint_about(library: Path, *check: str) -> str | None:
    """Why a library does not work beside torch; None where it does."""
    if SHARED_LIBRARY.encode() not in library.read_bytes():
        return f"it does not share {SHARED_LIBRARY} with torch"
    result = subprocess.run([sys.executable, "-c", LOAD, str(library), *check], capture_output=True, text=True)
    if result.returncode == 0:
        return None
    said = (result.stderr.strip() or "nothing").splitlines()[-1]
    return f"loading it beside torch ended with {result.returncode}: {said}"


def try_out(compiler: Compiler) -> str | None:
    """Why a small library of this compiler does not work; None where it does."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "small.cpp"), Path(folder, "small.so")
        source.write_text(SMALL)
        command = [*shlex.split(compiler.command), "-shared", "-fPIC", "-std=c++17", "-o", str(library), str(source)]
        command += shlex.split(compiler.variables.get("LDFLAGS", ""))
        try:
            result = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            return str(error)
        if result.returncode:
            return f"exit code {result.returncode}: {(result.stderr.strip() or 'it said nothing').splitlines()[-1]}"
        return complaint_about(library, "works")


@functools.cache
def working_compiler() -> Compiler | None:
    """The first whose small library works; None where no one's does."""
    return next((compiler for compiler in candidates() if try_out(compiler) is None), None)


def can_split() -> bool:
    """Whether nvcc optimises the kernels of one file at the same time."""
    nvcc = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
    words = [str(nvcc) if nvcc.exists() else "nvcc", "--split-compile=0", "--dryrun", "-x", "cu", "-c", os.devnull]
    try:
        return subprocess.run([*words, "-o", os.devnull], capture_output=True).returncode == 0
    except OSError:
        return False


def build(half: str, compiler: Compiler, root: Path) -> str | None:
    """Builds a half; returns why that failed, None where it did not."""
    choice, name = HALVES[half]
    variables = {**os.environ, **compiler.variables, "CXX": compiler.command, "CARAFE_CUDA": choice}
    variables.pop("CC", None)  # nvcc would compile what is not device code with it
    if half == "cuda" and can_split():
        variables["NVCC_APPEND_FLAGS"] = f"{variables.get('NVCC_APPEND_FLAGS', '')} --split-compile=0".strip()
    # Folders of its own, so that the halves do not write into each other's while both are built.
    words = ["setup.py", "build_ext", "--inplace", "--force"]
    words += ["--build-temp", f"build/{half}/temp", "--build-lib", f"build/{half}/lib"]
    if code := subprocess.run([sys.executable, *words], cwd=root, env=variables).returncode:
        return f"setup.py ended with {code}"
    library = newest_library(root, name)
    return complaint_about(library) if library else f"setup.py made no {name}"


def newest_library(root: Path, name: str) -> Path | None:
    """The file of `_C` or `_C_cuda`, for whichever torch, that was made last."""
    libraries = (root / "carafe_plugin").glob("*.so")
    found = [path for path in libraries if re.match(rf"{name}(_torch\d+_\d+)?\.", path.name)]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def main(arguments: list[str] | None = None) -> int:
    """Builds as the command line says; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_build")
    parser.add_argument("half", choices=HALVES)
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout [this one]")
    parser.add_argument("--json", type=Path, help="write what was done")
    options = parser.parse_args(arguments)
    record: dict[str, Any] = {"ok": False, "architectures": os.environ.get("TORCH_CUDA_ARCH_LIST"), "rejected": {}}
    begin = time.monotonic()
    for compiler in candidates():
        complaint = try_out(compiler) or build(options.half, compiler, options.root)
        if complaint is None:
            record |= {"ok": True, "compiler": str(compiler)}
            break
        print(f"{compiler}: {complaint}", flush=True)
        record["rejected"][str(compiler)] = complaint
    record["seconds"] = round(time.monotonic() - begin, 1)
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"built by {record['compiler']}" if record["ok"] else "no C++ compiler here makes a library that works")
    return 0 if record["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
