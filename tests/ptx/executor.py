"""Runs the project's CUDA launcher with every kernel executed on the CPU: nvcc's PTX by an interpreter, which is
the CUDA runtime to it (machine.h, execution.cpp, runtime.cpp, ...).

executor = Executor()                        # compiles, or takes what was compiled from the same sources
run = executor.run("reassemble", (features, kernels), normalizer="softmax", kernel_size=5, group_size=1, up=2, down=1)
run.result, run.error, run.findings, run.launches, run.records()
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ptx
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
OPERATORS = ("reassemble", "grad_features", "grad_kernels")
NORMALIZERS = ("none", "softmax", "sigmoid", "sigmoid_normalized")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# What the launcher may ask of a device, by CUDA's numbers.
_COMMON = {1: 1024, 2: 1024, 3: 1024, 4: 64, 5: 2**31 - 1, 6: 65535, 7: 65535, 8: 48 << 10, 10: 32, 12: 65536}
_NAMES = {16: "multiprocessors", 38: "l2", 39: "threads", 75: "major", 76: "minor", 81: "shared", 97: "optin"}


def _device(
    major: int, minor: int, multiprocessors: int, shared: int, threads: int, blocks: int, l2: int
) -> dict[int, int]:
    reserved = 1024 if major >= 8 else 0
    clocks = {13: 1_755_000, 36: 2_619_000, 37: 5120}  # in kHz, and the width of the bus in bits
    return _COMMON | clocks | {
        16: multiprocessors, 38: l2 << 20, 39: threads, 75: major, 76: minor, 81: shared << 10, 82: 65536,
        97: (shared << 10) - reserved, 106: blocks, 111: reserved,
    }  # fmt: skip


DEVICES: Mapping[str, dict[int, int]] = {
    "t4": _device(7, 5, 40, 64, 1024, 16, 4),
    "a100": _device(8, 0, 108, 164, 2048, 32, 40),
    "a10": _device(8, 6, 72, 100, 1536, 16, 6),
    "l4": _device(8, 9, 58, 100, 1536, 24, 48),
    "h100": _device(9, 0, 132, 228, 2048, 32, 50),
    "h200": _device(9, 0, 132, 228, 2048, 32, 50),
    "b200": _device(10, 0, 148, 228, 2048, 32, 126),
}

PROBLEMS = (
    "global access out of bounds", "shared access out of bounds", "local access out of bounds",
    "parameter access out of bounds", "misaligned access", "uninitialized shared memory", "uninitialized global memory",
    "uninitialized register", "race in shared memory", "race in global memory",
    "shared memory that a copy is on its way to", "write to an input", "barrier that not all threads reach",
    "barrier in divergent code", "lane that is not there", "endless loop", "invalid barrier or trap",
    "instruction of the whole warp in divergent code",
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------- compilation


def find_nvcc() -> str | None:
    places = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    folders = os.pathsep.join(str(Path(place) / "bin") for place in places if place)
    return shutil.which("nvcc") or shutil.which("nvcc", path=folders)


def missing_tools() -> str | None:
    """Why nothing can be compiled here; None where it can."""
    if find_nvcc() is None:
        return "no nvcc: on the PATH, in CUDA_HOME or in /usr/local/cuda"
    if shutil.which(_cxx()[0]) is None:
        return f"no C++ compiler: {_cxx()[0]} is not on the PATH"
    return None


def _cxx() -> list[str]:
    return os.environ.get("CXX", "g++").split()


def cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "carafe_plugin" / "ptx"


KEPT = 16  # folders of a kind


def _run(command: Sequence[str | Path]) -> str:
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stdout[-4000:]}{result.stderr[-8000:]}")
    return result.stdout


def _age(path: Path) -> float:
    try:
        return -path.stat().st_mtime
    except OSError:  # another process has just removed it
        return 0


def _cached(name: str, parts: Sequence[str | bytes], make: Any) -> Path:
    """The folder of what ``make(folder)`` has made from these parts, now or in a run before."""
    digest = hashlib.sha256(b"\0".join(p.encode() if isinstance(p, str) else p for p in parts)).hexdigest()[:24]
    folder = cache_folder() / f"{name}-{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    # One process makes it, others wait: a compilation takes a minute of every core.
    with (folder.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _make(folder, name, make)
    os.utime(folder)
    # Without what no source stands for any more.
    for old in sorted(folder.parent.glob(f"{name}-*"), key=_age)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def _make(folder: Path, name: str, make: Any) -> None:
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{name}-making-") as temporary:
            made = Path(temporary) / "made"
            made.mkdir()
            make(made)
            made.rename(folder)


SONAME = "libcarafe_ptx_executor.so"


@functools.cache
def executor_library() -> Path:
    sources = sorted(HERE.glob("*.cpp"))
    cpu = Path("/proc/cpuinfo")
    flags = re.search(r"^flags.*$", cpu.read_text(), re.MULTILINE) if cpu.exists() else None
    # Sums and products are rounded one by one, as PTX has them.
    command = [*_cxx(), "-O3", "-march=native", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fno-strict-aliasing"]
    command += ["-ffp-contract=off", "-fPIC", "-fvisibility=hidden"]
    link = ["-shared", "-Wl,-Bsymbolic", f"-Wl,-soname,{SONAME}"]
    parts = [path.read_bytes() for path in (*sources, *sorted(HERE.glob("*.h")))]
    described = [*command, *link, flags.group(0) if flags else "", _run([_cxx()[0], "--version"])]

    def make(made: Path) -> None:
        objects = [made / f"{source.stem}.o" for source in sources]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda source, to: _run([*command, "-c", source, "-o", to]), sources, objects))
        _run([_cxx()[0], *link, *objects, "-o", made / "libexecutor.so"])

    return _cached("executor", [*parts, *described], make) / "libexecutor.so"


def compile_ptx(source: Path, architecture: str = "compute_80") -> str:
    """nvcc's PTX of a file that stands alone."""
    nvcc = find_nvcc()
    assert nvcc is not None
    command = [nvcc, "-ptx", f"-arch={architecture}", "-O3", "-std=c++17", "-lineinfo"]
    folder = _cached(
        "snippet",
        [source.read_bytes(), " ".join(command), _run([nvcc, "--version"])],
        lambda made: _run([*command, source, "-o", made / "snippet.ptx"]),
    )
    return (folder / "snippet.ptx").read_text()


