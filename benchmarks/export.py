"""Measures exported models in other runtimes beside the model in PyTorch with this package's operator.

For each shape: our module, and the reassembly alone (from the content encoder's output), exported with fixed sizes and
with any, in onnxruntime and in OpenVINO; beside them other up- and downsamplers, exported in the same way. What is ours
is compared with the model before it is timed. One thread; all take turns; a ratio is taken within its turn, between
processor times, so that what else the machine does counts little.

    python -m benchmarks.export --json result.json

Exit code: 0; 1 when an exported model of ours fails or differs from the model; 2 for invalid arguments.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])
from benchmarks import command, measure, report, runtimes
from benchmarks.comparison import Inputs, Problem, relative_error
from benchmarks.module import our_module
from benchmarks.peers import DOWNSAMPLERS, UPSAMPLERS, fused
from carafe_plugin import export

SHAPES = {Fraction(2): [(1, 256, 50, 84)], Fraction(1, 2): [(1, 64, 200, 336), (1, 256, 200, 336)]}
WRITERS = {"onnxruntime": (export.to_onnx, "model.onnx"), "openvino": (export.to_openvino, "model.xml")}
OURS = ("module", "reassembly")
TOLERANCE = 1e-5  # relative to the largest value: 25 products in float32, added in another order


class Reassembly(nn.Module):
    """The operator as modules call it, behind their convolutions."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.geometry = problem.geometry

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        """(N, C, H, W) and the content encoder's output -> (N, C, H * up / down, W * up / down)."""
        return fused(features, logits, *self.geometry)


@dataclass
class Subject:
    """A model, its inputs, and the ways in which it is exported: sizes and what torch.export is told of them."""

    name: str
    model: nn.Module
    inputs: tuple[Tensor, ...]
    forms: dict[str, Any]


class Turns(measure.Timing):
    """Samples of processor time instead of the clock's."""

    def sample(self) -> None:
        if self.estimate < measure.WARM_CALL_SECONDS:
            self.work()  # what ran before has emptied the caches
        self.samples.append(timeit.Timer(self.work, timer=time.process_time).timeit(self.calls) / self.calls)


def subjects(problem: Problem) -> Iterator[Subject]:
    """What is exported for a problem, ours first."""
    inputs = Inputs.random(problem)
    features, logits = inputs.features.detach(), inputs.logits.detach()
    n, h, w = torch.export.Dim("n"), torch.export.Dim("h"), torch.export.Dim("w")
    coarse, fine = {0: n, 2: h, 3: w}, {0: n, 2: problem.down * h, 3: problem.down * w}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield Subject("module", our_module(problem).eval(), (features,), {"fixed": None, "any": (fine,)})
        both = {"fixed": None, "any": (fine, coarse)}
        yield Subject("reassembly", Reassembly(problem).eval(), (features, logits), both)
        for name, _, build in UPSAMPLERS if problem.up > 1 else DOWNSAMPLERS:
            yield Subject(name, build(problem).eval(), (features,), {"fixed": None})


def exported(subject: Subject, sizes: str, runtime: str, folder: Path) -> tuple[Path, runtimes.Run]:
    """The model's file and the model in its runtime."""
    write, name = WRITERS[runtime]
    dynamic = subject.forms[sizes]
    # A batch of one would be taken for a constant.
    example = tuple(torch.cat([each, each]) for each in subject.inputs) if dynamic else subject.inputs
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # exporters warn of their own past and future
        path = write(subject.model, example, folder / name, dynamic)
    return path, runtimes.RUNTIMES[runtime](path)


def peak_bytes(runtime: str, path: Path, inputs: Sequence[np.ndarray]) -> int | None:
    """As :func:`runtimes.peak_bytes` counts, in a process of its own."""
    files = [path.parent / f"input{number}.npy" for number in range(len(inputs))]
    for file, array in zip(files, inputs, strict=True):
        np.save(file, array)
    arguments = [sys.executable, runtimes.__file__, runtime, *map(str, (path, *files))]
    return json.loads(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)


def measure_problem(problem: Problem, names: Sequence[str], repeats: int) -> report.Record:
    """All subjects of a problem, in every form and runtime."""
    rows: list[report.Record] = []
    timings: list[Turns] = []

    def add(row: report.Record, work: measure.Work) -> None:
        timings.append(Turns(work, min(measure.seconds(work) for _ in range(2)), repeats))
        rows.append(row)

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for subject in subjects(problem):
            work = functools.partial(subject.model, *subject.inputs)
            expected = work()
            row: report.Record = {"name": subject.name, "sizes": "", "runtime": "torch"}
            add(row | {"peak_bytes": measure.peak_bytes(work, "cpu")}, work)
            arrays = [each.numpy() for each in subject.inputs]
            for sizes in subject.forms:
                for runtime in names:
                    row = {"name": subject.name, "sizes": sizes, "runtime": runtime}
                    path, run = exported(subject, sizes, runtime, Path(folder) / f"{len(rows)}")
                    error = relative_error([torch.from_numpy(np.array(run(arrays)[0]))], [expected])
                    row |= {"error": error, "peak_bytes": peak_bytes(runtime, path, arrays)}
                    add(row, functools.partial(run, arrays))
        measure.interleave(timings)
    ours = {row["name"]: timing for row, timing in zip(rows, timings, strict=True) if row["runtime"] == "torch"}
    for row, timing in zip(rows, timings, strict=True):
        # The reassembly is compared with ours alone, all that is a whole up- or downsampler with our module.
        reference = ours[row["name"] if row["name"] == "reassembly" else "module"].samples
        ratios = [one / other for one, other in zip(timing.samples, reference, strict=True)]
        row |= timing.summary() | {"times_ours": round(statistics.median(ratios), 4)}
        row |= {"times_ours_min": round(min(ratios), 4), "times_ours_max": round(max(ratios), 4)}
    shape = ("channels", "height", "width", "batch", "kernel_size", "group_size", "up", "down")
    return {"shape": {name: getattr(problem, name) for name in shape}, "rows": rows}


