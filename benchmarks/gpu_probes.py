"""The steps of `benchmarks.gpu_check` that are not a benchmark or test; each runs in a process of its own.

    python -m benchmarks.gpu_probes NAME [--device cuda] [--tiny] [--json FILE] [--mmcv-source DIR]

`--tiny` takes sizes of a few pixels, for a rehearsal; on a CPU what only a GPU has is played by stand-ins: a graph by
calling again, a stream by the only order that there is.

Exit code: 0, or 1 when the check fails.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import re
import statistics
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])
import carafe_plugin
from benchmarks import measure
from benchmarks.command import SHAPES
from benchmarks.comparison import PASSES, Call, Inputs, Peer, Problem, run_pass
from benchmarks.mmcv_operator import LAUNCHERS, find_source
from benchmarks.peers import OURS, PEERS, VARIANTS, mmcv
from carafe_plugin import CARAFEUpsample
from carafe_plugin.engine.writing import write_whole
from carafe_plugin.ops import carafe, reference
from carafe_plugin.ops.fused import reassemble_logits
from carafe_plugin.ops.reference import NORMALIZERS, masks_from_logits
from carafe_plugin.testing import TOLERANCES, random_case, relative_error

Result = dict[str, Any]  # 'ok', and what was found
SMALL_SCALES: tuple[Fraction, ...] = (Fraction(2), Fraction(3), Fraction(1, 2), Fraction(3, 2))
# Channels, height, width, up and down of what the profiler counts: levels of a detector's FPN, and a backbone's stem.
COUNTED = ((256, 25, 42, 2, 1), (256, 100, 168, 2, 1), (64, 200, 336, 1, 2))
COUNTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_SLOWER = 1.02  # of a detector with our upsampler, against nearest


@dataclass
class Run:
    """How a probe is to run."""

    device: str = "cuda"
    tiny: bool = False
    file: Path | None = None
    case: str | None = None

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def keep(self, result: Result) -> None:
        """Writes what is found so far, whole."""
        if self.file:
            write_whole((json.dumps(result, indent=1) + "\n").encode(), self.file)


def environment(run: Run) -> Result:
    """The machine and the versions of what runs here."""
    found: Result = {"machine": measure.machine(run.device), "revision": measure.revision()}
    found["version"] = carafe_plugin.__version__
    for package in ("torchvision", "triton", "mmcv", "hypothesis", "pytest"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return {"ok": True, **found}


def compiled(run: Run) -> Result:
    """Whether the compiled operators serve the device, and what they refuse comes back as an error."""
    types = [kind for kind in ("cpu", "cuda") if carafe_plugin.is_compiled(kind)]
    asked = torch.device(run.device).type
    result: Result = {"ok": asked in types, "compiled for": types}
    for kind in dict.fromkeys(("cpu", asked)):
        if kind not in types:
            continue
        print(f"an error from C++ on {kind}:", flush=True)  # a toolchain whose unwinder fails ends the process here
        features, masks = torch.zeros(1, 4, 6, 5, device=kind), torch.zeros(1, 9, 3, 3, device=kind)
        try:
            torch.ops.carafe_plugin.carafe(features, masks, 3, 1, 2, 1)
            result["ok"] = False
        except RuntimeError as error:
            print(error)
    return result


def small(run: Run) -> Result:
    """Every operator on small odd sizes, forward and backward, for the sanitizer to watch."""
    worst: dict[str, float] = {}
    kernels = ((5, 1, torch.contiguous_format), (3, 2, torch.channels_last), (7, 8, torch.contiguous_format))
    device, scales = run.device, SMALL_SCALES[::3] if run.tiny else SMALL_SCALES
    dtypes = (torch.float32,) if run.tiny else (torch.float32, torch.float16)
    for dtype, scale, (k, g, layout) in itertools.product(dtypes, scales, kernels):
        tensors = random_case((9, 13), 16, k, g, scale, dtype=dtype, device=device)
        features, masks, grad_output = (tensor.contiguous(memory_format=layout) for tensor in tensors)
        output = carafe(features.requires_grad_(), masks.requires_grad_(), k, g, scale)
        output.backward(grad_output)
        expected = carafe(_on_host(features), _on_host(masks), k, g, scale)
        worst[f"{dtype}, {scale}, k {k}, {g} groups"] = relative_error(output, expected) / TOLERANCES[dtype]
    for dtype, (up, down), normalizer in itertools.product(dtypes, ((2, 1), (1, 2)), NORMALIZERS):
        features = torch.randn(2, 16, 9, 13, device=device, dtype=dtype, requires_grad=True)
        logits = torch.randn(2, 25 * up**2, -(-9 // down), -(-13 // down), device=device, dtype=dtype)
        output = reassemble_logits(features, logits.requires_grad_(), 5, 1, up, down, normalizer)
        output.backward(torch.ones_like(output))
        masks = masks_from_logits(_on_host(logits), 5, 1, up, down, normalizer)
        expected = carafe(_on_host(features), masks, 5, 1, Fraction(up, down))
        # Where it is done in steps, the kernels are rounded to the dtype too: twice the tolerance.
        error = relative_error(output, expected) / (2 * TOLERANCES[dtype])
        worst[f"{dtype}, fused, {up}/{down}, {normalizer}"] = error
    return {"ok": all(error <= 1 for error in worst.values()), "errors over tolerance": worst}


def problems(run: Run, dtype: torch.dtype) -> list[Problem]:
    """What the benchmarks measure: levels of a detector's FPN, and what a backbone halves."""
    if run.tiny:
        return [Problem(8, 6, 8, up=up, down=down, dtype=dtype, device=run.device) for up, down in ((2, 1), (1, 2))]
    return [
        Problem(c, h, w, n, up=scale.numerator, down=scale.denominator, dtype=dtype, device=run.device)
        for scale, shapes in SHAPES.items()
        for n, c, h, w in shapes
    ]


