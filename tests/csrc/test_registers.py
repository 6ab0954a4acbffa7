"""Registers and local memory of the CUDA kernels, as cuobjdump reads them from the built library."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from toolkit import reason_for_no_cuda_half

import carafe_plugin

LIBRARY = Path(carafe_plugin.__file__).with_name("_C_cuda.abi3.so")
KERNEL = re.compile(r"^ Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", re.MULTILINE)
# Threads that a multiprocessor with 65536 registers is to hold at the least: of the common cases' kernels a quarter of
# those that the largest one has, of the general ones what their blocks are.
RESIDENT = {
    "reassemble_tile": 512,
    "reassemble_strips": 512,
    "grad_features_tile": 512,
    "grad_features_strip": 512,
    "grad_kernels_tile": 448,  # k = 7: two blocks of 224; the others five or four, of 128 and 160
    "grad_kernels_products": 512,
    "ReassembleBlock": 3 * 256,
    "GradFeaturesBlock": 3 * 128,
    "GradKernelsBlock": 640,
}
# With k = 7 and channels_last a thread has more sums than a quarter of the threads have registers for; and some
# architectures have shared memory for one block of its products alone.
RESIDENT_OF_7 = {"grad_features_strip": 384, "grad_kernels_products": 256}


def find_cuobjdump():
    """Of the CUDA toolkit, or the one that Triton brings along with torch; None where there is neither."""
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    if triton := importlib.util.find_spec("triton"):
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return shutil.which("cuobjdump") or next(filter(None, (shutil.which("cuobjdump", path=f) for f in folders)), None)


def read(text):
    """(kernel, architecture, bytes of local memory, registers) of every kernel that cuobjdump names."""
    parts = re.split(r"^arch = (sm_\w+)$", text, flags=re.MULTILINE)
    return [
        (name, architecture, int(stack) + int(local), int(registers))
        for architecture, part in zip(parts[1::2], parts[2::2], strict=True)
        for name, registers, stack, local in KERNEL.findall(part)
    ]


@pytest.fixture(scope="module")
def kernels():
    if not LIBRARY.exists():
        pytest.skip(f"the CUDA half is not built: {reason_for_no_cuda_half() or f'{LIBRARY} is not there'}")
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("no cuobjdump: neither the CUDA toolkit's nor Triton's")
    result = subprocess.run([cuobjdump, "-res-usage", LIBRARY], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = read(result.stdout)
    assert len(found) == result.stdout.count("Function ")
    assert {name for name in RESIDENT if any(name in kernel for kernel, *_ in found)} == set(RESIDENT)
    return found


def test_no_kernel_spills(kernels):
    """Spilled registers lie in local memory; no kernel has any for other reasons either."""
    assert not [(kernel, architecture, spilled) for kernel, architecture, spilled, _ in kernels if spilled]


def test_registers_leave_room_for_enough_threads(kernels):
    for kernel, architecture, _, registers in kernels:
        for name, threads in RESIDENT.items():
            if name in kernel and f"{name}Id" not in kernel:  # float64 has other needs
                threads = RESIDENT_OF_7.get(name, threads) if "GeometryILi7E" in kernel else threads
                assert registers * threads <= 65536, (kernel, architecture, registers)


def test_a_listing_is_read_as_it_is_written():
    text = """
Fatbin elf code:
================
arch = sm_80
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:28 CONSTANT[4]:224
 Function _Zfirst:
  REG:80 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:1048 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Zsecond:
  REG:128 STACK:48 SHARED:64 LOCAL:0 CONSTANT[0]:1048 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90

Resource usage:
 Function _Zfirst:
  REG:90 STACK:0 SHARED:0 LOCAL:8 CONSTANT[0]:1048 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    expected = [("_Zfirst", "sm_80", 0, 80), ("_Zsecond", "sm_80", 48, 128), ("_Zfirst", "sm_90", 8, 90)]
    assert read(text) == expected
