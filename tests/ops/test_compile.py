"""torch.compile without graph breaks, with symbolic shapes, and torch.export."""

import pytest
import torch

from carafe_plugin import CARAFEDownsample, CARAFEUpsample
from carafe_plugin.ops import carafe
from carafe_plugin.testing import relative_error


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiled_module_equals_eager_at_any_size(device):
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
