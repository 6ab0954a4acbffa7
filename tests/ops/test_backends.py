"""Which code serves: the compiled paths, the reference, and what is said when a wish cannot be met."""

import os
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from toolkit import reason_for_no_cuda_half, skip_without_half_on_cpu

from carafe_plugin.ops import _mmcv, is_compiled, reference
from carafe_plugin.ops._operators import OPERATORS
from carafe_plugin.testing import assert_close, random_case

CHECK = """
import ctypes, torch, carafe_plugin._C
from fractions import Fraction
from carafe_plugin.ops import carafe, reference
from carafe_plugin.testing import TOLERANCES, assert_close, random_case
from carafe_plugin.ops.functional import scale_ratio
library = ctypes.CDLL(carafe_plugin._C.__file__)
library.carafe_cpu_path.restype = ctypes.c_char_p
ops = torch.ops.carafe_plugin
for dtype in reference.DTYPES:
    for scale in (2, 3, Fraction(1, 2), Fraction(3, 2)):
        for k, g in ((5, 1), (3, 4), (1, 1), (7, 2)):
            args = (k, g, *scale_ratio(scale))
            x, m, z = random_case((9, 21), 20, k, g, scale, dtype=dtype)
            assert_close(ops.carafe(x, m, *args), reference.reassemble(x, m, *args))
            assert_close(ops._carafe_grad_features(z, m, 9, 21, *args), reference.grad_features(z, m, 9, 21, *args))
            assert_close(ops._carafe_grad_kernels(z, x, m, *args), reference.grad_masks(z, x, *args))
            if min(args[2:]) == 1:  # from logits, as if the masks were these
                up, down = args[2:]
                logits = torch.nn.functional.pixel_unshuffle(m, up)
                for number, normalizer in enumerate(reference.NORMALIZERS, start=1):
                    exact = [t.double().requires_grad_() for t in (x, logits)]
                    masks = reference.masks_from_logits(exact[1], *args, normalizer)
                    y = reference.reassemble(exact[0], masks, *args)
                    dx, dz = torch.autograd.grad(y, exact, z.double())
                    assert_close(ops.carafe(x, logits, *args, number), y.to(dtype))
                    assert_close(ops._carafe_grad_features(z, logits, 9, 21, *args, number), dx.to(dtype))
                    error = ops._carafe_grad_kernels(z, x, logits, *args, number).double() - dz
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


def test_unknown_cpu_path_does_not_end_a_process_that_asks_by_ctypes():
    code = "import ctypes, carafe_plugin._C as c\nl = ctypes.CDLL(c.__file__)\n"
    code += "l.carafe_cpu_path.restype = ctypes.c_char_p\nprint(l.carafe_cpu_path())"
    result = run(code, CARAFE_CPU_PATH="bogus")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "None"


def test_the_operators_behave_on_the_reference():
    """Derivatives, opcheck, autocast, torch.compile and FLOPs do not depend on what computes."""
    tests = Path(__file__).parent
    files = [
        tests / f"test_{name}.py"
        for name in ("autograd", "autocast", "compile", "errors", "flops", "logits", "transforms")
    ]
    compiled_alone = "not same_bits and not short_way and not direct_callers"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--every=3", "-k", compiled_alone]
    command += map(str, files)
    environment = {**os.environ, "CARAFE_BACKEND": "reference"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.parametrize(
    ("version", "names", "expected"),
    [
        ("2.6.0+cu124", ["_C.abi3.so"], "built for another torch than 2.6.0+cu124: _C.abi3.so"),
        ("2.6.0", ["_C_torch2_5.abi3.so", "_C.abi3.so"], "another torch than 2.6.0: _C.abi3.so, _C_torch2_5.abi3.so"),
        ("2.11.0", ["_C_torch2_6.abi3.so", "_C_cuda.abi3.so"], "another torch than 2.11.0: _C_torch2_6.abi3.so"),
        ("2.6.1", ["_C_torch2_6.abi3.so", "_C.abi3.so"], "_C_torch2_6.abi3.so: file too short"),
        ("2.11.0", ["_C_torch2_6.abi3.so", "_C.abi3.so"], "_C.abi3.so: file too short"),
    ],
)
def test_no_torch_loads_the_library_of_another(version, names, expected, tmp_path, monkeypatch):
    from carafe_plugin.ops import _registration

    for name in names:
        (tmp_path / name).touch()  # not a library: who loads it fails
    monkeypatch.delitem(sys.modules, "carafe_plugin._C")
    monkeypatch.setattr(sys.modules["carafe_plugin"], "__path__", [str(tmp_path)])
    monkeypatch.setattr(_registration, "__file__", str(tmp_path / "ops" / "_registration.py"))
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ImportError, match=re.escape(expected)):
        _registration._import_library("_C")


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
    assert result.returncode == 1
    assert "CARAFE_BACKEND must be 'auto', 'compiled' or 'reference', got 'fast'" in result.stderr


@pytest.mark.parametrize("operator", [operator.name for operator in OPERATORS.values()])
@pytest.mark.parametrize(
    "key", ["CPU", "CUDA", "Meta", "CompositeExplicitAutograd", "Autograd", "AutocastCPU", "AutocastCUDA"]
)
def test_every_operator_has_every_registration(operator, key):
    if key == "CUDA" and not is_compiled("cuda") and (reason := reason_for_no_cuda_half()):
        pytest.skip(reason)
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"carafe_plugin::{operator}", key)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=lambda operator: operator.name)
def test_both_languages_have_the_same_schema(operator):
    if not is_compiled("cpu"):
        pytest.skip("the compiled CPU operators are not built")
    defined = str(getattr(torch.ops.carafe_plugin, operator.name).default._schema)
    assert defined == f"carafe_plugin::{operator.name}{operator.schema}"


def test_there_are_no_other_operators():
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("carafe_plugin::")}
    assert registered == {f"carafe_plugin::{operator.name}" for operator in OPERATORS.values()}


def test_both_languages_have_the_same_normalizers():
    header = (Path(__file__).parents[2] / "csrc" / "common" / "operators.h").read_text()
    names = re.search(r"enum class Normalizer {([^}]+)}", header).group(1)
    assert [name.strip() for name in names.split(",")] == ["none", *reference.NORMALIZERS]


def test_reference_takes_the_place_of_compiled_kernels():
    """As on a GPU that the binary has no code for: results of the reference to the bit, autograd on top as before."""
    code = """
