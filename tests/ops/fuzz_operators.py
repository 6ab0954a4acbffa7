"""Random calls of the operators against their definition in float64, and random faults in their arguments.

A command, since the instruction set of a process and a sanitizer in it are chosen when it starts; it prints its counts:

    CARAFE_CPU_PATH=avx2 python tests/ops/fuzz_operators.py --calls 100 --faults 100 --seed 3
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where this file runs as a command

if "CARAFE_LIBRARY" in os.environ:  # another build in the place of the package's own
    spec = importlib.util.spec_from_file_location("carafe_plugin._C", os.environ["CARAFE_LIBRARY"])
    sys.modules["carafe_plugin._C"] = importlib.util.module_from_spec(spec)

from carafe_plugin.ops import carafe, reference
from carafe_plugin.ops._operators import OPERATORS
from carafe_plugin.ops.functional import scale_ratio
from carafe_plugin.ops.fused import reassemble_logits
from carafe_plugin.testing import LAYOUTS, assert_close

counts: Counter[str] = Counter()

try:
    torch.zeros(1, dtype=torch.float16).softmax(0)
    DTYPES = reference.DTYPES
except RuntimeError:  # before torch 2.3 it has none on a CPU
    DTYPES = tuple(dtype for dtype in reference.DTYPES if dtype != torch.float16)
    print(f"without float16, which torch {torch.__version__} does not normalise on a CPU", file=sys.stderr)

MOST_WORK = 250_000  # multiply-adds of a call, but for a few larger ones


def _off_alignment(t: Tensor) -> Tensor:
    return t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)


def _every_second(t: Tensor) -> Tensor:
    return torch.stack((t, torch.full_like(t, float("nan"))), dim=-1).flatten(-2)[..., ::2]


WAYS_TO_LIE = {
    **LAYOUTS,
    "off alignment": _off_alignment,
    "off alignment, channels_last": lambda t: _off_alignment(t.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2),
    "every second": _every_second,
    "negated": lambda t: torch._neg_view(-t),  # as the imaginary part of a conjugate lies
    "one image": lambda t: t[:1].expand_as(t),
}


@st.composite
def geometries(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes of a call, of which most are small, odd or none."""
    length = st.one_of(st.sampled_from((0, 1, 2, 3, 5, 7, 13, 31, 61, 97)), st.integers(1, 40), st.integers(100, 420))
    k = draw(st.sampled_from((1, 3, 5, 5, 7, 9, 3, 5, 1, 3, 11, 13)))
    groups = draw(st.integers(1, 5))
    group_channels = draw(st.one_of(st.integers(0, 20), st.sampled_from((1, 31, 33, 64, 127))))
    h, w, n = draw(length), draw(length), draw(st.sampled_from((0, 1, 1, 2, 3)))
    usual = st.sampled_from((2, 2, 1, 3, 4, *(Fraction(*ratio) for ratio in ((1, 2), (1, 3), (3, 2), (2, 3), (7, 5)))))
    unusual = st.sampled_from((16, 64, 65, *(Fraction(*ratio) for ratio in ((1, 17), (1, 64), (1, 70), (101, 100)))))
    scale = draw(st.one_of(usual, st.builds(Fraction, st.integers(1, 9), st.integers(1, 9)), unusual))
    most = MOST_WORK * draw(st.sampled_from((1, 1, 1, 1, 1, 1, 1, 4)))
    while True:  # the largest of what makes a call too long is halved
        # Of a scale such as 7/5, the logits are those of an upsampling by 7.
        places = max(1, h * w) * scale_ratio(scale)[0] ** 2
        if max(1, n) * groups * (group_channels + 4) * k**2 * places <= most:
            break
        if max(h, w) >= 8:
            h, w = (h // 2, w) if h > w else (h, w // 2)
        elif group_channels * groups > 8:
            group_channels, groups = group_channels // 2, max(1, groups // 2)
        elif k > 1:
            k -= 2
        else:
            break
    return dict(n=n, channels=groups * group_channels, h=h, w=w, k=k, g=groups, scale=scale)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    case = draw(geometries())
    way = st.sampled_from(sorted(WAYS_TO_LIE))
    case |= dict(
        dtype=draw(st.sampled_from(DTYPES)),
        normalizer=draw(st.sampled_from(("none", *reference.NORMALIZERS))),
        values=draw(st.sampled_from(("normal", "normal", "normal", "tiny", "large", "not finite", "far apart"))),
        layouts=draw(st.tuples(way, way, way)),
        threads=draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        seed=draw(st.integers(0, 2**31)),
    )
    whole = output_size(case)
    if min(whole) > 0 and draw(st.booleans()):
        case["wanted"] = tuple(draw(st.one_of(st.just(most), st.integers(1, most))) for most in whole)
    return case


def output_size(case: dict[str, Any]) -> tuple[int, int]:
    """Height and width of the whole output."""
    up, down = scale_ratio(case["scale"])
    return reference.output_size(case["h"], up, down), reference.output_size(case["w"], up, down)


def make_tensors(case: dict[str, Any]) -> list[Tensor]:
    """Features, kernels, the gradient of the output, and two directions: gradients of the first two's gradients."""
    n, c, h, w, k, g, dtype = (case[key] for key in ("n", "channels", "h", "w", "k", "g", "dtype"))
    up = scale_ratio(case["scale"])[0]
    whole, masks = output_size(case), case["normalizer"] == "none"
    out = case.get("wanted", whole)
    phases, coarse = (1, out) if masks else (1, whole) if up == 1 else (up, (h, w))
    kernels = (n, g * k * k * phases**2, *coarse)
    generator = torch.Generator().manual_seed(case["seed"])
    shapes = ((n, c, h, w), kernels, (n, c, *out), (n, c, h, w), kernels)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    info = torch.finfo(dtype)
    if case["values"] == "tiny":  # subnormal, most of them
        tensors[0] *= info.smallest_normal / 8
    elif case["values"] == "large":
        for index in (0, 2):
            tensors[index] *= info.max**0.4
    elif case["values"] == "far apart" and not masks:
        tensors[1] *= min(1e4, info.max / 8)
    elif case["values"] == "not finite":
        for tensor in tensors[: 3 if masks else 1]:
            if tensor.numel():
                at = torch.randint(tensor.numel(), (2,), generator=generator)
                what = torch.randint(3, (2,), generator=generator)
                tensor.view(-1)[at] = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64)[what]
    features, kernels, grad = case["layouts"]
    ways = [WAYS_TO_LIE[way] for way in (features, kernels, grad, grad, kernels)]
    return [way(tensor.to(dtype)) for way, tensor in zip(ways, tensors, strict=True)]


