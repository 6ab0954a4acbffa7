"""Exported models in the runtimes that they are for, against the model."""

import importlib.util
import multiprocessing
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from toolkit import needs_torch
from torch import nn

from carafe_plugin import CARAFEDownsample, CARAFEUpsample, carafe, export

pytestmark = needs_torch(2, 6, "torch.export.Dim.DYNAMIC")


class Scales(nn.Module):
    """Down, up to the size that it came from, by 3/2 with groups, and masks that a user made.

    Kernels are small: a form for any sizes has as many products as a kernel has weights.
    """

    def __init__(self):
        super().__init__()
        self.down = CARAFEDownsample(8, down_kernel=3, norm=nn.BatchNorm2d, act=nn.ReLU)
        self.up = CARAFEUpsample(8, up_kernel=3)
        self.other = CARAFEUpsample(8, 1.5, up_kernel=3, up_group=2, normalizer="sigmoid_normalized")
        self.masks = nn.Conv2d(8, 9, 3, 2, 1)

    def forward(self, features):
        merged = features + self.up(self.down(features), output_size=features.shape[2:])
        masks = self.masks(merged).sigmoid()
        return self.other(merged), carafe(merged, masks, 3, 1, 0.5)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        pytest.importorskip("mmengine", reason="mmengine is not installed")
        from carafe_plugin.inpainting import MaskedCARAFEUpsample

        self.up = MaskedCARAFEUpsample(4)

    def forward(self, features):
        return self.up(features, (features[:, :1] > 0).to(features.dtype))


FIXED, OTHERS = (2, 8, 31, 43), ((1, 8, 20, 57), (3, 8, 64, 64))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Scales()
    for module in model.modules():
        if hasattr(module, "content_encoder"):
            nn.init.normal_(module.content_encoder.weight, std=0.2)  # else all weights of a kernel would be alike
    model(torch.randn(4, 8, 16, 16))  # statistics for the norm
    return model.eval()


def dynamic():
    return {"features": dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)}


def compare(model, run, sizes, tolerance=2e-6):
    for size in sizes:
        features = size if isinstance(size, torch.Tensor) else torch.randn(*size)
        with torch.no_grad():
            expected = model(features)
        for got, wanted in zip(run(features), expected, strict=True):
            torch.testing.assert_close(torch.as_tensor(got), wanted, rtol=tolerance, atol=tolerance)


def onnxruntime_of(path):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (features,) = session.get_inputs()
    return lambda x: session.run(None, {features.name: x.numpy()})


def operators_of(path):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    return {(node.domain, node.op_type) for node in onnx.load(path).graph.node}


def test_decompositions_leave_no_operator_of_this_package(model):
    features = torch.randn(*FIXED)
    for sizes in (None, dynamic()):
        program = export.standard_program(model, (features,), sizes)
        assert not [node for node in program.graph.nodes if "carafe" in str(node.target)]
        compare(model, program.module(), [FIXED, *(OTHERS if sizes else ())])


def test_fixed_sizes_have_the_form_with_matrices(model):
    programs = [export.standard_program(model.up, (torch.randn(*FIXED),), sizes) for sizes in (None, dynamic())]
    products = [sum("bmm" in str(node.target) for node in program.graph.nodes) for program in programs]
    assert products == [2, 0]