def launcher_library(csrc: Path = CSRC, architecture: str = "compute_80") -> tuple[Path, str]:
    """The launcher, which is the host's half of launcher.cu, and the PTX of its kernels, by one run of nvcc."""
    nvcc = find_nvcc()
    assert nvcc is not None
    source = HERE / "launcher.cu"
    command = [nvcc, "-gencode", f"arch={architecture},code={architecture}", "-O3", "-std=c++17", "-lineinfo"]
    command += ["-cudart", "none", "-shared", "-Xcompiler", "-fPIC,-O1", f"-I{csrc}"]
    headers = sorted(path for folder in ("cuda", "common") for path in (csrc / folder).rglob("*.*h"))
    parts = [text for path in headers for text in (str(path), path.read_bytes())]
    parts += [source.read_bytes(), " ".join(command), SONAME, _run([nvcc, "--version"])]

    def make(made: Path) -> None:
        keep = made / "keep"
        keep.mkdir()
        # Its CUDA runtime is the executor, whichever is loaded by that name then.
        _run([*command, "-keep", "-keep-dir", keep, source, executor_library(), "-o", made / "launcher.so"])
        (keep / "launcher.ptx").rename(made / "launcher.ptx")
        shutil.rmtree(keep)

    folder = _cached("launcher", parts, make)
    return folder / "launcher.so", (folder / "launcher.ptx").read_text()


