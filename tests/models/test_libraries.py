"""convert() on models of other libraries, each compared with the library's own; docs/libraries.md has the table."""

import io
import warnings

import pytest
import torch
from library_model import LibraryModel
from library_models import MODELS, OTHERS, smp_model
from toolkit import needs_compile, needs_torch
from torch import nn
from torch.utils import _pytree
from transformers_models import upernet

from carafe_plugin import convert, export
from carafe_plugin.models.tracing import largest_difference
from carafe_plugin.modules.carafe import KernelPrediction

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [pytest.param(row, id=str(row).replace(" ", "-")) for row in MODELS]
CONVERTED = [pytest.param(row, id=str(row).replace(" ", "-")) for row in MODELS if row.arguments is not None]

#: Float32, through tens of layers that sum in another order; relative to the largest output.
ROUNDING = 1e-5
#: Likewise, beside another runtime: of fcn_resnet50, unconverted, 1.4e-4.
EXPORTED = 5e-4


def original(row: LibraryModel, seed: int = 0) -> nn.Module:
    """The library's model, with features that reach its outputs: initialised and normalised for that."""
    pytest.importorskip(row.library, reason=f"{row.library} is not installed")
    torch.manual_seed(seed)
    model = row.build().eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0  # the statistics of this batch
    run(row, model, number=2)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum
    return model


def converted(row: LibraryModel, seed: int = 0, **others) -> nn.Module:
    model = original(row, seed)
    if row.arguments is not None:
        convert(model, **{**row.arguments, **others})
    return model


def run(row: LibraryModel, model: nn.Module, number: int = 1) -> list[torch.Tensor]:
    torch.manual_seed(1)
    with torch.no_grad():
        return tensors(called(row.part(model), row.inputs(number)))


def called(model: nn.Module, inputs):
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def tensors(output) -> list[torch.Tensor]:
    return [leaf for leaf in _pytree.tree_flatten(output)[0] if isinstance(leaf, torch.Tensor)]


def upsamplers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, KernelPrediction)}


@pytest.mark.parametrize("row", ROWS)
def test_outputs_stay(row, cell):
    model = original(row)
    before = run(row, model)
    if row.arguments is None:
        assert set(upsamplers(model)) == set(row.places)
        cell(row, places=len(row.places), difference="to be trained")
        return
    report = convert(model, **row.arguments)
    assert tuple(place.name for place in report.replaced) == row.places
    difference = largest_difference(run(row, model), before)
    keeps = all(place.keeps for place in report.replaced)
    assert (difference <= ROUNDING) == keeps, str(report)
    cell(row, places=len(row.places), difference=f"{difference:.0e}" if keeps else "to be trained")


@pytest.mark.parametrize("row", CONVERTED)
def test_outputs_come_from_what_was_put_in(row):
    """Else that they stay would say nothing."""
    keys = {key: {"init_spread": 0.1} for key in ("upsample", "downsample")}
    asked = {key: value for key, value in {"upsample": True, **row.arguments}.items() if value is not False}
    arguments = {key: {**(value if isinstance(value, dict) else {}), **keys[key]} for key, value in asked.items()}
    before, after = (run(row, converted(row, **others)) for others in ({}, arguments))
    assert largest_difference(after, before) > ROUNDING


@pytest.mark.parametrize("row", ROWS)
def test_training_step(row, cell):
    model = converted(row).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    torch.manual_seed(2)
    loss = row.loss(model)
    assert loss.isfinite()
    loss.backward()
    for name, module in upsamplers(model).items():
        for parameter, value in module.named_parameters():
            assert value.grad is not None, f"{name}.{parameter}"
            assert value.grad.isfinite().all(), f"{name}.{parameter}"
            assert value.grad.any(), f"{name}.{parameter}"
    before = {name: value.detach().clone() for name, value in model.named_parameters() if "content_encoder" in name}
    optimizer.step()
    moved = [not torch.equal(before[name], value) for name, value in model.named_parameters() if name in before]
    assert moved
    assert all(moved)
    torch.manual_seed(2)
    assert row.loss(model).isfinite()
    cell(row, training="yes")


