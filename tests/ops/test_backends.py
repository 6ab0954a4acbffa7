"""Which code serves: the compiled paths, the reference, and what is said when a wish cannot be met."""

import os
import subprocess
import sys

import pytest
import torch
from toolkit import reason_for_no_cuda_half

from carafe_plugin.ops import is_compiled
from carafe_plugin.ops._registration import OPERATORS

CHECK = """
import ctypes, torch, carafe_plugin._C
from fractions import Fraction
from carafe_plugin.ops import carafe, reference
from carafe_plugin.ops.fused import NORMALIZERS, kernels_from_logits
from carafe_plugin.testing import TOLERANCES, assert_close, random_case, dtypes
from carafe_plugin.ops.functional import scale_ratio
library = ctypes.CDLL(carafe_plugin._C.__file__)
library.carafe_cpu_path.restype = ctypes.c_char_p
ops = torch.ops.carafe_plugin
for dtype in dtypes():
    for scale in (2, 3, Fraction(1, 2), Fraction(3, 2)):
        for k, g in ((5, 1), (3, 4), (1, 1), (7, 2)):
            args = (k, g, *scale_ratio(scale))
            x, m, z = random_case((9, 21), 20, k, g, scale, dtype=dtype)
            assert_close(ops.carafe(x, m, *args), reference.reassemble(x, m, *args))
            assert_close(ops._carafe_grad_features(z, m, 9, 21, *args), reference.grad_features(z, m, 9, 21, *args))
            assert_close(ops._carafe_grad_masks(z, x, *args), reference.grad_masks(z, x, *args))
            if min(args[2:]) == 1:  # from logits, as if the masks were these
                up, down = args[2:]
                logits = torch.nn.functional.pixel_unshuffle(m, up)
                for how, normalizer in enumerate(NORMALIZERS):
                    exact = [t.double().requires_grad_() for t in (x, logits)]
                    kernels = kernels_from_logits(exact[1], *args, normalizer)
                    y = reference.reassemble(exact[0], kernels, *args)
                    dx, dz = torch.autograd.grad(y, exact, z.double())
                    assert_close(ops._carafe_logits(x, logits, *args, how), y.to(dtype))
                    assert_close(ops._carafe_logits_grad_features(z, logits, 9, 21, *args, how), dx.to(dtype))
                    error = ops._carafe_logits_grad_logits(z, x, logits, *args, how).double() - dz
                    assert error.norm() <= TOLERANCES[dtype] * (dz.norm() + z.double().norm())
print("path", library.carafe_cpu_path().decode())
"""


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def supported_paths():
    result = run(
        "import ctypes, carafe_plugin._C as c\nl = ctypes.CDLL(c.__file__)\n"
        "l.carafe_cpu_path.restype = ctypes.c_char_p\nprint(l.carafe_cpu_path().decode())"
    )
    assert result.returncode == 0, result.stderr
    paths = ("plain", "baseline", "avx2", "avx512")
    return paths[: paths.index(result.stdout.strip()) + 1]


