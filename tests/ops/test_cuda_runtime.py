"""What only a GPU has: captured graphs, side streams, tensors on two devices, and the sizes that it is for."""

import pytest
import torch

from carafe_plugin.ops import carafe, reference
from carafe_plugin.ops.fused import reassemble_logits
from carafe_plugin.testing import TOLERANCES, random_case

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device on this machine"),
]
CALLS = {
    "masks": (lambda x, m: carafe(x, m, 5), 25, (20, 28)),
    "logits": (lambda x, z: reassemble_logits(x, z, 5, 1, 2, 1, "softmax"), 100, (10, 14)),
}


def step(function, features, kernels, grad_output):
    """Output and gradients of one pass."""
    output = function(features, kernels)
    return output.detach(), *torch.autograd.grad(output, (features, kernels), grad_output)


def draw(channels, size):
    shapes = ((2, 32, 10, 14), (2, channels, *size), (2, 32, 20, 28))
    features, kernels, grad_output = (torch.randn(shape, device="cuda") for shape in shapes)
    return features.requires_grad_(), kernels.requires_grad_(), grad_output


@pytest.mark.parametrize("name", CALLS)
def test_captured_graph_computes_from_what_its_inputs_hold(name):
    function, channels, size = CALLS[name]
    inputs = draw(channels, size)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(function, *inputs)  # allocations and lazy starts are no part of a graph
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(function, *inputs)
    fresh = draw(channels, size)
    with torch.no_grad():
        for static, value in zip(inputs, fresh, strict=True):
            static.copy_(value)
    for result in results:
        result.fill_(float("nan"))
    graph.replay()
    for result, expected in zip(results, step(function, *fresh), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("name", CALLS)
def test_work_is_put_on_the_current_stream(name):
    """Inputs that a side stream fills only after a long wait: work on any other stream would read what was there."""
    function, channels, size = CALLS[name]
    values = draw(channels, size)
    expected = step(function, *values)
    late = [torch.full_like(value, float("nan")) for value in values]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # clock cycles: about a tenth of a second
        for tensor, value in zip(late, values, strict=True):
            tensor.copy_(value.detach())
        results = step(function, late[0].requires_grad_(), late[1].requires_grad_(), late[2])
    stream.synchronize()
    for result, right in zip(results, expected, strict=True):
        assert torch.equal(result, right)


def test_tensors_on_two_devices_are_an_error():
    features, masks = torch.randn(1, 4, 6, 5, device="cuda"), torch.rand(1, 9, 12, 10)
    with pytest.raises((ValueError, RuntimeError), match="device"):
        carafe(features, masks, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("size", "k", "g"),
    [((820, 820), 5, 1), ((40, 56), 7, 8)],
    ids=["32 threads for each weight exceed 2^31", "a pixel's weights exceed 48 KB"],
)
def test_sizes_at_which_mmcv_fails(size, k, g, dtype):
    """Errors relative to the reference in float64, without copying gigabytes to the host."""
    features, masks, grad_output = random_case(size, 64, k, g, 2, batch=1, dtype=dtype, device="cuda")
    found = step(lambda x, m: carafe(x, m, k, g), features.requires_grad_(), masks.requires_grad_(), grad_output)
    x, m, z = (tensor.detach().double() for tensor in (features, masks, grad_output))
    geometry = (k, g, 2, 1)
    expected = (
        lambda: reference.reassemble(x, m, *geometry),
        lambda: reference.grad_features(z, m, *size, *geometry),
        lambda: reference.grad_masks(z, x, *geometry),
    )
    for got, compute in zip(found, expected, strict=True):
        right = compute()
        assert (got.double() - right).norm() / right.norm() <= TOLERANCES[dtype]
