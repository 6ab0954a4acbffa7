"""Predicts what the CUDA kernels ask of a GPU, and the least time that can take, without a GPU.

For each operator, shape, dtype and layout: nvcc compiles the project's own launcher, what it launches is executed on
the CPU (tests/ptx), a sample of the blocks where they are many, and how often a warp issues each instruction of the
machine code follows (benchmarks/gpu_model_sass.py). Beside it stand the bytes that must move, those that are asked of
the caches, the wavefronts of shared memory, and how much of a kernel a multiprocessor holds. `limit` is the largest of
the times that these take on the GPU of a data sheet: nothing can be faster. `expected` adds the clocks that a warp
waits for what it has loaded or computed, as if nothing hid them; benchmarks/results says how far both are from measured
times.

    python -m benchmarks.gpu_model [--gpu h100] [--shapes 256x50x84 ...] [--json FILE]
    python -m benchmarks.gpu_model --gpu h200 --compare counters.csv     # what ncu counted of benchmarks.gpu_probes

It is a model. What was measured stands in the other files of benchmarks/results.

Exit code: 0; 1 where a kernel's counts contradict each other; 2 for invalid arguments, or where a tool is missing.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])
from benchmarks import command, gpu_model_sass, measure
from benchmarks.comparison import Inputs, Problem
from benchmarks.gpu_model_devices import GPUS, SECTOR, WARP, Gpu, Occupancy, occupancy
from benchmarks.gpu_model_sass import Check, Code, Statement
from benchmarks.report import Record, make_table, shape_title
from carafe_plugin.engine.console import table_console
from carafe_plugin.engine.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
SOURCE, EXECUTOR = ROOT / "csrc", ROOT / "tests" / "ptx"
OPERATORS = {"forward": "reassemble", "grad-features": "grad_features", "grad-kernels": "grad_kernels"}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
KERNELS = {"masks": "none", "logits": "softmax"}  # what is reassembled with, and its normaliser
DTYPES = {name: command.DTYPES[name] for name in ("float32", "float16", "bfloat16")}

# Which of a multiprocessor's pipes takes an instruction; others are bound by issuing alone.
PIPES = {
    "float": "FFMA FMUL FADD HFMA2 HADD2 HMUL2 IMAD FFMA2 FADD2 FMUL2",
    "product": "IMAD",
    "integer": "IADD3 IADD VIADD LOP3 PLOP3 LEA SHF SHL SHR ISETP FSETP SEL FSEL FMNMX VIMNMX IMNMX VIADDMNMX PRMT MOV "
    "IABS F2FP P2R R2P SGXT BMSK FCHK I2FP HSET2 HSETP2",
    "special": "MUFU I2F F2I F2F FRND POPC FLO BREV",
    "double": "DFMA DADD DMUL DSETP",
}
# Multiply-adds of a warp instruction, where they are not one of each lane.
PRODUCTS = {"HMMA.16816": 16 * 8 * 16, "HMMA.1688": 16 * 8 * 8}
MULTIPLY_ADDS = {"FFMA": WARP, "DFMA": WARP, "FFMA2": 2 * WARP, **PRODUCTS}
EXCHANGES = ("SHFL", "MOVM")  # between lanes: through the data path of shared memory, a warp a clock
PIPES_OF = {name: frozenset(kinds.split()) for name, kinds in PIPES.items()}

console = table_console(210)

SAMPLE = 32  # blocks of a launch that are executed, more or less; the rest is like them
MOST_DIFFERENT = 0.05  # of the machine code's counts from the PTX's, without a mark
CONTRADICTION = 0.25  # likewise, of which the exit code tells
HOT_LINES = 20  # of a kernel's source
LAUNCH_SECONDS = 2e-6  # to start a kernel and to end it


# -------------------------------------------------------------------------------------------------------- counts


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
    lines: float = 0.0  # of 128 bytes
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
    global_wavefronts: float  # a line of 128 bytes each
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
        total("lines"),
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
    names = ("issued", "sectors", "lines", "wavefronts", "ideal_wavefronts")
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


# -------------------------------------------------------------------------------------------------------- limits


def times(counts: Counts, gpu: Gpu) -> dict[str, float]:
    """Seconds that each part of the GPU is busy at least. The memory is left out: it bounds a whole call."""
    unit = gpu.multiprocessor
    busiest = math.ceil(counts.blocks / gpu.multiprocessors)  # blocks of a multiprocessor
    share = busiest / counts.blocks / gpu.clock  # seconds for what takes one clock a piece, on that multiprocessor
    together = min(busiest, counts.resident(gpu).blocks) * counts.warps
    uneven = math.ceil(together / 4) * 4 / together  # of the four schedulers' shares

    def pipe(name: str, lanes: int) -> float:
        work = sum(number for kind, number in counts.kinds.items() if kind in PIPES_OF[name])
        return work * WARP / lanes * share * uneven

    wavefronts = counts.shared_wavefronts + counts.global_wavefronts + sum(counts.kinds.get(k, 0) for k in EXCHANGES)
    of_matrices = sum(counts.kinds.get(kind, 0) * multiply_adds for kind, multiply_adds in PRODUCTS.items())
    moved = SECTOR * (counts.sectors_read + counts.sectors_written)
    return {
        "issue": counts.instructions / 4 * share * uneven,
        "float": pipe("float", unit.float_lanes),
        "product": pipe("product", unit.product_lanes),
        "integer": pipe("integer", unit.integer_lanes),
        "special": pipe("special", unit.special_lanes),
        "double": pipe("double", unit.double_lanes),
        "tensor": of_matrices / gpu.tensor * share * uneven,
        "wavefronts": wavefronts / unit.wavefronts * share,
        "L2": max(moved / gpu.l2_bandwidth, moved / 64 * share),
    }


def generations(counts: Counts, gpu: Gpu) -> int:
    """How often the busiest multiprocessor fills up with blocks."""
    return math.ceil(math.ceil(counts.blocks / gpu.multiprocessors) / counts.resident(gpu).blocks)


@dataclass(frozen=True)
class Prediction:
    """What the model says of one call."""

    case: Case
    launches: tuple[Counts, ...]
    bound: float  # seconds: the compulsory bytes at the memory's bandwidth
    limit: float  # seconds: nothing can be faster
    limited_by: str
    expected: float  # seconds

    def record(self, gpu: Gpu) -> Record:
        outputs, wanted = self.case.problem.elements()[2], self.case.multiply_adds()
        instructions = sum(each.instructions for each in self.launches)
        return {
            **self.case.record(),
            "bound_us": micro(self.bound),
            "limit_us": micro(self.limit),
            "limited_by": self.limited_by,
            "expected_us": micro(self.expected),
            "limit_times_bound": round(self.limit / self.bound, 3),
            "expected_times_bound": round(self.expected / self.bound, 3),
            "compulsory_bytes": self.case.compulsory_bytes(),
            "requested_bytes": round(
                sum(SECTOR * (each.sectors_read + each.sectors_written) for each in self.launches)
            ),
            "instructions_per_output": round(WARP * instructions / outputs, 2),
            "useful_share": share_of(wanted, sum(each.capacity for each in self.launches)),
            "useful_multiply_adds": share_of(wanted, sum(each.multiply_adds for each in self.launches)),
            "launches": [launch_record(each, gpu) for each in self.launches],
        }


def most_common(kinds: Mapping[str, float], most: int) -> list[tuple[str, float]]:
    return sorted(kinds.items(), key=lambda item: -item[1])[:most]


def share_of(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None


def micro(seconds: float) -> float:
    return round(1e6 * seconds, 3)


def launch_record(counts: Counts, gpu: Gpu) -> Record:
    """One launch, for a file."""
    resident = counts.resident(gpu)
    waves = counts.blocks / (gpu.multiprocessors * resident.blocks)
    return {
        "kernel": counts.kernel,
        "blocks": counts.blocks,
        "threads": counts.threads,
        "sampled_blocks": counts.sampled,
        "registers": counts.registers,
        "shared_bytes": counts.shared,
        "spilled_bytes": counts.spills,
        "resident_blocks": resident.blocks,
        "resident_warps_share": round(resident.share, 4),
        "resident_limit": resident.limit,
        "waves": round(waves, 3),
        "last_wave_share": round(waves - math.ceil(waves) + 1, 3),
        "instructions": round(counts.instructions),
        "instructions_by_opcode": {kind: round(number) for kind, number in most_common(counts.kinds, 12)},
        "sectors_read": round(counts.sectors_read),
        "sectors_written": round(counts.sectors_written),
        "shared_wavefronts": round(counts.shared_wavefronts),
        "ideal_wavefronts": round(counts.ideal_wavefronts),
        "global_wavefronts": round(counts.global_wavefronts),
        "latency_clocks": round(counts.latency),
        "times_us": {name: micro(time) for name, time in times(counts, gpu).items()},
        "guessed_share": round(counts.guessed, 4),
        "difference": round(counts.difference, 4),
    }


def predict(case: Case, launches: Sequence[Counts], gpu: Gpu) -> Prediction:
    """The model of a call's launches on a GPU, one after the other."""
    bound = case.compulsory_bytes() / gpu.bandwidth
    limit, expected = 0.0, 0.0
    by: Counter[str] = Counter()
    for counts in launches:
        name, least = max(times(counts, gpu).items(), key=lambda item: item[1])
        by[name] += round(1e12 * least)
        limit += least
        expected += least + generations(counts, gpu) * counts.latency / gpu.clock + LAUNCH_SECONDS
    limited_by = by.most_common(1)[0][0] if limit > bound else "memory"
    return Prediction(case, tuple(launches), bound, max(bound, limit), limited_by, max(bound, expected))


