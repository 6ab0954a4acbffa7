"""The CUDA operators executed on the CPU: nvcc's PTX of the unmodified kernels, launched by the project's own launcher,
against the reference, with every access checked."""

import functools
import itertools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "support"))
import executor
from covering import pairwise
from executor import NORMALIZERS, OPERATORS, Executor
from run import LAYOUTS, expected, inputs_of, lay_out, make_tensors

from carafe_plugin.ops import fused, reference
from carafe_plugin.testing import ELEMENT_FACTOR, TOLERANCES, assert_close

pytestmark = pytest.mark.skipif(executor.missing_tools() is not None, reason=str(executor.missing_tools()))

INVALID_VALUE, OUT_OF_MEMORY, NOT_SUPPORTED = 1, 2, 801  # cudaError_t
CROPS = ((0, 0), (1, 0), (0, 1), (1, 1), (3, 2), (9, 20))  # rows and columns of the output that are not wanted

# Scales and kernels as modules have them, whatever the channels.
ANY = {
    "kernel": (1, 3, 5, 7, 9),
    "group": (1, 2, 4),
    "ratio": ((2, 1), (1, 2), (3, 1), (4, 1), (1, 1), (1, 3), (3, 2), (2, 3)),
    "size": ((6, 8), (5, 7), (1, 1), (2, 33), (9, 20)),
    "channels": (4, 12, 20, 36),
    "normalizer": NORMALIZERS,
    "dtype": reference.DTYPES,
    "layout": LAYOUTS,
    "offset": (0, 1),
    "crop": CROPS,
}
# The scales and kernels that have kernels of their own, each with every other option, with channels that fill several
# blocks, and odd ones.
COMMON = {
    "which": tuple(itertools.product((3, 5, 7), ((2, 1), (1, 2)), (torch.float32, torch.float16, torch.bfloat16))),
    "group": (1, 2),
    "size": ((8, 16), (5, 7), (1, 1), (9, 35), (2, 17)),
    "channels": (8, 64, 72, 136, 10),
    "normalizer": NORMALIZERS,
    "layout": LAYOUTS,
    "offset": (0, 1, 4),
    "crop": CROPS,
}


def common(case):
    kernel, ratio, dtype = case.pop("which")
    return dict(kernel=kernel, ratio=ratio, dtype=dtype) | case


def possible(case):
    up, down = case["ratio"]
    fits = (case["kernel"] * max(up, down)) ** 2 <= fused._MAX_WEIGHTS
    return case["normalizer"] == "none" or (min(up, down) == 1 and fits)


CASES = [case for case in (*pairwise(ANY), *map(common, pairwise(COMMON))) if possible(case)]
CASE = dict(kernel=5, group=1, ratio=(2, 1), size=(6, 19), channels=12, normalizer="softmax", dtype=torch.float32,
            layout="contiguous", offset=0, crop=(0, 0), batch=2)  # fmt: skip
# What no pair of options has: kernels and scales that need more shared memory than every GPU gives, many channels.
MORE = [
    CASE | changes
    for changes in (
        dict(kernel=9, size=(4, 5), channels=4),
        dict(kernel=13, ratio=(1, 1), size=(4, 5), channels=4),
        dict(ratio=(5, 1), size=(4, 5), channels=4),
        dict(channels=1),
        dict(channels=3, layout="channels_last", ratio=(1, 2)),
        dict(channels=300, size=(3, 4), batch=1),
        dict(channels=256, size=(3, 9), batch=1, dtype=torch.float16, layout="channels_last"),
        dict(channels=256, size=(5, 9), batch=1, dtype=torch.bfloat16, ratio=(1, 2)),
        dict(kernel=3, size=(2, 3), channels=70, batch=200),
        dict(kernel=3, size=(2, 3), channels=64, batch=200, ratio=(1, 2)),
        dict(size=(40, 6), channels=16, batch=1),
        # As many blocks of the general kernels as make each go over all channels, in two turns.
        dict(kernel=1, size=(1, 1), channels=40, batch=1024, ratio=(3, 1), normalizer="none"),
        dict(kernel=3, size=(1, 2), channels=40, batch=1024, ratio=(1, 3), layout="channels_last"),
        # Tensor cores: several steps of channels in a block, rows that are aligned to 8, 4 or 2 bytes, channels that
        # fill no unit.
        *(
            dict(kernel=kernel, dtype=dtype, layout=layout, size=size, channels=channels, batch=batch, group=group)
            for kernel, dtype, layout, size, channels, batch, group in (
                (5, torch.float16, "contiguous", (2, 3), 72, 140, 1),
                (3, torch.bfloat16, "contiguous", (1, 4), 72, 140, 1),
                (7, torch.float16, "contiguous", (1, 3), 72, 140, 1),
                (5, torch.bfloat16, "channels_last", (2, 3), 72, 140, 1),
                (7, torch.float16, "channels_last", (1, 3), 144, 70, 2),
                (3, torch.float16, "channels_last", (3, 20), 20, 2, 1),
                (5, torch.float16, "contiguous", (5, 22), 20, 1, 1),
                (5, torch.bfloat16, "contiguous", (5, 22), 6, 1, 2),
            )
        ),
        dict(dtype=torch.float64, normalizer="none"),
        dict(dtype=torch.float64, ratio=(1, 2)),
        *(dict(dtype=dtype, ratio=(3, 2), normalizer="none") for dtype in reference.DTYPES),
    )
]


