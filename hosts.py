"""Compiles the torch-free kernel headers with g++ alone and runs tests of them under the sanitizers."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
CXX = os.environ.get("CXX", "g++")
WARNINGS = ("-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-psabi")
SANITIZERS = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # the order of the C functions
# How the axes lie in memory for each layout of the C functions, and the way back.
ORDERS = (((0, 1, 2, 3),) * 2, ((0, 1, 3, 2),) * 2, ((0, 2, 3, 1), (0, 3, 1, 2)))


def label(case):
    return "-".join(str(value).replace("torch.", "").replace("/", "to") for value in case.values())


def compile_host(source: str, folder: Path, *flags: str) -> Path:
    if shutil.which(CXX) is None:
        pytest.skip(f"no C++ compiler: {CXX} is not on the PATH")
    library = folder / f"{Path(source).stem}.so"
    command = [CXX, *WARNINGS, "-shared", "-fPIC", *flags]
    result = subprocess.run([*command, str(HERE / source), "-o", str(library)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return library


def run_under_sanitizers(script: str, source: str, folder: Path, *flags: str) -> str:
    """What ``script`` prints, given the library of ``source`` compiled with the sanitizers."""
    compiled = compile_host(source, folder, *SANITIZERS, *flags)
    # libstdc++ too: without it AddressSanitizer finds no function that throws, and importing torch 2.1 throws.
    runtimes = [
        subprocess.run([CXX, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    if not Path(runtimes[0]).is_absolute():
        pytest.skip(f"{CXX} has no address sanitizer runtime")
    # They must be loaded before Python; leaks of the interpreter are none of our business.
    variables = dict(LD_PRELOAD=" ".join(runtimes), ASAN_OPTIONS="detect_leaks=0", OMP_NUM_THREADS="1")
    environment = {**os.environ, **variables}
    result = subprocess.run(
        [sys.executable, script, str(compiled)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout.strip()


ARM_CXX, ARM_EMULATOR = "aarch64-linux-gnu-g++", ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")


def require_arm(*commands):
    if missing := [name for name in commands if shutil.which(name) is None]:
        pytest.skip(f"{', '.join(missing)} not on the PATH (Debian: g++-aarch64-linux-gnu, qemu-user)")


class Emulated:
    """The kernels of host.cpp on 64-bit Arm, which QEMU emulates: emulated.cpp, compiled for it in ``folder``."""

    def __init__(self, folder: Path):
        require_arm(ARM_CXX, ARM_EMULATOR[0])
        program = folder / "emulated"
        command = [ARM_CXX, *WARNINGS, "-O1", HERE / "emulated.cpp", "-o", program]
        result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        self.process = subprocess.Popen([*ARM_EMULATOR, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, op, path, normalizer, dtype, geometry, layout, held):
        """As ``carafe_run``; ``held`` are the result, which is written into, and up to three tensors."""
        maps = [ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size()) for tensor in held]
        sizes = [len(each) for each in maps] + [0] * (4 - len(maps))
        request = (ctypes.c_int64 * 19)(op, path, normalizer, dtype, layout, *geometry, *sizes)
        self.process.stdin.write(b"".join([request, *maps]))
        self.process.stdin.flush()
        result = self.process.stdout.read(sizes[0])
        assert len(result) == sizes[0], f"the program ended: {self.process.poll()}"
        ctypes.memmove(held[0].data_ptr(), result, sizes[0])

    def close(self):
        self.process.stdin.close()
        assert self.process.wait(timeout=60) == 0


def outputs_of(size, up, down, crop=(0, 0)):
    """The output's size without ``crop`` rows and columns, of which one at least remains."""
    return tuple(max(1, -(-length * up // down) - less) for length, less in zip(size, crop, strict=True))


def geometry(case, batch, up, down):
    """What the C functions take of that name."""
    numbers = (case["kernel_size"], case["group_size"], up, down)
    outputs = outputs_of(case["size"], up, down, case.get("crop", (0, 0)))
    return (ctypes.c_int64 * 10)(batch, case.get("channels", 8), *case["size"], *numbers, *outputs)
