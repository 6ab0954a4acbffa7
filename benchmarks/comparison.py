"""What is compared, on problems of one size each, and how: results, time, peak memory, and what autograd keeps."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import benchmark

from benchmarks import measure

PASSES = ("forward", "forward_backward")
FEWEST_REPEATS = 3
TINY_FLOP = 1e6
MEMORY_ERRORS = (MemoryError, torch.cuda.OutOfMemoryError)
LACKING_MEMORY = re.compile("not enough memory|can't allocate memory|bad_alloc")  # the CPU allocator's RuntimeError


@dataclass(frozen=True)
class Problem:
    """One size to measure: features (batch, channels, height, width), rescaled by the integer `up` or by 1/`down`."""

    channels: int
    height: int
    width: int
    batch: int = 1
    kernel_size: int = 5
    group_size: int = 1
    up: int = 2
    down: int = 1
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    # The largest difference from ours, relative to ours' largest value, that rounding explains: peers add 25 products
    # (a gradient: hundreds) in the dtype itself, ours accumulates in float32.
    tolerances: ClassVar = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}

    @property
    def geometry(self) -> tuple[int, int, int, int]:
        """What a reassembly is told besides its tensors: kernel size, groups, `up` and `down`."""
        return self.kernel_size, self.group_size, self.up, self.down

    @property
    def taps(self) -> int:
        """Source locations that one output element sums: k^2."""
        return self.kernel_size**2

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the rescaled map, H' = ceil(H * up / down)."""
        return -(-self.height * self.up // self.down), -(-self.width * self.up // self.down)

    def elements(self) -> tuple[int, int, int]:
        """Elements of the features, the kernels (as masks or as the content encoder's output) and the output."""
        source, target = self.height * self.width, self.output_size[0] * self.output_size[1]
        kernels = self.group_size * self.taps * target
        return self.batch * self.channels * source, self.batch * kernels, self.batch * self.channels * target

    def flop(self, backward: bool) -> int:
        """A multiply and an add for each tap, as many again for each gradient; the normaliser's few are left out."""
        return 2 * self.taps * self.elements()[2] * (3 if backward else 1)

    def traffic(self, backward: bool) -> int:
        """Bytes that must move when each tensor is read or written once a direction, the same from masks and logits."""
        features, kernels, output = self.elements()
        # Forward reads features and kernels and writes the output. Backward reads the output's gradient and both
        # inputs again, and writes two gradients.
        elements = features + kernels + output + (output + 2 * features + 2 * kernels if backward else 0)
        return elements * self.dtype.itemsize

    def needed_memory(self, backward: bool) -> int:
        """Bytes that peak memory is compared with: output and masks or, with backward, output and both gradients."""
        features, kernels, output = self.elements()
        return (output + kernels + (features if backward else 0)) * self.dtype.itemsize


@dataclass(frozen=True)
class Inputs:
    """The tensors that every peer is given; those that a peer differentiates require grad."""

    features: Tensor  # (N, C, H, W)
    masks: Tensor  # (N, G * k^2, H', W'): the kernels that `logits` stand for
    logits: Tensor  # the content encoder's output: (N, G * k^2 * up^2, H, W), or (N, G * k^2, H', W') downsampling
    grad_output: Tensor  # (N, C, H', W'): what backward starts from

    @classmethod
    def random(cls, problem: Problem, seed: int = 0) -> Inputs:
        """Draws inputs for `problem`, the same ones for the same seed on every device."""
        draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed))
        n, c, g, up = problem.batch, problem.channels, problem.group_size, problem.up
        height, width = problem.output_size
        logits = draw(n, g * problem.taps * up**2, height // up, width // up)
        features, grad_output = draw(n, c, problem.height, problem.width), draw(n, c, height, width)
        masks = shuffle_and_softmax(logits, problem.kernel_size, g, up)
        tensors = [tensor.to(problem.device, problem.dtype) for tensor in (features, masks, logits, grad_output)]
        for tensor in tensors[:3]:
            tensor.requires_grad_()
        return cls(*tensors)


def shuffle_and_softmax(logits: Tensor, kernel_size: int, group_size: int, up: int) -> Tensor:
    """The two steps between content encoder and reassembly, as mmcv and the copies of it write them."""
    shuffled = F.pixel_shuffle(logits, up)
    n, _, h, w = shuffled.shape
    return shuffled.view(n, group_size, kernel_size**2, h, w).softmax(2).view(shuffled.shape)


@dataclass(frozen=True)
class Call:
    """A peer made ready for one problem."""

    forward: Callable[[], Tensor]
    wrt: tuple[Tensor, ...]  # what backward computes gradients of
    grad_output: Tensor  # what backward starts from
    parameters: tuple[Tensor, ...] = ()  # learnt values among `wrt`


@dataclass(frozen=True)
class Peer:
    """One way to rescale a map.

    `reference` names the peer that computes the same function of the same inputs: results are compared with its results
    before anything is timed, and times with its times. It is the peer's own name for ours.
    """

    name: str
    description: str
    setup: Callable[[Problem, Inputs], Call]  # not part of any timing
    reference: str
    equal: bool = True  # False for one that computes another function, of which only times are compared
    compiles: bool = False  # whether its first call also compiles, and its time says nothing of the others
    variant: bool = False  # whether it is ours too, in another layout or dtype
    dtype: torch.dtype | None = None  # of its results and inputs, where that is not the problem's
    unavailable: Callable[[Problem], str | None] = lambda problem: None  # why it cannot run; None where it can

    @property
    def is_ours(self) -> bool:
        """Whether the others are compared with it."""
        return self.name == self.reference


class Failure(Exception):
    """Why a peer has no measurement, as its record says it: a status, the detail, and what is known besides."""


def run_pass(call: Call, name: str) -> tuple[Tensor, ...]:
    """One forward pass without gradients, or one forward and backward; returns what was computed."""
    if name == "forward":
        with torch.no_grad():
            return (call.forward(),)
    return torch.autograd.grad(call.forward(), call.wrt, call.grad_output)


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
        inputs, bound = Inputs.random(self.problem), self._bound()
        self.calls: dict[Peer, Call] = {}
        self.records: dict[Peer, dict[str, Any]] = {}
        for peer in self.peers:
            told = ("name", "description", "equal", "variant", "reference")
            record = self.records[peer] = {name: getattr(peer, name) for name in told}
            failure: dict[str, Any] = {}
            with self._guard(failure), self._limit():
                call = self.calls[peer] = peer.setup(self.problem, inputs)
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
            bound |= {
                f"{each}_flop": flop,
                f"{each}_bytes": moved,
                f"{each}_copy_bytes_per_s": rate,
                f"{each}_ms": 1e3 * max(flop / bound["matmul_flop_per_s"], moved / rate),
                f"{each}_needed_bytes": problem.needed_memory(backward),
            }
        return bound

    def _measure(self, each: str, bound: dict[str, float]) -> None:
        timings: dict[Peer, measure.Timing] = {}
        expected: dict[str, tuple[Tensor, ...]] = {}
        for peer, call in self.calls.items():
            record = self.records[peer][each]
            with self._guard(record):
                if self.records[peer]["forward"].get("status") == "too slow":
                    raise Failure({"status": "too slow", "detail": "the forward pass alone is"})
                work = functools.partial(run_pass, call, each)
                begin = benchmark.timer()
                # TF32 convolutions keep 10 bits, too few to compare results by; they are timed at torch's setting.
                with self._limit(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
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
                timings[peer] = measure.Timing(work, estimate, self._turns(peer, estimate))
            if "status" in record and not self.on_cpu:
                torch.cuda.empty_cache()
        expected.clear()
        # The limit is not in force here: what has just succeeded twice succeeds again.
        measure.interleave(list(timings.values()))
        medians: dict[str, float] = {}
        for peer, timing in timings.items():
            record, peak = self.records[peer][each], measure.peak_bytes(timing.work, self.problem.device)
            record |= {"status": "ok", **timing.summary(), "peak_bytes": peak}
            # A hook would make torch.compile compile again; what it keeps is not asked.
            if each == "forward_backward" and not peer.compiles:
                record |= saved_memory(self.calls[peer])
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
        call.forward()
    allocations = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    sizes = [size for address, size in allocations.items() if size and address not in parameters]
    return {"saved_tensors": len(sizes), "saved_bytes": sum(sizes)}


def is_sound(result: dict[str, Any]) -> bool:
    """Whether ours was measured and no peer disagreed with it."""
    for peer in result["peers"]:
        statuses = {peer[each]["status"] for each in PASSES}
        if "wrong result" in statuses or (peer["name"] == peer["reference"] and statuses != {"ok"}):
            return False
    return True
