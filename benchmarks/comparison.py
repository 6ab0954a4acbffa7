"""Compares peers on one problem: their results, time, peak memory, and what autograd keeps."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import benchmark

from benchmarks import measure
from benchmarks.problem import Call, Inputs, Peer, Problem

PASSES = ("forward", "forward_backward")
FEWEST_REPEATS = 3
TINY_FLOP = 1e6
MEMORY_ERRORS = (MemoryError, torch.cuda.OutOfMemoryError)
LACKING_MEMORY = re.compile("not enough memory|can't allocate memory|bad_alloc")  # the CPU allocator's RuntimeError


class Failure(Exception):
    """Why a peer has no measurement, as its record says it: a status, the detail, and what is known besides."""


def run_pass(call: Call, inputs: Inputs, name: str) -> tuple[Tensor, ...]:
    """One forward pass without gradients, or one forward and backward; returns what was computed."""
    if name == "forward":
        with torch.no_grad():
            return (call.forward(),)
    start = inputs.grad_output if call.grad_output is None else call.grad_output
    return torch.autograd.grad(call.forward(), call.wrt, start)


def relative_error(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference between two sets of tensors, each relative to the largest expected value; NaN where one is."""
    errors = []
    for result, reference in zip(results, expected, strict=True):
        if result.shape != reference.shape:
            return float("inf")
        scale = reference.abs().max().clamp_min(torch.finfo(reference.dtype).tiny)
        errors.append((result.to(reference.dtype) - reference).abs().max() / scale)
    return float(torch.stack(errors).max())