@pytest.mark.parametrize("row", ROWS)
def test_state_dict_and_whole_model(row, cell):
    model = converted(row)
    expected = run(row, model)
    other = converted(row, seed=3)
    assert largest_difference(run(row, other), expected) > ROUNDING
    other.load_state_dict(reread(model.state_dict(), weights_only=True))
    assert all(map(torch.equal, run(row, other), expected))
    if row.unsaved:
        mine = original(row)  # it has run
        with pytest.raises((AttributeError, TypeError), match="pickle"):
            reread(mine, weights_only=False)
        cell(row, saved=f"state dict; not whole, as the library's own: {row.unsaved}")
        return
    assert all(map(torch.equal, run(row, reread(model, weights_only=False)), expected))
    cell(row, saved="state dict, whole")


def reread(what, **options):
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return torch.load(file, **options)


@needs_compile
@pytest.mark.parametrize("row", ROWS)
def test_compiled(row, cell):
    model = converted(row)
    expected = run(row, model)
    torch._dynamo.reset()
    part = row.part(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what compilers say of the libraries' code
        compiled = torch.compile(part, backend="aot_eager", fullgraph=not row.breaks)
        torch.manual_seed(1)
        with torch.no_grad():
            outputs = tensors(called(compiled, row.inputs(1)))
    assert largest_difference(outputs, expected) <= ROUNDING
    if row.breaks:
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.TorchDynamoException), torch.no_grad():
            called(torch.compile(row.part(original(row)), backend="aot_eager", fullgraph=True), row.inputs(1))
    cell(row, compiled="several graphs, as the library's own" if row.breaks else "one graph")


@needs_torch(2, 6, "carafe_plugin.export")
@pytest.mark.parametrize("row", ROWS)
def test_onnx(row, tmp_path, cell):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    torch.manual_seed(1)
    inputs = row.inputs(1)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    if row.unexported:
        with pytest.raises(RuntimeError, match="tracked with proxy"):
            export.standard_program(row.part(original(row)), args, kwargs=kwargs)
        cell(row, onnx=f"not exported, as the library's own: {row.unexported}")
        return
    model = converted(row)
    expected = run(row, model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what exporters say of the libraries' code
        # Without the optimiser, which takes longer than all else and is tried in tests/test_export.py.
        path = export.to_onnx(row.part(model), args, tmp_path / "model.onnx", kwargs=kwargs, optimize=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    given = [value.numpy() for value in (*args, *kwargs.values())]
    outputs = [torch.as_tensor(each) for each in session.run(None, dict(zip(names, given, strict=True)))]
    assert len(outputs) == len(expected)
    difference = largest_difference(outputs, expected)
    assert difference <= EXPORTED
    cell(row, onnx=f"{difference:.0e}")


@pytest.mark.parametrize(("library", "build", "side", "places"), OTHERS)
def test_other_models_that_upsample_features(library, build, side, places):
    pytest.importorskip(library, reason=f"{library} is not installed")
    torch.manual_seed(0)
    report = convert(build().eval(), torch.rand(1, 3, side, side), names=places)
    assert tuple(place.name for place in report.replaced) == places
    assert report.difference <= ROUNDING


@pytest.mark.parametrize("name", ["PAN", "DeepLabV3Plus", "PSPNet", "Linknet"])
def test_what_starts_as_no_kernel_is_named(name):
    pytest.importorskip("segmentation_models_pytorch", reason="segmentation_models_pytorch is not installed")
    model = smp_model(name, 5)()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    layer, reason = "segmentation_head.1", r"align_corners=True: no kernels start as that.*dict\(init=\"bilinear\"\)"
    if name == "Linknet":
        layer, reason = "decoder.blocks.0.block.1.0", "of deconvolutions only those of 2x2 with stride 2"
    with pytest.raises(ValueError, match=rf"{name} has nothing to convert; .*{layer} \(.*{reason}"):
        convert(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_scores_and_pooled_pyramids_are_left():
    pytest.importorskip("transformers", reason="transformers is not installed")
    report = convert(upernet(), dry_run=True)
    reasons = {name: kept.reason for kept in report.kept for name in kept.names}
    scores, pooled = "carafe_upsamplers.0", "decode_head.psp_modules.carafe_upsamplers.1"
    for name in (scores, pooled):
        assert "not known in transformers as upsampling of features" in reasons[name]


def test_a_forward_of_ones_own_in_a_librarys_subclass():
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")

    class Mine(torchvision.models.ResNet):
        def forward(self, image):
            features = self.maxpool(self.conv1(image))
            return nn.functional.interpolate(features, scale_factor=2)

    report = convert(Mine(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1]))
    assert [place.name for place in report.replaced] == ["carafe_upsamplers.0"]
    assert report.difference <= ROUNDING