# -------------------------------------------------------------------------------------------------------- tables


def print_predictions(predictions: Sequence[Prediction], gpu: Gpu) -> None:
    """A table for each shape."""
    for problem, series in itertools.groupby(predictions, lambda each: shape_title(vars(each.case.problem))):
        rows = list(series)
        table = make_table(
            f"Model, not measured: {problem}, {gpu.title}",
            f"us. bound: each tensor once at {gpu.bandwidth / 1e12:.3g} TB/s; limit: the busiest part; expected: with "
            "latencies. waves: blocks over what the GPU holds at once. /output: instructions of a thread; useful: the "
            "definition's multiply-adds, of what so many instructions can (a lane one, a tensor core 1024 or 2048 at "
            "once). moved: bytes asked of the caches over the bound's. "
            "conflicts: wavefronts of shared memory over those without.",
            "operator",
            [
                "kernels", "dtype", "layout", "blocks", "waves", "warps", "regs", "KiB", "/output", "useful", "moved",
                "conflicts", "bound", "limit", "by", "x bound", "expected", "x bound",
            ],
        )  # fmt: skip
        for each in rows:
            table.add_row(*cells(each, gpu))
        console.print(table)


def cells(prediction: Prediction, gpu: Gpu) -> list[str]:
    """A row. Of several launches the one with most instructions is shown, and their number."""
    record, case = prediction.record(gpu), prediction.case
    main = max(record["launches"], key=lambda each: each["instructions"])
    more = f" +{len(prediction.launches) - 1}" if len(prediction.launches) > 1 else ""
    doubtful = "?" if any(max(each.difference, each.guessed) > MOST_DIFFERENT for each in prediction.launches) else ""
    return [
        case.operator,
        case.kernels,
        case.dtype,
        case.layout.replace("channels-last", "nhwc").replace("contiguous", "nchw"),
        f"{main['blocks']}{more}",
        f"{main['waves']:.2f}",
        f"{main['resident_warps_share']:.0%}",
        f"{main['registers']}" + (" spills" if main["spilled_bytes"] else ""),
        f"{main['shared_bytes'] / 1024:.1f}",
        f"{record['instructions_per_output']:.1f}{doubtful}",
        f"{record['useful_share']:.0%}",
        f"{record['requested_bytes'] / record['compulsory_bytes']:.2f}",
        f"{main['shared_wavefronts'] / main['ideal_wavefronts']:.2f}" if main["ideal_wavefronts"] else "",
        f"{record['bound_us']:.1f}",
        f"{record['limit_us']:.1f}",
        record["limited_by"],
        f"{record['limit_times_bound']:.2f}",
        f"{record['expected_us']:.1f}",
        f"{record['expected_times_bound']:.2f}",
    ]