def other_problems(run: Run, dtype: torch.dtype) -> list[Problem]:
    """Other kernels, scales and groups, of ours alone."""
    middle = dataclasses.replace(problems(run, dtype)[0 if run.tiny else 1], dtype=dtype)
    changes: tuple[Result, ...] = ({"kernel_size": 3}, {"kernel_size": 7}, {"up": 4}, {"group_size": 4})
    return [dataclasses.replace(middle, **change) for change in (changes[1:] if run.tiny else changes)]


def in_words(problem: Problem) -> str:
    """A problem, short."""
    text = f"{problem.channels}x{problem.height}x{problem.width} {problem.up}/{problem.down}"
    text += "" if problem.kernel_size == 5 else f" k{problem.kernel_size}"
    return text + ("" if problem.group_size == 1 else f" G{problem.group_size}")


# ------------------------------------------------------------------------------------------------------- counters


def counters(run: Run) -> Result:
    """One pass of every kernel at the shapes and dtypes that count, for the profiler to watch.

    Before each call goes a kernel of torch's that waits for nothing: it divides the profiler's list.
    """
    calls: list[str] = []
    counted = ((8, 6, 8, 2, 1), (8, 6, 8, 1, 2)) if run.tiny else COUNTED
    for (channels, height, width, up, down), dtype in itertools.product(counted, COUNTED_DTYPES):
        problem = Problem(channels, height, width, up=up, down=down, dtype=dtype, device=run.device)
        inputs = Inputs.random(problem)
        for layout in (torch.contiguous_format, torch.channels_last):
            features, grad_output = (
                tensor.detach().contiguous(memory_format=layout) for tensor in (inputs.features, inputs.grad_output)
            )
            if run.on_gpu:
                torch.cuda._sleep(1)
            arguments = (features.requires_grad_(), inputs.logits, *problem.geometry)
            torch.autograd.grad(reassemble_logits(*arguments, "softmax"), arguments[:2], grad_output)
            words = (str(word).removeprefix("torch.") for word in (dtype, layout))
            calls.append(" ".join([in_words(problem), *words]))
    return {"ok": True, "calls": calls}


# --------------------------------------------------------------------------------------------------------- graphs

CALLS = 10  # in one graph, so that starting it costs little of each
# At most so many times what the memory's speed would take (DESIGN's targets are those of the documentation).
TARGETS = {"forward": {torch.float32: 1.5, torch.float16: 1.8, torch.bfloat16: 1.8}, "forward_backward": 2.0}
COMPARED = ("mmcv", "steps-mmcv", "shifted-madd-compiled", "nearest", "bilinear", "deconvolution", "max-pool")


