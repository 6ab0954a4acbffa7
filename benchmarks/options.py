"""What the command lines of `bench_op.py` and `bench_module.py` share, and what both write about a run."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

import carafe_plugin
from benchmarks import measure, mmcv_peer, report
from benchmarks import runner as engine
from benchmarks.problem import Peer, Problem

DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}
# An FPN's levels P5, P4 and P3 for an image of 800 x 1333, as the upsamplers of its top-down path see them.
UP_SHAPES = ((1, 256, 25, 42), (1, 256, 50, 84), (1, 256, 100, 168))
# What a ResNet-50 halves for the same image: its stem's map (after the 7x7), and its second stage's.
DOWN_SHAPES = ((1, 64, 200, 336), (1, 256, 200, 336))
QUICK_SHAPES = (UP_SHAPES[1],), (DOWN_SHAPES[0],)


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """Reads CxHxW or NxCxHxW."""
    if not re.fullmatch(r"([1-9]\d*x){2,3}[1-9]\d*", text):
        raise argparse.ArgumentTypeError(
            f"expected CxHxW or NxCxHxW, positive integers such as 256x50x84, got {text!r}"
        )
    *batch, channels, height, width = map(int, text.split("x"))
    return batch[0] if batch else 1, channels, height, width


def parse_scale(text: str) -> Fraction:
    """Reads an integer (upsampling) or one over an integer (downsampling)."""
    try:
        scale = Fraction(text)
    except (ValueError, ZeroDivisionError):
        scale = Fraction(0)
    if scale <= 0 or 1 not in (scale.numerator, scale.denominator):
        raise argparse.ArgumentTypeError(f"expected an integer such as 2, or one over it such as 1/2, got {text!r}")
    return scale


def positive(kind: type) -> Callable[[str], Any]:
    """A parser of positive numbers of one kind."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected a positive {kind.__name__}, got {text!r}")
        return value

    return parse


def make_parser(program: str, description: str, peers: Iterable[Peer]) -> argparse.ArgumentParser:
    """A parser with the options that both benchmarks have."""
    integer, number = positive(int), positive(float)
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{program}",
        description=description,
        epilog="Peers:\n" + "\n".join(f"  {peer.name:22} {peer.description}" for peer in peers),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=DTYPES, default="float32")
    add("--shapes", type=parse_shape, nargs="+", metavar="CxHxW", help="sizes of the features, or NxCxHxW")
    add("--scale-factor", type=parse_scale, help="2 doubles, 1/2 halves [both, each at shapes of its own]")
    add("--kernel-size", type=integer, default=5, help="k of the kernels, odd [5]")
    add("--group-size", type=integer, default=1, help="groups of channels with kernels of their own [1]")
    add("--peers", nargs="*", metavar="PEER", help="what to compare with, of those below [all that can run]")
    add("--skip", nargs="+", default=(), metavar="PEER", help="what to leave out of them")
    add("--threads", type=integer, default=min(2, measure.cores()), help="CPU threads [2]")
    add("--repeats", type=integer, help="turns that each peer gets [10]")
    add("--time-limit", type=number, metavar="S", help="seconds a peer may take in a pass [15]")
    add("--memory-limit", type=number, metavar="GB", help="memory a peer may allocate on CPU [what is available]")
    add("--json", type=Path, metavar="FILE", help="write the results")
    add("--plot", type=Path, metavar="FILE", help="write a figure (.png, .svg or .pdf)")
    add("--quick", action="store_true", help="one size each way, three turns, no peer that compiles or is slow")
    return parser


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Completes what was parsed; ends with code 2 and one clear line when something does not fit."""
    options.repeats = options.repeats or (3 if options.quick else 10)
    options.time_limit = options.time_limit or (3.0 if options.quick else 15.0)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    if options.kernel_size % 2 == 0:
        parser.error(f"--kernel-size: expected an odd number, got {options.kernel_size}")
    for problem in problems(options):
        if problem.channels % options.group_size:
            parser.error(
                f"--group-size: {problem.channels} channels cannot be divided into {options.group_size} groups"
            )
    if options.threads > measure.cores():
        parser.error(f"--threads: {options.threads} asked for, {measure.cores()} cores available")
    for name, path in (("--json", options.json), ("--plot", options.plot)):
        if path and not path.absolute().parent.is_dir():
            parser.error(f"{name}: no folder {path.parent} to write {path.name} into")
        if path and path.is_dir():
            parser.error(f"{name}: expected a file, {path} is a folder")
    if options.plot and options.plot.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--plot: expected a name that ends in .png, .svg or .pdf, got {options.plot.name!r}")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, which is not installed")


def problems(options: argparse.Namespace) -> list[Problem]:
    """The problems that the command line describes."""
    scale = options.scale_factor
    if options.shapes:
        sizes = [(shape, scale or Fraction(2)) for shape in options.shapes]
    else:
        up_shapes, down_shapes = QUICK_SHAPES if options.quick else (UP_SHAPES, DOWN_SHAPES)
        defaults = ((Fraction(2), up_shapes), (Fraction(1, 2), down_shapes))
        sizes = [
            (shape, scale or usual)
            for usual, shapes in defaults
            if scale is None or (scale >= 1) == (usual >= 1)
            for shape in shapes
        ]
    return [
        Problem(
            *(channels, height, width, batch),
            kernel_size=options.kernel_size,
            group_size=options.group_size,
            up=factor.numerator,
            down=factor.denominator,
            dtype=DTYPES[options.dtype],
            device=options.device,
        )
        for (batch, channels, height, width), factor in sizes
    ]


def choose_peers(parser: argparse.ArgumentParser, options: argparse.Namespace, known: Sequence[Peer]) -> list[Peer]:
    """The peers asked for, or all that can run on one of the problems; asking for one that cannot is an error."""
    names, asked = options.peers, problems(options)
    by_name = {peer.name: peer for peer in known}
    for name in options.skip:
        if name not in {peer.name for peer in known}:
            parser.error(f"--skip: unknown peer {name!r}; known are {', '.join(peer.name for peer in known)}")
    known = [peer for peer in known if peer.name not in options.skip]
    runnable = [peer for peer in known if any(peer.unavailable(problem) is None for problem in asked)]
    if names is None:
        return [peer for peer in runnable if not (options.quick and peer.compiles)]
    for name in names:
        if name not in by_name:
            parser.error(f"--peers: unknown peer {name!r}; known are {', '.join(by_name)}")
        if by_name[name] not in runnable:
            parser.error(f"--peers: {name} cannot run: {by_name[name].unavailable(asked[0])}")
    return [by_name[name] for name in dict.fromkeys(names)]


def add_mmcv_option(parser: argparse.ArgumentParser) -> None:
    """Adds the option that names mmcv's source."""
    parser.add_argument(
        "--mmcv-source", type=Path, metavar="DIR", help="compile mmcv's operator from this folder (mmcv, or its csrc)"
    )


