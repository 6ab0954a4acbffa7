"""What the benchmarks measure with: time, memory, the rates that bound the hardware, and what the machine is."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import importlib
import inspect
import itertools
import os
import platform
import re
import subprocess
import timeit
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils import benchmark

import carafe_plugin
from carafe_plugin.engine.errors import UsageError

# A sample lasts at least this long, so that neither the clock nor the cost of a call's Python shows.
SAMPLE_SECONDS = 0.02
# Calls that take longer are not repeated to warm the caches: filling them is then a small part of the call.
WARM_CALL_SECONDS = 0.05

# Variables of the environment that change what is measured.
SETTINGS = re.compile(r"(MALLOC|THP|CARAFE|OMP|KMP|GOMP|MKL|ATEN|PYTORCH|TORCH)_|(GLIBC_TUNABLES|LD_PRELOAD)$")

Work = Callable[[], object]


def seconds(work: Work, calls: int = 1) -> float:
    """Mean duration of one of `calls` calls in a row; a GPU is waited for before and after.

    `torch.utils.benchmark.Timer` would warm up with two calls or more, which would triple what slow peers take.
    """
    return timeit.Timer(work, timer=benchmark.timer).timeit(calls) / calls


@dataclass
class Timing:
    """The samples of one piece of work."""

    work: Work
    estimate: float  # seconds of one warm call; decides how many calls make a sample
    repeats: int  # samples to take
    samples: list[float] = field(default_factory=list)  # seconds of a call

    @property
    def calls(self) -> int:
        """Calls in one sample."""
        return max(1, round(SAMPLE_SECONDS / max(self.estimate, 1e-6)))

    def sample(self) -> None:
        if self.estimate < WARM_CALL_SECONDS:
            self.work()  # what ran before has emptied the caches
        self.samples.append(seconds(self.work, self.calls))

    def summary(self) -> dict[str, object]:
        """Median, quartiles and extremes in milliseconds, and how many figures of the median are significant."""
        quantiles = torch.tensor(self.samples, dtype=torch.float64).quantile(torch.linspace(0, 1, 5).double())
        measurement = benchmark.Measurement(1, self.samples, benchmark.TaskSpec("work()", "pass"))
        names = ("min_ms", "q1_ms", "median_ms", "q3_ms", "max_ms")
        return {
            **{name: round(1e3 * value, 5) for name, value in zip(names, quantiles.tolist(), strict=True)},
            "significant_figures": measurement.significant_figures,
            "repeats": len(self.samples),
            "calls_per_repeat": self.calls,
            "samples_ms": [round(1e3 * sample, 5) for sample in self.samples],
        }


def interleave(timings: Sequence[Timing]) -> None:
    """Samples in turn (A, B, C, A, B, C, ...), so that a machine that slows down slows all of them."""
    for turn in range(max((timing.repeats for timing in timings), default=0)):
        for timing in timings:
            if turn < timing.repeats:
                timing.sample()


def peak_bytes(work: Work, device: str) -> int:
    """Most memory that `work` holds at once beyond what was held before it, its result included.

    Both devices count what torch's allocators hand out; on CPU the profiler reports it, for compiled operators too. A
    process's resident size would depend on malloc, untouched pages and loaded libraries as well.
    """
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    # Without a word torch 2.4 and later warn of events that are lost; torch 2.1 has no such word, and microseconds.
    keeping: dict[str, Any] = (
        {"acc_events": True} if "acc_events" in inspect.signature(torch.profiler.profile).parameters else {}
    )
    with torch.profiler.profile(activities=activities, profile_memory=True, **keeping) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns() if hasattr(event, "start_ns") else event.start_us())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


def _best_seconds(work: Work) -> float:
    # A bound is what the machine can do at its best, hence the minimum, not the median.
    timing = Timing(work, min(seconds(work) for _ in range(2)), repeats=10)
    interleave([timing])
    return min(timing.samples)


def matmul_rate(device: str, dtype: torch.dtype, size: int) -> float:
    """Best FLOP/s of a square matrix product, in float32 (float64 for float64), as the operator accumulates."""
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    left, right, product = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(3))
    return 2 * size**3 / _best_seconds(lambda: torch.mm(left, right, out=product))


def copy_rate(device: str, moved: int) -> float:
    """Best bytes/s, reads and writes counted, of a warm copy that moves `moved` bytes (so it fits the same caches)."""
    source, target = (torch.ones(max(1, moved // 8), device=device, dtype=torch.float32) for _ in range(2))
    return 8 * source.numel() / _best_seconds(lambda: target.copy_(source))


def available_memory() -> int | None:
    """Bytes that can still be allocated on this machine; None where that cannot be asked (other than Linux)."""
    if platform.system() != "Linux":
        return None
    available, group = _kibibytes("/proc/meminfo", "MemAvailable"), Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no limit set, or no control group
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        available = min(available, limit - used)
    return available


def peak_resident_bytes() -> int:
    """The most memory that this process has held since it began, as Linux counts it."""
    return _kibibytes("/proc/self/status", "VmHWM")


@contextlib.contextmanager
def memory_limit(extra: int | None) -> Iterator[None]:
    """Makes allocations on CPU that go `extra` bytes beyond the present fail, where otherwise the kernel would kill."""
    if extra is None or platform.system() != "Linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _kibibytes("/proc/self/status", "VmData") + extra
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _kibibytes(file: str, key: str) -> int:
    return 1024 * int(re.findall(rf"^{key}:\s+(\d+) kB", Path(file).read_text(), re.MULTILINE)[0])


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_record(command: str, device: str) -> dict[str, Any]:
    """What a result file says about its run beside the results; `command` must not contain this machine's paths."""
    compiled = carafe_plugin.is_compiled(torch.device(device).type)
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "revision": revision(),
        "version": carafe_plugin.__version__,
        "backend": "compiled" if compiled else "fallback",
        "device": device,
        "machine": machine(device),
    }


def machine(device: str) -> dict[str, Any]:
    """What the numbers depend on; nothing that names the machine."""
    cpus = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
    models = re.findall(r"^model name\s*:\s*(.+)$", cpus, re.MULTILINE)
    description: dict[str, Any] = {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpu": (models or [platform.processor() or "unknown"])[0],
        "cores": cores(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cpu_path": cpu_path(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        # Of a preloaded allocator its file's name alone.
        "environment": {
            name: " ".join(Path(part).name for part in re.split("[ :]+", value))
            for name, value in sorted(os.environ.items())
            if SETTINGS.match(name)
        },
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


def cpu_path() -> str | None:
    """The instruction set that this package's CPU operators take here; None where they are not compiled."""
    if not carafe_plugin.is_compiled("cpu"):
        return None
    library = ctypes.CDLL(importlib.import_module("carafe_plugin._C").__file__)
    library.carafe_cpu_path.restype = ctypes.c_char_p
    if (path := library.carafe_cpu_path()) is None:
        raise UsageError(f"CARAFE_CPU_PATH={os.environ['CARAFE_CPU_PATH']} is not a path of this machine")
    return path.decode()


def revision(folder: Path = Path(__file__).parent) -> str | None:
    """The commit of a folder's checkout, with "+" when tracked files differ from it; None outside a git checkout."""
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]
    try:
        return subprocess.check_output(command, cwd=folder, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None
