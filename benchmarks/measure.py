"""How the benchmarks measure: time, memory, the bound of the hardware, and what the machine is."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

import carafe_plugin

# A sample lasts at least this long, so that neither the clock nor the cost of a call's Python shows.
SAMPLE_SECONDS = 0.02
# Calls that take longer are not repeated to warm the caches: filling them is then a small part of the call.
WARM_CALL_SECONDS = 0.05

# Variables of the environment that change what is measured.
SETTINGS = re.compile(r"(MALLOC|CARAFE|OMP|KMP|GOMP|MKL|ATEN|PYTORCH|TORCH)_|(GLIBC_TUNABLES|LD_PRELOAD)$")

Work = Callable[[], object]


def synchronize(device: str) -> None:
    """Waits for the work that was given to a GPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Work, device: str, calls: int = 1) -> float:
    """Mean duration of one call, over `calls` of them in a row: by the clock on CPU, by events on CUDA."""
    if torch.device(device).type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            work()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - begin) / calls


@dataclass
class Timing:
    """The samples of one piece of work.

    Attributes:
        work: what is timed.
        estimate: seconds of one warm call; decides how many calls make a sample.
        repeats: samples to take.
    """

    work: Work
    estimate: float
    repeats: int
    samples: list[float] = field(default_factory=list)

    @property
    def calls(self) -> int:
        """Calls in one sample."""
        return max(1, round(SAMPLE_SECONDS / max(self.estimate, 1e-6)))

    def sample(self, device: str) -> None:
        """Takes one sample."""
        if self.estimate < WARM_CALL_SECONDS:
            self.work()  # what ran before has emptied the caches
        self.samples.append(seconds(self.work, device, self.calls))

    def summary(self) -> dict[str, object]:
        """Median, quartiles and extremes in milliseconds."""
        milliseconds = [round(1e3 * sample, 5) for sample in self.samples]
        quartiles = statistics.quantiles(milliseconds, n=4, method="inclusive") if len(milliseconds) > 1 else None
        low, median, high = quartiles or milliseconds * 3
        return {
            "median_ms": round(median, 5),
            "q1_ms": round(low, 5),
            "q3_ms": round(high, 5),
            "min_ms": min(milliseconds),
            "max_ms": max(milliseconds),
            "repeats": len(milliseconds),
            "calls_per_repeat": self.calls,
            "samples_ms": milliseconds,
        }


def interleave(timings: list[Timing], device: str) -> None:
    """Samples in turn (A, B, C, A, B, C, ...), so that a machine that slows down slows all of them."""
    for turn in range(max((timing.repeats for timing in timings), default=0)):
        for timing in timings:
            if turn < timing.repeats:
                timing.sample(device)


def peak_bytes(work: Work, device: str) -> int:
    """Most memory that `work` holds at once beyond what was held before it, its result included.

    Both devices count what torch's allocators hand out. On CPU the profiler reports every allocation and release, of
    compiled operators too (they get outputs and scratch space from torch), and the running sum has an exact peak.
    A process's resident size would also show memory from elsewhere, but shrinks and grows with what malloc keeps, with
    pages not yet touched and with libraries being loaded, and can be reset on Linux alone.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = work()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        result = work()
    del result
    held = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _best_seconds(work: Work, device: str, repeats: int) -> float:
    # A bound is what the machine can do at its best, hence the minimum, not the median.
    timing = Timing(work, min(seconds(work, device) for _ in range(2)), repeats)
    interleave([timing], device)
    return min(timing.samples)


def matmul_rate(device: str, dtype: torch.dtype, size: int, repeats: int = 10) -> float:
    """Best FLOP/s of a square matrix product, in float32 (float64 for float64), as the operator accumulates."""
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    left, right, product = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(3))
    return 2 * size**3 / _best_seconds(lambda: torch.mm(left, right, out=product), device, repeats)


def copy_rate(device: str, moved: int, repeats: int = 10) -> float:
    """Best bytes/s, reads and writes counted, of a warm copy that moves `moved` bytes (so it fits the same caches)."""
    source, target = (torch.ones(max(1, moved // 8), device=device, dtype=torch.float32) for _ in range(2))
    return 8 * source.numel() / _best_seconds(lambda: target.copy_(source), device, repeats)


def available_memory() -> int | None:
    """Bytes that can still be allocated on this machine; None where that cannot be asked (other than Linux)."""
    try:
        available = _kibibytes("/proc/meminfo", "MemAvailable")
    except OSError:
        return None
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no limit set, or no control group
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        available = min(available, limit - used)
    return available


@contextlib.contextmanager
def memory_limit(extra: int | None) -> Iterator[None]:
    """Makes allocations on CPU that go `extra` bytes beyond the present fail, where otherwise the kernel would kill."""
    if extra is None or platform.system() != "Linux":
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _kibibytes("/proc/self/status", "VmData") + extra
    if before[1] != resource.RLIM_INFINITY:
        limit = min(limit, before[1])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _kibibytes(file: str, key: str) -> int:
    return 1024 * int(re.findall(rf"^{key}:\s+(\d+) kB", Path(file).read_text(), re.MULTILINE)[0])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    # The CPU allocator says it in a plain RuntimeError.
    said = re.search(r"not enough memory|can't allocate memory|bad_alloc", str(error))
    return isinstance(error, RuntimeError) and said is not None


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(device: str) -> dict[str, object]:
    """What the numbers depend on; nothing that names the machine."""
    description: dict[str, object] = {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpu": _cpu_model(),
        "cores": cores(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cpu_path": cpu_path(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "environment": _settings(),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        description |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return description


def _settings() -> dict[str, str]:
    # What the environment says to memory, threads and this package; of a preloaded allocator its file's name alone.
    settings = {name: value for name, value in sorted(os.environ.items()) if SETTINGS.match(name)}
    return {name: " ".join(Path(part).name for part in re.split("[ :]+", value)) for name, value in settings.items()}


def cpu_path() -> str | None:
    """The instruction set that this package's CPU operators take here; None where they are not compiled."""
    if not carafe_plugin.is_compiled("cpu"):
        return None
    library = ctypes.CDLL(importlib.import_module("carafe_plugin._C").__file__)
    library.carafe_cpu_path.restype = ctypes.c_char_p
    return library.carafe_cpu_path().decode()


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        if names := re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return str(names[0])
    return platform.processor() or "unknown"


def revision() -> str | None:
    """The checkout's commit, with "+" when files differ from it; None outside a git checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