def label(case):
    return "-".join(str(value).replace("torch.", "") for value in case.values()).replace(" ", "")


@functools.cache
def machine(architecture="compute_80", device="h100"):
    return Executor(architecture=architecture, device=device)


@functools.cache
def _tensors(key):
    case = dict(key)
    shape = (case.get("batch", 2), case["channels"], *case["size"])
    numbers = (case["kernel"], case["group"], *case["ratio"])
    tensors = make_tensors(case["dtype"], case["normalizer"], shape, *numbers, case["crop"])
    return tuple(lay_out(tensor, case["layout"]) for tensor in tensors)


def tensors_of(case):
    return _tensors(tuple(case.items()))


def arguments_of(case):
    up, down = case["ratio"]
    return dict(
        normalizer=case["normalizer"], kernel_size=case["kernel"], group_size=case["group"], up=up, down=down,
        offset=case["offset"],
    )  # fmt: skip


def call(host, op, case, tensors, **options):
    features, kernels, grad = tensors
    like = {"reassemble": grad, "grad_features": features, "grad_kernels": kernels}[op]
    return host.run(
        op, inputs_of(op, tensors), size=features.shape[2:], out_size=grad.shape[2:], strides=like.stride(),
        **arguments_of(case), **options,
    )  # fmt: skip


def choose(host, op, case):
    """The kernels that the launcher takes."""
    tensors = tensors_of(case)
    features, kernels, grad = tensors
    like = {"reassemble": grad, "grad_features": features, "grad_kernels": kernels}[op]
    shape = (*features.shape, *grad.shape[2:], case["kernel"], case["group"], *case["ratio"])
    strides = [like.stride(), *(tensor.stride() for tensor in inputs_of(op, tensors))]
    return host.choose(op, case["dtype"], case["normalizer"], shape, strides, case["offset"])


DIGITS = {torch.float16: 11, torch.bfloat16: 8}


def assert_rounded(got, wanted, terms, weights=0.0):
    """Halves: the sums are float32 numbers, rounded to the nearest; ``terms``: the size of what is summed up;
    ``weights``: what comes of weights that are rounded before."""
    spacing = torch.ldexp(torch.ones_like(wanted), torch.frexp(wanted)[1] - DIGITS[got.dtype]).clamp_min(2.0**-24)
    sums = ELEMENT_FACTOR * TOLERANCES[torch.float32] * (wanted.abs() + terms)
    excess = (got.double() - wanted).abs() - spacing / 2 - sums - weights
    assert excess.max() <= 0, f"element {int(excess.argmax())} of {got.dtype} is not rounded to the nearest"