# ------------------------------------------------------------------------------------------------------------- results


class _Finding(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("problem", "kernel", "instruction", "launch")),
        ("count", ctypes.c_int64),
        ("block", ctypes.c_uint64),
        ("thread", ctypes.c_int32),
        ("other", ctypes.c_int32),
        ("address", ctypes.c_uint64),
        ("bytes", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class Finding:
    problem: str
    kernel: str
    instruction: str
    ptx_line: int
    location: tuple[tuple[str, int], ...]  # innermost first
    count: int
    block: int
    thread: int
    other: int  # thread, of a race
    address: int
    bytes: int
    launch: int

    def __str__(self) -> str:
        where = " < ".join(f"{Path(file).name}:{line}" for file, line in self.location)
        other = f" (with thread {self.other})" if self.other >= 0 else ""
        return (
            f"{self.problem}: {self.kernel}, {where or f'PTX line {self.ptx_line}'}, block {self.block}, thread "
            f"{self.thread}{other}, address {self.address:#x}, {self.bytes} bytes, {self.count} times: "
            f"{self.instruction}"
        )


@dataclass(frozen=True)
class Launch:
    kernel: str  # mangled
    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    static_shared: int
    dynamic_shared: int
    status: int
    blocks_executed: int
    instructions: int  # of warps
    counts: array[int]  # six for each instruction
    program: ptx.Kernel

    def records(self) -> Iterator[dict[str, Any]]:
        """What each PTX instruction asked of the hardware, in the order of the PTX."""
        for index, i in enumerate(self.program.code):
            if i.hidden:
                continue
            numbers = self.counts[6 * index : 6 * index + 6]
            if numbers[0]:
                names = ("issued", "lanes", "sectors", "global_wavefronts", "wavefronts", "ideal_wavefronts")
                yield {
                    "index": index,
                    "ptx": i.statement.text,
                    "ptx_line": i.statement.line,
                    "location": [list(place) for place in i.statement.location],
                    **dict(zip(names, numbers, strict=True)),
                }

    def summary(self) -> dict[str, Any]:
        return {
            "kernel": self.kernel, "name": self.name, "grid": self.grid, "block": self.block,
            "static_shared": self.static_shared, "dynamic_shared": self.dynamic_shared, "status": self.status,
            "blocks_executed": self.blocks_executed, "instructions": self.instructions,
        }  # fmt: skip


@dataclass(frozen=True)
class Run:
    result: Tensor
    error: int  # what the launcher returned
    findings: list[Finding]
    launches: list[Launch]
    unwritten: int  # elements of the result

    def records(self) -> list[dict[str, Any]]:
        return [{**launch.summary(), "instructions_of_ptx": list(launch.records())} for launch in self.launches]


def demangle(name: str) -> str:
    return _demangled(name)


@functools.cache
def _demangled(name: str) -> str:
    if filt := shutil.which("c++filt"):
        return subprocess.run([filt, name], capture_output=True, text=True).stdout.strip() or name
    return name


# ----------------------------------------------------------------------------------------------------------- execution


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(executor_library()))
    library.ptx_operation.restype = ctypes.c_char_p
    library.ptx_finding.restype = ctypes.POINTER(_Finding)
    library.ptx_launched.restype = ctypes.POINTER(ctypes.c_int64)
    library.ptx_written.restype = ctypes.c_int64
    library.ptx_allocate.restype = ctypes.c_void_p
    return library


@functools.cache
def _operations() -> dict[str, int]:
    library = _library()
    return {library.ptx_operation(n).decode(): n for n in range(library.ptx_operations())}


def _pointer(values: Sequence[int], kind: str) -> Any:
    numbers = array(kind, values)
    type_ = {"i": ctypes.c_int32, "q": ctypes.c_int64}[kind]
    return (type_ * max(1, len(numbers))).from_buffer(numbers) if numbers else (type_ * 1)()


