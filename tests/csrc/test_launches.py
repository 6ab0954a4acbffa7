"""The launcher of the CUDA kernels over a runtime that only notes what is launched: no call is too large for it, and
every failure of the runtime comes out, before anything else is launched."""

import ctypes
import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hosts import CXX, DTYPES

from carafe_plugin.ops import fused

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
H100_SHARED, GA102_SHARED, EVERY_GPUS_SHARED = (kib << 10 for kib in (227, 99, 48))  # of a block, on request
OPERATORS = ("reassemble", "grad_features", "grad_kernels")
STREAM = 0x5EA


class Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_int64 * 3),
        ("block", ctypes.c_int64 * 3),
        ("shared", ctypes.c_int64),
        ("allowed", ctypes.c_int64),  # shared memory that the kernel has leave for
        ("stream", ctypes.c_void_p),
        ("call", ctypes.c_int),
        ("name", ctypes.c_char_p),
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    nvcc = next(filter(None, (shutil.which("nvcc"), shutil.which("/usr/local/cuda/bin/nvcc"))), None)
    if nvcc is None or shutil.which(CXX) is None:
        pytest.skip(f"no nvcc or no {CXX} on the PATH")
    folder = tmp_path_factory.mktemp("launches")
    # What runs on the device is not needed, which is most of the compiler's time.
    flags = ["-std=c++17", "-fdevice-syntax-only", "-arch=sm_80", "-Xcompiler=-fPIC", f"-I{CSRC}"]
    objects = [folder / "launcher.o", folder / "runtime.o"]
    commands = [
        [nvcc, *flags, "-c", HERE.parent / "ptx" / "launcher.cu", "-o", objects[0]],
        [CXX, "-std=c++17", "-fPIC", "-c", HERE / "runtime.cpp", "-o", objects[1]],
        # Its own runtime, whatever another library of this process brings.
        [CXX, "-shared", "-Wl,-Bsymbolic", *objects, "-o", folder / "launches.so"],
    ]
    for command in commands:
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[:4000]
    loaded = ctypes.CDLL(str(folder / "launches.so"))
    loaded.launch_at.restype = ctypes.POINTER(Launch)
    return loaded


class Case:
    """A call by its sizes; tensors are contiguous or channels_last."""

    def __init__(self, size, k=5, g=1, up=2, down=1, normalizer=0, dtype=torch.float32, channels_last=False):
        n, c, h, w = size
        out = -(-h * up // down), -(-w * up // down)
        coarse = (h, w) if normalizer and up > 1 else out
        self.geometry = (n, c, h, w, *out, k, g, up, down)
        kernels = (n, g * k * k * (up * up if normalizer and up > 1 else 1), *coarse)
        self.shapes = {"features": size, "output": (n, c, *out), "kernels": kernels}
        self.normalizer, self.dtype, self.channels_last = normalizer, dtype, channels_last

    def tensors(self, operator):
        names = {"reassemble": "output features kernels", "grad_features": "features output kernels"}
        return names.get(operator, "kernels output features kernels").split()

    def strides(self, shape):
        _, c, h, w = shape
        return (h * w * c, 1, w * c, c) if self.channels_last else (c * h * w, h * w, w, 1)

    def launch(self, library, operator, fail_at=-1, code=0, has_memory=True, shared=H100_SHARED):
        """The launcher's result and what was launched."""
        library.start_over(fail_at, code, shared)
        strides = [stride for name in self.tensors(operator) for stride in self.strides(self.shapes[name])]
        result = library.launch(
            OPERATORS.index(operator),
            DTYPES.index(self.dtype),
            self.normalizer,
            (ctypes.c_int64 * 10)(*self.geometry),
            0,
            ctypes.c_void_p(STREAM),
            library.allocate,
            ctypes.byref(ctypes.c_bool(has_memory)),
            (ctypes.c_void_p * 4)(*[1 << 44] * 4),  # addresses that nothing reads
            (ctypes.c_int64 * 16)(*strides),
        )
        return result, [library.launch_at(index).contents for index in range(library.launch_count())]


# The common cases in both layouts; kernels and scales of the general block kernels; those of none.
CASES = {
    "up 2": Case((1, 256, 25, 42)),
    "up 2, half, logits": Case((1, 256, 50, 84), normalizer=1, dtype=torch.float16),
    "up 2, k 7, channels last": Case((2, 64, 40, 56), k=7, channels_last=True, dtype=torch.float16),
    "down 2": Case((1, 64, 200, 336), up=1, down=2, normalizer=2),
    "down 2, k 3": Case((1, 256, 200, 336), k=3, up=1, down=2, channels_last=True),
    "four groups": Case((1, 256, 25, 42), g=4, normalizer=3),
    "up 4": Case((1, 64, 25, 42), up=4, normalizer=1),
    "odd channels": Case((2, 7, 9, 13)),
    "down 3": Case((1, 16, 20, 20), up=1, down=3, dtype=torch.float16),
    "k 9, 8 groups": Case((1, 64, 20, 20), k=9, g=8),
    "3/2": Case((1, 16, 20, 20), k=3, up=3, down=2),
    "k 65": Case((1, 4, 80, 80), k=65),
}


def check(launches, shared=H100_SHARED):
    """What CUDA asks of a launch."""
    for launch in launches:
        grid, block = list(launch.grid), list(launch.block)
        assert 1 <= grid[0] < 2**31
        assert all(1 <= length < 2**16 for length in grid[1:])
        assert all(length >= 1 for length in block)
        assert 1 <= block[0] * block[1] * block[2] <= 1024
        assert launch.shared <= launch.allowed <= max(shared, EVERY_GPUS_SHARED)
        assert launch.stream == STREAM


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_every_failure_of_the_runtime_comes_out(case, operator, library):
    result, launches = case.launch(library, operator)
    assert result == 0
    assert launches
    check(launches)
    calls, allocations = library.call_count(), library.allocation_count()
    assert calls >= 2 * len(launches)  # each is asked about
    for number in range(calls):
        for code in (2, 700):  # out of memory; an illegal access, of earlier work too
            result, launches = case.launch(library, operator, fail_at=number, code=code)
            assert result == code
            assert all(launch.call <= number for launch in launches)  # nothing after it
    if allocations:  # scratch memory
        result, launches = case.launch(library, operator, has_memory=False)
        assert result == 2
        assert library.allocation_count() == 1


# What a grid cannot hold: 2^31 blocks and more along one axis or another, in tensors whose offsets need 64 bits.
HUGE = {
    "batch": (2**33, 4, 2, 2),
    "channels": (1, 2**34, 4, 4),
    "height": (1, 4, 2**30, 4),
    "width": (1, 4, 4, 2**30),
    "both": (1, 4, 2**20, 2**20),
    "all": (2**12, 2**12, 2**12, 2**12),
}


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("size", HUGE.values(), ids=list(HUGE))
@pytest.mark.parametrize(
    "options",
    [{}, {"up": 1, "down": 2}, {"dtype": torch.float16, "channels_last": True}, {"up": 3}],
    ids=["up", "down", "half", "3"],
)
def test_no_call_has_more_blocks_than_a_grid(options, size, operator, library):
    result, launches = Case(size, **options).launch(library, operator)
    assert result == 0
    assert launches
    check(launches)


def test_every_call_that_modules_fuse_is_served(library):
    """By the shared memory of any GPU from compute capability 8.0 on."""
    for k, scale in itertools.product(range(1, 31, 2), range(1, 1 + fused._MAX_CUDA_SCALE)):
        if (k * scale) ** 2 > fused._MAX_WEIGHTS:
            continue
        options = itertools.product(
            {(scale, 1), (1, scale)}, (torch.float64, torch.float32), (False, True), (1, 8, 256)
        )
        for (up, down), dtype, channels_last, channels in options:
            case = Case((1, channels, 20, 30), k, 1, up, down, 1, dtype, channels_last)
            for operator in OPERATORS:
                result, launches = case.launch(library, operator, shared=GA102_SHARED)
                assert result == 0, (operator, case.geometry, dtype)
                check(launches, GA102_SHARED)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("k", "up", "down"), [(3, 2, 1), (5, 2, 1), (5, 1, 2), (7, 2, 1)])