@pytest.mark.parametrize("path", ["plain", "baseline", "avx2", "avx512"])
def test_every_cpu_path_equals_the_reference(path):
    if path not in supported_paths():
        pytest.skip(f"this processor does not run the {path} path")
    result = run(CHECK, CARAFE_CPU_PATH=path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"path {path}"


def test_unknown_cpu_path_is_an_error():
    code = "import torch; from carafe_plugin.ops import carafe\n"
    code += "carafe(torch.zeros(1, 1, 2, 2), torch.zeros(1, 9, 4, 4), 3)"
    result = run(code, CARAFE_CPU_PATH="quantum")
    assert result.returncode != 0
    assert "CARAFE_CPU_PATH must be auto or a path of this machine (plain to " in result.stderr
    assert "got quantum" in result.stderr


def test_reference_backend_on_request():
    code = """
import torch
from carafe_plugin import CARAFEUpsample, is_compiled
assert not is_compiled("cpu")
x = torch.rand(1, 4, 3, 3, requires_grad=True)
CARAFEUpsample(4)(x).sum().backward()
print(x.grad.shape)
"""
    result = run(code, CARAFE_BACKEND="reference")
    assert result.returncode == 0, result.stderr
    assert "torch.Size([1, 4, 3, 3])" in result.stdout
    assert "carafe_plugin" not in result.stderr


# What a machine without a compiler sees: the module is not there.
HIDDEN = """
import sys
sys.modules["carafe_plugin._C"] = None
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import carafe_plugin, torch
    for _ in range(2):
        carafe_plugin.carafe(torch.zeros(1, 1, 2, 2), torch.zeros(1, 9, 4, 4), 3)
ours = [str(w.message) for w in caught if "carafe_plugin" in str(w.message)]
print(len(ours), ours, carafe_plugin.is_compiled())
"""


def test_reference_serves_without_the_extension_after_one_warning():
    result = run(HIDDEN)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("1 [")
    assert "the slower PyTorch reference serves" in result.stdout
    assert result.stdout.strip().endswith("False")


def test_missing_extension_is_an_error_where_it_is_required():
    result = run("import sys; sys.modules['carafe_plugin._C'] = None; import carafe_plugin", CARAFE_BACKEND="compiled")
    assert result.returncode != 0
    assert "CARAFE_BACKEND=compiled, but carafe_plugin._C does not load" in result.stderr


def test_unknown_backend_is_an_error():
    result = run("import carafe_plugin", CARAFE_BACKEND="fast")
    assert "CARAFE_BACKEND must be 'auto', 'compiled' or 'reference', got 'fast'" in result.stderr


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("key", ["CPU", "CUDA", "Meta", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA"])
def test_every_operator_has_every_registration(operator, key):
    if key == "CUDA" and not is_compiled("cuda") and (reason := reason_for_no_cuda_half()):
        pytest.skip(reason)
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"carafe_plugin::{operator}", key) or (
        key.startswith("Autograd")
        and torch._C._dispatch_has_kernel_for_dispatch_key(f"carafe_plugin::{operator}", "Autograd")
    )


@pytest.mark.parametrize(
    ("change", "right"),
    [
        ({}, True),
        ({"down": 2}, False),
        ({"kernel_size": 7, "group_size": 8}, False),
        ({"channels_last": True}, False),
        ({"dtype": torch.float16}, True),
        ({"dtype": torch.float64}, False),
        ({"weights": 2**26}, False),
        ({"batch": 0}, False),
        ({"cuda": False}, False),
        ({"installed": False}, False),
        ({"stand_in": True}, False),
    ],
    ids=lambda change: "-".join(change) if isinstance(change, dict) else str(change),
)
def test_mmcv_takes_over_only_where_it_is_right(change, right, monkeypatch):
    """The choice alone, on stand-ins for CUDA tensors: no GPU is needed to know where mmcv's kernel goes wrong."""
    import types

    from carafe_plugin.ops import _fallback

    class Tensor:
        def __init__(self):
            self.is_cuda = change.get("cuda", True)
            self.dtype = change.get("dtype", torch.float32)

        def numel(self):
            return change.get("batch", 2) * change.get("weights", 64)

        def is_contiguous(self):
            return not change.get("channels_last", False)

    module = types.ModuleType("mmcv.ops.carafe")
    if change.get("installed", True):
        module.CARAFEFunction = object
    for name in ("mmcv", "mmcv.ops", "mmcv._ext"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    if change.get("stand_in"):
        sys.modules["mmcv._ext"].is_stand_in = True
    sys.modules["mmcv"]._ext = sys.modules["mmcv._ext"]
    monkeypatch.setitem(sys.modules, "mmcv.ops.carafe", module)
    arguments = (change.get("kernel_size", 5), change.get("group_size", 1), change.get("down", 1))
    assert _fallback._mmcv_is_right(Tensor(), Tensor(), *arguments) is right


def test_mmcv_operator_is_wrapped_safely(monkeypatch):
    """Gradients pass through, sums are float32, and a second derivative is there although mmcv has none."""
    import types

    from carafe_plugin.ops import _fallback, reference
    from carafe_plugin.testing import random_case

    class CARAFEFunction(torch.autograd.Function):  # mmcv's signature, on the CPU
        @staticmethod
        def forward(ctx, features, masks, kernel_size, group_size, scale_factor):
            assert features.dtype == masks.dtype == torch.float32
            ctx.save_for_backward(features, masks)
            ctx.args = (kernel_size, group_size, scale_factor, 1)
            return reference.reassemble(features, masks, *ctx.args)

        @staticmethod
        def backward(ctx, grad):
            features, masks = ctx.saved_tensors
            dx = reference.grad_features(grad, masks, *features.shape[2:], *ctx.args)
            return dx, reference.grad_masks(grad, features, *ctx.args), None, None, None

    module = types.ModuleType("mmcv.ops.carafe")
    module.CARAFEFunction = CARAFEFunction
    for name in ("mmcv", "mmcv.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "mmcv.ops.carafe", module)
    monkeypatch.setattr(_fallback, "_mmcv_is_right", lambda *args: True)
    features, masks, grad = random_case((4, 5), 4, 3, 2, 2, dtype=torch.float16)
    features.requires_grad_(), masks.requires_grad_()
    output = _fallback.reassemble(features, masks, 3, 2, 2, 1)
    assert torch.equal(output, reference.reassemble(features, masks, 3, 2, 2, 1))
    output.backward(grad)
    assert torch.equal(features.grad, reference.grad_features(grad, masks, 4, 5, 3, 2, 2, 1))
    assert torch.equal(masks.grad, reference.grad_masks(grad, features, 3, 2, 2, 1))
    features, masks, grad = (t.detach().float().requires_grad_() for t in (features, masks, grad))
    output = _fallback.reassemble(features, masks, 3, 2, 2, 1)
    (first,) = torch.autograd.grad(output, features, grad, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), masks)
    expected = reference.grad_features(grad, masks, 4, 5, 3, 2, 2, 1).square().sum()
    torch.testing.assert_close(second, torch.autograd.grad(expected, masks)[0])