def by_operators(case: dict[str, Any], features: Tensor, kernels: Tensor) -> Tensor:
    wanted = case.get("wanted")
    if case["normalizer"] == "none":
        return carafe(features, kernels, case["k"], case["g"], case["scale"], wanted)
    up, down = scale_ratio(case["scale"])
    return reassemble_logits(features, kernels, case["k"], case["g"], up, down, case["normalizer"], wanted)


def in_one_pass(case: dict[str, Any]) -> bool:
    """Whether logits become weights within the operator, in the dtype of its sums, as in fused.py."""
    up, down = scale_ratio(case["scale"])
    return min(up, down) == 1 and max(up, down) <= 64


def by_definition(case: dict[str, Any], features: Tensor, kernels: Tensor) -> Tensor:
    args = (case["k"], case["g"], *scale_ratio(case["scale"]))
    if case["normalizer"] != "none":
        kernels = reference.crop(reference.masks_from_logits(kernels, *args, case["normalizer"]), case.get("wanted"))
    return reference.reassemble(features, kernels, *args)


RESULTS = ("output", "features'", "kernels'", "features''", "kernels''", "output''")


def derive(function: Any, case: dict[str, Any], tensors: list[Tensor]) -> list[Tensor]:
    """The output, both gradients, and the gradients of these to all three tensors: RESULTS."""
    leaves, directions = [tensor.detach().requires_grad_() for tensor in tensors[:3]], tensors[3:]
    output = function(case, *leaves[:2])
    # Where a map is empty, a result may not depend on it.
    options = dict(allow_unused=True, materialize_grads=True)
    first = torch.autograd.grad(output, leaves[:2], leaves[2], create_graph=True, **options)
    second = [torch.zeros_like(leaf) for leaf in leaves]
    if any(gradient.requires_grad for gradient in first):
        second = torch.autograd.grad(first, leaves, directions, **options)
    return [result.detach() for result in (output, *first, *second)]