def capture(work: Callable[[], Sequence[Tensor]], on_gpu: bool) -> tuple[Callable[[], None], Sequence[Tensor]]:
    """What replays `CALLS` calls of `work`, and the tensors in which the last one's results will lie."""
    if not on_gpu:
        results = [tensor.clone() for tensor in work()]

        def again() -> None:
            for _ in range(CALLS):
                for result, value in zip(results, work(), strict=True):
                    result.copy_(value)

        return again, results
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # allocations and lazy starts are no part of a graph
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            captured = work()
    return graph.replay, captured


def time_replays(replays: dict[str, Callable[[], None]], on_gpu: bool, turns: int) -> dict[str, list[float]]:
    """Milliseconds of one call in `turns` turns of each, taken in rounds; a GPU's own clock, its queue kept full."""
    samples: dict[str, list[float]] = {name: [] for name in replays}
    counts = dict.fromkeys(replays, 1)
    for turn in range(turns + 1):
        for name, replay in replays.items():
            replay()  # what ran before has emptied the caches
            taken = milliseconds(replay, counts[name], on_gpu)
            if turn == 0:  # tells how many fill three milliseconds
                counts[name] = max(1, min(20, round(3 / max(taken, 1e-3))))
            else:
                samples[name].append(taken / CALLS)
    return samples


def milliseconds(replay: Callable[[], None], count: int, on_gpu: bool) -> float:
    """Of one replay, on average over so many in a row."""
    if not on_gpu:
        begin = time.perf_counter()
        for _ in range(count):
            replay()
        return 1e3 * (time.perf_counter() - begin) / count
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / count


def graphs(run: Run) -> Result:
    """Captures of one pass of ours and others: replays equal eager calls, and their times are the GPU's alone.

    An eager call of so small a pass takes as long as its Python. The bound here is what copying as many bytes takes at
    the rate of a large copy, or the FLOP at the rate of a matrix product, whichever is longer.
    """
    copied = 2**20 if run.tiny else 2**31
    rates = {"copy_bytes_per_s": measure.copy_rate(run.device, copied)}
    rates["matmul_flop_per_s"] = measure.matmul_rate(run.device, torch.float32, 128 if run.tiny else 4096)
    result: Result = {"ok": True, "calls_in_graph": CALLS, **rates, "measured": []}
    ours = [*OURS, *(variant for variant in VARIANTS if "channels-last" in variant.name)]
    compared = [peer for peer in PEERS if peer.name in COMPARED and not (run.tiny and peer.compiles)]
    for dtype in (torch.float32, torch.bfloat16) if run.tiny else (torch.float32, torch.float16, torch.bfloat16):
        for problem in (*problems(run, dtype), *other_problems(run, dtype)):
            others = compared if problem in problems(run, dtype) and dtype != torch.bfloat16 else []
            others = [peer for peer in others if not (peer.compiles and dtype != torch.float32)]
            peers = [*ours, *(peer for peer in others if peer.unavailable(problem) is None)]
            inputs = Inputs.random(problem)
            for each in PASSES:
                record = graphs_of(run, problem, peers, inputs, each, rates)
                result["measured"].append(record)
                mine = [peer for peer in record["peers"] if peer["name"] in {peer.name for peer in ours}]
                result["ok"] &= all(peer["status"] == "ok" for peer in mine)
                print(graph_line(record), flush=True)
            run.keep(result)
    return result