import torch
from carafe_plugin.ops import carafe, reference
from carafe_plugin.ops._registration import serve_by_reference
from carafe_plugin.testing import random_case
x, m, z = random_case((6, 7), 8, 5, 2, 2)
compiled = carafe(x, m, 5, 2)
if hasattr(torch.library, "get_kernel"):
    serve_by_reference("cpu", {1})  # of other devices alone
    assert torch.equal(carafe(x, m, 5, 2), compiled)
serve_by_reference("cpu")
x.requires_grad_(), m.requires_grad_()
y = carafe(x, m, 5, 2)
expected = reference.reassemble(x, m, 5, 2, 2, 1)
assert torch.equal(y, expected)
for ours, theirs in zip(torch.autograd.grad(y, (x, m), z), torch.autograd.grad(expected, (x, m), z)):
    torch.testing.assert_close(ours, theirs)
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert "verrid" not in result.stderr  # torch's warning about a kernel that replaces another


@pytest.mark.parametrize("capabilities", [[(7, 0)], [(9, 0)], [(6, 1), (9, 0)]], ids=["old", "new", "both"])
def test_old_gpus_are_served_by_the_reference_after_one_warning(capabilities, monkeypatch):
    from carafe_plugin.ops import _registration

    served = []
    monkeypatch.setattr(_registration, "compiled_architectures", lambda: ([80, 90], True))
    monkeypatch.setattr(_registration, "serve_by_reference", lambda *arguments: served.append(arguments))
    monkeypatch.setattr(_registration, "_serving", {"cpu", "cuda"})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _registration._check_gpus()
    old = capabilities[0] != (9, 0)
    keeps = hasattr(torch.library, "get_kernel")  # without it, the reference serves all GPUs or none
    assert served == ([("cuda", {0} if keeps else set(range(len(capabilities))))] if old else [])
    assert len(caught) == old
    if old:
        assert "compiled for sm_80, sm_90, so the slower PyTorch reference serves on GPU 0" in str(caught[0].message)
    assert ("cuda" in _registration._serving) == (capabilities[-1] == (9, 0) and (keeps or not old))


def test_the_binary_knows_its_architectures():
    from carafe_plugin.ops._registration import compiled_architectures

    if not is_compiled("cuda"):
        pytest.skip(reason_for_no_cuda_half() or "the CUDA half is not built")
    found, ptx = compiled_architectures()
    assert found == sorted(found)
    assert {80, 90} <= set(found)
    assert ptx