def error_of_weights(op, case, tensors):
    """What the result of tensor cores may be off by: they multiply weights that are rounded to halves."""
    if case["normalizer"] == "none" or op == "grad_kernels":
        return 0.0
    features, kernels, grad = tensors
    sizes_of = (features if op == "reassemble" else grad).double().abs()
    dtype, geometry = case["dtype"], (case["kernel"], case["group"], *case["ratio"])
    absolute = (sizes_of, kernels, grad) if op == "reassemble" else (features, kernels, sizes_of)
    sizes = expected(op, absolute, case["normalizer"], *geometry)
    # Below the normal numbers a half has no more than its last place.
    terms = case["kernel"] ** 2 * (1 if op == "reassemble" else case["ratio"][0] ** 2)
    least = 2.0**-25 * terms * sizes_of.max() if dtype == torch.float16 else 0.0
    return 2.0 ** -DIGITS[dtype] * sizes + least


def terms_of_logits(case, tensors):
    """The root mean square of the terms that the gradient to logits is a difference of: w (dw - sum of w dw)."""
    features, kernels, grad = (tensor.double() for tensor in tensors)
    geometry = (case["kernel"], case["group"], *case["ratio"])
    masks = reference.masks_from_logits(kernels, *geometry, case["normalizer"])
    masks = masks[..., : grad.shape[2], : grad.shape[3]].unflatten(1, (case["group"], -1))
    sizes = reference.grad_masks(grad.abs(), features.abs(), *geometry).unflatten(1, (case["group"], -1))
    return (masks * (sizes + (masks * sizes).sum(2, keepdim=True))).square().mean().sqrt()


def check(host, case, operators=OPERATORS, tensors=None, **options):
    tensors = tensors or tensors_of(case)
    geometry = (case["kernel"], case["group"], *case["ratio"])
    for op in operators:
        run = call(host, op, case, tensors, **options)
        assert run.error == 0, f"{op}: error {run.error}"
        assert not run.findings, f"{op}: " + "\n".join(map(str, run.findings))
        assert run.unwritten == 0, f"{op}: {run.unwritten} elements are not written"
        wanted = expected(op, tensors, case["normalizer"], *geometry)
        terms = wanted.square().mean().sqrt()
        if op == "grad_kernels" and case["normalizer"] != "none":
            # What is lost is relative to the terms, not to what remains of them.
            terms = terms_of_logits(case, tensors)
            exact = TOLERANCES[torch.promote_types(case["dtype"], torch.float32)]
            bound = TOLERANCES[case["dtype"]] * wanted.norm() + 4 * exact * terms * wanted.numel() ** 0.5
            difference = (run.result.double() - wanted).norm()
            assert difference <= bound, f"{op}: {difference:.3g} > {bound:.3g}"
        else:
            assert_close(run.result, wanted.to(case["dtype"]))
        if case["dtype"].itemsize == 2:
            on_tensor_cores = any("tensor" in launch.kernel for launch in run.launches)
            weights = error_of_weights(op, case, tensors) if on_tensor_cores else 0.0
            assert_rounded(run.result, wanted, 4 * terms, weights)
        again = call(host, op, case, tensors, descending=True, fill=0x3F, checks=False, counting=False, **options)
        same = torch.equal(again.result, run.result)
        assert same, f"{op}: the order of blocks and warps matters, or what lay in memory before"


@pytest.mark.parametrize("case", [*CASES, *MORE], ids=label)
def test_kernels_equal_the_reference(case):
    check(machine(), case)


def test_every_kernel_of_the_binary_is_executed():
    """Of all kernels, dtypes and layouts: none that no case above launches, on one device or another."""
    launched = {}
    for host, case in itertools.product((machine(), machine(device="t4")), (*CASES, *MORE)):
        for op in OPERATORS:
            error, launches = choose(host, op, case)
            assert error == 0, (op, case)
            for launch in launches:
                launched.setdefault(launch.kernel, []).append(case)
    missing = sorted(executor.demangle(name) for name in set(machine().module.spans) - set(launched))
    assert not missing, "kernels that no case launches:\n" + "\n".join(missing)


@pytest.mark.parametrize("architecture", ["compute_75", "compute_90"])
def test_other_architectures(architecture):
    host = machine(architecture, "t4" if architecture == "compute_75" else "h100")
    for case in CASES[::8]:
        check(host, case)


