"""Compares peers on one problem: their results, time, peak memory, and what autograd keeps."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import benchmark

from benchmarks import measure
from benchmarks.problem import Call, Inputs, Peer, Problem

# The largest difference from ours, relative to ours' largest value, that rounding explains: peers add 25 products (a
# gradient: hundreds) in the dtype itself, ours accumulates in float32.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
PASSES = ("forward", "forward_backward")
FEWEST_REPEATS = 3
TINY_FLOP = 1e6

T = TypeVar("T")


class Failure(Exception):
    """Why a peer has no measurement: a status and what is known besides."""

    def __init__(self, status: str, detail: str, **facts: object) -> None:
        super().__init__(detail)
        self.record: dict[str, object] = {"status": status, "detail": detail, **facts}


@dataclass(frozen=True)
class Settings:
    """How to measure; a tolerance, by dtype, is relative to ours' largest value."""

    repeats: int = 10  # turns that each peer is given
    time_limit: float = 15.0  # seconds that a peer which is not ours may take in a pass; `FEWEST_REPEATS` must fit
    memory_limit: int | None = None  # bytes that a peer may allocate on CPU; None for what is available
    tolerances: Mapping[torch.dtype, float] = field(default_factory=lambda: TOLERANCES)


def run_pass(call: Call, inputs: Inputs, name: str) -> tuple[Tensor, ...]:
    """One forward pass without gradients, or one forward and backward; returns what was computed."""
    if name == "forward":
        with torch.no_grad():
            return (call.forward(),)
    start = inputs.grad_output if call.grad_output is None else call.grad_output
    return torch.autograd.grad(call.forward(), call.wrt, start)


def relative_error(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference between two sets of tensors, each relative to the largest expected value."""
    errors = [0.0]
    for result, reference in zip(results, expected, strict=True):
        if result.shape != reference.shape:
            return float("inf")
        if reference.numel():
            scale = reference.abs().max().clamp_min(torch.finfo(reference.dtype).tiny)
            error = float((result.to(reference.dtype) - reference).abs().max() / scale)
            errors.append(error if error == error else float("inf"))
    return max(errors)


class Comparison:
    """Measures all peers for one problem; each `reference` must come before the peers that name it."""

    def __init__(self, problem: Problem, peers: Sequence[Peer], settings: Settings) -> None:
        self.problem, self.settings = problem, settings
        self.on_cpu = torch.device(problem.device).type == "cpu"
        self.inputs = Inputs.random(problem)
        self.peers = {peer.name: peer for peer in peers}
        self.calls: dict[str, Call] = {}
        told = ("name", "description", "equal", "variant", "reference")
        self.records: dict[str, dict[str, Any]] = {
            peer.name: {name: getattr(peer, name) for name in told} for peer in peers
        }

    def run(self) -> dict[str, Any]:
        """Returns the record of the problem, the bound and every peer."""
        bound = self._bound()
        for name, peer in self.peers.items():
            try:
                call = self._guarded(peer.setup, self.problem, self.inputs)
            except Failure as failure:
                self.records[name] |= {each: dict(failure.record) for each in PASSES}
                continue
            self.calls[name] = call
            self.records[name]["parameters"] = sum(parameter.numel() for parameter in call.parameters)
        for each in PASSES:
            self._measure(each, bound)
        shape = {name: value for name, value in vars(self.problem).items() if name not in ("dtype", "device")}
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
        for name, call in self.calls.items():
            record: dict[str, Any] = {}
            self.records[name][each] = record
            try:
                self._not_slow_already(name, each)
                begin = benchmark.timer()
                results = self._guarded(run_pass, call, self.inputs, each)
                record["first_call_s"] = round(benchmark.timer() - begin, 4)  # compilation included
                peer = self.peers[name]
                if peer.is_ours:
                    expected[name] = results
                elif peer.equal and peer.reference in expected:
                    record["error"] = self._checked_error(peer, results, expected[peer.reference])
                del results
                timings[name] = self._guarded(self._timing, peer, call, each, record["first_call_s"])
            except Failure as failure:
                record |= failure.record
        expected.clear()
        # The limit is not in force here: what has just succeeded twice succeeds again.
        measure.interleave(list(timings.values()))
        for name, timing in timings.items():
            peak = measure.peak_bytes(timing.work, self.problem.device)
            self.records[name][each] |= {"status": "ok", **timing.summary(), "peak_bytes": peak}
            # A hook would make torch.compile compile again; what it keeps is not asked.
            if each == "forward_backward" and not self.peers[name].compiles:
                self.records[name][each] |= saved_memory(self.calls[name])
        self._add_ratios(each, bound)

    def _not_slow_already(self, name: str, each: str) -> None:
        if each == "forward_backward" and self.records[name]["forward"].get("status") == "too slow":
            raise Failure("too slow", "the forward pass alone is")

    def _checked_error(self, peer: Peer, results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
        dtypes = self.problem.dtype, peer.dtype or self.problem.dtype
        error, tolerance = relative_error(results, expected), max(self.settings.tolerances[dtype] for dtype in dtypes)
        if error > tolerance:
            raise Failure("wrong result", f"differs from {peer.reference} by {error:.1e}, allowed {tolerance:.0e}")
        return error

    def _timing(self, peer: Peer, call: Call, each: str, first: float) -> measure.Timing:
        def work() -> object:
            return run_pass(call, self.inputs, each)

        def affordable(estimate: float) -> int:
            if peer.is_ours:  # ours is what the others are compared with
                return self.settings.repeats
            calls = int(self.settings.time_limit / estimate)
            if calls < min(self.settings.repeats, FEWEST_REPEATS):
                detail = f"one call takes {estimate:.3g} s, all may take {self.settings.time_limit:g} s"
                raise Failure("too slow", detail, estimate_ms=1e3 * estimate)
            return min(self.settings.repeats, calls)

        # Warming up makes a first call slow, but hardly so slow: twice the limit needs no second look.
        if first > 2 * self.settings.time_limit and not peer.compiles:
            affordable(first)
        estimate = measure.seconds(work)
        return measure.Timing(work, estimate, affordable(estimate))

    def _guarded(self, work: Callable[..., T], *arguments: Any) -> T:
        """Calls `work`; whatever it raises becomes a `Failure`, so that one peer does not end the run."""
        limit = (self.settings.memory_limit or measure.available_memory()) if self.on_cpu else None
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
        if not self.on_cpu:
            torch.cuda.empty_cache()
        raise Failure("out of memory" if out_of_memory else "failed", detail)

    def _add_ratios(self, each: str, bound: dict[str, float]) -> None:
        medians = {name: record[each].get("median_ms") for name, record in self.records.items()}
        for name, record in self.records.items():
            result = record[each]
            if result["status"] == "ok":
                ours = medians.get(self.peers[name].reference)
                result["times_bound"] = round(result["median_ms"] / bound[f"{each}_ms"], 4)
                result["times_needed_memory"] = round(result["peak_bytes"] / bound[f"{each}_needed_bytes"], 4)
                if ours:
                    result["times_ours"] = round(result["median_ms"] / ours, 4)


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