def test_usual_calls_need_no_more_shared_memory_than_every_gpu_gives(k, up, down, dtype, library):
    for operator, normalizer, last, size in itertools.product(
        OPERATORS, (0, 1), (False, True), ((25, 42), (50, 84), (100, 168))
    ):
        case = Case((1, 256, *size), k, 1, up, down, normalizer, dtype, last)
        result, launches = case.launch(library, operator, shared=EVERY_GPUS_SHARED)
        assert result == 0
        check(launches, EVERY_GPUS_SHARED)
        assert not any(b"run_elements" in launch.name for launch in launches)
        assert all(launch.block[0] >= 32 for launch in launches), (operator, case.geometry)


@pytest.mark.parametrize("operator", OPERATORS)
def test_kernels_of_a_pixel_beyond_shared_memory_are_refused_with_a_normalizer(operator, library):
    result, launches = Case((1, 4, 40, 40), k=63, g=4, up=4, normalizer=1).launch(library, operator)
    assert (result, launches) == (801, [])  # cudaErrorNotSupported, for which the caller has words


def empty_cases():
    """Calls whose result has elements, each a sum over nothing: of no channels, of an output of no rows or columns."""
    for options in ({}, {"up": 1, "down": 2}, {"up": 3}, {"dtype": torch.float16, "channels_last": True}):
        for normalizer in (0, 1):
            yield "grad_kernels", Case((1, 0, 6, 8), normalizer=normalizer, **options)
            for axis in (4, 5):
                case = Case((1, 8, 6, 8), normalizer=normalizer, **options)
                case.geometry = (*case.geometry[:axis], 0, *case.geometry[axis + 1 :])
                n, c, _, _ = case.shapes["output"]
                case.shapes["output"] = (n, c, *case.geometry[4:6])
                if not normalizer or case.geometry[8] == 1:  # its kernels are those of the output
                    case.shapes["kernels"] = (n, 25, *case.geometry[4:6])
                else:
                    yield "grad_kernels", case
                yield "grad_features", case


@pytest.mark.parametrize(("operator", "case"), empty_cases())
def test_sums_over_nothing_are_launched(operator, case, library):
    child = os.fork()  # a division by zero would end this process
    if child == 0:
        result, launches = case.launch(library, operator)
        os._exit(result != 0 or not launches or any(launch.grid[0] < 1 for launch in launches))
    _, status = os.waitpid(child, 0)
    assert status == 0, "a launch of no blocks, or none" if os.WIFEXITED(status) else f"signal {os.WTERMSIG(status)}"
