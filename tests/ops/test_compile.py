"""torch.compile without graph breaks, with symbolic shapes, and torch.export."""

import os
import shutil

import pytest
import torch
from toolkit import TORCH, needs_compile, needs_torch, skip_without_half_on_cpu
from torch._dynamo.testing import CompileCounterWithBackend

from carafe_plugin import CARAFEDownsample, CARAFEUpsample
from carafe_plugin.ops import carafe
from carafe_plugin.testing import relative_error

pytestmark = needs_compile


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiled_module_equals_eager_at_any_size(device):
    if device == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("torch.compile needs a C++ compiler for code on the CPU, and g++ is not on the PATH")
    torch.manual_seed(0)
    module = torch.nn.Sequential(CARAFEUpsample(8, compressed_channels=4), CARAFEDownsample(8, compressed_channels=4))
    module = module.to(device)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for height, width in ((6, 8), (5, 9), (11, 7)):
        features = torch.randn(2, 8, height, width, device=device)
        expected, got = features.clone().requires_grad_(), features.clone().requires_grad_()
        module(expected).pow(2).sum().backward()
        compiled(got).pow(2).sum().backward()
        assert relative_error(compiled(got), module(expected)) < 1e-5
        assert relative_error(got.grad, expected.grad) < 1e-5


@pytest.mark.parametrize("scale", [2, 0.5, 1.5], ids=str)
def test_public_function_has_no_graph_break(scale, device):
    def function(x, m):
        return carafe(x, m, 3, 2, scale) * 2

    # The tracer is what is tested: "aot_eager" runs autograd and the fake kernels without generating code.
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((4, 6), (6, 10)):
        features = torch.randn(1, 4, *size, device=device, requires_grad=True)
        masks = torch.randn(1, 18, *(int(s * scale) for s in size), device=device, requires_grad=True)
        output = compiled(features, masks)
        assert torch.equal(output, function(features, masks))
        output.sum().backward()
        assert features.grad is not None


def test_export_with_dynamic_size(device):
    module = CARAFEUpsample(4).to(device).eval()
    size = {2: torch.export.Dim("h", min=2, max=64), 3: torch.export.Dim("w", min=2, max=64)}
    program = torch.export.export(module, (torch.randn(1, 4, 6, 8, device=device),), dynamic_shapes=(size,))
    assert [str(node.target) for node in program.graph.nodes].count("carafe_plugin.carafe.default") == 1
    features = torch.randn(1, 4, 9, 5, device=device)
    assert torch.equal(program.module()(features), module(features))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compiled_under_autocast(dtype, device):
    skip_without_half_on_cpu(dtype, device=device)

    def function(x, m):
        with torch.autocast(device, dtype=dtype):
            return carafe(x, m, 3, 2)

    features = torch.randn(1, 4, 5, 6, device=device, requires_grad=True)
    masks = torch.randn(1, 18, 10, 12, device=device).to(dtype)
    output = torch.compile(function, fullgraph=True, backend="aot_eager")(features, masks)
    assert output.dtype == dtype
    assert torch.equal(output, function(features, masks))
    output.float().sum().backward()
    assert features.grad.dtype == torch.float32


@pytest.mark.parametrize("scale", [2, 1.5], ids=str)
def test_output_size_fixes_no_size(scale, device):
    """A finer map's size of any parity: one compilation, forward and backward."""
    if scale == 1.5 and TORCH < (2, 5):
        pytest.skip(f"slices with a step in a module whose numbers torch {torch.__version__} takes for dynamic")
    module = CARAFEUpsample(4, scale, up_kernel=3, compressed_channels=2).to(device)

    def function(fine, coarse):
        return fine + module(coarse, fine.shape[2:])

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for height, width in ((9, 14), (12, 11), (15, 7), (8, 9), (10, 22), (23, 16)):
        size = [-(-length // scale) for length in (height, width)]
        fine, coarse = (torch.randn(2, 4, *map(int, s), device=device) for s in ((height, width), size))
        inputs = (fine, coarse.requires_grad_())
        output, expected = compiled(*inputs), function(*inputs)
        assert torch.equal(output, expected)
        found, right = (torch.autograd.grad(result.sin().sum(), coarse)[0] for result in (output, expected))
        assert torch.equal(found, right)
    assert counter.frame_count == 1


@needs_torch(2, 6, "torch.export.Dim.DYNAMIC")
def test_exported_output_size_is_that_of_the_other_map(device):
    class Merge(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.upsample = CARAFEUpsample(4)

        def forward(self, fine, coarse):
            return fine + self.upsample(coarse, fine.shape[2:])

    module, dynamic = Merge().to(device).eval(), {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    inputs = [torch.randn(1, 4, *size, device=device) for size in ((9, 13), (5, 7))]
    program = torch.export.export(module, tuple(inputs), dynamic_shapes=(dynamic, dynamic))
    for size in ((9, 13), (8, 12), (9, 12), (16, 31)):
        inputs = [torch.randn(1, 4, *s, device=device) for s in (size, [(length + 1) // 2 for length in size])]
        assert torch.equal(program.module()(*inputs), module(*inputs))
    # Older programs come without guards, and the operator itself refuses what lies beyond its output.
    with pytest.raises((AssertionError, RuntimeError), match=r"Guard failed|must be of at most 10 x 12, got 11 x 12"):
        program.module()(torch.randn(1, 4, 11, 12, device=device), inputs[1][..., :5, :6])
