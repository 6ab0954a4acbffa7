"""Reassembly from the content encoder's raw output in one pass, against the three steps that define it."""

from copy import deepcopy

import pytest
import torch
from covering import pairwise
from toolkit import needs_opcheck, skip_without_half_on_cpu

from carafe_plugin import CARAFEDownsample, CARAFEUpsample
from carafe_plugin.ops import is_compiled, reference
from carafe_plugin.ops.fused import reassemble_logits
from carafe_plugin.ops.reference import NORMALIZERS, masks_from_logits
from carafe_plugin.testing import LAYOUTS, SHAPES, TOLERANCES, assert_close, relative_error

RATIOS = ((2, 1), (3, 1), (4, 1), (1, 1), (1, 2), (1, 3))
CASES = list(
    pairwise(
        {
            "kernel_size": (1, 3, 5, 7),
            "group_size": (1, 2, 4),
            "ratio": RATIOS,
            "size": SHAPES,
            "normalizer": NORMALIZERS,
            "dtype": reference.DTYPES,
            "layout": tuple(LAYOUTS),
        }
    )
)
OPS = torch.ops.carafe_plugin


def random_logits(size, channels, k, g, ratio, dtype=torch.float32, spread=2.0, batch=2, device="cpu"):
    up, down = ratio
    coarse = tuple(-(-length // down) for length in size) if up == 1 else size
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (batch, channels, *size),
        (batch, g * k * k * up * up, *coarse),
        (batch, channels, *(length * up for length in coarse)),
    )
    features, logits, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return features.to(device, dtype), (logits * spread).to(device, dtype), grad.to(device, dtype)


def by_definition(features, logits, k, g, up, down, normalizer):
    return reference.reassemble(features, masks_from_logits(logits, k, g, up, down, normalizer), k, g, up, down)


def label(case):
    return "-".join(str(value).replace("torch.", "") for value in case.values())


@pytest.mark.parametrize("case", CASES, ids=label)
def test_one_pass_equals_three_steps(case, device):
    k, g, ratio, dtype = case["kernel_size"], case["group_size"], case["ratio"], case["dtype"]
    if not is_compiled(device):  # the reference's normaliser is torch's
        skip_without_half_on_cpu(dtype, device=device)
    tensors = random_logits(case["size"], 40, k, g, ratio, dtype, device=device)
    features, logits, grad = (LAYOUTS[case["layout"]](tensor) for tensor in tensors)
    exact = [tensor.double().requires_grad_() for tensor in (features, logits)]
    expected = by_definition(*exact, k, g, *ratio, case["normalizer"])
    expected_grads = torch.autograd.grad(expected, exact, grad.double())

    features.requires_grad_(), logits.requires_grad_()
    got = reassemble_logits(features, logits, k, g, *ratio, case["normalizer"])
    grads = torch.autograd.grad(got, (features, logits), grad)
    assert_close(got, expected.to(dtype))
    assert_close(grads[0], expected_grads[0].to(dtype))
    # The gradient to the logits is a difference: what is lost is relative to its terms, not to what remains of them.
    assert grads[1].dtype == dtype
    difference = (grads[1].double() - expected_grads[1]).norm()
    assert difference <= 4 * TOLERANCES[dtype] * (expected_grads[1].norm() + grad.double().norm())


@pytest.mark.parametrize("ratio", RATIOS, ids=str)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_gradcheck_and_gradgradcheck(ratio, normalizer, device):
    size = (2, 3) if ratio[0] > 1 else (3, 4)
    features, logits, _ = random_logits(size, 4, 3, 2, ratio, torch.float64, batch=1, device=device)
    inputs = (features.requires_grad_(), logits.requires_grad_())

    def function(x, z):
        return reassemble_logits(x, z, 3, 2, *ratio, normalizer)

    assert torch.autograd.gradcheck(function, inputs, nondet_tol=0.0, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, nondet_tol=0.0, fast_mode=True)


def test_second_derivative_through_a_common_origin(device):
    # The logits come from the features: the partial derivatives must not be taken along that way twice.
    module = CARAFEUpsample(4, 2, 3, 1, 3, compressed_channels=2).double().to(device)
    torch.nn.init.normal_(module.content_encoder.weight)
    features = torch.randn(1, 4, 3, 2, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradgradcheck(module, (features,), fast_mode=True)


@needs_opcheck
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("ratio", [(2, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("normalizer", range(1, 4), ids=NORMALIZERS)
def test_opcheck(ratio, normalizer, channels_last, device):
    tensors = random_logits((5, 6), 4, 3, 2, ratio, device=device)
    if channels_last:
        tensors = tuple(tensor.contiguous(memory_format=torch.channels_last) for tensor in tensors)
    features, logits, grad = (tensor.requires_grad_() for tensor in tensors)
    args = (3, 2, *ratio, normalizer)
    torch.library.opcheck(OPS.carafe.default, (features, logits, *args))
    torch.library.opcheck(OPS._carafe_grad_features.default, (grad, logits, 5, 6, *args))
    torch.library.opcheck(OPS._carafe_grad_kernels.default, (grad, features, logits, *args))


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("offset", [0.0, -300.0, -1e4, 300.0], ids=str)
def test_saturated_logits(normalizer, offset, device):
    features, logits, grad = random_logits((3, 20), 4, 3, 1, (2, 1), spread=30.0, device=device)
    logits = (logits + offset).requires_grad_()
    got = reassemble_logits(features, logits, 3, 1, 2, 1, normalizer)
    exact = logits.detach().double().requires_grad_()
    expected = by_definition(features.double(), exact, 3, 1, 2, 1, normalizer)
    assert (got - expected).abs().max() < 1e-5
    got.backward(grad), expected.backward(grad.double())
    assert logits.grad.isfinite().all()
    assert (logits.grad - exact.grad).abs().max() < 1e-4


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_what_is_not_a_number_stays_so(normalizer, device):
    features, logits, _ = random_logits((3, 20), 4, 3, 1, (2, 1), device=device)
    logits[0, 5, 1, 7] = float("nan")
    got = reassemble_logits(features, logits, 3, 1, 2, 1, normalizer)
    expected = by_definition(features, logits, 3, 1, 2, 1, normalizer)
    assert torch.equal(got.isnan(), expected.isnan())
    assert got.isnan().any()


@pytest.mark.parametrize("size", [(0, 4), (3, 0)], ids=str)
def test_an_empty_map_has_empty_gradients(size, device):
    """F.pixel_shuffle has none."""
    for ratio in ((2, 1), (3, 2)):
        features, logits, _ = random_logits(size, 4, 3, 1, ratio, device=device)
        features.requires_grad_(), logits.requires_grad_()
        reassemble_logits(features, logits, 3, 1, *ratio, "softmax").sum().backward()
        assert (features.grad.shape, logits.grad.shape) == (features.shape, logits.shape)


@pytest.mark.parametrize("dtype", reference.DTYPES, ids=str)
@pytest.mark.parametrize("ratio", [(2, 1), (1, 2)], ids=str)
def test_same_bits_on_repeated_runs_and_for_any_number_of_threads(ratio, dtype, device):
    features, logits, grad = random_logits((33, 150), 40, 5, 2, ratio, dtype, device=device)
    args = (5, 2, *ratio, 1)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            results.append(
                (
                    OPS.carafe(features, logits, *args),
                    OPS._carafe_grad_features(grad, logits, 33, 150, *args),
                    OPS._carafe_grad_kernels(grad, features, logits, *args),
                )
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("module", "fused"),
    [
        (CARAFEUpsample(16), True),
        (CARAFEDownsample(16), True),
        (CARAFEUpsample(16, 1.5), False),
        (CARAFEUpsample(16, normalizer="sigmoid"), True),
    ],
    ids=["up", "down", "3/2", "sigmoid"],
)
def test_modules_take_the_short_way(module, fused, device):
    features = torch.randn(1, 16, 6, 8, device=device, requires_grad=True)
    module = deepcopy(module).to(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        module(features).sum().backward()
    called = {event.key for event in profile.key_averages()}
    assert "carafe_plugin::carafe" in called
    assert ("aten::pixel_shuffle" in called) == (not fused)


def test_training_keeps_features_and_raw_output_alone(device):
    module = CARAFEUpsample(64).to(device)
    features = torch.randn(1, 64, 20, 30, device=device, requires_grad=True)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        output = module(features)
    parameters = {parameter.data_ptr() for parameter in module.parameters()}
    elements = sum(t.numel() for pointer, t in kept.items() if pointer not in parameters)
    # features, compressed features, raw output; no shuffled, normalised or unfolded copy
    assert elements == 64 * 600 + 64 * 600 + 100 * 600
    assert output.shape == (1, 64, 40, 60)


def test_checkpointed_module_has_the_same_gradients(device):
    from torch.utils.checkpoint import checkpoint

    module = CARAFEUpsample(16).to(device)
    features = torch.randn(2, 16, 6, 8, device=device, requires_grad=True)
    wanted = (features, *module.parameters())
    with torch.backends.cudnn.flags(deterministic=True):  # the convolutions' gradients, too, are the same bits then
        plain = torch.autograd.grad(module(features).pow(2).sum(), wanted)
        again = torch.autograd.grad(checkpoint(module, features, use_reentrant=False).pow(2).sum(), wanted)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_autocast(device):
    module = CARAFEUpsample(16).to(device)
    features = torch.randn(2, 16, 6, 8, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        output = module(features)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert relative_error(output.float(), module(features)) < 0.02
    assert features.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(logits=(2, 36, 5, 7)), r"kernels must have shape \(2, 36, 5, 6\), got \(2, 36, 5, 7\)"),
        (dict(ratio=(3, 2)), "up or down must be 1 and neither more than 64, got 3 and 2"),
        (dict(normalizer=4), "normalizer must be 0, 1, 2 or 3, got 4"),
    ],
)
def test_direct_callers_are_told(change, message, device):
    logits = torch.zeros(change.get("logits", (2, 36, 5, 6)), device=device)
    features, ratio = torch.zeros(2, 4, 5, 6, device=device), change.get("ratio", (2, 1))
    with pytest.raises(RuntimeError, match=message):
        OPS.carafe(features, logits, 3, 1, *ratio, change.get("normalizer", 1))