def test_onnx(model, tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    for sizes in (None, dynamic()):
        path = export.to_onnx(model, (torch.randn(*FIXED),), tmp_path / "model.onnx", sizes)
        assert {domain for domain, _ in operators_of(path)} == {""}
        compare(model, onnxruntime_of(path), [FIXED, *(OTHERS if sizes else ())])
    assert [file.name for file in tmp_path.iterdir() if not file.name.startswith("model.onnx")] == []


def test_onnx_where_somebody_else_exports(model, tmp_path):
    """By torch.onnx.export on the model itself, with and without its compiler, as other libraries call it."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    path, example = tmp_path / "model.onnx", (torch.randn(*FIXED),)
    axes = {"input_names": ["features"], "dynamic_axes": {"features": {0: "n", 2: "h", 3: "w"}}}
    calls = [({"dynamo": False}, []), ({"dynamo": False, **axes}, OTHERS)]
    calls += [({"dynamo": True}, []), ({"dynamo": True, "dynamic_shapes": dynamic()}, OTHERS)]
    for options, others in calls:
        torch.onnx.export(model, example, path, **options)
        assert ("", "MatMul") in operators_of(path) or options != {"dynamo": True}
        compare(model, onnxruntime_of(path), [FIXED, *others])


def test_masked_carafe(tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model = Masked().eval()
    path = export.to_onnx(model, (torch.randn(1, 4, 12, 14),), tmp_path / "model.onnx")
    compare(model, onnxruntime_of(path), [(1, 4, 12, 14)], tolerance=1e-5)


def test_nodes_of_carafe(model, tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    path = export.to_onnx(model, (torch.randn(*FIXED),), tmp_path / "model.onnx")
    nodes = export.carafe_nodes(model, path)
    kinds = {node.name: node.op_type for node in onnx.load(path).graph.node}
    # Three modules, of two convolutions each; `masks` is the user's, and what reassembles by them is no module's.
    assert sum(kinds[name] == "Conv" for name in nodes) == 6
    assert sum(kind == "Conv" for kind in kinds.values()) == 7
    assert sum(kinds[name] == "Softmax" for name in nodes) == 3
    assert [kind for name, kind in kinds.items() if name not in nodes].count("Gather") == 1
    with pytest.raises(ValueError, match=r"model must have modules of CARAFE\+\+, got a Conv2d without"):
        export.carafe_nodes(model.masks, path)
    with pytest.raises(ValueError, match=r"path must be of a file that this model was exported to, got .*model.onnx"):
        export.carafe_nodes(nn.Sequential(model), path)


def outputs_of_openvino(model, any_size, path, inputs):
    import openvino

    export.to_openvino(model, (torch.randn(*FIXED),), path, dynamic() if any_size else None)
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [[torch.as_tensor(value).clone() for value in compiled(x.numpy()).values()] for x in inputs]


def test_openvino(model, tmp_path):
    """In a process of its own: OpenVINO's threads and this process's, which has had many others, do not go together."""
    pytest.importorskip("openvino", reason="openvino is not installed")
    for any_size in (False, True):
        inputs = [torch.randn(*size) for size in (FIXED, *(OTHERS if any_size else ()))]
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            found = process.submit(outputs_of_openvino, model, any_size, tmp_path / "model.xml", inputs).result()
        for features, outputs in zip(inputs, found, strict=True):
            compare(model, lambda x: outputs, [features])  # noqa: B023
    assert {file.name for file in tmp_path.iterdir()} == {"model.xml", "model.bin"}


def test_package_compiled_ahead_of_time(model, tmp_path):
    """In a process of its own, as packages are run: what it loads stays loaded."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("ahead-of-time compilation needs a C++ compiler, and g++ is not on the PATH")
    features = torch.randn(*FIXED)
    torch.save((model.up, features), tmp_path / "given.pt")
    code = (
        "import sys, torch; from carafe_plugin import export\n"
        "folder = sys.argv[1]\n"
        "module, features = torch.load(folder + '/given.pt', weights_only=False)\n"
        "path = export.to_aoti(module, (torch.randn_like(features),), folder + '/model.pt2', standalone=True)\n"
        "torch.save(torch._inductor.aoti_load_package(str(path))(features), folder + '/found.pt')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    found = torch.load(tmp_path / "found.pt")
    torch.testing.assert_close(found, model.up(features).detach(), rtol=2e-5, atol=2e-5)  # its own exponential


def test_what_cannot_be_exported_is_said(model, tmp_path):
    features, path = torch.randn(*FIXED), tmp_path / "model.onnx"
    path.write_text("another model")
    with pytest.raises(ValueError, match=r"model must be in evaluation mode.*got one in training mode"):
        export.standard_program(Scales().train(), (features,))
    partly = Scales().eval()
    partly.down.compressor_norm.train()
    with pytest.raises(ValueError, match=r"evaluation mode.*got down.compressor_norm in training mode"):
        export.standard_program(partly, (features,))
    with pytest.raises(TypeError, match=r"args must be a tuple of example inputs, got a Tensor: write \(tensor,\)"):
        export.standard_program(model, features)
    with pytest.raises(ValueError, match=r"path must end in \.pt2, got .*model.onnx"):
        export.to_aoti(model, (features,), path)
    if importlib.util.find_spec("onnxscript") is not None:
        with pytest.raises(ValueError, match="options must not set dynamo"):
            export.to_onnx(model, (features,), path, dynamo=False)
    if importlib.util.find_spec("openvino") is None:
        with pytest.raises(ImportError, match="to_openvino needs openvino, which is not installed: install openvino"):
            export.to_openvino(model, (features,), path)
    else:
        with pytest.raises(ValueError, match=r"path must end in \.xml, got .*model.onnx"):
            export.to_openvino(model, (features,), path)
    with pytest.raises(FileNotFoundError, match=r"path must be in a folder that exists, got .*absent"):
        export.to_aoti(model, (features,), tmp_path / "absent" / "model.pt2")
    assert path.read_text() == "another model"
