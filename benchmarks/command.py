"""The command line of `benchmarks.op` and `benchmarks.module`, from its options to the result file."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, report
from benchmarks.comparison import PASSES, Comparison, Peer, Problem, is_sound
from benchmarks.mmcv_operator import LAUNCHERS, find_source
from benchmarks.peers import mmcv
from benchmarks.report import Record
from carafe_plugin.engine.errors import UsageError
from carafe_plugin.engine.writing import write_whole

DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}
SHAPES = {
    # An FPN's levels P5, P4 and P3 for an image of 800 x 1333, as the upsamplers of its top-down path see them.
    Fraction(2): [(1, 256, 25, 42), (1, 256, 50, 84), (1, 256, 100, 168)],
    # What a ResNet-50 halves for the same image: its stem's map (after the 7x7), and its second stage's.
    Fraction(1, 2): [(1, 64, 200, 336), (1, 256, 200, 336)],
}
QUICK_SHAPES = {Fraction(2): [(1, 256, 50, 84)], Fraction(1, 2): [(1, 64, 200, 336)]}


def shape(text: str) -> tuple[int, int, int, int]:
    """Reads CxHxW or NxCxHxW."""
    if not re.fullmatch(r"([1-9]\d*x){2,3}[1-9]\d*", text):
        raise argparse.ArgumentTypeError(
            f"expected CxHxW or NxCxHxW, positive integers such as 256x50x84, got {text!r}"
        )
    *batch, channels, height, width = map(int, text.split("x"))
    return batch[0] if batch else 1, channels, height, width


def scale(text: str) -> Fraction:
    """Reads an integer (upsampling) or one over an integer (downsampling)."""
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if value <= 0 or 1 not in (value.numerator, value.denominator):
        raise argparse.ArgumentTypeError(f"expected an integer such as 2, or one over it such as 1/2, got {text!r}")
    return value


def positive(kind: type, text: str) -> Any:
    """Reads a positive number of one kind."""
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive {kind.__name__}, got {text!r}")
    return value


integer, number = functools.partial(positive, int), functools.partial(positive, float)


def threads(text: str) -> int:
    """Reads a number of CPU threads, at most one a core."""
    number = integer(text)
    if number > measure.cores():
        raise argparse.ArgumentTypeError(f"{number} asked for, {measure.cores()} cores available")
    return number


def output_file(text: str) -> Path:
    """Reads the name of a file to write, whose folder must exist."""
    path = Path(text)
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"no folder {path.parent} to write {path.name} into")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file, {path} is a folder")
    return path


def figure_file(text: str) -> Path:
    """Reads the name of a figure."""
    path = output_file(text)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"expected a name that ends in .png, .svg or .pdf, got {path.name!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("needs matplotlib, which is not installed")
    return path


def make_parser(
    program: str, description: str, ours: Sequence[Peer], peers: Sequence[Peer], kind: type[Problem] = Problem
) -> argparse.ArgumentParser:
    """A parser with the options that both benchmarks have, to measure `ours` beside `peers` on problems of a `kind`."""
    names = [peer.name for peer in peers]
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{program}",
        description=description,
        epilog="Peers:\n" + "\n".join(f"  {peer.name:22} {peer.description}" for peer in (*ours, *peers)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=DTYPES, default="float32")
    add("--shapes", type=shape, nargs="+", metavar="CxHxW", help="sizes of the features, or NxCxHxW")
    add("--scale-factor", type=scale, help="2 doubles, 1/2 halves [both, each at shapes of its own]")
    add("--kernel-size", type=integer, default=5, help="k of the kernels, odd [5]")
    add("--group-size", type=integer, default=1, help="groups of channels with kernels of their own [1]")
    add("--peers", nargs="*", choices=names, metavar="PEER", help="what to compare with, of those below [all that run]")
    add("--skip", nargs="+", choices=names, default=(), metavar="PEER", help="what to leave out of them")
    add("--threads", type=threads, default=min(2, measure.cores()), help="CPU threads [2]")
    add("--repeats", type=integer, help="turns that each peer is given [10]")
    add("--time-limit", type=number, metavar="S", help="seconds a peer may take in a pass [15]")
    add("--memory-limit", type=number, metavar="GB", help="memory a peer may allocate on CPU [what is available]")
    add("--json", type=output_file, metavar="FILE", help="write the results")
    add("--plot", type=figure_file, metavar="FILE", help="write a figure (.png, .svg or .pdf)")
    add("--quick", action="store_true", help="one size each way, three turns, no peer that compiles or is slow")
    add("--mmcv-source", type=Path, metavar="DIR", help="compile mmcv's operator from this folder (mmcv, or its csrc)")
    parser.set_defaults(ours=ours, known=peers, kind=kind, growth=None)
    return parser


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Adds `problems`, `command` and `comparison` and chooses `peers`.

    Exits with code 2 and one clear line when an argument is invalid.
    """
    options = parser.parse_args(arguments)
    if options.growth is not None and options.peers:
        parser.error("--growth measures ours only: it takes no --peers")
    options.command = command_line(parser, arguments, options)
    options.repeats = options.repeats or (3 if options.quick else 10)
    options.time_limit = options.time_limit or (3.0 if options.quick else 15.0)
    limit = int(options.memory_limit * 1e9) if options.memory_limit else None
    options.comparison = functools.partial(
        Comparison, repeats=options.repeats, time_limit=options.time_limit, memory_limit=limit
    )
    options.problems = list(_problems(options))
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    try:
        measure.cpu_path()
    except UsageError as error:
        parser.error(str(error))
    if options.kernel_size % 2 == 0:
        parser.error(f"--kernel-size: expected an odd number, got {options.kernel_size}")
    for problem in options.problems:
        if problem.channels % options.group_size:
            parser.error(
                f"--group-size: {problem.channels} channels cannot be divided into {options.group_size} groups"
            )
    mmcv.source = find_source(options.mmcv_source) if options.mmcv_source else None
    if options.mmcv_source and mmcv.source is None:
        parser.error(f"--mmcv-source: no {LAUNCHERS} in {options.mmcv_source}")
    reasons: dict[str, str | None] = {}  # why a peer runs on none of the problems; None where it runs on one
    for peer in options.known:
        told = [peer.unavailable(problem) for problem in options.problems]
        reasons[peer.name] = None if None in told else told[0]
    for name in options.peers or ():
        if reasons[name] is not None:
            parser.error(f"--peers: {name} cannot run: {reasons[name]}")
    by_name = {peer.name: peer for peer in options.known}
    if options.peers is None:
        runnable = [name for name, reason in reasons.items() if reason is None]
        options.peers = [name for name in runnable if not (options.quick and by_name[name].compiles)]
    options.peers = [by_name[name] for name in dict.fromkeys(options.peers) if name not in options.skip]
    return options