def graphs_of(run: Run, problem: Problem, peers: Sequence[Peer], inputs: Inputs, each: str, rates: Result) -> Result:
    """The record of one pass of one problem."""
    backward = each != "forward"
    flop, moved = problem.flop(backward), problem.traffic(backward)
    bound = 1e3 * max(moved / rates["copy_bytes_per_s"], flop / rates["matmul_flop_per_s"])
    target = TARGETS[each]
    record: Result = {"problem": in_words(problem), "dtype": str(problem.dtype).removeprefix("torch."), "pass": each}
    record |= {"bytes": moved, "flop": flop, "bound_ms": bound, "peers": []}
    record["target"] = target[problem.dtype] if isinstance(target, dict) else target
    replays = {}
    for peer in peers:
        entry: Result = {"name": peer.name, "status": "ok"}
        record["peers"].append(entry)
        try:
            call = peer.setup(problem, inputs)
            replays[peer.name] = checked_replay(call, each, run.on_gpu, same_bits=peer.is_ours or peer.variant)
        except Exception as error:  # a peer is foreign code, and not everything can be captured
            entry |= {
                "status": "failed",
                "detail": f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}",
            }
    for name, samples in time_replays(replays, run.on_gpu, 2 if run.tiny else 9).items():
        entry = next(entry for entry in record["peers"] if entry["name"] == name)
        entry |= {"median_ms": statistics.median(samples), "min_ms": min(samples), "max_ms": max(samples)}
        entry["times_bound"] = entry["median_ms"] / bound
    del replays
    if run.on_gpu:
        torch.cuda.empty_cache()
    return record


def checked_replay(call: Call, each: str, on_gpu: bool, same_bits: bool) -> Callable[[], None]:
    """A replay whose results equal an eager call's; ValueError where they do not."""
    work = functools.partial(run_pass, call, each)
    expected = work()
    replay, results = capture(work, on_gpu)
    for tensor in results:
        tensor.fill_(float("nan"))
    replay()
    for got, right in zip(results, expected, strict=True):
        if not torch.isfinite(got).all():
            raise ValueError("a replayed graph leaves elements unwritten")
        if same_bits and not torch.equal(got, right):
            raise ValueError("a replayed graph computes other values than an eager call")
    return replay


def graph_line(record: Result) -> str:
    times = (
        f"{peer['name']} {1e3 * peer['median_ms']:.1f} ({peer['times_bound']:.2f})"
        if "median_ms" in peer
        else f"{peer['name']} {peer['status']}: {peer['detail']}"
        for peer in record["peers"]
    )
    what = f"{record['problem']} {record['dtype']} {record['pass']}"
    return f"{what}: bound {1e3 * record['bound_ms']:.1f} us; {', '.join(times)}"


# --------------------------------------------------------------------------------------------------------- limits


@dataclass(frozen=True)
class Limit:
    """A size at which mmcv's operator fails; `rows`: what is compared, the last so many of the features, or all."""

    why: str
    size: tuple[int, int]
    channels: int
    kernel_size: int
    group_size: int
    dtype: torch.dtype
    rows: int | None = None

    @property
    def name(self) -> str:
        return f"{self.why}, {str(self.dtype).removeprefix('torch.')}"


