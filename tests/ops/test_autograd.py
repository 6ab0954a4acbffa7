"""Derivatives of any order, and everything that torch asks of a well-behaved operator."""

from fractions import Fraction

import pytest
import torch
from toolkit import needs_opcheck

from carafe_plugin.ops import carafe, reference
from carafe_plugin.ops.functional import scale_ratio
from carafe_plugin.ops.fused import reassemble_logits
from carafe_plugin.testing import SCALES, random_case, relative_error


@pytest.mark.parametrize("scale", SCALES, ids=str)
@pytest.mark.parametrize(("kernel_size", "group_size"), [(3, 1), (5, 2), (1, 4)])
def test_gradcheck_and_gradgradcheck(scale, kernel_size, group_size, device):
    # Numerical differentiation evaluates the operator twice per input element: keep the masks small.
    size = (5, 4) if scale <= 1 else (2, 3) if scale <= 2 else (1, 2)
    features, masks, _ = random_case(
        size, group_size, kernel_size, group_size, scale, batch=1, dtype=torch.float64, device=device
    )
    inputs = (features.requires_grad_(), masks.requires_grad_())

    def function(x, m):
        return carafe(x, m, kernel_size, group_size, scale)

    assert torch.autograd.gradcheck(function, inputs, nondet_tol=0.0)
    # Along random directions: entry by entry it would take minutes.
    assert torch.autograd.gradgradcheck(function, inputs, nondet_tol=0.0, fast_mode=True)


def test_third_derivative_exists(device):
    features, masks, _ = random_case((3, 3), 2, 3, 1, 2, batch=1, dtype=torch.float64, device=device)
    features.requires_grad_(), masks.requires_grad_()
    value = carafe(features, masks, 3).pow(3).sum()
    (first,) = torch.autograd.grad(value, features, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), masks, create_graph=True)
    (third,) = torch.autograd.grad(second.sum(), features)
    assert third.abs().sum() > 0


@pytest.mark.parametrize("wanted", ["features", "masks"])
def test_only_the_wanted_gradient_is_computed(wanted, device):
    features, masks, grad = random_case((4, 4), 4, 3, 1, 2, device=device)
    (features if wanted == "features" else masks).requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        carafe(features, masks, 3).backward(grad)
    called = {e.key for e in profile.key_averages()}
    operators = {"features": "carafe_plugin::_carafe_grad_features", "masks": "carafe_plugin::_carafe_grad_kernels"}
    assert {name for name, operator in operators.items() if operator in called} == {wanted}


@pytest.mark.parametrize("wanted", [("features",), ("kernels",), ("features", "kernels")], ids="+".join)
@pytest.mark.parametrize("normalizer", [None, "softmax"])
def test_only_what_the_backward_pass_reads_is_kept(normalizer, wanted, device):
    features, masks, grad = random_case((8, 8), 16, 5, 1, 2, device=device)
    kernels = masks if normalizer is None else torch.randn(2, 100, 8, 8, device=device)
    tensors = {"features": features, "kernels": kernels}
    for name in wanted:
        tensors[name].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        if normalizer is None:
            output = carafe(features, masks, 5)
        else:
            output = reassemble_logits(features, kernels, 5, 1, 2, 1, normalizer)
    if normalizer is not None and "kernels" in wanted:
        read = {"features", "kernels"}
    else:
        read = {{"features": "kernels", "kernels": "features"}[name] for name in wanted}
    assert sorted(t.data_ptr() for t in kept) == sorted(tensors[name].data_ptr() for name in read)
    found = torch.autograd.grad(output, [tensors[name] for name in wanted], grad)
    both = [tensor.detach().double().requires_grad_() for tensor in tensors.values()]
    masks64 = both[1] if normalizer is None else reference.masks_from_logits(both[1], 5, 1, 2, 1, normalizer)
    reference.reassemble(both[0], masks64, 5, 1, 2, 1).backward(grad.double())
    for name, gradient in zip(wanted, found, strict=True):
        assert relative_error(gradient, both[list(tensors).index(name)].grad) < 1e-5


def test_checkpointing(device):
    features, masks, _ = random_case((5, 5), 4, 3, 1, 2, device=device)
    features.requires_grad_(), masks.requires_grad_()
    carafe(features, masks, 3).sum().backward()
    expected = features.grad.clone(), masks.grad.clone()
    features.grad = masks.grad = None
    torch.utils.checkpoint.checkpoint(carafe, features, masks, 3, use_reentrant=False).sum().backward()
    assert torch.equal(features.grad, expected[0])
    assert torch.equal(masks.grad, expected[1])


@needs_opcheck
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("scale", [2, Fraction(1, 2), Fraction(3, 2)], ids=str)
@pytest.mark.parametrize("requires_grad", [True, False], ids=["grad", "no_grad"])
def test_opcheck(scale, channels_last, requires_grad, device):
    tensors = random_case((5, 6), 4, 3, 2, scale, device=device)
    if channels_last:
        tensors = tuple(t.contiguous(memory_format=torch.channels_last) for t in tensors)
    features, masks, grad = (t.requires_grad_(requires_grad) for t in tensors)
    args = (3, 2, *scale_ratio(scale))
    ops = torch.ops.carafe_plugin
    torch.library.opcheck(ops.carafe.default, (features, masks, *args))
    torch.library.opcheck(ops._carafe_grad_features.default, (grad, masks, 5, 6, *args))
    torch.library.opcheck(ops._carafe_grad_kernels.default, (grad, features, masks, *args))


@needs_opcheck
def test_opcheck_of_an_empty_batch(device):
    features, masks, _ = random_case((5, 6), 4, 3, 2, 2, batch=0, device=device)
    torch.library.opcheck(torch.ops.carafe_plugin.carafe.default, (features, masks, 3, 2, 2, 1))