_programs: dict[int, ptx.Kernel] = {}
_memory: dict[int, dict[str, Any]] = {}  # variables of modules


def load(module: ptx.Module, name: str) -> int:
    """Hands a kernel to the executor: its number there."""
    return add_program(module, module.kernel(name))


def drop_program(number: int) -> None:
    """Frees what only a changed kernel was for."""
    _library().ptx_drop_kernel(number)
    del _programs[number]


def add_program(module: ptx.Module, kernel: ptx.Kernel) -> int:
    library = _library()
    if id(module) not in _memory:
        _memory[id(module)] = {
            name: ctypes.create_string_buffer(data, len(data)) for name, data in module.variables.items()
        }
        for data in _memory[id(module)].values():
            library.ptx_range(ctypes.c_uint64(ctypes.addressof(data)), ctypes.c_uint64(len(data)), 3, 0)
    variables = {name: ctypes.addressof(data) for name, data in _memory[id(module)].items()}
    p = ptx.pack(kernel, _operations(), variables)
    number = library.ptx_add_kernel(
        kernel.name.encode(), _pointer(p["header"], "i"), _pointer(p["code"], "q"), len(kernel.code),
        _pointer(p["constants"], "q"), len(p["constants"]) // 3, _pointer(p["specials"], "i"),
        len(p["specials"]) // 2, _pointer(p["tables"], "i"), len(p["tables"]), _pointer(p["offsets"], "i"),
        _pointer(p["sizes"], "i"), len(p["offsets"]), _pointer(p["checked"], "i"), len(p["checked"]),
    )  # fmt: skip
    _programs[number] = kernel
    return number


def set_device(name: str = "h100", **changes: int) -> None:
    attributes = dict(DEVICES[name])
    numbers = {name: number for number, name in _NAMES.items()}
    attributes.update({numbers[change]: value for change, value in changes.items()})
    for attribute, value in attributes.items():
        _library().ptx_attribute(attribute, value)


def set_options(
    limit: int = 1 << 32, every: int = 1, first: int = 0, checks: bool = True, counting: bool = True,
    descending: bool = False, fill: int = 0xFF,
) -> None:  # fmt: skip
    """``limit``: instructions of a warp; ``every``, ``first``: blocks that are executed; ``descending``: their order
    and that of warps; ``fill``: the byte that lies in memory which has not been written.
    """
    _library().ptx_options(
        ctypes.c_int64(limit), ctypes.c_uint64(every), ctypes.c_uint64(first), checks, counting, descending, fill
    )


NOTHING = (1 << 64) - 1  # as the first block that is executed


def reset() -> None:
    _library().ptx_reset()


def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


ALIGNMENT = 512  # bytes, of what CUDA's allocators return


