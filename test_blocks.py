"""The CUDA block kernels on the host: blocks, steps and threads as a GPU runs them, compiled with g++ alone, against
the reference. Threads ascending and descending give the same bits, or there is a race."""

import ctypes
import itertools
import sys
from pathlib import Path

import pytest
import torch

from carafe_plugin.ops import fused, reference
from carafe_plugin.ops.reference import NORMALIZERS, masks_from_logits
from carafe_plugin.testing import TOLERANCES, assert_close

sys.path.insert(0, str(Path(__file__).parent))  # also where this file runs as a script
sys.path.append(str(Path(__file__).parents[1] / "support"))
from covering import pairwise
from hosts import DTYPES, ORDERS, compile_host, geometry, label, outputs_of, run_under_sanitizers

# Bytes of shared memory less the 64 that the kernel itself takes: what every GPU gives a block, and what each of the
# architectures we build for gives on request.
DEFAULT_SHARED, LARGE_SHARED = (48 << 10) - 64, (99 << 10) - 64
REASSEMBLE, GRAD_FEATURES, GRAD_KERNELS = range(3)
RATIOS = ((2, 1), (3, 1), (4, 1), (1, 1), (1, 2), (1, 3), (1, 4))
OPTIONS = {
    "kernel_size": (1, 3, 5, 7),
    "group_size": (1, 2, 4),
    "ratio": RATIOS,
    "size": ((6, 8), (5, 7), (1, 1), (2, 33), (9, 20)),
    "channels": (4, 20, 36),
    "how": ("masks", *NORMALIZERS),
    "dtype": reference.DTYPES,
    "layout": (0, 1, 2),
    "misaligned": (False, True),
    "crop": ((0, 0), (1, 0), (0, 1), (1, 1), (3, 2), (9, 20)),  # rows and columns of the output that are not wanted
}
# Without the few whose weights fit into no block.
CASES = [case for case in pairwise(OPTIONS) if (case["kernel_size"] * max(case["ratio"])) ** 2 <= fused._MAX_WEIGHTS]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return ctypes.CDLL(str(compile_host("blocks.cpp", tmp_path_factory.mktemp("blocks"), "-O1")))


def place(tensor, misaligned):
    """A contiguous copy, one element away from where several can be loaded at once if that is wanted."""
    copy = tensor.new_empty(tensor.numel() + misaligned)[int(misaligned) :].view(tensor.shape)
    return copy.copy_(tensor)


def call(library, op, case, like, *tensors, descending=False):
    """What the block kernel of a call writes into something like ``like``."""
    there, back = ORDERS[case["layout"]]
    held = [
        place(tensor.permute(there), case["misaligned"]) for tensor in (torch.full_like(like, float("nan")), *tensors)
    ]
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in held] + [ctypes.c_void_p()] * (3 - len(tensors))
    how, dtype = ("masks", *NORMALIZERS).index(case["how"]), DTYPES.index(case["dtype"])
    library.block_run.restype = ctypes.c_bool
    for shared in (DEFAULT_SHARED, LARGE_SHARED):
        bytes_, sizes = ctypes.c_int64(shared), geometry(case, like.shape[0], *case["ratio"])
        if library.block_run(op, how, dtype, descending, sizes, case["layout"], bytes_, *pointers):
            return held[0].permute(back)
    raise AssertionError(f"operator {op} has no block kernel")


def tensors_of(case, batch=2, spread=1.0):
    k, g, (up, down), size = case["kernel_size"], case["group_size"], case["ratio"], case["size"]
    out = outputs_of(size, up, down, case["crop"])
    raw = case["how"] != "masks" and up > 1
    weights = (batch, g * k * k * (up * up if raw else 1), *(size if raw else out))
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, case["channels"], *size), weights, (batch, case["channels"], *out))
    features, weights, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return tuple(tensor.to(case["dtype"]) for tensor in (features, weights * spread, grad))


def definition(case, features, weights):
    args = (case["kernel_size"], case["group_size"], *case["ratio"])
    masks = weights if case["how"] == "masks" else masks_from_logits(weights, *args, case["how"])
    rows, columns = outputs_of(case["size"], *case["ratio"], case["crop"])
    masks = masks[..., :rows, :columns]
    return reference.reassemble(features, masks, *args)