def print_details(predictions: Sequence[Prediction], gpu: Gpu) -> None:
    """Of each launch: each part's time, the instructions by kind, and the lines of the source."""
    for prediction in predictions:
        for counts in prediction.launches:
            case = prediction.case
            title = f"{case.operator}, {case.kernels}, {case.dtype}, {case.layout}: {counts.kernel}"
            console.print(f"\n{title}, {counts.blocks} x {counts.threads} threads", style="bold", highlight=False)
            parts = {**times(counts, gpu), "waiting": generations(counts, gpu) * counts.latency / gpu.clock}
            busy = ", ".join(f"{name} {1e6 * time:.1f}" for name, time in parts.items() if time > 5e-8)
            of_global = counts.global_wavefronts / max(1.0, counts.global_wavefronts + counts.shared_wavefronts)
            busy += f" ({of_global:.0%} of the wavefronts are global memory's)"
            console.print(f"us: {busy}; more warps would not fit the {counts.resident(gpu).limit}", highlight=False)
            kinds = most_common(counts.kinds, 16)
            total = max(1.0, counts.instructions)
            console.print(", ".join(f"{kind} {number / total:.1%}" for kind, number in kinds), highlight=False)
            table = make_table("", None, "source", ["instructions", "waiting"])
            for place, instructions, waiting in counts.hot:
                table.add_row(place, f"{instructions:.1%}", f"{waiting:.1%}")
            console.print(table)


