"""The specification itself: against plain loops, and its gradients against autograd."""

import itertools
from fractions import Fraction

import pytest
import torch
from covering import pairwise

from carafe_plugin.ops import reference
from carafe_plugin.ops.functional import scale_ratio
from carafe_plugin.testing import SCALES, random_case
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


def test_cases_cover_every_pair():
    options = {"a": range(3), "b": range(3), "c": range(3)}
    cases = list(pairwise(options))
    assert len(cases) == 10
    for first, second in itertools.combinations(options, 2):
        assert len({(case[first], case[second]) for case in cases}) == 9


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