def check(library, case, orders=(False, True), batch=2):
    features, weights, grad = tensors_of(case, batch)
    exact = [tensor.double().requires_grad_() for tensor in (features, weights)]
    output = definition(case, *exact)
    expected_features, expected_weights = torch.autograd.grad(output, exact, grad.double())
    calls = (
        (REASSEMBLE, output.detach(), grad, (features, weights)),
        (GRAD_FEATURES, expected_features, features, (grad, weights)),
        (GRAD_KERNELS, expected_weights, weights, (grad, features, weights)),
    )
    for op, expected, like, tensors in calls:
        results = [call(library, op, case, like, *tensors, descending=order) for order in orders]
        got = results[0]
        if op == GRAD_KERNELS and case["how"] != "masks":
            # A difference: what is lost is relative to its terms, not to what remains of them.
            difference = (got.double() - expected).norm()
            assert difference <= 4 * TOLERANCES[case["dtype"]] * (expected.norm() + grad.double().norm())
        else:
            assert_close(got, expected.to(case["dtype"]))
        assert all(torch.equal(got, other) for other in results[1:]), f"operator {op}: the order of threads matters"


@pytest.mark.parametrize("case", CASES, ids=label)
def test_blocks_equal_the_reference_in_either_order(case, library):
    check(library, case)


def test_blocks_under_sanitizers(tmp_path):
    assert run_under_sanitizers(__file__, "blocks.cpp", tmp_path, "-DCARAFE_HALF_ONLY") == f"{len(CASES)} cases"


CASE = dict(
    kernel_size=5,
    group_size=1,
    ratio=(2, 1),
    size=(6, 19),
    channels=12,
    how="softmax",
    dtype=torch.float32,
    layout=0,
    misaligned=False,
    crop=(0, 0),
)