def find_mmcv_source(parser: argparse.ArgumentParser, folder: Path | None) -> Path | None:
    """The folder to compile, None where none was named; a folder without the source is an error."""
    if folder is None:
        return None
    source = mmcv_peer.find_source(folder)
    if source is None:
        parser.error(f"--mmcv-source: no {mmcv_peer.LAUNCHERS} in {folder}")
    return source


def engine_options(options: argparse.Namespace) -> engine.Options:
    """How to measure, as the command line says."""
    return engine.Options(
        repeats=options.repeats,
        time_limit=options.time_limit,
        memory_limit=int(options.memory_limit * 1e9) if options.memory_limit else None,
    )


def new_report(program: str, options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """What a result file says before its results; sets the number of threads, of which it tells."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the memory profiler complains of a missing GPU
    torch.set_num_threads(options.threads)
    words = list(arguments)
    for path in (options.json, options.plot, getattr(options, "mmcv_source", None)):
        words = [word.replace(str(path), path.name) if path else word for word in words]
    return {
        "schema": 2,
        "command": shlex.join(["python", "-m", f"benchmarks.{program}", *words]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "revision": measure.revision(),
        "version": carafe_plugin.__version__,
        "backend": "compiled" if carafe_plugin.is_compiled(options.device) else "fallback",
        "device": options.device,
        "dtype": options.dtype,
        "quick": options.quick,
        "machine": measure.machine(options.device),
    }


def measure_peers(
    asked: Sequence[Problem], ours: Sequence[Peer], peers: Sequence[Peer], how: engine.Options
) -> list[dict[str, Any]]:
    """Measures ours and the peers that can run on every problem, and shows each result as it comes."""
    results = []
    for problem in asked:
        runnable = [peer for peer in peers if peer.unavailable(problem) is None]
        result = engine.Benchmark(problem, (*ours, *runnable), how).run()
        results.append(result)
        for each in engine.PASSES:
            report.print_table(result, each)
    return results


def write_json(options: argparse.Namespace, record: Mapping[str, Any]) -> None:
    """Writes the result file, if one is wanted."""
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
