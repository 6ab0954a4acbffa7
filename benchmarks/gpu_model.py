"""Predicts what the CUDA kernels ask of a GPU, and the least time that can take, without a GPU.

For each operator, shape, dtype and layout: nvcc compiles the project's own launcher, what it launches is executed on
the CPU (tests/ptx), a sample of the blocks where they are many, and how often a warp issues each instruction of the
machine code follows (benchmarks/gpu_model_sass.py). Beside it stand the bytes that must move, those that are asked of
the caches, the wavefronts of shared memory and of the L1 cache, the products of tensor cores, and how much of a kernel
a multiprocessor holds. `limit` is the largest of the times that these take on the GPU of a data sheet: nothing can be
faster. `expected` adds the clocks that a warp waits for what it has loaded or computed, as if nothing hid them;
benchmarks/results says how far both are from measured times.

gpu_model_counts.py counts, gpu_model_limits.py makes times of it, gpu_model_tables.py shows them, gpu_model_compared.py
holds them against a profiler's counters; gpu_model_devices.py has the data sheets.

    python -m benchmarks.gpu_model [--gpu h100] [--shapes 256x50x84 ...] [--json FILE]
    python -m benchmarks.gpu_model --gpu h200 --compare counters.csv     # what ncu counted of benchmarks.gpu_probes

It is a model. What was measured stands in the other files of benchmarks/results.

Exit code: 0; 1 where a kernel's counts contradict each other; 2 for invalid arguments, or where a tool is missing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])
from benchmarks import command, measure
from benchmarks.comparison import Problem
from benchmarks.gpu_model_compared import compare, print_comparison, read_counters
from benchmarks.gpu_model_counts import DTYPES, KERNELS, LAYOUTS, OPERATORS, SOURCE, Case, Tally
from benchmarks.gpu_model_devices import GPUS
from benchmarks.gpu_model_limits import predict
from benchmarks.gpu_model_tables import print_details, print_differences, print_predictions, print_summary
from benchmarks.report import Record, shape_title
from carafe_plugin.engine.errors import UsageError

CONTRADICTION = 0.25  # likewise, of which the exit code tells


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
