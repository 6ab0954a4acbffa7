"""The compiled operators against the reference: values and both gradients, over everything they accept."""

from fractions import Fraction

import pytest
import torch
from covering import pairwise
from hypothesis import given, settings
from hypothesis import strategies as st

from carafe_plugin.ops import carafe, is_compiled, reference
from carafe_plugin.ops.functional import scale_ratio
from carafe_plugin.testing import (
    LAYOUTS,
    SCALES,
    SHAPES,
    TOLERANCES,
    assert_close,
    random_case,
    relative_error,
)

CASES = list(
    pairwise(
        {
            "kernel_size": (1, 3, 5, 7),
            "group_size": (1, 2, 4, 8),
            "scale": SCALES,
            "size": SHAPES,
            "dtype": reference.DTYPES,
            "layout": tuple(LAYOUTS),
            "mask_layout": tuple(LAYOUTS),
            "grad_layout": tuple(LAYOUTS),
        }
    )
)


def name(case):
    return "-".join(str(value).replace("/", "to").replace("torch.", "") for value in case.values())


def compare(features, masks, grad, kernel_size, group_size, scale):
    """All three operators on these tensors against the reference on contiguous copies."""
    args = (kernel_size, group_size, *scale_ratio(scale))
    size = features.shape[-2:]
    x, m, g = (t.detach().clone(memory_format=torch.contiguous_format) for t in (features, masks, grad))
    ops = torch.ops.carafe_plugin
    assert_close(carafe(features, masks, kernel_size, group_size, scale), reference.reassemble(x, m, *args))
    assert_close(ops._carafe_grad_features(grad, masks, *size, *args), reference.grad_features(g, m, *size, *args))
    assert_close(ops._carafe_grad_kernels(grad, features, masks, *args), reference.grad_masks(g, x, *args))


def test_compiled_operators_serve():
    # Without this, every comparison below would compare the reference with itself.
    assert is_compiled("cpu")


@pytest.mark.parametrize("case", CASES, ids=name)
def test_operators_equal_the_reference(case, device):
    k, g, scale = case["kernel_size"], case["group_size"], case["scale"]
    features, masks, grad = random_case(case["size"], 16, k, g, scale, dtype=case["dtype"], device=device)
    layouts = (LAYOUTS[case[key]] for key in ("layout", "mask_layout", "grad_layout"))
    features, masks, grad = (layout(t) for layout, t in zip(layouts, (features, masks, grad), strict=True))
    compare(features, masks, grad, k, g, scale)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 20), st.integers(1, 40)),
    kernel_size=st.sampled_from((1, 3, 5, 7, 9)),
    groups=st.integers(1, 5),
    group_channels=st.integers(1, 19),
    scale=st.builds(Fraction, st.integers(1, 5), st.integers(1, 5)),
    batch=st.integers(1, 3),
    layout=st.sampled_from(sorted(LAYOUTS)),
    seed=st.integers(0, 2**31),
)
def test_any_geometry(device, size, kernel_size, groups, group_channels, scale, batch, layout, seed):
    channels = groups * group_channels
    tensors = random_case(size, channels, kernel_size, groups, scale, batch=batch, device=device, seed=seed)
    compare(*(LAYOUTS[layout](t) for t in tensors), kernel_size, groups, scale)


def cropped(tensor):
    """Channels side by side, but in a larger map."""
    larger = torch.nn.functional.pad(tensor, (1, 2, 2, 1), value=float("nan"))
    return LAYOUTS["channels_last"](larger)[:, :, 2:-1, 1:-2]


@pytest.mark.parametrize("layout", [*LAYOUTS.values(), cropped], ids=[*LAYOUTS, "cropped"])
@pytest.mark.parametrize("channels", [1, 8, 17, 40, 75])
def test_channel_remainders(channels, layout, device):
    for scale in (2, 3, Fraction(1, 2)):
        case = random_case((7, 19), channels, 5, 1, scale, batch=1, device=device)
        compare(*map(layout, case), 5, 1, scale)
        compare(layout(case[0]), case[1], case[2], 5, 1, scale)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("width", [191, 192, 193, 400])
def test_rows_longer_than_a_span(width, layout, device):
    for scale in (2, Fraction(1, 2), Fraction(3, 2)):
        case = random_case((3, width), 32, 5, 2, scale, batch=1, device=device)
        compare(*map(LAYOUTS[layout], case), 5, 2, scale)