@dataclass
class Comparison:
    """Measures all peers for one problem; each `reference` must come before the peers that name it."""

    problem: Problem
    peers: Sequence[Peer]
    repeats: int = 10  # turns that each peer is given
    time_limit: float = 15.0  # seconds that a peer which is not ours may take in a pass; `FEWEST_REPEATS` must fit
    memory_limit: int | None = None  # bytes that a peer may allocate on CPU; None for what is available

    def run(self) -> dict[str, Any]:
        """Returns the record of the problem, the bound and every peer."""
        shape = {name: value for name, value in vars(self.problem).items() if name not in ("dtype", "device")}
        self.on_cpu = torch.device(self.problem.device).type == "cpu"
        self.inputs = Inputs.random(self.problem)
        bound = self._bound()
        self.calls: dict[str, Call] = {}
        self.records: dict[str, dict[str, Any]] = {}
        for peer in self.peers:
            told = ("name", "description", "equal", "variant", "reference")
            record = self.records[peer.name] = {name: getattr(peer, name) for name in told}
            failure: dict[str, Any] = {}
            with self._guard(failure), self._limit():
                call = self.calls[peer.name] = peer.setup(self.problem, self.inputs)
                record["parameters"] = sum(parameter.numel() for parameter in call.parameters)
            record |= {each: dict(failure) for each in PASSES}
        for each in PASSES:
            self._measure(each, bound)
        return {"shape": shape, "bound": bound, "peers": list(self.records.values())}

    def _bound(self) -> dict[str, float]:
        device, problem = self.problem.device, self.problem
        size = 1024 if self.on_cpu else 4096
        if problem.flop(backward=False) < TINY_FLOP:
            size = 128  # such a time shows the cost of a call, whatever the bound
        bound: dict[str, float] = {"matmul_flop_per_s": measure.matmul_rate(device, problem.dtype, size)}
        for each in PASSES:
            backward = each != "forward"
            flop, moved = problem.flop(backward), problem.traffic(backward)
            rate = measure.copy_rate(device, moved)
            limits = flop / bound["matmul_flop_per_s"], moved / rate
            bound |= {
                f"{each}_flop": flop,
                f"{each}_bytes": moved,
                f"{each}_copy_bytes_per_s": rate,
                f"{each}_ms": 1e3 * max(limits),
                f"{each}_needed_bytes": problem.needed_memory(backward),
            }
        return bound

    def _measure(self, each: str, bound: dict[str, float]) -> None:
        timings: dict[str, measure.Timing] = {}
        expected: dict[str, tuple[Tensor, ...]] = {}
        peers = [peer for peer in self.peers if peer.name in self.calls]
        for peer in peers:
            record = self.records[peer.name][each]
            with self._guard(record):
                if self.records[peer.name]["forward"].get("status") == "too slow":
                    raise Failure({"status": "too slow", "detail": "the forward pass alone is"})
                work = functools.partial(run_pass, self.calls[peer.name], self.inputs, each)
                begin = benchmark.timer()
                with self._limit():
                    results = work()
                first = benchmark.timer() - begin
                record["first_call_s"] = round(first, 4)  # compilation included
                if peer.is_ours:
                    expected[peer.name] = results
                elif peer.equal and peer.reference in expected:
                    record["error"] = self._checked_error(peer, results, expected[peer.reference])
                del results
                # Warming up makes a first call slow, but hardly so slow: twice the limit needs no second look.
                if first > 2 * self.time_limit and not peer.compiles:
                    self._turns(peer, first)
                with self._limit():
                    estimate = measure.seconds(work)
                timings[peer.name] = measure.Timing(work, estimate, self._turns(peer, estimate))
            if "status" in record and not self.on_cpu:
                torch.cuda.empty_cache()
        expected.clear()
        # The limit is not in force here: what has just succeeded twice succeeds again.
        measure.interleave(list(timings.values()))
        medians: dict[str, float] = {}
        for peer in peers:
            if (timing := timings.get(peer.name)) is None:
                continue
            record, peak = self.records[peer.name][each], measure.peak_bytes(timing.work, self.problem.device)
            record |= {"status": "ok", **timing.summary(), "peak_bytes": peak}
            # A hook would make torch.compile compile again; what it keeps is not asked.
            if each == "forward_backward" and not peer.compiles:
                record |= saved_memory(self.calls[peer.name])
            median = medians[peer.name] = record["median_ms"]
            record["times_bound"] = round(median / bound[f"{each}_ms"], 4)
            record["times_needed_memory"] = round(peak / bound[f"{each}_needed_bytes"], 4)
            if peer.reference in medians:
                record["times_ours"] = round(median / medians[peer.reference], 4)

    def _checked_error(self, peer: Peer, results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
        dtypes = self.problem.dtype, peer.dtype or self.problem.dtype
        error, tolerance = relative_error(results, expected), max(self.problem.tolerances[dtype] for dtype in dtypes)
        if not error <= tolerance:
            detail = f"differs from {peer.reference} by {error:.1e}, allowed {tolerance:.0e}"
            raise Failure({"status": "wrong result", "detail": detail})
        return error

    def _turns(self, peer: Peer, estimate: float) -> int:
        if peer.is_ours:  # ours is what the others are compared with
            return self.repeats
        calls = int(self.time_limit / estimate)
        if calls < min(self.repeats, FEWEST_REPEATS):
            detail = f"one call takes {estimate:.3g} s, all may take {self.time_limit:g} s"
            raise Failure({"status": "too slow", "detail": detail, "estimate_ms": 1e3 * estimate})
        return min(self.repeats, calls)

    def _limit(self) -> contextlib.AbstractContextManager[None]:
        return measure.memory_limit((self.memory_limit or measure.available_memory()) if self.on_cpu else None)

    @contextlib.contextmanager
    def _guard(self, record: dict[str, Any]) -> Iterator[None]:
        """Whatever is raised becomes a status in `record`, so that one peer does not end the run."""
        try:
            yield
        except Failure as failure:
            record |= failure.args[0]
        except Exception as error:  # a peer is foreign code: compilers, kernels, packages
            # The first line says what happened; the rest, and paths, are about this machine.
            line = re.sub(r"(?<!\w)/\S+/", "", (str(error).strip() or "no message").splitlines()[0])
            out_of_memory = isinstance(error, MEMORY_ERRORS) or LACKING_MEMORY.search(str(error))
            status = "out of memory" if out_of_memory else "failed"
            record |= {"status": status, "detail": f"{type(error).__name__}: {line}"}


def saved_memory(call: Call) -> dict[str, int]:
    """Number and bytes of the distinct allocations that autograd keeps for backward, learnt parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in call.parameters}
    kept: list[Tensor] = []  # holding them keeps their memory from being handed out again

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = call.forward()
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    del output
    sizes = {address: size for address, size in sizes.items() if size and address not in parameters}
    return {"saved_tensors": len(sizes), "saved_bytes": sum(sizes.values())}


def is_sound(result: dict[str, Any]) -> bool:
    """Whether ours was measured and no peer disagreed with it."""
    statuses = [(peer, peer[each]["status"]) for peer in result["peers"] for each in PASSES]
    return all(
        status == "ok" or (peer["name"] != peer["reference"] and status != "wrong result") for peer, status in statuses
    )
