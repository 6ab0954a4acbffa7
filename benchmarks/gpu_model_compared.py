"""The model beside what ncu counted of the same kernels."""

from __future__ import annotations

import csv
import itertools
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.comparison import Problem
from benchmarks.gpu_model_counts import DTYPES, LAYOUTS, OPERATORS, Case, Tally
from benchmarks.gpu_model_devices import Gpu
from benchmarks.gpu_model_limits import LAUNCH_SECONDS, generations, launch_record, micro, times
from benchmarks.gpu_model_tables import console
from benchmarks.report import Record, make_table, shape_title
from carafe_plugin.engine.errors import UsageError

MEASURED = {
    "time_us": "gpu__time_duration.sum",
    "instructions": "smsp__inst_executed.sum",
    "dram_bytes": "dram__bytes.sum",
    "registers": "launch__registers_per_thread",
    "warps_active": "sm__warps_active.avg.pct_of_peak_sustained_active",
}
# Of those that the multiprocessors could pass in that time, in percent: compared where ncu was asked for it.
WAVEFRONTS = "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed"
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
        if row.get(WAVEFRONTS):
            values["wavefronts_share"] = float(row[WAVEFRONTS].replace(",", "")) / 100
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
        record: Record = {
            **case.record(),
            "measured": values,
            "model": launch_record(counts, gpu),
            "limit_us": micro(least),
            "expected_us": micro(expected),
            "instructions_ratio": round(counts.instructions / values["instructions"], 4),
            "measured_over_limit": round(values["time_us"] / micro(least), 3),
            "measured_over_expected": round(values["time_us"] / micro(expected), 3),
        }
        if values.get("wavefronts_share"):
            clocks = 1e-6 * values["time_us"] * gpu.clock * gpu.multiprocessors
            passed = values["wavefronts_share"] * gpu.multiprocessor.wavefronts * clocks
            record["wavefronts_ratio"] = round(counts.wavefronts / passed, 4)
        records.append(record)
    return records


def print_comparison(records: Sequence[Record], gpu: Gpu) -> None:
    """A row for each kernel, and what they say of the model in all."""
    table = make_table(
        f"The model beside what ncu measured, {gpu.title}",
        "us; M instructions of warps; WF: wavefronts, model over measured. limit and expected: the model's.",
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
            "WF",
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
            f"{each['wavefronts_ratio']:.2f}" if "wavefronts_ratio" in each else "",
            f"{measured['time_us']:.1f}",
            f"{each['limit_us']:.1f}",
            f"{each['measured_over_limit']:.2f}",
            f"{each['expected_us']:.1f}",
            f"{each['measured_over_expected']:.2f}",
        )
    console.print(table)
    for name, words in SUMMARIES.items():
        if values := sorted(each[name] for each in records if name in each):
            middle = statistics.median(values)
            console.print(f"{words}: {values[0]:.3f} to {values[-1]:.3f}, median {middle:.3f}", highlight=False)


SUMMARIES = {
    "instructions_ratio": "instructions, model over measured",
    "wavefronts_ratio": "wavefronts, model over measured",
    "measured_over_limit": "time, measured over the limit",
    "measured_over_expected": "time, measured over expected",
}
