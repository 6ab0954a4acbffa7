"""The least time that what a call asks of a GPU can take there, part by part, and the time that is expected."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.gpu_model_counts import PRODUCTS, Case, Counts
from benchmarks.gpu_model_devices import SECTOR, WARP, Gpu
from benchmarks.report import Record

# Which of a multiprocessor's pipes takes an instruction; others are bound by issuing alone.
PIPES = {
    "float": "FFMA FMUL FADD HFMA2 HADD2 HMUL2 IMAD FFMA2 FADD2 FMUL2",
    "product": "IMAD",
    "integer": "IADD3 IADD VIADD LOP3 PLOP3 LEA SHF SHL SHR ISETP FSETP SEL FSEL FMNMX VIMNMX IMNMX VIADDMNMX PRMT MOV "
    "IABS F2FP P2R R2P SGXT BMSK FCHK I2FP HSET2 HSETP2",
    "special": "MUFU I2F F2I F2F FRND POPC FLO BREV",
    "double": "DFMA DADD DMUL DSETP",
}
PIPES_OF = {name: frozenset(kinds.split()) for name, kinds in PIPES.items()}

LAUNCH_SECONDS = 2e-6  # to start a kernel and to end it


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
        "wavefronts": counts.wavefronts / unit.wavefronts * share,
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
