"""``output_size``: the first rows and columns of the output alone, to the bit what slicing the whole output gives."""

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from covering import pairwise
from toolkit import needs_opcheck, skip_without_half_on_cpu
from torch.func import hessian, jacfwd, jacrev, vmap
from torch.utils.flop_counter import FlopCounterMode

from carafe_plugin import CARAFEDownsample, CARAFEUpsample
from carafe_plugin.ops import carafe, reference
from carafe_plugin.ops.fused import reassemble_logits
from carafe_plugin.ops.reference import NORMALIZERS
from carafe_plugin.testing import LAYOUTS, relative_error

OPS = torch.ops.carafe_plugin
RATIOS = ((2, 1), (3, 1), (4, 1), (1, 1), (1, 2), (1, 3), (3, 2), (2, 3))
CASES = list(
    pairwise(
        {
            "crop": ((1, 0), (0, 1), (1, 1), (3, 2), (99, 199)),  # rows and columns less, of which one remains
            "normalizer": (None, *NORMALIZERS),
            "ratio": RATIOS,
            "size": ((1, 1), (5, 7), (9, 40), (2, 200)),
            "kernel_size": (1, 3, 5, 7),
            "group_size": (1, 2, 4),
            "dtype": reference.DTYPES,
            "layout": ("contiguous", "channels_last", "sliced", "transposed"),
            "grad_layout": ("contiguous", "channels_last", "sliced"),
        }
    )
)


def label(case):
    return "-".join(str(value).replace("torch.", "") for value in case.values())


def whole_size(size, ratio):
    return tuple(reference.output_size(length, *ratio) for length in size)


def draw(size, ratio, k=3, g=2, normalizer="softmax", channels=4, batch=2, dtype=torch.float64, device="cpu"):
    """Random features, kernels (masks where there is no normaliser) and the gradient of the whole output."""
    whole = whole_size(size, ratio)
    raw = normalizer is not None and ratio[0] > 1
    kernels = (g * k * k * ratio[0] ** 2, *size) if raw else (g * k * k, *whole)
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, channels, *size), (batch, *kernels), (batch, channels, *whole))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes]


def both_ways(k, g, ratio, normalizer, wanted):
    """Two functions of features and kernels, sliced from the whole output, and of ``wanted`` size at once."""
    rows, columns = wanted
    if normalizer is None:
        scale = Fraction(*ratio)
        return (
            lambda x, m: carafe(x, m, k, g, scale)[..., :rows, :columns],
            lambda x, m: carafe(x, m[..., :rows, :columns], k, g, scale, wanted),
        )
    args = (k, g, *ratio, normalizer)
    return (
        lambda x, z: reassemble_logits(x, z, *args)[..., :rows, :columns],
        lambda x, z: reassemble_logits(x, z, *args, wanted),
    )


@pytest.mark.parametrize("case", CASES, ids=label)
def test_same_bits_as_slicing(case, device):
    k, g, ratio, normalizer = (case[name] for name in ("kernel_size", "group_size", "ratio", "normalizer"))
    if min(ratio) > 1 and normalizer:  # then torch normalises the kernels
        skip_without_half_on_cpu(case["dtype"], device=device)
    drawn = draw(case["size"], ratio, k, g, normalizer, channels=40, dtype=case["dtype"], device=device)
    features, kernels = (LAYOUTS[case["layout"]](tensor).requires_grad_() for tensor in drawn[:2])
    whole = whole_size(case["size"], ratio)
    wanted = tuple(max(1, length - less) for length, less in zip(whole, case["crop"], strict=True))
    _, cropped = both_ways(k, g, ratio, normalizer, wanted)
    everything, _ = both_ways(k, g, ratio, normalizer, whole)

    output, expected = cropped(features, kernels), everything(features, kernels)
    assert torch.equal(output, expected[..., : wanted[0], : wanted[1]])
    assert output.is_contiguous() or output.is_contiguous(memory_format=torch.channels_last)
    # In the layout, too, the gradients that both get are the same: a sum's order may depend on it.
    arrange = LAYOUTS[case["grad_layout"]]
    grad = drawn[2][..., : wanted[0], : wanted[1]]
    zeros = F.pad(grad, (0, whole[1] - wanted[1], 0, whole[0] - wanted[0]))
    found = torch.autograd.grad(output, (features, kernels), arrange(grad))
    right = torch.autograd.grad(expected, (features, kernels), arrange(zeros))
    for a, b in zip(found, right, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("normalizer", [None, *NORMALIZERS])
@pytest.mark.parametrize("ratio", [(2, 1), (1, 2), (3, 2)], ids=str)
def test_derivatives_of_every_mode_and_order(ratio, normalizer, device):
    size, wanted = ((2, 2), (3, 2)) if ratio[0] > 1 else ((4, 3), (1, 2))
    features, kernels, _ = draw(size, ratio, 3, 1, normalizer, channels=2, batch=1, device=device)
    _, cropped = both_ways(3, 1, ratio, normalizer, wanted)
    inputs = (features.requires_grad_(), kernels.requires_grad_())
    options = dict(fast_mode=True, nondet_tol=0.0)
    assert torch.autograd.gradcheck(cropped, inputs, check_forward_ad=True, **options)
    assert torch.autograd.gradgradcheck(cropped, inputs, check_fwd_over_rev=True, **options)


@pytest.mark.parametrize("normalizer", [None, "softmax"])
@pytest.mark.parametrize("argument", [0, 1], ids=["features", "kernels"])
def test_transforms(argument, normalizer, device):
    *inputs, _ = draw((1, 2), (2, 1), 3, 1, normalizer, channels=2, batch=1, device=device)
    sliced, cropped = (lambda x, m, f=f: f(x, m).pow(3).sum() for f in both_ways(3, 1, (2, 1), normalizer, (1, 3)))
    for transform in (hessian, lambda f, argnums: jacrev(jacfwd(f, argnums), argnums)):
        found, right = (transform(f, argnums=argument)(*inputs) for f in (cropped, sliced))
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9)