def magnitudes(case: dict[str, Any], tensors: list[Tensor]) -> list[Tensor]:
    """Of each of the RESULTS, the sum of its terms' absolute values: what a rounding error is relative to."""
    if case["normalizer"] == "none":
        return derive(by_definition, case, [tensor.abs() for tensor in tensors])
    features, logits, grad, direction, logits_direction = (tensor.abs() for tensor in tensors)
    args = (case["k"], case["g"], *scale_ratio(case["scale"]))
    size = features.shape[2:]
    wanted = case.get("wanted")
    masks = reference.crop(reference.masks_from_logits(tensors[1], *args, case["normalizer"]), wanted)

    def mean(maps: Tensor) -> Tensor:
        if case["normalizer"] == "sigmoid":
            return torch.zeros_like(maps)
        by_kernel = (masks * maps).unflatten(1, (case["g"], case["k"] ** 2))
        return by_kernel.sum(2, keepdim=True).expand_as(by_kernel).reshape(maps.shape)

    def unshuffle(maps: Tensor) -> Tensor:
        leaf = torch.zeros_like(logits, requires_grad=True)
        return torch.autograd.grad(reference.crop(reference.shuffle_logits(leaf, *args[2:]), wanted), leaf, maps)[0]

    def slope(maps: Tensor) -> Tensor:  # of the normaliser, whose own slope is at most 1
        return masks * (maps + mean(maps))

    along = reference.crop(reference.shuffle_logits(logits_direction, *args[2:]), wanted)
    tangent = slope(along)
    grad_masks = reference.grad_masks(grad, features, *args)
    bend = slope(grad_masks * (along + mean(along)) + along * mean(grad_masks)) + masks * along * (
        grad_masks + mean(grad_masks)
    )
    return [
        reference.reassemble(features, masks, *args),
        reference.grad_features(grad, masks, *size, *args),
        unshuffle(slope(grad_masks)),
        reference.grad_features(grad, tangent, *size, *args),
        unshuffle(slope(reference.grad_masks(grad, direction, *args)) + bend),
        reference.reassemble(direction, masks, *args) + reference.reassemble(features, tangent, *args),
    ]