def command_line(parser: argparse.ArgumentParser, arguments: Sequence[str] | None, options: argparse.Namespace) -> str:
    """The command as a result file shows it: files and folders without the path to them."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    for path in vars(options).values():
        if isinstance(path, Path) and path.name:  # "." has none
            words = [word.replace(str(path), path.name) for word in words]
    return f"{parser.prog} {shlex.join(words)}"


def _problems(options: argparse.Namespace) -> Iterator[Problem]:
    asked = options.scale_factor
    if options.shapes:
        sizes = {asked or Fraction(2): options.shapes}
    else:
        usual = QUICK_SHAPES if options.quick else SHAPES
        sizes = {asked or scale: shapes for scale, shapes in usual.items() if not asked or (asked < 1) == (scale < 1)}
    for factor, shapes in sizes.items():
        kernels = options.kernel_size, options.group_size, factor.numerator, factor.denominator
        for batch, channels, height, width in shapes:
            yield options.kind(channels, height, width, batch, *kernels, DTYPES[options.dtype], options.device)


def run(options: argparse.Namespace, fill: Callable[[Record], None], plot: Callable[[Record, Path], None]) -> int:
    """Says what runs where, has `fill` fill the record, writes what is wanted; returns the exit code."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the memory profiler complains of a missing GPU
    torch.set_num_threads(options.threads)
    record = {"schema": 2, **measure.run_record(options.command, options.device)}
    record |= {"dtype": options.dtype, "quick": options.quick, "results": []}
    report.print_header(record)
    fill(record)
    write(options, record)
    if options.plot:
        plot(record, options.plot)
    return 0 if all(map(is_sound, [*record["results"], *record.get("growth", ())])) else 1


def write(options: argparse.Namespace, record: Record) -> None:
    """Writes the file of results, whole."""
    if options.json:
        write_whole((json.dumps(record, indent=1) + "\n").encode(), options.json)


def compare(options: argparse.Namespace) -> int:
    """Measures the peers on every problem; shows ours beside the bound first, then all; returns the exit code."""

    def fill(record: Record) -> None:
        for number, problem in enumerate(options.problems, 1):
            peers = [*options.ours, *(peer for peer in options.peers if peer.unavailable(problem) is None)]
            result = options.comparison(problem, peers).run()
            record["results"].append(result)
            write(options, record)  # what is measured stays, whatever becomes of the rest
            title = report.shape_title(result["shape"])
            print(f"measured: {title} ({number} of {len(options.problems)})", file=sys.stderr)
        report.print_bounds(record["results"])
        for result in record["results"]:
            for each in PASSES:
                report.print_table(result, each)

    return run(options, fill, report.plot)