def place(tensor: Tensor, offset: int, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """A copy that begins ``offset`` elements after an address that is aligned as CUDA's are; bytes of 255, where
    ``tensor`` is empty.
    """
    count, size = _extent(shape, strides), tensor.element_size()
    memory = torch.full(((count + offset) * size + ALIGNMENT,), 255, dtype=torch.uint8)
    first = -memory.data_ptr() % ALIGNMENT + offset * size
    flat = memory[first : first + count * size].view(tensor.dtype)
    if tensor.numel():
        flat.copy_(torch.as_strided(tensor, (count,), (1,)))
    return torch.as_strided(flat, tuple(shape), tuple(strides), flat.storage_offset())


def add_range(tensor: Tensor, kind: int) -> None:
    """Memory that kernels may touch; ``kind``: 0 input, 1 result, 2 workspace."""
    size = tensor.element_size()
    extent = _extent(tensor.shape, tensor.stride()) * size
    _library().ptx_range(ctypes.c_uint64(tensor.data_ptr()), ctypes.c_uint64(extent), kind, size.bit_length() - 1)


def findings() -> list[Finding]:
    library, found = _library(), []
    for n in range(library.ptx_findings()):
        f = library.ptx_finding(n).contents
        program = _programs[f.kernel]
        at = min(f.instruction, len(program.code) - 1)
        while program.code[at].hidden and at > 0:
            at -= 1
        statement = program.code[at].statement
        found.append(
            Finding(
                PROBLEMS[f.problem],
                demangle(program.name),
                statement.text,
                statement.line,
                statement.location,
                f.count,
                f.block,
                f.thread,
                f.other,
                f.address,
                f.bytes,
                f.launch,
            )
        )
    return found


def launches() -> list[Launch]:
    library, found = _library(), []
    for n in range(library.ptx_launches()):
        numbers = (ctypes.c_int64 * 11)()
        counts = library.ptx_launched(n, numbers)
        program = _programs[numbers[0]]
        copy = array("q")
        copy.frombytes(ctypes.string_at(counts, 48 * len(program.code)))
        found.append(
            Launch(
                program.name,
                demangle(program.name),
                tuple(numbers[1:4]),
                tuple(numbers[4:7]),
                program.static_shared,
                *numbers[7:10],
                sum(copy[6 * at] for at, i in enumerate(program.code) if not i.hidden),
                copy,
                program,
            )
        )
    return found


def launch(kernel: int, grid: Sequence[int], block: Sequence[int], arguments: Sequence[Any], dynamic: int = 0) -> int:
    """Launches a kernel itself, with ctypes values as arguments."""
    extents = [(ctypes.c_uint32 * 3)(*(list(each) + [1, 1])[:3]) for each in (grid, block)]
    pointers = (ctypes.c_void_p * max(1, len(arguments)))(*(ctypes.addressof(a) for a in arguments))
    return _library().ptx_launch(kernel, *extents, pointers, ctypes.c_uint64(dynamic))


class Executor:
    """The launcher of the sources in ``csrc``, with kernels for ``architecture``, on a device of DEVICES."""

    def __init__(self, csrc: Path | str | None = None, architecture: str = "compute_80", device: str = "h100") -> None:
        path, self.text = launcher_library(Path(csrc or CSRC).resolve(), architecture)
        self.module = ptx.Module(self.text)
        self.numbers: dict[str, int] = {}
        self.failure: Exception | None = None
        self.device = device
        _library()
        # Bound to runtime.cpp's functions, not to the CUDA runtime that torch has loaded.
        self.library = ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_DEEPBIND)
        self._find = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p)(self._find_kernel)

    def _find_kernel(self, mangled: bytes) -> int:
        name = mangled.decode()
        try:
            if name not in self.numbers:
                self.numbers[name] = load(self.module, name)
            return self.numbers[name]
        except Exception as error:  # it cannot pass through the launcher
            self.failure = error
            return -1

    def run(
        self, op: str, tensors: Sequence[Tensor], *, normalizer: str, kernel_size: int, group_size: int, up: int,
        down: int, size: Sequence[int] | None = None, out_size: Sequence[int] | None = None,
        strides: Sequence[int] | None = None, offset: int = 0, workspace: int = 1 << 32, fail_with: int = 0,
        fail_after: int = 0, **options: Any,
    ) -> Run:  # fmt: skip
        """Calls the launcher, with copies of the tensors that lie as CUDA's allocator places them, of the same strides.

        ``tensors``: of 'reassemble' (features, kernels), of 'grad_features' (gradient, kernels), of 'grad_kernels'
        (gradient, features, kernels); ``size``: of the features, for 'grad_features'; ``out_size``: of the output, for
        'reassemble', where it is not whole; ``strides``: the result's, or those of the first tensor's memory format;
        ``offset``: elements by which everything lies further; ``workspace``: bytes that the launcher may allocate;
        ``fail_with``: a CUDA error that launches give from number ``fail_after`` on; ``options``: those of
        :func:`set_options`.
        """
        first, kernels = tensors[0], tensors[-1]
        features = tensors[1] if op == "grad_kernels" else first
        height, width = size if op == "grad_features" else features.shape[2:]  # type: ignore[misc]
        whole = (-(-height * up // down), -(-width * up // down))
        out_height, out_width = (out_size or whole) if op == "reassemble" else first.shape[2:]
        batch, channels = first.shape[:2]
        shape = ((batch, channels, out_height, out_width), (batch, channels, height, width), kernels.shape)[
            OPERATORS.index(op)
        ]
        if strides is None:
            last = is_channels_last(kernels if op == "grad_kernels" else first)
            form = torch.channels_last if last else torch.contiguous_format
            strides = torch.empty(shape, dtype=first.dtype, memory_format=form, device="meta").stride()
        # Of bytes that are not a number in any format.
        result = place(torch.empty(0, dtype=first.dtype), offset, shape, strides)
        tensors = [place(tensor, offset, tensor.shape, tensor.stride()) for tensor in tensors]
        reset()
        add_range(result, 1)
        for tensor in tensors:
            add_range(tensor, 0)
        shape_numbers = (batch, channels, height, width, out_height, out_width, kernel_size, group_size, up, down)
        held = [result, *tensors]
        set_options(**options)
        error = self._launch(
            op, first.dtype, normalizer, shape_numbers, [t.data_ptr() for t in held], [t.stride() for t in held],
            workspace, fail_with, fail_after,
        )  # fmt: skip
        unwritten = result.numel() - _library().ptx_written(ctypes.c_uint64(result.data_ptr()))
        return Run(result, error, findings(), launches(), unwritten)

    def _launch(
        self, op: str, dtype: torch.dtype, normalizer: str, shape: Sequence[int], data: Sequence[int],
        strides: Sequence[Sequence[int]], workspace: int, fail_with: int, fail_after: int,
    ) -> int:  # fmt: skip
        library = _library()
        set_device(self.device)
        library.ptx_fail(fail_with, fail_after)
        library.ptx_find_kernels(self._find)
        pointers = (ctypes.c_void_p * 4)(*data, *[None] * (4 - len(data)))
        flat = (ctypes.c_int64 * 16)(*(stride for each in strides for stride in each), *[0] * (16 - 4 * len(strides)))
        left = ctypes.c_int64(workspace)
        error = self.library.launch(
            OPERATORS.index(op), DTYPES.index(dtype), NORMALIZERS.index(normalizer), (ctypes.c_int64 * 10)(*shape), 0,
            None, ctypes.cast(library.ptx_allocate, ctypes.c_void_p), ctypes.byref(left), pointers, flat,
        )  # fmt: skip
        if self.failure:
            failure, self.failure = self.failure, None
            raise failure
        return error

    def choose(
        self, op: str, dtype: torch.dtype, normalizer: str, shape: Sequence[int], strides: Sequence[Sequence[int]],
        offset: int = 0,
    ) -> tuple[int, list[Launch]]:  # fmt: skip
        """What the launcher returns and launches; nothing is executed, and no tensor needs to exist. ``shape``: batch,
        channels, height, width, output's height and width, kernel and group size, up, down; ``strides``: of the result
        and the tensors, in the order of :meth:`run`.
        """
        reset()
        set_options(first=NOTHING)
        data = [(n + 1 << 44) + offset * dtype.itemsize for n in range(len(strides))]
        error = self._launch(op, dtype, normalizer, shape, data, strides, 1 << 62, 0, 0)
        return error, launches()


def is_channels_last(tensor: Tensor) -> bool:
    return not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def write_counts(run: Run, path: str | Path, **call: Any) -> None:
    """The record that a performance model reads."""
    Path(path).write_text(json.dumps({"call": call, "launches": run.records()}, indent=1) + "\n")


__all__ = ["DEVICES", "Executor", "Finding", "Launch", "Run", "asdict", "load", "write_counts"]
