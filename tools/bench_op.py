"""Measures `carafe_plugin.ops.carafe` against the other ways to compute it, and against cheaper upsamplers.

For each shape: forward, forward + backward (gradients of features and masks) and peak additional memory of each peer,
beside a bound of the hardware measured in the same run. A peer that computes CARAFE's function is compared with ours
before it is timed. Peers take turns, and each gets the median of its turns; compilation and warm-up do not count.

    python tools/bench_op.py --device cpu --json result.json --plot result.png

Exit code: 0; 1 when ours fails or a peer's result differs from ours; 2 for arguments that do not fit.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.util
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import bench_measure as measure
import bench_report
import torch
from bench_peers import OURS, PEERS, Call, Inputs, Peer, Problem
from torch import Tensor

import carafe_plugin

DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}
# The largest difference from ours, relative to ours' largest value, that rounding explains: peers add 25 products (a
# gradient: hundreds) in the dtype itself, ours accumulates in float32.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# An FPN's levels P5, P4 and P3 for an image of 800 x 1333, as the upsamplers of its top-down path see them.
SHAPES = ((256, 25, 42), (256, 50, 84), (256, 100, 168))
QUICK_SHAPES = ((8, 5, 6),)
PASSES = ("forward", "forward_backward")
FEWEST_REPEATS = 3

T = TypeVar("T")


class Failure(Exception):
    """Why a peer has no measurement: a status and what is known besides."""

    def __init__(self, status: str, detail: str, **facts: object) -> None:
        super().__init__(detail)
        self.record: dict[str, object] = {"status": status, "detail": detail, **facts}


def run_pass(call: Call, inputs: Inputs, name: str) -> tuple[Tensor, ...]:
    """One forward pass without gradients, or one forward and backward; returns what was computed."""
    if name == "forward":
        with torch.no_grad():
            return (call.forward(),)
    return torch.autograd.grad(call.forward(), call.wrt, inputs.grad_output)


def relative_error(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference between two sets of tensors, each relative to the largest expected value."""
    errors = [0.0]
    for result, reference in zip(results, expected, strict=True):
        if result.shape != reference.shape:
            return float("inf")
        if reference.numel():
            scale = reference.abs().max().clamp_min(torch.finfo(reference.dtype).tiny)
            error = float((result - reference).abs().max() / scale)
            errors.append(error if error == error else float("inf"))
    return max(errors)