def test_vmap(device):
    features, kernels, _ = draw((3, 4), (2, 1), batch=1, device=device)
    sliced, cropped = both_ways(3, 2, (2, 1), "softmax", (5, 7))
    stacked = torch.stack([features, -features])
    assert torch.equal(vmap(cropped, (0, None))(stacked, kernels), vmap(sliced, (0, None))(stacked, kernels))


@needs_opcheck
@pytest.mark.parametrize("normalizer", range(4))
@pytest.mark.parametrize("ratio", [(2, 1), (1, 2)], ids=str)
def test_opcheck(ratio, normalizer, device):
    features, kernels, grad = draw((5, 6), ratio, normalizer=normalizer or None, dtype=torch.float32, device=device)
    rows, columns = grad.shape[2] - 1, grad.shape[3] - 2
    grad = grad[..., :rows, :columns].contiguous()
    if not (normalizer and ratio[0] > 1):
        kernels = kernels[..., :rows, :columns].contiguous()
    features, kernels, grad = (tensor.requires_grad_() for tensor in (features, kernels, grad))
    args = (3, 2, *ratio, normalizer)
    torch.library.opcheck(OPS.carafe.default, (features, kernels, *args, rows, columns))
    torch.library.opcheck(OPS._carafe_grad_features.default, (grad, kernels, 5, 6, *args))
    torch.library.opcheck(OPS._carafe_grad_kernels.default, (grad, features, kernels, *args))


@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        (CARAFEUpsample(8), (11, 13)),
        (CARAFEUpsample(8, 1.5), (8, 11)),
        (CARAFEUpsample(8, 3, normalizer="sigmoid"), 16),
        (CARAFEDownsample(8), (2, 4)),
        (CARAFEDownsample(8, 1.5), [4, 4]),
    ],
    ids=["up 2", "up 3/2", "up 3", "down 2", "down 3/2"],
)
def test_modules(module, wanted, device):
    features = torch.randn(2, 8, 6, 7, device=device)
    module = module.to(device)
    rows, columns = (wanted, wanted) if isinstance(wanted, int) else wanted
    whole = module(features)
    assert torch.equal(module(features, wanted), whole[..., :rows, :columns])
    assert torch.equal(module(features, output_size=whole.shape[2:]), whole)
    with torch.autocast(device, dtype=torch.bfloat16):
        output = module(features, output_size=wanted)
    assert output.dtype == torch.bfloat16
    assert relative_error(output.float(), whole[..., :rows, :columns]) < 0.03


def test_flops_are_those_of_the_outputs_computed():
    features, logits, _ = draw((5, 6), (2, 1), 3, 2, channels=4, batch=1)
    features.requires_grad_(), logits.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        reassemble_logits(features, logits, 3, 2, 2, 1, "softmax", (9, 11)).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 4 * 99 * 9


@pytest.mark.parametrize(
    ("output_size", "error", "message"),
    [
        ((11, 12), ValueError, r"output_size must be from \(1, 1\) to \(10, 12\), .*5 x 6 .* 2/1 .*, got \(11, 12\)"),
        ((10, 13), ValueError, r"got \(10, 13\)"),
        ((0, 12), ValueError, r"got \(0, 12\)"),
        (-1, ValueError, r"got \(-1, -1\)"),
        (11, ValueError, r"got \(11, 11\)"),
        ((1, 4, 10, 12), TypeError, r"output_size must be an int or two of them, \(H', W'\), got \(1, 4, 10, 12\)"),
        (9.0, TypeError, "got 9.0"),
        ((9, None), TypeError, r"got \(9, None\)"),
        (True, TypeError, "got True"),
        ("ab", TypeError, "got 'ab'"),
    ],
    ids=str,
)
def test_bad_sizes_are_named(output_size, error, message):
    features = torch.zeros(1, 4, 5, 6)
    with pytest.raises(error, match=message):
        CARAFEUpsample(4)(features, output_size)
    with pytest.raises(error, match=message):
        carafe(features, torch.zeros(1, 9, 10, 12), 3, output_size=output_size)


def test_masks_have_the_output_size():
    with pytest.raises(ValueError, match=r"masks must have shape \(1, 9, 9, 12\)"):
        carafe(torch.zeros(1, 4, 5, 6), torch.zeros(1, 9, 10, 12), 3, output_size=(9, 12))


def test_direct_callers_are_told(device):
    features, masks, logits = (torch.zeros(1, c, h, 6, device=device) for c, h in ((4, 5), (9, 11), (36, 5)))
    with pytest.raises(RuntimeError, match=r"the output .* must be of at most 10 x 12, got 11 x 6"):
        OPS.carafe(features, masks, 3, 1, 2, 1, 0, 11, 6)
    with pytest.raises(RuntimeError, match=r"the output .* must be of at most 10 x 12, got 10 x 13"):
        OPS.carafe(features, logits, 3, 1, 2, 1, 1, None, 13)
    with pytest.raises(RuntimeError, match=r"the output .* must be of at most 10 x 12, got 11 x 6"):
        OPS._carafe_grad_kernels(torch.zeros(1, 4, 11, 6, device=device), features, logits, 3, 1, 2, 1, 1)
    with pytest.raises(RuntimeError, match=r"kernels must have shape \(1, 9, 10, 12\), got \(1, 9, 11, 6\)"):
        OPS.carafe(features, masks, 3, 1, 2, 1)