@pytest.mark.parametrize("dtype", reference.DTYPES)
@pytest.mark.parametrize("lanes", range(15, 34))
def test_every_end_of_a_row(lanes, dtype, device):
    # Rows end with a whole vector, a part of one, or half a one that holds the rest.
    half = Fraction(1, 2)
    for scale, width in ((1, lanes), (2, lanes), (3, lanes), (half, 2 * lanes), (half, 2 * lanes - 1)):
        case = random_case((5, width), 9, 5, 1, scale, batch=1, dtype=dtype, device=device)
        compare(*case, 5, 1, scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel_size", [3, 5, 7, 37])
def test_halving_looks_at_nothing_beside_the_map(kernel_size, dtype, device):
    """The part of a map that is NaN elsewhere, of rows of every length: the same bits as from a map of its own."""
    operators = torch.ops.carafe_plugin
    grad_kernels, grad_features = operators._carafe_grad_kernels, operators._carafe_grad_features
    sizes = [(1, 64), (2, 65), (40, 95)] + [(5, width) for width in (*range(30, 36), *range(62, 70), 399)]
    for height, width in sizes[:4] if kernel_size > 7 else sizes:
        size = (-(-height // 2), -(-width // 2))
        masks = torch.randn(2, kernel_size**2, *size).softmax(1).to(dtype).to(device)
        around = torch.full((2, 9, height + 2, width + 80), float("nan"), dtype=dtype, device=device)
        around[:, :, 1:-1, 40:-40] = torch.randn(2, 9, height, width)
        part = around[:, :, 1:-1, 40:-40]
        whole = carafe(part.contiguous(), masks, kernel_size, 1, Fraction(1, 2))
        assert whole.isfinite().all()
        assert torch.equal(carafe(part, masks, kernel_size, 1, Fraction(1, 2)), whole)
        repeated = part[:, :1, :1].expand(-1, 9, height, -1)  # strides of 0
        expected = carafe(repeated.contiguous(), masks, kernel_size, 1, Fraction(1, 2))
        assert torch.equal(carafe(repeated, masks, kernel_size, 1, Fraction(1, 2)), expected)
        assert_close(whole, reference.reassemble(part, masks, kernel_size, 1, 1, 2))
        grad = torch.randn(2, 9, *size).to(dtype).to(device)
        found = grad_kernels(grad, part, masks, kernel_size, 1, 1, 2)
        assert torch.equal(found, grad_kernels(grad, part.contiguous(), masks, kernel_size, 1, 1, 2))
        assert_close(found, reference.grad_masks(grad, part, kernel_size, 1, 1, 2))
        found = grad_features(grad, masks, height, width, kernel_size, 1, 1, 2)
        assert_close(found, reference.grad_features(grad, masks, height, width, kernel_size, 1, 1, 2))


def test_kernel_larger_than_the_map(device):
    compare(*random_case((2, 3), 4, 7, 1, 2, device=device), 7, 1, 2)


@pytest.mark.parametrize(("kernel_size", "group_size"), [(7, 8), (5, 16), (9, 8), (31, 1)])
def test_more_weights_than_a_pixel_of_mmcv_holds(kernel_size, group_size, device):
    assert kernel_size**2 * group_size > 384
    compare(*random_case((6, 9), 16, kernel_size, group_size, 2, device=device), kernel_size, group_size, 2)


@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_empty_batch(scale, device):
    features, masks, grad = random_case((4, 6), 8, 3, 2, scale, batch=0, device=device)
    compare(features, masks, grad, 3, 2, scale)
    features.requires_grad_(), masks.requires_grad_()
    carafe(features, masks, 3, 2, scale).sum().backward()
    assert features.grad is not None
    assert features.grad.shape == features.shape


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_reaches_only_its_neighbourhood(layout, device):
    features, masks, _ = (LAYOUTS[layout](t) for t in random_case((9, 9), 20, 3, 1, 2, batch=1, device=device))
    features[0, 0, 4, 4] = float("nan")
    touched = carafe(features, masks, 3)[0].isnan()
    expected = torch.zeros_like(touched)
    expected[0, 6:12, 6:12] = True
    assert torch.equal(touched, expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_infinite_weight_on_the_border_is_nan_as_in_the_reference(layout, device):
    features, masks, grad = (LAYOUTS[layout](t) for t in random_case((4, 5), 20, 3, 1, 2, batch=1, device=device))
    masks[0, 0, 0, 0] = grad[0, 0, 0, 0] = float("inf")  # tap 0 of the first output lies outside the map
    got = carafe(features, masks, 3)
    assert torch.equal(got.isnan(), reference.reassemble(features, masks, 3, 1, 2, 1).isnan())
    assert got.isnan().any()
    got = torch.ops.carafe_plugin._carafe_grad_kernels(grad, features, masks, 3, 1, 2, 1)
    assert torch.equal(got.isnan(), reference.grad_masks(grad, features, 3, 1, 2, 1).isnan())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_subnormal_halves_survive_where_subnormal_floats_are_flushed(layout):
    features = LAYOUTS[layout](torch.full((1, 32, 5, 40), 1e-5, dtype=torch.float16))
    masks = torch.ones(1, 1, 10, 80, dtype=torch.float16)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormal numbers")
    try:
        got = carafe(features, masks, 1)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(got, torch.full_like(got, 1e-5))


@pytest.mark.parametrize("scale", [Fraction(101, 100), Fraction(17, 9), 13, Fraction(1, 70)], ids=str)
def test_scales_of_many_phases(scale, device):
    compare(*random_case((23, 31), 6, 3, 2, scale, batch=1, device=device), 3, 2, scale)


def test_delta_kernels_copy(device):
    features, _, _ = random_case((5, 6), 3, 1, 1, 2, device=device)
    masks = torch.zeros(2, 25, 10, 12, device=device)
    masks[:, 12] = 1
    nearest = torch.nn.functional.interpolate(features, scale_factor=2, mode="nearest")
    assert torch.equal(carafe(features, masks, 5), nearest)


@pytest.mark.parametrize("dtype", reference.DTYPES, ids=str)
@pytest.mark.parametrize("scale", [2, Fraction(1, 2), Fraction(3, 2)], ids=str)
def test_same_bits_on_repeated_runs_and_for_any_number_of_threads(dtype, scale, device):
    features, masks, grad = random_case((33, 50), 40, 5, 2, scale, dtype=dtype, device=device)
    args = (5, 2, *scale_ratio(scale))

    def run():
        ops = torch.ops.carafe_plugin
        return (
            ops.carafe(features, masks, *args),
            ops._carafe_grad_features(grad, masks, 33, 50, *args),
            ops._carafe_grad_kernels(grad, features, masks, *args),
        )

    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("scale", [2, Fraction(1, 2)], ids=str)
def test_output_keeps_the_memory_format_of_features(scale, device):
    features, masks, _ = random_case((6, 8), 4, 3, 1, scale, device=device)
    assert carafe(features, masks, 3, 1, scale).is_contiguous()
    last = features.contiguous(memory_format=torch.channels_last)
    output = carafe(last, masks, 3, 1, scale)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert not output.is_contiguous()


@pytest.mark.parametrize("grad", [False, True])
def test_memory_that_runs_out_is_named_and_then_all_goes_on(grad, device):
    """torch's own error, whose type callers catch, for an output of 2^50 bytes."""
    dot = torch.zeros(1, 1, 1, 1, device=device, requires_grad=grad)
    expected = torch.OutOfMemoryError if device == "cuda" else RuntimeError
    with pytest.raises(expected, match=r"out of memory|not enough memory|allocate memory"):
        carafe(dot.expand(1, 2**26, 1024, 1024), dot.expand(1, 1, 2048, 2048), 1)
    with torch.inference_mode():
        dot = torch.zeros(1, 1, 1, 1, device=device)  # which autograd has nothing to do with
        huge = dot.expand(1, 2**26, 1024, 1024), dot.expand(1, 1, 2048, 2048)
        with pytest.raises(RuntimeError, match=r"out of memory|not enough memory|allocate memory"):
            carafe(*huge, 1)
    features, masks, _ = random_case((6, 5), 4, 3, 1, 2, device=device)
    error = relative_error(carafe(features, masks, 3), reference.reassemble(features, masks, 3, 1, 2, 1))
    assert error < 1e-5


def test_memory_is_the_output_alone(device):
    features, masks, _ = random_case((40, 60), 64, 5, 1, 2, batch=1, device=device)
    carafe(features, masks, 5)  # the pool of worker threads exists before the measurement
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        output = carafe(features, masks, 5)
        allocated = torch.cuda.max_memory_allocated() - before
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            output = carafe(features, masks, 5)
        allocated = sum(e.self_cpu_memory_usage for e in profile.key_averages() if e.self_cpu_memory_usage > 0)
    assert allocated == output.numel() * output.element_size()


@pytest.mark.parametrize("dtype", reference.DTYPES, ids=str)
def test_one_wrong_output_among_thousands_is_noticed(dtype):
    expected = torch.randn(38_000, dtype=dtype)
    assert_close(expected.clone(), expected)
    wrong = expected.clone()
    wrong[12_345] += 20 * TOLERANCES[dtype]
    assert relative_error(wrong, expected) < TOLERANCES[dtype]
    with pytest.raises(AssertionError, match="element 12345: got"):
        assert_close(wrong, expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("scale", [2, Fraction(1, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_chunks_of_channels(dtype, scale, layout, device):
    """256 channels of 40 x 60, k = 5: every kernel goes through its channels in several turns, as in a real model."""
    x, m, z = map(LAYOUTS[layout], random_case((40, 60), 256, 5, 1, scale, batch=1, dtype=dtype, device=device))
    compare(x, m, z, 5, 1, scale)