@pytest.mark.parametrize("channels", [1, 3, 70])
@pytest.mark.parametrize("layout", [0, 2], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("ratio", [(2, 1), (1, 2)], ids=str)
def test_channels_that_no_quad_divides_and_several_chunks(channels, layout, ratio, library):
    check(library, CASE | dict(channels=channels, layout=layout, ratio=ratio))


@pytest.mark.parametrize("layout", [0, 2], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("how", ["softmax", "masks"])
@pytest.mark.parametrize("ratio", [(2, 1), (1, 1), (1, 2)], ids=str)
def test_every_kernel_with_several_chunks_a_block(ratio, how, layout, library):
    """Where tiles are many, a block goes over all channels, with what it staged for the first of them."""
    batch, case = 1024, CASE | dict(kernel_size=3, size=(2, 3), channels=70, ratio=ratio, how=how, layout=layout)
    for op in (REASSEMBLE, GRAD_FEATURES, GRAD_KERNELS):
        chosen = choice(library, op, case["dtype"], tuple(geometry(case, batch, *ratio)), layout == 2)
        assert chosen["chunks"] > 1, f"operator {op}: {chosen}"
    check(library, case, batch=batch)


@pytest.mark.parametrize(
    "changes", [dict(kernel_size=9), dict(kernel_size=13, ratio=(1, 1)), dict(ratio=(5, 1))], ids=str
)
def test_large_kernels_and_scales(changes, library):
    check(library, CASE | dict(size=(4, 5), channels=4) | changes)


@pytest.mark.parametrize("how", NORMALIZERS)
@pytest.mark.parametrize("offset", [0.0, -300.0, -1e4, 300.0], ids=str)
def test_saturated_logits(how, offset, library):
    case = CASE | dict(kernel_size=3, how=how, channels=4)
    features, weights, grad = tensors_of(case, spread=30.0)
    weights = weights + offset
    exact = weights.double().requires_grad_()
    expected = definition(case, features.double(), exact)
    (expected_grad,) = torch.autograd.grad(expected, exact, grad.double())
    assert (call(library, REASSEMBLE, case, grad, features, weights) - expected).abs().max() < 1e-5
    got = call(library, GRAD_KERNELS, case, weights, grad, features, weights)
    assert (got - expected_grad).abs().max() < 1e-4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("how", [*NORMALIZERS, "masks"])
@pytest.mark.parametrize("ratio", [(2, 1), (1, 2)], ids=str)
def test_what_is_not_finite(ratio, how, value, library):
    # Outside the map features are zero, not absent; what is not a number must stay where the definition has it.
    case = CASE | dict(kernel_size=3, ratio=ratio, how=how, channels=4)
    features, weights, grad = tensors_of(case)
    weights[0, :9, 0, 0] = value  # all taps of an output of which some lie outside, ...
    weights[1, 4, 1, 2] = value  # and one
    for tensor, at in ((features, (1, 2, 3, 4)), (grad, (0, 3, 2, 2))):
        one = tensor.clone()
        one[at] = value
        args = (one, weights) if tensor is features else (features, weights)
        expected = definition(case, *args)
        got = call(library, REASSEMBLE, case, grad, *args)
        assert torch.equal(got.isnan(), expected.isnan())
        gradient = one if tensor is grad else grad
        if how == "masks":
            k, (up, down), size = case["kernel_size"], case["ratio"], case["size"]
            for op, like, expected, tensors in (
                (
                    GRAD_FEATURES,
                    features,
                    reference.grad_features(gradient, weights, *size, k, 1, up, down),
                    (gradient, weights),
                ),
                (
                    GRAD_KERNELS,
                    weights,
                    reference.grad_masks(gradient, args[0], k, 1, up, down),
                    (gradient, args[0], weights),
                ),
            ):
                assert torch.equal(call(library, op, case, like, *tensors).isnan(), expected.isnan())


def choice(library, op, dtype, sizes, channels_last=False, shared=DEFAULT_SHARED):
    library.block_choice.restype = ctypes.c_bool
    found = (ctypes.c_int64 * 7)()
    if len(sizes) == 8:
        sizes = (*sizes, *outputs_of(sizes[2:4], *sizes[6:]))
    arguments = (op, DTYPES.index(dtype), (ctypes.c_int64 * 10)(*sizes), channels_last, ctypes.c_int64(shared), found)
    names = ("rows", "columns", "slots", "chunks", "threads", "bytes", "blocks")
    return dict(zip(names, found, strict=True)) if library.block_choice(*arguments) else None


def test_every_call_that_modules_fuse_has_a_block_kernel(library):
    for k, scale in itertools.product(range(1, 31, 2), range(1, 9)):
        for up, down in {(scale, 1), (1, scale)}:
            if (k * scale) ** 2 > fused._MAX_WEIGHTS:
                continue
            for op, dtype, last in itertools.product(range(3), (torch.float64, torch.float32), (False, True)):
                for channels in (1, 8, 256):
                    sizes = (1, channels, 20, 30, k, 1, up, down)
                    found = choice(library, op, dtype, sizes, last, LARGE_SHARED)
                    assert found is not None, (op, dtype, k, up, down)
                    assert found["bytes"] <= LARGE_SHARED
                    assert found["threads"] <= 640


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_usual_calls_need_no_more_shared_memory_than_every_gpu_gives(dtype, library):
    for op, last, size, (k, up, down) in itertools.product(
        range(3), (False, True), ((25, 42), (50, 84), (100, 168)), ((3, 2, 1), (5, 2, 1), (5, 1, 2), (7, 2, 1))
    ):
        found = choice(library, op, dtype, (1, 256, *size, k, 1, up, down), last)
        assert found is not None
        assert found["threads"] >= 32, (op, last, size, k, found)


def test_calls_without_a_block_kernel(library):
    for sizes in ((1, 4, 6, 6, 5, 1, 3, 2), (1, 4, 6, 6, 101, 1, 1, 1), (1, 4, 6, 6, 5, 1, 65, 1)):
        assert choice(library, REASSEMBLE, torch.float32, sizes, shared=LARGE_SHARED) is None


def test_maps_of_more_than_2_to_the_31_elements(library):
    # 1 x 64 x 1640 x 1640 outputs with k = 7, G = 8, where mmcv's kernel fails, and more elements than 32 bits count.
    for sizes in ((1, 64, 820, 820, 7, 8, 2, 1), (1, 64, 16400, 16400, 3, 1, 1, 1)):
        for op in range(3):
            found = choice(library, op, torch.float32, sizes)
            per_block = found["rows"] * found["columns"] * (found["chunks"] * found["slots"] * 8 if op == 0 else 1)
            assert found["blocks"] * per_block >= sizes[1] // (1 if op == 0 else sizes[1]) * sizes[2] * sizes[3]
            assert found["blocks"] < 2**31


if __name__ == "__main__":
    host = ctypes.CDLL(sys.argv[1])
    for chosen in CASES:
        check(host, chosen | dict(dtype=torch.float16), orders=(False,))
    print(f"{len(CASES)} cases")
