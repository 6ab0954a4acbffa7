"""Registers of the CUDA kernels, read from what ptxas said when the extension was built (setup.py keeps it)."""

import re
from pathlib import Path

import pytest

LOG = Path(__file__).parents[2] / "build" / "ptxas.log"
ENTRY = re.compile(
    r"Compiling entry function '(\w+)' for '(sm_\d+\w*)'"
    r"(?:(?!Compiling entry).)*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    r"(?:(?!Compiling entry).)*?Used (\d+) registers",
    re.DOTALL,
)
# Threads of a block, times the blocks that a multiprocessor with 65536 registers is to hold, at the least.
RESIDENT = {"ReassembleBlock": 3 * 256, "GradFeaturesBlock": 3 * 128, "GradWeightsBlock": 640}


def read(text):
    """(kernel, architecture, bytes spilled, registers) of every kernel in a log."""
    return [(name, sm, int(stores) + int(loads), int(used)) for name, sm, stores, loads, used in ENTRY.findall(text)]


@pytest.fixture(scope="module")
def kernels():
    if not LOG.exists():
        pytest.skip(f"{LOG} is not there: the CUDA half was not built in this folder")
    found = read(LOG.read_text(errors="replace"))
    assert {name for name in RESIDENT if any(name in kernel for kernel, *_ in found)} == set(RESIDENT)
    return found


def test_no_kernel_spills(kernels):
    assert not [(kernel, sm, spilled) for kernel, sm, spilled, _ in kernels if spilled]


def test_registers_leave_room_for_enough_threads(kernels):
    for kernel, sm, _, registers in kernels:
        for name, threads in RESIDENT.items():
            if name in kernel and f"{name}Id" not in kernel:  # float64 has other needs
                assert registers * threads <= 65536, (kernel, sm, registers)


def test_a_log_is_read_as_it_is_written():
    text = """ptxas info    : Compiling entry function '_Zfirst' for 'sm_80'
ptxas info    : Function properties for _Zfirst
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers
ptxas info    : Compiling entry function '_Zsecond' for 'sm_90'
ptxas info    : Function properties for _Zsecond
    48 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 48 bytes cumulative stack size
"""
    assert read(text) == [("_Zfirst", "sm_80", 0, 80), ("_Zsecond", "sm_90", 28, 128)]