class Benchmark:
    """Measures all peers for one problem."""

    def __init__(self, problem: Problem, peers: Sequence[Peer], options: argparse.Namespace) -> None:
        self.problem, self.options = problem, options
        self.inputs = Inputs.random(problem)
        self.peers = {peer.name: peer for peer in (OURS, *peers)}
        self.calls: dict[str, Call] = {}
        self.records: dict[str, dict[str, Any]] = {
            peer.name: {"name": peer.name, "description": peer.description, "equal": peer.equal}
            for peer in self.peers.values()
        }

    def run(self) -> dict[str, object]:
        """Returns the record of the problem, the bound and every peer."""
        bound = self._bound()
        for name in self.peers:
            try:
                self.calls[name] = self._guarded(self.peers[name].setup, self.problem, self.inputs)
            except Failure as failure:
                self.records[name] |= {each: dict(failure.record) for each in PASSES}
        for each in PASSES:
            self._measure(each, bound)
        shape = dataclasses.asdict(self.problem)
        del shape["dtype"], shape["device"]
        return {"shape": shape, "bound": bound, "peers": list(self.records.values())}

    def _bound(self) -> dict[str, float]:
        device, problem = self.problem.device, self.problem
        size = 128 if self.options.quick else (4096 if torch.device(device).type == "cuda" else 1024)
        bound: dict[str, float] = {"matmul_flop_per_s": measure.matmul_rate(device, problem.dtype, size)}
        for each in PASSES:
            flop, moved = problem.flop(each != "forward"), problem.traffic(each != "forward")
            rate = measure.copy_rate(device, moved)
            limits = flop / bound["matmul_flop_per_s"], moved / rate
            bound |= {
                f"{each}_flop": flop,
                f"{each}_bytes": moved,
                f"{each}_copy_bytes_per_s": rate,
                f"{each}_ms": 1e3 * max(limits),
            }
        return bound

    def _measure(self, each: str, bound: dict[str, float]) -> None:
        device = self.problem.device
        timings: dict[str, measure.Timing] = {}
        expected: tuple[Tensor, ...] | None = None
        for name, call in self.calls.items():
            record: dict[str, Any] = {}
            self.records[name][each] = record
            try:
                begin = time.perf_counter()
                results = self._guarded(run_pass, call, self.inputs, each)
                measure.synchronize(device)
                record["first_call_s"] = round(time.perf_counter() - begin, 4)  # compilation included
                if name == OURS.name:
                    expected = results
                elif self.peers[name].equal and expected is not None:
                    record["error"] = self._checked_error(results, expected)
                del results
                timings[name] = self._guarded(self._timing, name, call, each)
            except Failure as failure:
                record |= failure.record
        del expected
        # The limit is not in force here: what has just succeeded twice succeeds again.
        measure.interleave(list(timings.values()), device)
        for name, timing in timings.items():
            peak = measure.peak_bytes(timing.work, device)
            self.records[name][each] |= {"status": "ok", **timing.summary(), "peak_bytes": peak}
        self._add_ratios(each, bound)

    def _checked_error(self, results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
        error, tolerance = relative_error(results, expected), TOLERANCES[self.problem.dtype]
        if error > tolerance:
            raise Failure("wrong result", f"differs from {OURS.name} by {error:.1e}, allowed {tolerance:.0e}")
        return error

    def _timing(self, name: str, call: Call, each: str) -> measure.Timing:
        def work() -> object:
            return run_pass(call, self.inputs, each)

        repeats = self.options.repeats
        estimate = measure.seconds(work, self.problem.device)
        if name != OURS.name:  # ours is what the others are compared with
            affordable = int(self.options.time_limit / estimate)
            if affordable < min(repeats, FEWEST_REPEATS):
                detail = f"one call takes {estimate:.3g} s, all may take {self.options.time_limit:g} s"
                raise Failure("too slow", detail, estimate_ms=1e3 * estimate)
            repeats = min(repeats, affordable)
        return measure.Timing(work, estimate, repeats)

    def _guarded(self, work: Callable[..., T], *arguments: Any) -> T:
        """Calls `work`; whatever it raises becomes a `Failure`, so that one peer does not end the run."""
        on_cpu = torch.device(self.problem.device).type == "cpu"
        limit = (self.options.memory_limit or measure.available_memory()) if on_cpu else None
        try:
            with measure.memory_limit(limit):
                return work(*arguments)
        except Failure:
            raise
        except Exception as error:  # a peer is foreign code: compilers, kernels, packages
            out_of_memory = measure.is_out_of_memory(error)
            # The first line says what happened; the rest, and paths, are about this machine.
            line = re.sub(r"(?<!\w)/\S+/", "", (str(error).strip() or "no message").splitlines()[0])
            detail = f"{type(error).__name__}: {line}"
        if not on_cpu:
            torch.cuda.empty_cache()
        raise Failure("out of memory" if out_of_memory else "failed", detail)

    def _add_ratios(self, each: str, bound: dict[str, float]) -> None:
        ours = self.records[OURS.name][each].get("median_ms")
        for record in self.records.values():
            result = record[each]
            if result["status"] == "ok":
                median = result["median_ms"]
                result["times_bound"] = round(median / bound[f"{each}_ms"], 4)
                if ours:
                    result["times_ours"] = round(median / ours, 4)


def parse_shape(text: str) -> tuple[int, int, int]:
    """Reads CxHxW."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"expected CxHxW, three positive integers such as 256x50x84, got {text!r}")
    channels, height, width = map(int, text.split("x"))
    return channels, height, width


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


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; exits with code 2 and one clear line when something in it does not fit."""
    integer, number = positive(int), positive(float)
    parser = argparse.ArgumentParser(
        prog="bench_op.py",
        description="Measure the CARAFE operator against other ways to compute it.",
        epilog="Peers:\n" + "\n".join(f"  {peer.name:22} {peer.description}" for peer in PEERS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=DTYPES, default="float32")
    add("--shapes", type=parse_shape, nargs="+", metavar="CxHxW", help="sizes of the features [an FPN's three]")
    add("--batch", type=integer, default=1, help="images at once [1]")
    add("--kernel-size", type=integer, default=5, help="k of the kernels, odd [5]")
    add("--group-size", type=integer, default=1, help="groups of channels with kernels of their own [1]")
    add("--scale-factor", type=integer, default=2, help="upsampling by this integer [2]")
    add("--peers", nargs="+", metavar="PEER", help="what to compare with, of those below [all that can run]")
    add("--threads", type=integer, default=min(2, measure.cores()), help="CPU threads [2]")
    add("--repeats", type=integer, help="turns that each peer gets [10]")
    add("--time-limit", type=number, default=60.0, metavar="S", help="seconds a peer may take in a pass [60]")
    add("--memory-limit", type=number, metavar="GB", help="memory a peer may allocate on CPU [what is available]")
    add("--json", type=Path, metavar="FILE", help="write the results")
    add("--plot", type=Path, metavar="FILE", help="write a figure (.png, .svg or .pdf)")
    add("--quick", action="store_true", help="tiny size, two turns: shows that everything runs, measures nothing")
    options = parser.parse_args(arguments)

    options.shapes = options.shapes or (QUICK_SHAPES if options.quick else SHAPES)
    options.repeats = options.repeats or (2 if options.quick else 10)
    options.memory_limit = int(options.memory_limit * 1e9) if options.memory_limit else None
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    if options.kernel_size % 2 == 0:
        parser.error(f"--kernel-size: expected an odd number, got {options.kernel_size}")
    for channels, *_ in options.shapes:
        if channels % options.group_size:
            parser.error(f"--group-size: {channels} channels cannot be divided into {options.group_size} groups")
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
    options.peers = choose_peers(parser, options)
    return options


def choose_peers(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Peer]:
    """The peers asked for, or all that can run; asking for one that cannot is an error."""
    by_name = {peer.name: peer for peer in PEERS}
    problem = problems(options)[0]
    if options.peers is None:
        return [peer for peer in PEERS if peer.unavailable(problem) is None]
    for name in options.peers:
        if name not in by_name:
            parser.error(f"--peers: unknown peer {name!r}; known are {', '.join(by_name)}")
        if reason := by_name[name].unavailable(problem):
            parser.error(f"--peers: {name} cannot run: {reason}")
    return [by_name[name] for name in dict.fromkeys(options.peers)]


def problems(options: argparse.Namespace) -> list[Problem]:
    """The problems that the command line describes."""
    return [
        Problem(
            channels=channels,
            height=height,
            width=width,
            batch=options.batch,
            kernel_size=options.kernel_size,
            group_size=options.group_size,
            up=options.scale_factor,
            dtype=DTYPES[options.dtype],
            device=options.device,
        )
        for channels, height, width in options.shapes
    ]


def command_line(options: argparse.Namespace, arguments: Sequence[str]) -> str:
    """The command, with output files by their names alone."""
    words = list(arguments)
    for path in (options.json, options.plot):
        words = [word.replace(str(path), path.name) if path else word for word in words]
    return shlex.join(["python", "tools/bench_op.py", *words])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parse_arguments(arguments)
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the memory profiler complains of a missing GPU
    torch.set_num_threads(options.threads)
    report: dict[str, object] = {
        "schema": 1,
        "command": command_line(options, arguments),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "revision": measure.revision(),
        "version": carafe_plugin.__version__,
        "backend": "compiled" if carafe_plugin.is_compiled(options.device) else "fallback",
        "device": options.device,
        "dtype": options.dtype,
        "quick": options.quick,
        "machine": measure.machine(options.device),
    }
    bench_report.print_header(report)
    results: list[dict[str, object]] = []
    for problem in problems(options):
        result = Benchmark(problem, options.peers, options).run()
        results.append(result)
        for each in PASSES:
            bench_report.print_table(result, each)
    report["results"] = results
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        bench_report.plot(report, options.plot)
    return 0 if all(map(bench_report.is_sound, results)) else 1


if __name__ == "__main__":
    sys.exit(main())