MASKS_TOO_MANY = "32 threads for each weight exceed 2^31"
PIXEL_TOO_LARGE = "k^2 G exceeds 384"
LIMITS = (
    *(Limit(PIXEL_TOO_LARGE, (40, 56), 64, 7, 8, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
    Limit(PIXEL_TOO_LARGE, (40, 56), 64, 7, 8, torch.float64),
    *(Limit(MASKS_TOO_MANY, (820, 820), 64, 5, 1, dtype, rows=64) for dtype in (torch.float32, torch.float16)),
    Limit("the output exceeds 2^31 elements", (1460, 1456), 256, 5, 1, torch.float16, rows=16),
    Limit("no kernel for the dtype", (25, 42), 64, 5, 1, torch.bfloat16),
)
ABSENT = "absent"
WHERE = r"(?<!\w)/\S+/"  # folders of this machine
Function = Callable[[Tensor, Tensor, int, int, int, int], Tensor]


def limits(run: Run) -> Result:
    """Sizes at which mmcv's operator fails: ours is right, and what becomes of mmcv's is told, each in its process."""
    result: Result = {"ok": True, "cases": []}
    cases = LIMITS[::3] if run.tiny else LIMITS
    with ThreadPoolExecutor(3) as pool:
        theirs = pool.map(functools.partial(run_mmcv, run), cases)
        for limit in cases:
            errors = limit_errors(run, limit, lambda x, m, k, g, up, down: carafe(x, m, k, g, Fraction(up, down)))
            right = all(error <= TOLERANCES[limit.dtype] for error in errors)
            result["ok"] &= right
            result["cases"].append({"case": limit.name, "ours": verdict(errors, limit), "errors": errors})
            run.keep(result)
        for case, told in zip(result["cases"], theirs, strict=True):
            case["mmcv"] = told
            print(f"{case['case']}: ours {case['ours']}; mmcv {told}", flush=True)
    return result


def verdict(errors: Sequence[float], limit: Limit) -> str:
    """Whether output and gradients are right."""
    worst = max(errors) if all(error == error for error in errors) else float("nan")
    return "right" if worst <= TOLERANCES[limit.dtype] else f"wrong: relative error {worst:.2g}"


def limit_errors(run: Run, limit: Limit, function: Function) -> list[float]:
    """Relative errors of output and both gradients against the reference in float64, in the rows that are compared."""
    k, g, channels = limit.kernel_size, limit.group_size, limit.group_size * 2 if run.tiny else limit.channels
    (height, width), rows = ((9, 7), 4 if limit.rows else None) if run.tiny else (limit.size, limit.rows)
    features, masks, grad_output = draw(run, limit.dtype, channels, height, width, k, g)
    output = function(features.requires_grad_(), masks.requires_grad_(), k, g, 2, 1)
    found = (output.detach(), *torch.autograd.grad(output, (features, masks), grad_output))
    del output
    # Whatever the rows that are compared depend on: a kernel's radius more of them.
    skipped = k // 2 if rows else 0
    first = height - rows - skipped if rows else 0
    x = features.detach()[..., first:, :].double()
    m, z = (tensor.detach()[..., 2 * first :, :].double() for tensor in (masks, grad_output))
    geometry = (k, g, 2, 1)
    expected = (
        reference.reassemble(x, m, *geometry)[..., 2 * skipped :, :],
        reference.grad_features(z, m, x.shape[2], x.shape[3], *geometry)[..., skipped:, :],
        reference.grad_masks(z, x, *geometry)[..., 2 * skipped :, :],
    )
    return [
        float((got[..., -right.shape[2] :, :].double() - right).norm() / right.norm())
        for got, right in zip(found, expected, strict=True)
    ]


def draw(run: Run, dtype: torch.dtype, c: int, h: int, w: int, k: int, g: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features, masks and the output's gradient, the same in every process, drawn where they are used."""
    generator = torch.Generator(run.device).manual_seed(0)
    shapes = ((1, c, h, w), (1, g * k * k, 2 * h, 2 * w), (1, c, 2 * h, 2 * w))
    x, m, z = (torch.empty(s, device=run.device, dtype=dtype).normal_(generator=generator) for s in shapes)
    return x, m, z


def run_mmcv(run: Run, limit: Limit) -> str:
    """What mmcv's operator does, in words: in a process of its own, which an illegal access may end."""
    command = [sys.executable, "-m", "benchmarks.gpu_probes", "mmcv_limit", "--device", run.device]
    command += ["--case", limit.name, *(["--tiny"] if run.tiny else [])]
    command += ["--mmcv-source", str(mmcv.source)] if mmcv.source else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return "does not end within 60 s"
    lines = [line for line in done.stdout.splitlines() if line.startswith("mmcv: ")]
    return lines[-1].removeprefix("mmcv: ") if lines else f"ends its process with {done.returncode}"


def mmcv_limit(run: Run) -> Result:
    """One case of `limits` by mmcv's operator."""
    limit = next(limit for limit in LIMITS if limit.name == run.case)
    try:
        told = verdict(limit_errors(run, limit, mmcv.reassembly()), limit)
    except ImportError:
        told = f"{ABSENT}: neither installed nor given by its source"
    except RuntimeError as error:  # NotImplementedError is one
        line = (str(error).strip() or "no message").splitlines()[0]
        told = f"fails: {type(error).__name__}: {re.sub(WHERE, '', line)}"
    print(f"mmcv: {told}", flush=True)
    return {"ok": True, "mmcv": told}


# -------------------------------------------------------------------------------------------------------- streams


class OnlyOrder:
    """On a CPU, for a rehearsal: what torch.cuda has for streams, where all happens in the order of its writing."""

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        yield

    def current_stream(self) -> OnlyOrder:
        return self

    Stream = Event = current_stream

    def __getattr__(self, name: str) -> Callable[..., Any]:  # waits, records and synchronises
        if name in ("wait_stream", "wait_event", "record", "synchronize", "_sleep"):
            return lambda *arguments: None
        raise AttributeError(name)


def streams(run: Run) -> Result:
    """The same bits on other streams than the default one, with inputs that come late, by event, and at once."""
    cuda: Any = torch.cuda if run.on_gpu else OnlyOrder()
    result: Result = {"ok": True, "checks": {}}
    late = 0 if run.tiny else 200_000_000  # clock cycles: about a tenth of a second
    for dtype, (up, down) in itertools.product((torch.float32, torch.float16), ((2, 1), (1, 2))):
        problem = Problem(16, 10, 14, 2, up=up, down=down, dtype=dtype, device=run.device)
        for kernels in ("masks", "logits"):
            values = [stream_inputs(problem, kernels, seed) for seed in range(4)]
            expected = [stream_step(problem, kernels, *each) for each in values]
            cuda.synchronize()

            side, other = cuda.Stream(), cuda.Stream()
            side.wait_stream(cuda.current_stream())
            with cuda.stream(side):
                plain = stream_step(problem, kernels, *values[0])
            buffers = [torch.full_like(value, float("nan")) for value in values[1]]
            ready = cuda.Event()
            cuda.synchronize()
            with cuda.stream(side):  # another stream than this would compute from NaN
                cuda._sleep(late)
                for buffer, value in zip(buffers, values[1], strict=True):
                    buffer.copy_(value)
                delayed = stream_step(problem, kernels, *buffers)
            cuda.synchronize()
            for buffer in buffers:
                buffer.fill_(float("nan"))
            cuda.synchronize()
            with cuda.stream(side):
                cuda._sleep(late)
                for buffer, value in zip(buffers, values[2], strict=True):
                    buffer.copy_(value)
                ready.record(cuda.current_stream())
            with cuda.stream(other):
                other.wait_event(ready)
                by_event = stream_step(problem, kernels, *buffers)
            cuda.synchronize()
            together = []
            many = [cuda.Stream() for _ in values]
            for _ in range(3):
                for stream, each in zip(many, values, strict=True):
                    with cuda.stream(stream):
                        together.append(stream_step(problem, kernels, *each))
            cuda.synchronize()
            name = f"{kernels}, {up}/{down}, {str(dtype).removeprefix('torch.')}"
            found = {"a side stream": (plain, expected[0]), "late inputs": (delayed, expected[1])}
            found["inputs by event"] = (by_event, expected[2])
            checks = {what: same_bits(*pair) for what, pair in found.items()}
            checks["four at once"] = all(map(same_bits, together, 3 * expected))
            result["checks"] |= {f"{what}: {name}": right for what, right in checks.items()}
    result["ok"] = all(result["checks"].values())
    return result


def stream_inputs(problem: Problem, kernels: str, seed: int) -> list[Tensor]:
    inputs = Inputs.random(problem, seed)
    return [tensor.detach() for tensor in (inputs.features, getattr(inputs, kernels), inputs.grad_output)]


def stream_step(problem: Problem, kernels: str, *values: Tensor) -> tuple[Tensor, ...]:
    """Output and both gradients."""
    features, weights = (value.detach().requires_grad_() for value in values[:2])
    ours = next(peer for peer in OURS if peer.name == ("carafe" if kernels == "masks" else "fused"))
    call = ours.setup(problem, Inputs(features, weights, weights, values[2]))
    output = call.forward()
    return (output.detach(), *torch.autograd.grad(output, call.wrt, call.grad_output))


def same_bits(results: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(torch.equal(result, right) for result, right in zip(results, expected, strict=True))


# ------------------------------------------------------------------------------------------------------- detector


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().double().cpu()


def as_nearest(upsampler: CARAFEUpsample) -> None:
    """Puts all of every kernel's weight on its centre: what follows then has the same work as after nearest."""
    encoder = upsampler.content_encoder
    nn.init.zeros_(encoder.weight)
    assert encoder.bias is not None
    phases = int(upsampler.scale_factor) ** 2
    taps = encoder.bias.numel() // phases
    with torch.no_grad():
        encoder.bias[taps // 2 * phases : (taps // 2 + 1) * phases] = 50.0


class UpsamplingFPN(nn.Module):
    """torchvision's FPN, its convolutions shared, with an upsampler of ours in place of nearest interpolation."""

    def __init__(self, fpn: nn.Module, channels: int) -> None:
        super().__init__()
        self.fpn = fpn
        self.upsamplers = nn.ModuleList(CARAFEUpsample(channels) for _ in range(len(fpn.inner_blocks) - 1))  # type: ignore[arg-type]

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        """As the FPN's: named maps, largest first."""
        names = list(maps)
        laterals = [block(each) for block, each in zip(self.fpn.inner_blocks, maps.values(), strict=True)]  # type: ignore[arg-type]
        for level in range(len(laterals) - 1, 0, -1):
            height, width = laterals[level - 1].shape[-2:]
            # Twice an odd size rounded up is one too many: cropped at the bottom and right.
            upsampled = self.upsamplers[level - 1](laterals[level])[..., :height, :width]
            laterals[level - 1] = laterals[level - 1] + upsampled
        outputs = [block(each) for block, each in zip(self.fpn.layer_blocks, laterals, strict=True)]  # type: ignore[arg-type]
        if self.fpn.extra_blocks is not None:
            outputs, names = self.fpn.extra_blocks(outputs, list(maps.values()), names)  # type: ignore[operator]
        return OrderedDict(zip(names, outputs, strict=True))


def detector(run: Run) -> Result:
    """Torchvision's Faster R-CNN R50 at 800 x 1333, inference, with our upsampler in its FPN beside nearest."""
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    torch.manual_seed(0)
    # Random weights score every box alike: with a threshold of 0 many go through to the end.
    size = (64, 96) if run.tiny else (800, 1333)
    build = dict(weights=None, weights_backbone=None, min_size=size[0], max_size=size[1], box_score_thresh=0.0)
    nearest, ours = (fasterrcnn_resnet50_fpn(**build).eval().to(run.device) for _ in range(2))
    ours.load_state_dict(nearest.state_dict())
    ours.backbone.fpn = UpsamplingFPN(ours.backbone.fpn, 256).to(run.device)
    for upsampler in ours.backbone.fpn.upsamplers:
        as_nearest(upsampler)
    image = [torch.rand(3, *size, device=run.device)]
    with torch.inference_mode():
        found = [len(model(image)[0]["boxes"]) for model in (nearest, ours)]

    timings = []
    for model in (nearest, ours):
        predict = torch.inference_mode()(functools.partial(model, image))
        estimate = min(measure.seconds(predict) for _ in range(1 if run.tiny else 5))
        timings.append(measure.Timing(predict, max(estimate, measure.SAMPLE_SECONDS), repeats=2 if run.tiny else 30))
    measure.interleave(timings)
    ratios = sorted(ours / nearest for nearest, ours in zip(*(timing.samples for timing in timings), strict=True))
    ratio = ratios[len(ratios) // 2]
    summaries = {name: timing.summary() for name, timing in zip(("nearest", "ours"), timings, strict=True)}
    times = {"times nearest": round(ratio, 4), "allowed": MOST_SLOWER, "boxes": found}
    fast = ratio <= MOST_SLOWER or run.tiny  # a rehearsal's times say nothing
    return {"ok": fast and found[0] == found[1], **times, **summaries}


PROBES: dict[str, Callable[[Run], Result]] = {
    probe.__name__: probe
    for probe in (environment, compiled, small, counters, graphs, limits, mmcv_limit, streams, detector)
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one probe and prints what it found; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_probes")
    parser.add_argument("name", choices=PROBES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes of a few pixels")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--mmcv-source", type=Path)
    parser.add_argument("--case", choices=[limit.name for limit in LIMITS], help="of mmcv_limit")
    options = parser.parse_args(arguments)
    mmcv.source = find_source(options.mmcv_source) if options.mmcv_source else None
    if options.mmcv_source and mmcv.source is None:
        parser.error(f"--mmcv-source: no {LAUNCHERS} in {options.mmcv_source}")
    if options.name == "mmcv_limit" and options.case is None:
        parser.error("mmcv_limit needs --case")
    if options.tiny:  # a second thread costs more than it does
        torch.set_num_threads(1)
    run = Run(options.device, options.tiny, options.json, options.case)
    result = PROBES[options.name](run)
    run.keep(result)
    print(json.dumps(result, indent=1))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