def print_differences(predictions: Sequence[Prediction]) -> None:
    """Where counts disagree, of each kernel and kind the most."""
    most: dict[tuple[str, str], Check] = {}
    for counts in (each for prediction in predictions for each in prediction.launches):
        for check in counts.checks:
            key = counts.kernel, check.kind
            if check.difference > max(MOST_DIFFERENT, most[key].difference if key in most else 0.0):
                most[key] = check
    for (kernel, kind), check in sorted(most.items()):
        text = f"? {kernel}: {check.sass:.4g} {kind} in the machine code, {check.ptx:.4g} in the PTX"
        console.print(text, style="yellow", highlight=False, markup=False)


def print_summary(predictions: Sequence[Prediction], gpu: Gpu) -> None:
    """How far all shapes are from the bound."""
    title = f"Model, not measured: times the bandwidth bound over all shapes and layouts, {gpu.title}"
    table = make_table(title, None, "operator", ["kernels", "dtype", "limit", "median", "expected", "median"])
    groups: dict[tuple[str, str, str], list[Prediction]] = {}
    for each in predictions:
        groups.setdefault((each.case.operator, each.case.kernels, each.case.dtype), []).append(each)
    for names, some in groups.items():
        numbers = []
        for times_bound in ([e.limit / e.bound for e in some], [e.expected / e.bound for e in some]):
            numbers += [f"{min(times_bound):.2f} to {max(times_bound):.2f}", f"{statistics.median(times_bound):.2f}"]
        table.add_row(*names, *numbers)
    console.print(table)


# ----------------------------------------------------------------------------------------------------- comparison