def check_values(case: dict[str, Any], name: str, got: Tensor, exact: Tensor, size: Tensor, largest: float) -> None:
    """Each element within the error that its dtype's roundings can add up to; what is not finite where it has to be."""
    dtype = case["dtype"]
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    assert got.dtype == dtype, f"{name}: {got.dtype}"
    if got.numel() == 0:
        return
    own, sums = torch.finfo(dtype), torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    up, down = scale_ratio(case["scale"])
    # Every term of a sum is rounded, and the sum after each: n * eps of the sum of absolute values at most. An exponent
    # of a weight that is not zero is at least -750 in float64, -110 in float32, and its rounding is relative to that.
    terms = (case["k"] * -(-up // down)) ** 2 + case["k"] ** 2 + case["channels"] // case["g"] + 50
    terms += 0 if case["normalizer"] == "none" else 750 if dtype == torch.float64 else 110
    # Several results of the dtype behind one another.
    intermediate = "''" in name or (case["normalizer"] != "none" and not in_one_pass(case))
    bound = (2 * terms * sums.eps + (32 if intermediate else 1) * own.eps) * size
    overflow = exact.abs() + bound >= own.max  # rounded to the largest number or to infinity
    # What is smaller than any normal number is lost; of an intermediate result too, with what it is multiplied by, and
    # the smallest weight is e^-87 in float32 (cpu/normalize.h).
    floor = own.smallest_normal * own.eps + terms * sums.smallest_normal * sums.eps
    times = terms * (1 + largest) ** 2
    floor += 0 if case["normalizer"] == "none" else times * 2 * sums.smallest_normal
    floor += times * own.smallest_normal * own.eps if intermediate else 0
    bound = bound + floor
    got = got.double()
    usual = exact.isfinite() & ~overflow & size.isfinite()
    wrong = (got - exact).abs() > bound
    assert not (wrong & usual).any(), _describe(name, wrong & usual, got, exact, bound)
    assert not (bad := usual & ~got.isfinite()).any(), _describe(name, bad, got, exact, bound)
    bad = overflow & exact.isfinite() & ~((got.sign() == exact.sign()) & (got.abs() >= exact.abs() - bound))
    assert not bad.any(), _describe(name, bad, got, exact, bound)
    bad = ~exact.isfinite() & ~((got == exact) | (got.isnan() & exact.isnan()))
    assert not bad.any(), _describe(name, bad, got, exact, bound)
    counts["elements"] += got.numel()


def _describe(name: str, wrong: Tensor, got: Tensor, exact: Tensor, bound: Tensor) -> str:
    at = tuple(int(index) for index in wrong.nonzero()[0])
    return f"{name}: {int(wrong.sum())} of {wrong.numel()} wrong, {at}: {got[at]}, expected {exact[at]} +- {bound[at]}"


def check_call(case: dict[str, Any], compare: bool = True) -> None:
    """All results against the definition in float64, and the same bits for another number of threads."""
    tensors = make_tensors(case)
    runs = []
    for threads in case["threads"]:
        torch.set_num_threads(threads)
        runs.append(derive(by_operators, case, tensors))
    torch.set_num_threads(1)
    counts["calls"] += 1
    counts["cropped"] += case.get("wanted", output_size(case)) != output_size(case)
    if not compare:
        return
    exact = [tensor.detach().double().contiguous() for tensor in tensors]
    expected, sizes = derive(by_definition, case, exact), magnitudes(case, exact)
    finite = [tensor[tensor.isfinite()].abs().max() for tensor in exact if tensor.isfinite().any()]
    one_pass = in_one_pass(case)
    largest = float(max(finite, default=torch.zeros(())))
    for index, name in enumerate(RESULTS):
        if case["values"] != "normal" and index > 2:
            continue  # results between these would overflow or lose what is not finite in the one or the other order
        if case["values"] == "large" and case["dtype"] == torch.float16 and name == "kernels'" and not one_pass:
            continue  # so would the gradient of the normalised kernels, which is one of these
        result = runs[0][index]
        if name == "kernels'" and case["values"] == "not finite" and "wanted" in case:
            # The gradient of what is cut off is 0, or what a slice's would be: 0 times what is not finite.
            result = result.masked_fill(result.isnan() & (expected[index] == 0), 0)
        check_values(case, name, result, expected[index], sizes[index], largest)
        if case["normalizer"] == "none" or (one_pass and index < 3):  # torch's own softmax depends on the threads
            same = [run[index].contiguous().view(-1).view(torch.uint8) for run in runs]
            assert torch.equal(*same), f"{name}: other bits for {case['threads']} threads"


# ----------------------------------------------------------------------------------------------------------- faults


NUMBERS = (0, -1, 2, 4, 9, 2**15 + 1, 2**31, 2**31 + 1, 2**62 + 1, -(2**63), 2**63, 2**70 + 1)
NO_NUMBERS = (None, "2", 2.5, math.nan, math.inf, True, [3], torch.zeros(2))
SPOILT: dict[str, Any] = {
    "not a tensor": lambda t: t.tolist(),
    "None": lambda t: None,
    "an integer dtype": lambda t: t.int(),
    "a complex dtype": lambda t: t.to(torch.complex64),
    "another dtype": lambda t: t.half(),
    "one dimension less": lambda t: t[0],
    "one dimension more": lambda t: t[None],
    "no dimensions": lambda t: t.sum(),
    **{f"one less along {axis}": lambda t, axis=axis: t.narrow(axis, 1, t.shape[axis] - 1) for axis in range(4)},
    **{f"one more along {axis}": lambda t, axis=axis: torch.cat((t, t.narrow(axis, 0, 1)), axis) for axis in range(4)},
    **{f"none along {axis}": lambda t, axis=axis: t.narrow(axis, 0, 0) for axis in range(4)},
    "sparse": lambda t: t.to_sparse(),
    "compressed": lambda t: t.to_sparse_csr(dense_dim=2) if t.dim() == 4 else t,
    "of oneDNN": lambda t: t.to_mkldnn(),
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.quint8),
    "nested": lambda t: torch.nested.nested_tensor([t[0], t[0]]),
    "nested, jagged": lambda t: torch.nested.nested_tensor([t[0], t[0]], layout=torch.jagged),
    "without data": lambda t: t.to("meta"),
}


@st.composite
def faults(draw: st.DrawFn) -> dict[str, Any]:
    """A call that is right but for one argument."""
    n, g, h, w = (draw(st.integers(1, 4)) for _ in range(4))
    case = dict(n=n, channels=g * draw(st.integers(1, 20)), h=h, w=w, k=draw(st.sampled_from((1, 3, 5))), g=g)
    case |= dict(scale=draw(st.sampled_from((1, 2, 3, Fraction(1, 2), Fraction(3, 2)))), layouts=("contiguous",) * 3)
    case |= dict(dtype=torch.float32, values="normal", seed=0, normalizer="none")
    if case["scale"] != Fraction(3, 2):
        case["normalizer"] = draw(st.sampled_from(("none", *reference.NORMALIZERS)))
    entry = draw(
        st.sampled_from((carafe, *OPERATORS.values()) if case["normalizer"] == "none" else (*OPERATORS.values(),))
    )
    names = list(arguments_of(case, entry))
    argument = draw(st.sampled_from(names))
    spoil = sorted(SPOILT) if argument in ("features", "masks", "kernels", "grad_output") else (*NUMBERS, *NO_NUMBERS)
    if entry is not carafe:  # torch itself answers for what stands for several tensors
        spoil = [each for each in spoil if not str(each).startswith("nested")]
    return dict(case, entry=entry, argument=argument, spoil=draw(st.sampled_from(spoil)), grad=draw(st.booleans()))


def arguments_of(case: dict[str, Any], entry: Any) -> dict[str, Any]:
    """The arguments of a right call by their names."""
    features, kernels, grad_output = make_tensors(case)[:3]
    up, down = scale_ratio(case["scale"])
    geometry = dict(kernel_size=case["k"], group_size=case["g"])
    if entry is carafe:
        return dict(features=features, masks=kernels, **geometry, scale_factor=case["scale"])
    tensors = dict(features=features, kernels=kernels, grad_output=grad_output)
    sizes = dict(height=case["h"], width=case["w"]) if entry.sizes else {}
    number = ("none", *reference.NORMALIZERS).index(case["normalizer"])
    return {
        **{name: tensors[name] for name in entry.tensors},
        **sizes,
        **geometry,
        **dict(up=up, down=down, normalizer=number),
    }


def check_fault(case: dict[str, Any]) -> None:
    """An error that names an argument; or, where the other value fits as well, what the definition gives."""
    entry, argument = case["entry"], case["argument"]
    arguments = arguments_of(case, entry)
    spoil, right = case["spoil"], arguments[argument]
    arguments[argument] = SPOILT[spoil](right) if isinstance(spoil, str) and spoil in SPOILT else spoil
    counts["faults"] += 1
    refused = None
    try:
        with torch.set_grad_enabled(case["grad"]):
            got = entry(*arguments.values())
    except (TypeError, ValueError, RuntimeError) as error:
        refused = error
    if refused is not None:
        assert any(name in str(refused) for name in arguments), f"{refused!r} names no argument"
        counts["refused"] += 1
        return
    if got.device.type == "meta":
        return
    if entry is carafe:
        up, down = scale_ratio(arguments.pop("scale_factor"))
        arguments |= dict(up=up, down=down)
    operator = OPERATORS["grad_output"] if entry is carafe else entry
    arguments = {name: int(value) if value is True else value for name, value in arguments.items()}
    assert_close(got, operator.by_reference(*arguments.values()))


def run(check: Any, strategy: Any, number: int, first: int, shrink: bool = True) -> None:
    quiet = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    seed(first)(settings(max_examples=number, phases=phases, **quiet)(given(strategy)(check)))()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--faults", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compare", action="store_true", help="calls alone, for a sanitizer to watch")
    parser.add_argument("--no-shrink", action="store_true", help="the first failure as it was drawn")
    args = parser.parse_args()
    if args.calls:
        run(lambda case: check_call(case, not args.no_compare), calls(), args.calls, args.seed, not args.no_shrink)
    if args.faults:
        run(check_fault, faults(), args.faults, args.seed, not args.no_shrink)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
