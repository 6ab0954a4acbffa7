"""FLOPs of the operators in torch's FlopCounterMode; test_backends.py has them counted by the reference, too."""

from fractions import Fraction

import pytest
import torch
from toolkit import TORCH
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from carafe_plugin import CARAFEDownsample, CARAFEUpsample
from carafe_plugin.ops import carafe


def by_operator(counter, scope="Global"):
    """FLOPs by what is computed."""
    counts = counter.get_flop_counts().get(scope, {})
    return {str(packet).rpartition(".")[2].lstrip("_"): number for packet, number in counts.items()}


def inputs(n, c, h, w, k, g, out):
    features = torch.rand(n, c, h, w, requires_grad=True)
    return features, torch.rand(n, g * k * k, *out, requires_grad=True)


@pytest.mark.parametrize(
    ("shape", "kernel_size", "groups", "scale", "out", "expected"),
    [
        # Two FLOPs for each of N * C * H' * W' * k^2 multiply-adds.
        ((1, 256, 1, 1), 5, 1, 2, (2, 2), 2 * 256 * 4 * 25),
        ((2, 6, 3, 5), 3, 3, 3, (9, 15), 2 * 2 * 6 * 135 * 9),
        ((3, 4, 5, 7), 5, 2, Fraction(1, 2), (3, 4), 2 * 3 * 4 * 12 * 25),
        ((1, 2, 5, 3), 7, 1, 1.5, (8, 5), 2 * 2 * 40 * 49),
        ((0, 2, 5, 3), 5, 1, 2, (10, 6), 0),
    ],
)
def test_each_operator_makes_one_multiply_add_per_output_and_tap(shape, kernel_size, groups, scale, out, expected):
    features, masks = inputs(*shape, kernel_size, groups, out)
    with FlopCounterMode(display=False) as counter:
        output = carafe(features, masks, kernel_size, groups, scale)
    assert by_operator(counter) == {"carafe": expected}
    with FlopCounterMode(display=False) as counter:
        output.backward(torch.ones_like(output))
    assert by_operator(counter) == {"carafe_grad_features": expected, "carafe_grad_kernels": expected}


def test_a_gradient_that_is_not_wanted_costs_nothing():
    features, masks = inputs(1, 2, 3, 3, 3, 1, (6, 6))
    with FlopCounterMode(display=False) as counter:
        carafe(features.detach(), masks, 3).sum().backward()
    assert by_operator(counter) == {"carafe": 2 * 2 * 36 * 9, "carafe_grad_kernels": 2 * 2 * 36 * 9}


def test_second_derivatives_count():
    features, masks = inputs(1, 2, 3, 3, 3, 1, (6, 6))
    first = torch.autograd.grad(carafe(features, masks, 3).square().sum(), features, create_graph=True)[0]
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(first.sum(), (features, masks))
    one = 2 * 2 * 36 * 9
    # The gradient to X is bilinear in Z and M: to M directly, to Z by a reassembly, and through Z = 2 Y to X and M.
    assert by_operator(counter) == {"carafe": one, "carafe_grad_features": one, "carafe_grad_kernels": 2 * one}


def test_upsampling_costs_what_the_paper_says():
    """The ICCV 2019 paper's formula for one location, 199k FLOPs at C = 256 and sigma = 2 (quoted from memory)."""
    c, cm, k, k_encoder, sigma = 256, 64, 5, 3, 2
    paper = 2 * (c + 1) * cm + 2 * (cm * k_encoder**2 + 1) * sigma**2 * k**2 + 2 * sigma**2 * k**2 * c
    assert paper == 199_496
    model = CARAFEUpsample(c, sigma)
    with FlopCounterMode(display=False) as counter:
        model(torch.rand(1, c, 3, 4))
    biases = 2 * (cm + sigma**2 * k**2)  # which the paper counts and torch does not
    assert counter.get_total_flops() == 12 * (paper - biases)


def test_downsampling_worked_by_hand():
    model = nn.Sequential(CARAFEDownsample(64, norm=nn.BatchNorm2d, act=nn.ReLU))
    modules = [model] if TORCH < (2, 4) else []  # whose modules it has to be told
    with FlopCounterMode(*modules, display=False) as counter:
        model(torch.rand(2, 64, 5, 7))
    compressor = 2 * 2 * 35 * 64 * 16  # at every location
    encoder = 2 * 2 * 12 * 16 * 9 * 25  # at every second
    reassembly = 2 * 2 * 12 * 25 * 64
    assert counter.get_total_flops() == compressor + encoder + reassembly
    # Each module by its name: the reassembly is CARAFE++'s own, beside its two convolutions.
    assert by_operator(counter, "Sequential.0") == {"convolution": compressor + encoder, "carafe": reassembly}
    assert by_operator(counter, "Sequential.0.content_encoder") == {"convolution": encoder}


def test_shapes_are_enough():
    """On the meta device nothing is computed: a model of any size can be counted."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        CARAFEUpsample(256)(torch.rand(1, 256, 200, 336))
    assert counter.get_total_flops() == 200 * 336 * 199_168