MEASURED = {
    "time_us": "gpu__time_duration.sum",
    "instructions": "smsp__inst_executed.sum",
    "dram_bytes": "dram__bytes.sum",
    "registers": "launch__registers_per_thread",
    "warps_active": "sm__warps_active.avg.pct_of_peak_sustained_active",
}
UNITS = {"ns": 1e-3, "us": 1.0, "ms": 1e3, "s": 1e6, "byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
LONG_UNITS = {"nsecond": "ns", "usecond": "us", "msecond": "ms", "second": "s"}


def read_counters(file: Path) -> list[Record]:
    """The kernels of a CSV file of ncu (`--csv --page raw`), in order."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror or error}") from error
    start = next((number for number, line in enumerate(lines) if "Kernel Name" in line), None)
    if start is None:
        raise UsageError(f"{file}: expected ncu's CSV, found no column 'Kernel Name'")
    rows = list(csv.DictReader(lines[start:]))
    if missing := [name for name in MEASURED.values() if not rows or name not in rows[0]]:
        raise UsageError(f"{file}: expected ncu's counters, found no column {missing[0]}")
    units = rows.pop(0) if not rows[0]["Kernel Name"] else {}
    found = []
    for row in rows:
        values: Record = {"kernel": row["Kernel Name"], "call": row.get("call", "")}
        for name, column in MEASURED.items():
            unit = LONG_UNITS.get(units.get(column, ""), units.get(column, ""))
            factor = UNITS.get(unit, 1.0) if name != "time_us" else UNITS.get(unit, 1e-3)
            values[name] = float(row[column].replace(",", "")) * factor
        found.append(values)
    return found


def probed_cases() -> Iterator[Case]:
    """The calls of benchmarks.gpu_probes.counters, in order."""
    from benchmarks.gpu_probes import COUNTED

    for (channels, height, width, up, down), dtype, layout in itertools.product(COUNTED, DTYPES.values(), LAYOUTS):
        for operator in OPERATORS:
            problem = Problem(channels, height, width, up=up, down=down, dtype=dtype)
            yield Case(problem, operator, layout, "logits", contiguous_kernels=True)


def compare(measured: Sequence[Record], counter: Tally, gpu: Gpu) -> list[Record]:
    """Each kernel's counters beside the model of it."""
    models = [(case, counts) for case in probed_cases() for counts in counter.counts(case)]
    if len(models) != len(measured):
        raise UsageError(
            f"--compare: {len(measured)} kernels were measured, benchmarks.gpu_probes launches {len(models)}: "
            "they are of other sources (--source)"
        )
    records = []
    for (case, counts), values in zip(models, measured, strict=True):
        least = max(times(counts, gpu).values())
        expected = least + generations(counts, gpu) * counts.latency / gpu.clock + LAUNCH_SECONDS
        records.append(
            {
                **case.record(),
                "measured": values,
                "model": launch_record(counts, gpu),
                "limit_us": micro(least),
                "expected_us": micro(expected),
                "instructions_ratio": round(counts.instructions / values["instructions"], 4),
                "measured_over_limit": round(values["time_us"] / micro(least), 3),
                "measured_over_expected": round(values["time_us"] / micro(expected), 3),
            }
        )
    return records


def print_comparison(records: Sequence[Record], gpu: Gpu) -> None:
    """A row for each kernel, and what they say of the model in all."""
    table = make_table(
        f"The model beside what ncu measured, {gpu.title}",
        "us; M instructions of warps. limit and expected: the model's.",
        "call",
        [
            "kernel",
            "M inst",
            "model",
            "ratio",
            "regs",
            "model",
            "warps",
            "model",
            "measured",
            "limit",
            "x",
            "expected",
            "x",
        ],
    )
    for each in records:
        measured, model = each["measured"], each["model"]
        table.add_row(
            f"{shape_title(each['shape'])}, {each['dtype']}, {each['layout']}",
            model["kernel"],
            f"{measured['instructions'] / 1e6:.2f}",
            f"{model['instructions'] / 1e6:.2f}",
            f"{each['instructions_ratio']:.3f}",
            f"{measured['registers']:.0f}",
            f"{model['registers']}",
            f"{measured['warps_active']:.0f}%",
            f"{model['resident_warps_share']:.0%}",
            f"{measured['time_us']:.1f}",
            f"{each['limit_us']:.1f}",
            f"{each['measured_over_limit']:.2f}",
            f"{each['expected_us']:.1f}",
            f"{each['measured_over_expected']:.2f}",
        )
    console.print(table)
    for name, words in SUMMARIES.items():
        values = sorted(each[name] for each in records)
        middle = statistics.median(values)
        console.print(f"{words}: {values[0]:.3f} to {values[-1]:.3f}, median {middle:.3f}", highlight=False)


SUMMARIES = {
    "instructions_ratio": "instructions, model over measured",
    "measured_over_limit": "time, measured over the limit",
    "measured_over_expected": "time, measured over expected",
}


# -------------------------------------------------------------------------------------------------------- command


def default_problems() -> list[Problem]:
    """An FPN's levels, a backbone's maps, and what is less common, at one size each way."""
    up, down = ((256, 50, 84, 2, 1), (64, 200, 336, 1, 2))
    usual = [(256, 25, 42, 2, 1), up, (256, 100, 168, 2, 1), down, (256, 200, 336, 1, 2)]
    problems = [Problem(c, h, w, up=s, down=d) for c, h, w, s, d in usual]
    for k, (c, h, w, s, d) in itertools.product((3, 7), (up, down)):
        problems.append(Problem(c, h, w, kernel_size=k, up=s, down=d))
    return [*problems, Problem(256, 50, 84, up=4), Problem(256, 50, 84, group_size=4)]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; exits with code 2 and one clear line when an argument is invalid."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_model",
        description="Predict what the CUDA kernels ask of a GPU, and the least time that can take, without a GPU.",
    )
    add = parser.add_argument
    add("--gpu", default="h100", metavar="GPU", help=f"{', '.join(GPUS)} [h100]")
    add(
        "--shapes", type=command.shape, nargs="+", metavar="CxHxW", help="sizes of the features, or NxCxHxW [the usual]"
    )
    add("--scale-factor", type=command.scale, help="2 doubles, 1/2 halves; with --shapes [2]")
    add("--kernel-size", type=command.integer, help="k of the kernels, odd; with --shapes [5]")
    add("--group-size", type=command.integer, help="groups of channels; with --shapes [1]")
    add("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES), help="[all]")
    add("--ops", choices=OPERATORS, nargs="+", default=list(OPERATORS), help="[all]")
    add("--layouts", choices=LAYOUTS, nargs="+", default=list(LAYOUTS), help="[both]")
    add("--kernels", choices=KERNELS, nargs="+", default=list(KERNELS), help="masks, or logits for a softmax [both]")
    add("--source", type=Path, default=SOURCE, metavar="DIR", help="the sources to count [this checkout's csrc]")
    add(
        "--compare", type=Path, metavar="CSV", help="instead: ncu's counters of benchmarks.gpu_probes, beside the model"
    )
    add("--details", action="store_true", help="also where the instructions and the waiting are, line by line")
    add("--json", type=command.output_file, metavar="FILE", help="write the results")
    options = parser.parse_args(arguments)
    if options.gpu not in GPUS:
        parser.error(f"--gpu: unknown GPU {options.gpu!r}; known are {', '.join(GPUS)}")
    if options.kernel_size and options.kernel_size % 2 == 0:
        parser.error(f"--kernel-size: expected an odd number, got {options.kernel_size}")
    for name in ("scale_factor", "kernel_size", "group_size"):
        if getattr(options, name) and not options.shapes:
            parser.error(f"--{name.replace('_', '-')} goes with --shapes, which says of what")
    if not (options.source / "cuda").is_dir():
        parser.error(f"--source: expected a folder with the CUDA sources in cuda/, got {options.source}")
    if options.compare and not options.compare.is_file():
        parser.error(f"--compare: no file {options.compare}")
    options.problems = default_problems()
    if options.shapes:
        scale = options.scale_factor or Fraction(2)
        geometry = options.kernel_size or 5, options.group_size or 1, scale.numerator, scale.denominator
        options.problems = [Problem(c, h, w, n, *geometry) for n, c, h, w in options.shapes]
    for problem in options.problems:
        if problem.channels % problem.group_size:
            parser.error(
                f"--group-size: {problem.channels} channels cannot be divided into {problem.group_size} groups"
            )
    options.command = command.command_line(parser, arguments, options)
    return options


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """The calls that were asked for."""
    for problem in options.problems:
        for operator, kernels, dtype, layout in itertools.product(
            options.ops, options.kernels, options.dtype, options.layouts
        ):
            sized = Problem(**{**vars(problem), "dtype": DTYPES[dtype]})
            yield Case(sized, operator, layout, kernels)


def run(options: argparse.Namespace) -> int:
    """Counts, predicts or compares, and shows it."""
    gpu = GPUS[options.gpu]
    measured = read_counters(options.compare) if options.compare else []
    counter = Tally(gpu, options.gpu, options.source)
    record: Record = {
        "schema": 1,
        "model": "a model of the GPU, not a measurement",
        "command": options.command,
        "revision": measure.revision(),
        "source_revision": measure.revision(options.source),
        "gpu": {**vars(gpu), "multiprocessor": vars(gpu.multiprocessor)},
    }
    if options.compare:
        record["compared"] = compare(measured, counter, gpu)
        print_comparison(record["compared"], gpu)
        differences = [each["model"]["difference"] for each in record["compared"]]
    else:
        predictions = []
        for _, series in itertools.groupby(cases(options), lambda case: shape_title(vars(case.problem))):
            some = [predict(case, counter.counts(case), gpu) for case in series]
            print_predictions(some, gpu)
            if options.details:
                print_details(some, gpu)
            predictions += some
        record["predictions"] = [each.record(gpu) for each in predictions]
        if len({each.case.problem for each in predictions}) > 1:
            print_summary(predictions, gpu)
        print_differences(predictions)
        differences = [launch.difference for each in predictions for launch in each.launches]
    if options.json:
        options.json.write_text(as_text(record), encoding="utf-8")
    return int(max(differences) > CONTRADICTION)


def as_text(record: Record) -> str:
    """JSON with a line for each prediction."""
    lines = [
        f" {json.dumps(name)}: [\n" + ",\n".join(f"  {json.dumps(each)}" for each in value) + "\n ]"
        if isinstance(value, list)
        else f" {json.dumps(name)}: {json.dumps(value)}"
        for name, value in record.items()
    ]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the model; returns the exit code."""
    options = parse_arguments(arguments)
    try:
        return run(options)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
