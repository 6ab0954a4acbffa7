"""What a call of an operator asks of a GPU: what the launcher launches, executed on the CPU (tests/ptx), and the counts
of its machine code that follow (gpu_model_sass.py).
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import command, gpu_model_sass
from benchmarks.comparison import Inputs, Problem
from benchmarks.gpu_model_devices import WARP, Gpu, Occupancy, occupancy
from benchmarks.gpu_model_sass import Check, Code, Statement
from benchmarks.report import Record
from carafe_plugin.engine.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
SOURCE, EXECUTOR = ROOT / "csrc", ROOT / "tests" / "ptx"
OPERATORS = {"forward": "reassemble", "grad-features": "grad_features", "grad-kernels": "grad_kernels"}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
KERNELS = {"masks": "none", "logits": "softmax"}  # what is reassembled with, and its normaliser
DTYPES = {name: command.DTYPES[name] for name in ("float32", "float16", "bfloat16")}

# Multiply-adds of a warp instruction, where they are not one of each lane.
PRODUCTS = {"HMMA.16816": 16 * 8 * 16, "HMMA.1688": 16 * 8 * 8}
MULTIPLY_ADDS = {"FFMA": WARP, "DFMA": WARP, "FFMA2": 2 * WARP, **PRODUCTS}
EXCHANGES = ("SHFL", "MOVM")  # between lanes: through the data path of shared memory, a warp a clock

SAMPLE = 32  # blocks of a launch that are executed, more or less; the rest is like them
HOT_LINES = 20  # of a kernel's source


@dataclass(frozen=True)
class Case:
    """One call of an operator."""

    problem: Problem
    operator: str
    layout: str
    kernels: str
    contiguous_kernels: bool = False  # whatever the layout of features and output

    def compulsory_bytes(self) -> int:
        """Each tensor once: what must come from memory and go there."""
        features, kernels, output = self.problem.elements()
        # To differentiate the normaliser the gradient reads the logits, of which it has the size.
        again = kernels if self.operator == "grad-kernels" and self.kernels == "logits" else 0
        return (features + kernels + output + again) * self.problem.dtype.itemsize

    def multiply_adds(self) -> float:
        """Those of the definition: one for each output and tap."""
        return float(self.problem.elements()[2] * self.problem.taps)

    @property
    def dtype(self) -> str:
        return str(self.problem.dtype).removeprefix("torch.")

    def record(self) -> Record:
        problem = {name: value for name, value in vars(self.problem).items() if name not in ("dtype", "device")}
        own = {"operator": self.operator, "dtype": self.dtype, "layout": self.layout, "kernels": self.kernels}
        return {"shape": problem, **own, "contiguous_kernels": self.contiguous_kernels}


@dataclass(frozen=True)
class Issue:
    """What warps do at one line of the PTX."""

    issued: float  # times
    sectors: float = 0.0  # of 32 bytes of global memory
    global_wavefronts: float = 0.0
    wavefronts: float = 0.0  # of shared memory
    ideal_wavefronts: float = 0.0  # with no conflict of banks

    def scaled(self, factor: float) -> Issue:
        return Issue(*(factor * value for value in vars(self).values()))


@dataclass(frozen=True)
class Launch:
    """One launch of a call, as the executor saw it, all blocks together."""

    kernel: str  # mangled
    blocks: int
    threads: int
    dynamic_shared: int
    lines: Mapping[int, Issue]
    sampled: int  # blocks that were executed
    sources: Mapping[int, str] = field(default_factory=dict)  # of lines of the PTX, file and line


@dataclass(frozen=True)
class Counts:
    """What a launch asks of the hardware."""

    kernel: str
    blocks: int
    threads: int
    registers: int
    shared: int  # bytes of a block, static and dynamic
    spills: int  # bytes stored and loaded
    kinds: Mapping[str, float]  # warp instructions issued, by opcode
    sectors_read: float  # of 32 bytes, asked of the L1 cache
    sectors_written: float
    shared_wavefronts: float
    ideal_wavefronts: float
    global_wavefronts: float  # of the L1 cache, by banks as those of shared memory
    latency: float = 0.0  # clocks of a warp, on average, that has a scheduler for itself
    guessed: float = 0.0  # share of the instructions whose count nothing vouched for
    checks: tuple[Check, ...] = ()  # of the machine code's counts against the PTX's
    sampled: int = 0
    # Lines of the source, with their shares of the instructions and of the clocks that warps wait.
    hot: tuple[tuple[str, float, float], ...] = ()

    @property
    def instructions(self) -> float:
        return sum(self.kinds.values())

    @property
    def wavefronts(self) -> float:
        """Of shared memory, the L1 cache, and exchanges between lanes: all by one data path."""
        return self.shared_wavefronts + self.global_wavefronts + sum(self.kinds.get(kind, 0) for kind in EXCHANGES)

    @property
    def multiply_adds(self) -> float:
        return sum(number * MULTIPLY_ADDS.get(kind, 0) for kind, number in self.kinds.items())

    @property
    def capacity(self) -> float:
        """Multiply-adds, had every instruction been one: a lane's, or a product of matrices."""
        return sum(number * max(WARP, MULTIPLY_ADDS.get(kind, 0)) for kind, number in self.kinds.items())

    @property
    def difference(self) -> float:
        """By how much the counts disagree, at most."""
        return max((check.difference for check in self.checks), default=0.0)

    @property
    def warps(self) -> int:
        return math.ceil(self.threads / WARP)

    def resident(self, gpu: Gpu) -> Occupancy:
        found = occupancy(gpu.capability, self.threads, self.registers, self.shared)
        if found.blocks == 0:
            raise UsageError(f"{self.kernel} does not fit {gpu.title}: {found.limit}")
        return found