@pytest.mark.parametrize("gpu", ["t4", "a10", "b200"])
def test_the_launcher_on_other_devices(gpu):
    """Another number of multiprocessors cuts the channels otherwise, less shared memory chooses other kernels."""
    host = machine(device=gpu)
    halves = [dict(kernel=kernel, dtype=torch.float16) for kernel in (3, 5, 7)]  # a T4 has no such tensor cores
    for changes in (dict(channels=128), dict(channels=128, ratio=(1, 2)), dict(kernel=9, size=(4, 5)), *halves):
        check(host, CASE | dict(batch=1) | changes)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_tiles_of_every_width(kernel, layout, monkeypatch):
    """The fewer multiprocessors, the wider are tiles of the gradient to the kernels on tensor cores, or the fewer the
    splits of their channels."""
    multiprocessors = 16  # cudaDevAttrMultiProcessorCount
    grids = set()
    for number, width, channels, dtype in (
        (1, 12, 72, torch.float16),
        (1, 20, 24, torch.bfloat16),
        (1, 24, 12, torch.float16),
        (1, 28, 130, torch.float16),
        (1, 32, 72, torch.bfloat16),
        (8, 18, 300, torch.float16),
        (8, 34, 104, torch.bfloat16),
    ):
        monkeypatch.setitem(executor.DEVICES, "few", {**executor.DEVICES["h100"], multiprocessors: number})
        case = CASE | dict(kernel=kernel, size=(3, width), channels=channels, dtype=dtype, layout=layout, batch=1)
        host = machine(device="few")
        check(host, case, ("grad_kernels",))
        _, launches = choose(host, "grad_kernels", case)
        assert "grad_kernels_products" in launches[0].kernel
        grids.add((launches[0].grid, len(launches)))
    assert len(grids) > 1


def test_a_gradient_that_is_expanded():
    """That of a sum has strides of 0."""
    for ratio in ((2, 1), (1, 2), (3, 1)):
        case = CASE | dict(ratio=ratio)
        features, kernels, grad = tensors_of(case)
        check(machine(), case, OPERATORS[1:], (features, kernels, torch.ones(()).expand(grad.shape)))


def test_views_of_larger_tensors():
    for ratio in ((2, 1), (1, 2)):
        case = CASE | dict(ratio=ratio)

        def part(tensor):
            larger = torch.nn.functional.pad(tensor, (1, 2, 0, 1, 1, 0, 1, 0))
            return larger[1:, 1:, : tensor.shape[2], 1 : 1 + tensor.shape[3]]

        check(machine(), case, tensors=tuple(map(part, tensors_of(case))))


@pytest.mark.parametrize("layouts", [(0, 1, 0), (1, 0, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)], ids=str)
def test_layouts_that_differ(layouts):
    """Features, kernels and output each with neighbouring channels or columns."""
    for kernel in (3, 5, 7):
        case = CASE | dict(kernel=kernel, dtype=torch.float16, channels=40, batch=1)
        tensors = tuple(
            lay_out(tensor, LAYOUTS[which]) for tensor, which in zip(tensors_of(case), layouts, strict=True)
        )
        check(machine(), case, OPERATORS[:1], tensors)


@pytest.mark.parametrize("normalizer", NORMALIZERS[1:])
@pytest.mark.parametrize("shift", [0.0, -300.0, -1e4, 300.0], ids=str)
def test_saturated_logits(normalizer, shift):
    for ratio, layout in (((2, 1), "contiguous"), ((1, 2), "channels_last"), ((3, 1), "contiguous")):
        case = CASE | dict(kernel=3, normalizer=normalizer, channels=4, ratio=ratio, layout=layout)
        features, kernels, grad = tensors_of(case)
        tensors = (features, kernels * 30 + shift, grad)
        for op, bound in (("reassemble", 1e-5), ("grad_features", 1e-5), ("grad_kernels", 1e-4)):
            run = call(machine(), op, case, tensors)
            assert not run.findings
            wanted = expected(op, tensors, normalizer, 3, 1, *ratio)
            assert (run.result - wanted).abs().max() < bound, op


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("ratio", [(2, 1), (1, 2), (1, 1)], ids=str)
def test_what_is_not_finite(ratio, normalizer, value):
    """Outside the map features are zero, not absent; what is not a number stays where the definition has it."""
    case = CASE | dict(kernel=3, ratio=ratio, normalizer=normalizer, channels=4)
    features, kernels, grad = (tensor.clone() for tensor in tensors_of(case))
    kernels[0, :9, 0, 0] = value  # all taps of an output of which some lie outside, ...
    kernels[1, 4, 1, 2] = value  # and one
    for of_features in (True, False):
        one = (features if of_features else grad).clone()
        one[(1, 2, 3, 4) if of_features else (0, 3, 2, 2)] = value
        tensors = (one, kernels, grad) if of_features else (features, kernels, one)
        for op in OPERATORS if normalizer == "none" else OPERATORS[:1]:
            run = call(machine(), op, case, tensors)
            assert not run.findings
            # By the definition itself: autograd multiplies zeros of its own with what is not finite.
            f, m, g = tensors
            if op == "reassemble":
                wanted = expected(op, tensors, normalizer, 3, 1, *ratio)
            elif op == "grad_features":
                wanted = reference.grad_features(g, m, *f.shape[2:], 3, 1, *ratio)
            else:
                wanted = reference.grad_masks(g, f, 3, 1, *ratio)
            assert torch.equal(run.result.isnan(), wanted.isnan()), op