def print_tables(record: report.Record) -> None:
    """A table for each shape."""
    for result in record["exported"]:
        table = report.make_table(
            report.shape_title(result["shape"]),
            "Processor time of one thread. x ours: beside the module, the reassembly beside itself, in PyTorch with "
            "the compiled operator; the median and the extremes of ratios within a turn.",
            "model",
            ("sizes", "runtime", "median ms", "quartiles", "x ours", "extremes", "peak MB", "error"),
        )
        for before, row in zip([None, *result["rows"]], result["rows"], strict=False):
            if before and before["name"] != row["name"]:
                table.add_section()
            table.add_row(
                row["name"],
                row["sizes"],
                row["runtime"],
                f"{row['median_ms']:.4g}",
                f"{row['q1_ms']:.4g} to {row['q3_ms']:.4g}",
                f"{row['times_ours']:.3g}",
                f"{row['times_ours_min']:.3g} to {row['times_ours_max']:.3g}",
                "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.4g}",
                f"{row['error']:.0e}" if "error" in row else "",
            )
        report.console.print(table)


def is_sound(row: report.Record) -> bool:
    """Whether an exported model of ours is the model, as far as rounding allows; others only have their error shown."""
    return row["name"] not in OURS or row.get("error", 0) <= TOLERANCE


def installed() -> list[str]:
    """The runtimes that there are, for which exporters need more than themselves."""
    packages = {"onnxruntime": ("onnxruntime", "onnx", "onnxscript"), "openvino": ("openvino",)}
    return [name for name, needed in packages.items() if all(map(importlib.util.find_spec, needed))]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; exits with code 2 and one clear line when an argument is invalid."""
    description = "Measure exported models in other runtimes beside the model."
    parser = argparse.ArgumentParser("python -m benchmarks.export", description=description)
    add = parser.add_argument
    add("--shapes", type=command.shape, nargs="+", metavar="CxHxW", help="sizes of the features [usual ones]")
    add("--scale-factor", type=command.scale, default=Fraction(2), help="of these shapes: 2 doubles, 1/2 halves [2]")
    add("--runtimes", nargs="+", choices=WRITERS, help="what runs the exported models [all that are installed]")
    add("--repeats", type=command.integer, default=15, help="turns [15]")
    add("--json", type=command.output_file, metavar="FILE", help="write the results")
    options = parser.parse_args(arguments)
    options.command = command.command_line(parser, arguments, options)
    found = installed()
    for name in options.runtimes or ():
        if name not in found:
            parser.error(f"--runtimes: {name}, or what exports for it, is not installed")
    options.runtimes = list(dict.fromkeys(options.runtimes or found))
    if not options.runtimes:
        parser.error("needs onnxruntime with onnx and onnxscript, or openvino; found none of them")
    shapes = {options.scale_factor: options.shapes} if options.shapes else SHAPES
    options.problems = [
        Problem(c, h, w, n, up=scale.numerator, down=scale.denominator)
        for scale, each in shapes.items()
        for n, c, h, w in each
    ]
    for problem in options.problems:
        if problem.height % problem.down or problem.width % problem.down:
            size = f"{problem.height}x{problem.width}"
            parser.error(f"--shapes: height and width must be multiples of {problem.down}, got {size}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    options = parse_arguments(arguments)
    torch.set_num_threads(1)
    record = {"schema": 1, **measure.run_record(options.command, "cpu"), "dtype": "float32", "quick": False}
    versions = {name: importlib.metadata.version(name) for name in options.runtimes}
    record |= {"runtimes": versions, "exported": []}
    report.print_header(record)
    for number, problem in enumerate(options.problems, 1):
        result = measure_problem(problem, options.runtimes, options.repeats)
        result["load_average"] = round(os.getloadavg()[0], 2)  # this process is one of it
        record["exported"].append(result)
        command.write(options, record)  # what is measured stays, whatever becomes of the rest
        title = report.shape_title(result["shape"])
        print(f"measured: {title} ({number} of {len(options.problems)})", file=sys.stderr)
    print_tables(record)
    return 0 if all(is_sound(row) for result in record["exported"] for row in result["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