class FakeExtension:
    """mmcv's compiled operators as they are called, computed on the CPU by the reference."""

    def __init__(self):
        self.calls = 0

    def carafe_forward(self, features, masks, rfeatures, routput, rmasks, output, **sizes):
        self.calls += 1
        assert features.dtype == masks.dtype == torch.float32
        assert features.is_contiguous()
        assert masks.is_contiguous()
        output.copy_(
            reference.reassemble(features, masks, sizes["kernel_size"], sizes["group_size"], sizes["scale_factor"], 1)
        )

    def carafe_backward(self, grad, rfeatures, masks, b0, b1, b2, b3, grad_features, grad_masks, **sizes):
        self.calls += 1
        n, c, h, w = grad_features.shape
        features = rfeatures.reshape(n, h, w, c).permute(0, 3, 1, 2)  # how its forward pass leaves them
        args = (sizes["kernel_size"], sizes["group_size"], sizes["scale_factor"], 1)
        grad_features.copy_(reference.grad_features(grad, masks, h, w, *args))
        grad_masks.copy_(reference.grad_masks(grad, features, *args))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("normalizer", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_mmcv_kernel_is_wrapped_safely(dtype, normalizer, layout, monkeypatch):
    if normalizer:
        skip_without_half_on_cpu(dtype)
    fake = FakeExtension()
    monkeypatch.setattr(_mmcv, "extension", lambda: fake)
    features, masks, grad = (t.contiguous(memory_format=layout) for t in random_case((4, 5), 4, 3, 2, 2, dtype=dtype))
    kernels = torch.nn.functional.pixel_unshuffle(masks, 2) if normalizer else masks
    geometry = (3, 2, 2, 1, normalizer)
    for computes, arguments in (
        ("grad_output", (features, kernels)),
        ("features", (grad, kernels, 4, 5)),
        ("kernels", (grad, features, kernels)),
    ):
        before = fake.calls
        found = OPERATORS[computes].by_mmcv(*arguments, *geometry)
        assert fake.calls == before + 1
        expected = OPERATORS[computes].by_reference(*arguments, *geometry)
        assert found.stride() == expected.stride()
        assert_close(found, expected)


@pytest.mark.parametrize("normalizer", [0, 1])
def test_mmcv_kernel_computes_whole_outputs_of_which_fewer_are_wanted(normalizer, monkeypatch):
    fake = FakeExtension()
    monkeypatch.setattr(_mmcv, "extension", lambda: fake)
    features, masks, grad = random_case((4, 5), 4, 3, 2, 2)
    kernels = torch.nn.functional.pixel_unshuffle(masks, 2) if normalizer else masks[..., :7, :8]
    geometry = (3, 2, 2, 1, normalizer)
    for computes, arguments in (
        ("grad_output", (features, kernels, *geometry, 7, 8)),
        ("features", (grad[..., :7, :8], kernels, 4, 5, *geometry)),
        ("kernels", (grad[..., :7, :8], features, kernels, *geometry)),
    ):
        found = OPERATORS[computes].by_mmcv(*arguments)
        assert found.is_contiguous()
        assert_close(found, OPERATORS[computes].by_reference(*arguments))
    assert fake.calls == 3


@pytest.mark.parametrize(
    "change", [{"scale": 0.5}, {"kernel_size": 7, "group_size": 8}, {"dtype": torch.float64}, {"batch": 0}], ids=str
)
def test_mmcv_kernel_stays_out_where_it_is_wrong(change, monkeypatch):
    fake = FakeExtension()
    monkeypatch.setattr(_mmcv, "extension", lambda: fake)
    settings = {"kernel_size": 3, "group_size": 2, "scale": 2, "batch": 2, "dtype": torch.float32, **change}
    k, g, scale = (settings.pop(name) for name in ("kernel_size", "group_size", "scale"))
    features, masks, grad = random_case((4, 5), 8, k, g, scale, **settings)
    geometry = (k, g, *((1, 2) if scale == 0.5 else (2, 1)))
    output = OPERATORS["grad_output"].by_mmcv(features, masks, *geometry)
    assert_close(output, reference.reassemble(features, masks, *geometry))
    OPERATORS["features"].by_mmcv(grad, masks, 4, 5, *geometry)
    OPERATORS["kernels"].by_mmcv(grad, features, masks, *geometry)
    assert fake.calls == 0


def test_mmcv_kernel_never_sees_what_does_not_fit_together(monkeypatch):
    fake = FakeExtension()
    monkeypatch.setattr(_mmcv, "extension", lambda: fake)
    features, masks, _ = random_case((4, 5), 4, 3, 2, 2)
    with pytest.raises(RuntimeError, match=r"kernels must have shape \(2, 18, 8, 10\), got \(2, 18, 8, 9\)"):
        OPERATORS["grad_output"].by_mmcv(features, masks[..., :9], 3, 2, 2, 1)
    assert fake.calls == 0


def test_mmcv_with_too_many_weights_stays_out(monkeypatch):
    monkeypatch.setattr(_mmcv, "extension", FakeExtension)
    features, masks = torch.empty(1, 1, 2048, 2048, device="meta"), torch.empty(1, 9, 4096, 4096, device="meta")
    assert not _mmcv.serves(features, masks.numel(), 3, 1, 1)
    assert _mmcv.serves(features, masks[..., :128].numel(), 3, 1, 1)


@pytest.mark.parametrize("state", ["absent", "stand-in", "compiled"])
def test_mmcv_is_asked_for_once(state, monkeypatch):
    module = types.ModuleType("mmcv._ext")
    if state == "compiled":
        module.carafe_forward = None
    if state == "stand-in":
        module.is_stand_in = True
    monkeypatch.setitem(sys.modules, "mmcv", types.ModuleType("mmcv"))
    monkeypatch.setitem(sys.modules, "mmcv._ext", None if state == "absent" else module)
    if state != "absent":
        sys.modules["mmcv"]._ext = module
    _mmcv.extension.cache_clear()
    try:
        assert _mmcv.extension() is (module if state == "compiled" else None)
        monkeypatch.setitem(sys.modules, "mmcv", None)
        assert _mmcv.extension() is (module if state == "compiled" else None)
    finally:
        _mmcv.extension.cache_clear()
