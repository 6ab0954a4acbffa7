"""What only a GPU has: captured graphs, side streams, several devices, errors that come late, the sizes it is for."""

import os
import subprocess
import sys

import pytest
import torch

from carafe_plugin import CARAFEUpsample
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


def test_tensors_on_two_devices_are_an_error_that_names_both():
    features, masks, grad = (torch.rand(shape) for shape in ((1, 4, 6, 5), (1, 9, 12, 10), (1, 4, 12, 10)))
    with pytest.raises(ValueError, match="got features on cuda:0, masks on cpu"):
        carafe(features.cuda(), masks, 3)
    with pytest.raises(ValueError, match="got features on cpu, masks on cuda:0"):
        carafe(features, masks.cuda(), 3)
    logits = torch.nn.functional.pixel_unshuffle(masks, 2)
    ops, rest = torch.ops.carafe_plugin, (3, 1, 2, 1)
    for message, call in (
        (
            "features and kernels .* cpu and cuda:0",
            lambda: reassemble_logits(features, logits.cuda(), *rest, "softmax"),
        ),
        ("features and kernels .* cuda:0 and cpu", lambda: ops.carafe(features.cuda(), masks, *rest)),
        (
            "grad_output and kernels .* cpu and cuda:0",
            lambda: ops._carafe_grad_features(grad, masks.cuda(), 6, 5, *rest),
        ),
        (
            "grad_output and features .* cuda:0 and cpu",
            lambda: ops._carafe_grad_kernels(grad.cuda(), features, masks.cuda(), *rest),
        ),
        (
            "features and kernels .* cuda:0 and cpu",
            lambda: ops._carafe_grad_kernels(grad.cuda(), features.cuda(), masks, *rest),
        ),
    ):
        with pytest.raises(RuntimeError, match=message.replace(" .* ", " must be on the same device, got ")):
            call()


def test_a_module_on_another_device_than_its_input_is_an_error():
    with pytest.raises(RuntimeError, match=r"(?i)cuda.*(same|different)|same device|FloatTensor"):
        CARAFEUpsample(8).cuda()(torch.rand(1, 8, 4, 4))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this machine has fewer than two GPUs")
@pytest.mark.parametrize("name", CALLS)
def test_another_current_device_or_a_stream_of_another_changes_nothing(name):
    function, channels, size = CALLS[name]
    inputs = [tensor.detach().to("cuda:1") for tensor in draw(channels, size)]
    inputs = [inputs[0].requires_grad_(), inputs[1].requires_grad_(), inputs[2]]
    with torch.cuda.device(1):
        expected = step(function, *inputs)
    torch.cuda.synchronize("cuda:1")
    results = [step(function, *inputs)]  # device 0 is current
    with torch.cuda.stream(torch.cuda.Stream("cuda:0")):
        results.append(step(function, *inputs))
    torch.cuda.synchronize("cuda:1")
    for found in results:
        assert all(torch.equal(result, right) for result, right in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match="got features on cuda:0, masks on cuda:1"):
        carafe(torch.rand(1, 4, 6, 5, device="cuda:0"), torch.rand(1, 9, 12, 10, device="cuda:1"), 3)


def run(code):
    """In a process of its own, which an error of a GPU ends for good."""
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code], env=os.environ, capture_output=True, text=True, timeout=300
    )


def test_an_error_left_by_an_earlier_call_is_named_and_then_all_goes_on():
    features, masks, _ = random_case((6, 5), 4, 3, 1, 2, device="cuda")
    expected = carafe(features, masks, 3)
    torch.cuda.synchronize()
    left = torch.cuda.cudart().cudaHostUnregister(16)  # memory that was never registered
    assert int(left) != 0
    with pytest.raises(RuntimeError, match="registered"):
        carafe(features, masks, 3)
    assert torch.equal(carafe(features, masks, 3), expected)


def test_an_error_of_earlier_work_on_the_gpu_is_named():
    """Work that fails after the call that queued it: what comes later says so, and reads or writes nothing more."""
    code = """
import torch
from carafe_plugin.ops import carafe
x, m = torch.rand(1, 4, 6, 5, device="cuda"), torch.rand(1, 9, 12, 10, device="cuda")
carafe(x, m, 3)
torch.cuda.synchronize()
torch.zeros(4, device="cuda")[torch.full((1,), 10**6, device="cuda")]
for _ in range(3):
    carafe(x, m, 3)
    torch.cuda.synchronize()
"""
    result = run(code)
    assert result.returncode == 1, (result.returncode, result.stderr[-2000:])  # neither a crash nor silence
    assert "device-side assert" in result.stderr


def test_a_gpu_without_code_in_the_binary_is_served_by_the_reference_after_one_warning():
    code = """
import warnings, torch
from carafe_plugin.ops import _registration, carafe, is_compiled, reference
from carafe_plugin.testing import random_case
_registration.compiled_architectures = lambda: ([10], False)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    x, m, z = random_case((6, 7), 8, 5, 2, 2, device="cuda")
    x.requires_grad_(), m.requires_grad_()
    for _ in range(2):
        y = carafe(x, m, 5, 2)
        found = torch.autograd.grad(y, (x, m), z)
expected = reference.reassemble(x, m, 5, 2, 2, 1)
assert torch.equal(y, expected)
for ours, theirs in zip(found, torch.autograd.grad(expected, (x, m), z)):
    torch.testing.assert_close(ours, theirs)
ours = [str(warning.message) for warning in caught if "carafe_plugin" in str(warning.message)]
assert len(ours) == 1, ours
assert "compiled for sm_10" in ours[0] and torch.cuda.get_device_name() in ours[0], ours
assert not is_compiled("cuda")
print("served")
"""
    result = run(code)
    assert result.stdout.strip() == "served", result.stderr[-2000:]


@pytest.mark.parametrize("name", CALLS)
def test_memory_that_runs_out_midway_is_named_and_then_all_goes_on(name):
    """For a result, or for what scratch memory a gradient takes beside its result."""
    function, channels, size = CALLS[name]
    inputs = draw(channels, size)
    expected = step(function, *inputs)
    total = torch.cuda.get_device_properties(0).total_memory
    lacking = []
    try:
        for spare in range(0, 5 * 2**21, 2**21):  # torch's allocator takes 2 MiB at a time
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + spare) / total)
            try:
                found = step(function, *inputs)
            except torch.cuda.OutOfMemoryError as error:
                lacking.append(str(error))
                continue
            assert all(torch.equal(result, right) for result, right in zip(found, expected, strict=True))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert all("out of memory" in message for message in lacking)
    for result, right in zip(step(function, *inputs), expected, strict=True):
        assert torch.equal(result, right)


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