def counts_of(launch: Launch, code: Code, statements: Sequence[Statement]) -> Counts:
    """From what the executor saw and the machine code."""
    issued = {line: issue.issued for line, issue in launch.lines.items()}
    gpu_model_sass.count_blocks(code, statements, issued)
    kinds = gpu_model_sass.totals(code)
    opcodes = {statement.line: statement.opcode for statement in statements}

    def total(name: str, *starts: str) -> float:
        wanted = (issue for line, issue in launch.lines.items() if opcodes.get(line, "").startswith(starts or ("",)))
        return float(sum(getattr(issue, name) for issue in wanted))

    clocks, waits = gpu_model_sass.latency(code)
    spent: Counter[str] = Counter()
    waited: Counter[str] = Counter()
    for block in code.blocks:
        for instruction in block.instructions:
            spent[launch.sources.get(instruction.line, "?")] += block.count or 0  # type: ignore[assignment]
    for line, each in waits.items():
        waited[launch.sources.get(line, "?")] += each  # type: ignore[assignment]
    shares = [
        (place, spent[place] / max(1, sum(spent.values())), waited[place] / max(1, sum(waited.values())))
        for place in spent
    ]
    guessed = sum((block.count or 0) * len(block.instructions) for block in code.blocks if block.how == "guessed")
    return Counts(
        gpu_model_sass.short_name(launch.kernel),
        launch.blocks,
        launch.threads,
        code.registers,
        code.shared + launch.dynamic_shared,
        code.spills,
        kinds,
        total("sectors", "ld", "cp"),
        total("sectors", "st"),
        total("wavefronts"),
        total("ideal_wavefronts"),
        total("global_wavefronts"),
        clocks / (launch.blocks * math.ceil(launch.threads / WARP)),
        guessed / max(1.0, sum(kinds.values())),
        tuple(gpu_model_sass.checks(code, statements, issued)),
        launch.sampled,
        tuple(sorted(shares, key=lambda share: -share[1] - share[2])[:HOT_LINES]),
    )


def missing(csrc: Path) -> str | None:
    """Why nothing can be counted on this machine, or of these sources; None where it can."""
    needed = [EXECUTOR / "executor.py", csrc / "cuda" / "launch.h"]
    absent = [f"there is no {path}" for path in needed if not path.is_file()]
    return gpu_model_sass.missing_tool() or (absent or [import_executor()[0].missing_tools()])[0]


def import_executor() -> tuple[Any, type[Exception]]:
    """The executor, which belongs to the tests, and what it raises for PTX that it does not know."""
    if str(EXECUTOR) not in sys.path:
        sys.path.insert(0, str(EXECUTOR))
    import executor
    from ptx import PtxError

    return executor, PtxError