# --- what goes wrong


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("ratio", [(2, 1), (1, 2), (3, 1)], ids=str)
def test_errors_of_a_launch_are_returned(op, ratio):
    case = CASE | dict(ratio=ratio, channels=128)
    tensors = tensors_of(case)
    whole = call(machine(), op, case, tensors)
    for number in range(len(whole.launches)):
        run = call(machine(), op, case, tensors, fail_with=700, fail_after=number)
        assert run.error == 700
        assert len(run.launches) == number + 1, "launches go on after one that failed"


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("ratio", [(2, 1), (1, 2)], ids=str)
def test_without_memory_nothing_is_launched(op, ratio):
    case = CASE | dict(ratio=ratio, channels=256, batch=1)
    run = call(machine(), op, case, tensors_of(case), workspace=0)
    needs = call(machine(), op, case, tensors_of(case))
    if len(needs.launches) == 1:  # nothing is allocated
        assert run.error == 0
        assert torch.equal(run.result, needs.result)
    else:
        assert run.error == OUT_OF_MEMORY
        assert not run.launches


def contiguous(n, c, h, w):
    return (c * h * w, h * w, w, 1)


def test_sizes_at_which_32_bits_do_not_count():
    """1 x 64 x 1640 x 1640 outputs with k = 7, G = 8, where mmcv's kernel fails; more elements than 2^31; long axes."""
    for c, h, w, k, g, (up, down) in (
        (64, 820, 820, 7, 8, (2, 1)),
        (64, 16400, 16400, 3, 1, (1, 1)),
        (64, 16400, 16400, 3, 1, (2, 1)),
        (64, 32800, 32800, 5, 1, (1, 2)),
        (1, 1, 1 << 30, 3, 1, (2, 1)),
        (4, 1 << 29, 2, 5, 1, (2, 1)),
    ):
        out = (h * up // down, w * up // down)
        features, grad = (1, c, h, w), (1, c, *out)
        for normalizer in ("none", "softmax"):
            raw = normalizer != "none" and up > 1
            kernels = (1, g * k * k * up * up, h, w) if raw else (1, g * k * k, *out)
            sizes = {"reassemble": (grad, features, kernels), "grad_features": (features, grad, kernels)}
            sizes["grad_kernels"] = (kernels, grad, features, kernels)
            for op in OPERATORS:
                shape = (*features, *out, k, g, up, down)
                strides = [contiguous(*size) for size in sizes[op]]
                error, launches = machine().choose(op, torch.float32, normalizer, shape, strides)
                assert error == 0 or (error == NOT_SUPPORTED and normalizer != "none"), (op, shape, error)
                assert all(launch.status == 0 for launch in launches)
                assert launches or error


@pytest.mark.parametrize("ratio", [(2, 1), (1, 2)], ids=str)
def test_usual_calls_fill_the_device(ratio):
    """At least as many blocks as an H100 has multiprocessors, in the kernel that takes longest."""
    for dtype in (torch.float32, torch.float16):
        for op in OPERATORS:
            case = CASE | dict(ratio=ratio, size=(25, 42) if ratio == (2, 1) else (50, 84), channels=256, batch=1)
            error, launches = choose(machine(), op, case | dict(dtype=dtype))
            assert error == 0
            assert max(launch.grid[0] for launch in launches) >= 84, (op, dtype, launches)
