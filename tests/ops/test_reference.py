"""The specification itself: against plain loops, and its gradients against autograd."""

from fractions import Fraction

import pytest
import torch

from carafe_plugin.ops import _fallback, reference
from carafe_plugin.ops.functional import scale_ratio
from carafe_plugin.testing import SCALES, pairwise, random_case
from ops.naive import naive_carafe

CASES = list(
    pairwise(
        {
            "kernel_size": (1, 3, 5),
            "group_size": (1, 2, 4),
            "scale": [Fraction(s) for s in (*SCALES, Fraction(5, 2), Fraction(3, 4))],
            "size": ((4, 5), (3, 6), (1, 1), (1, 4)),
        }
    )
)


def name(case):
    return "-".join(str(value).replace("/", "to") for value in case.values())


@pytest.mark.parametrize("case", CASES, ids=name)
def test_reference_is_equation_3(case):
    features, masks, _ = random_case(case["size"], 4, case["kernel_size"], case["group_size"], case["scale"])
    features, masks = features.double(), masks.double()
    up, down = scale_ratio(case["scale"])
    expected = naive_carafe(features, masks, case["kernel_size"], case["group_size"], case["scale"])
    got = reference.reassemble(features, masks, case["kernel_size"], case["group_size"], up, down)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_gradients_are_those_of_autograd(case):
    args = (case["kernel_size"], case["group_size"], *scale_ratio(case["scale"]))
    features, masks, grad = random_case(
        case["size"], 4, case["kernel_size"], case["group_size"], case["scale"], dtype=torch.float64
    )
    features.requires_grad_(), masks.requires_grad_()
    reference.reassemble(features, masks, *args).backward(grad)
    assert features.grad is not None
    assert masks.grad is not None
    torch.testing.assert_close(reference.grad_features(grad, masks, *case["size"], *args), features.grad)
    torch.testing.assert_close(reference.grad_masks(grad, features, *args), masks.grad)


@pytest.mark.parametrize("scale", [2, Fraction(1, 2), Fraction(3, 2)], ids=str)
def test_fallback_is_differentiable_twice(scale):
    up, down = scale_ratio(scale)
    features, masks, _ = random_case((2, 3), 2, 3, 2, scale, batch=1, dtype=torch.float64)
    inputs = (features.requires_grad_(), masks.requires_grad_())

    def function(x, m):
        return _fallback.reassemble(x, m, 3, 2, up, down)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_fallback_keeps_only_its_inputs_for_the_backward_pass():
    features, masks, _ = random_case((8, 8), 16, 5, 1, 2)
    features.requires_grad_(), masks.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _fallback.reassemble(features, masks, 5, 1, 2, 1)
    assert sorted(t.numel() for t in kept) == sorted((features.numel(), masks.numel()))


def test_fallback_casts_under_autocast():
    features, masks, _ = random_case((4, 4), 4, 3, 1, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _fallback.reassemble(features, masks.bfloat16(), 3, 1, 2, 1).dtype == torch.bfloat16