def attributes(gpu: Gpu) -> dict[int, int]:
    """What a launcher may ask of a device, by the numbers of cudaDeviceAttr."""
    unit, (major, minor) = gpu.multiprocessor, map(int, gpu.capability.split("."))
    return {
        16: gpu.multiprocessors,
        38: gpu.l2_bytes,
        39: unit.warps * WARP,
        75: major,
        76: minor,
        81: unit.shared,
        97: unit.shared_of_block,
        106: unit.blocks,
        111: unit.shared - unit.shared_of_block,
    }


class Tally:
    """Counts the calls of one checkout's launcher for one architecture, each once."""

    def __init__(self, gpu: Gpu, device: str, csrc: Path) -> None:
        if reason := missing(csrc):
            raise UsageError(f"the kernels cannot be counted: {reason}")
        executor, ptx_error = import_executor()
        executor.DEVICES[device] = {**executor.DEVICES["h100"], **attributes(gpu)}
        try:
            self.executor = executor.Executor(csrc, gpu.architecture.replace("sm_", "compute_"), device)
        except (ptx_error, RuntimeError) as error:
            lines = str(error).strip().splitlines()
            detail = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
            raise UsageError(f"the kernels cannot be executed: {detail}") from error
        self.statements = gpu_model_sass.ptx_statements(self.executor.text)
        self.codes = gpu_model_sass.assemble(self.executor.text, gpu.architecture)
        self.known: dict[Case, tuple[Counts, ...]] = {}

    def counts(self, case: Case) -> tuple[Counts, ...]:
        if case not in self.known:
            self.known[case] = tuple(
                counts_of(launch, self.codes[launch.kernel], self.statements[launch.kernel])
                for launch in self.launches(case, SAMPLE)
            )
        return self.known[case]

    def launches(self, case: Case, sample: int | None) -> list[Launch]:
        """Executes a call, of each launch about `sample` blocks, or all."""
        problem, layout = case.problem, LAYOUTS[case.layout]
        inputs = Inputs.random(problem)
        kernels = (inputs.logits if case.kernels == "logits" else inputs.masks).detach()
        features, grad = (
            each.detach().contiguous(memory_format=layout) for each in (inputs.features, inputs.grad_output)
        )
        kernels = kernels.contiguous(memory_format=torch.contiguous_format if case.contiguous_kernels else layout)
        tensors = {
            "forward": (features, kernels),
            "grad-features": (grad, kernels),
            "grad-kernels": (grad, features, kernels),
        }[case.operator]
        k, g, up, down = problem.geometry

        def execute(every: int) -> list[Any]:
            run = self.executor.run(
                OPERATORS[case.operator], tensors, normalizer=KERNELS[case.kernels], kernel_size=k, group_size=g, up=up,
                down=down, size=(problem.height, problem.width), every=every, first=min(every - 1, every // 2),
                checks=False,
            )  # fmt: skip
            if run.error:
                raise UsageError(f"the launcher returned CUDA error {run.error} for {case}")
            return list(run.launches)

        if sample is None:
            return [launch_of(each) for each in execute(1)]
        # A first look shows the grids; then each is sampled by a step that no tiling of the map is a multiple of.
        steps = [sampling_step(math.prod(each.grid), sample) for each in execute(1 << 62)]
        runs = {step: execute(step) for step in set(steps)}
        return [launch_of(runs[step][index]) for index, step in enumerate(steps)]


def sampling_step(blocks: int, sample: int) -> int:
    """One, or a prime number of blocks, of which about `sample` make up the grid."""
    step = blocks // sample
    while step > 1 and any(step % factor == 0 for factor in range(2, math.isqrt(step) + 1)):
        step -= 1
    return max(1, step)


def launch_of(seen: Any) -> Launch:
    """What is needed of the executor's own record."""
    blocks = math.prod(seen.grid)
    names = tuple(Issue.__dataclass_fields__)
    lines: dict[int, Issue] = {}
    sources: dict[int, str] = {}
    for record in seen.records():
        issue = Issue(*(float(record[name]) for name in names)).scaled(blocks / max(1, seen.blocks_executed))
        lines[record["ptx_line"]] = issue
    for statement in seen.program.code:  # lines that no warp came to
        lines.setdefault(statement.statement.line, Issue(0.0))
        for file, line in statement.statement.location[:1]:
            sources[statement.statement.line] = f"{Path(file).name}:{line}"
    return Launch(seen.kernel, blocks, math.prod(seen.block), seen.dynamic_shared, lines, seen.blocks_executed, sources)
