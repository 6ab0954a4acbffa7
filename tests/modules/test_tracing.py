"""torch.fx and what is built on it, torch.jit, and values for a model that was built without any (meta device)."""

import copy
import io
import os
import subprocess
import sys
from fractions import Fraction
from functools import partial

import pytest
import torch
from starts import wrong_starts
from toolkit import TORCH
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx
from torch.fx.experimental.optimization import fuse

from carafe_plugin import CARAFEDownsample, CARAFEUpsample
from carafe_plugin.modules import peers
from carafe_plugin.ops import carafe
from carafe_plugin.ops.fused import reassemble_logits
from carafe_plugin.testing import relative_error

NORMED = partial(CARAFEDownsample, norm=nn.BatchNorm2d, act=nn.ReLU)
KINDS = {
    "CARAFEUpsample": CARAFEUpsample,
    "CARAFEUpsample by 3/2": partial(CARAFEUpsample, scale_factor=Fraction(3, 2)),
    "CARAFEDownsample": CARAFEDownsample,
    "CARAFEDownsample, normed": NORMED,
    **{kind.__name__: kind for kind in (*peers.DOWNSAMPLERS, *peers.UPSAMPLERS)},
}

pytestmark = pytest.mark.filterwarnings("ignore:.*(deprecated|reduce_range|observer|torch.jit).*")


class Network(nn.Module):
    """An encoder, a resampler and a head."""

    def __init__(self, up, down=None):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.up, self.head = up, nn.Conv2d(8, 8, 3, padding=1)
        self.down = down or nn.Identity()

    def forward(self, images):
        return self.down(self.head(self.up(self.encoder(images))))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_fx_traces_what_it_traces_with_interpolation(kind):
    network = Network(kind(8))
    traced = torch.fx.symbolic_trace(network)
    file = io.BytesIO()
    torch.save(traced, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for size in ((6, 8), (7, 5)):
        images = torch.randn(2, 3, *size)
        expected = network(images)
        expected.square().sum().backward()
        weight = network.encoder[0].weight
        gradient, weight.grad = weight.grad, None
        output = traced(images)
        output.square().sum().backward()
        assert torch.equal(output, expected)
        assert torch.equal(weight.grad, gradient)
        assert gradient.any()
        weight.grad = None
        assert torch.equal(loaded(images), expected)


def test_a_traced_module_checks_its_input():
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Identity(), CARAFEUpsample(8)))
    with pytest.raises(ValueError, match=r"features must have shape \(N, 8, H, W\) as channels=8 says"):
        traced(torch.randn(1, 4, 5, 5))


class Functions(nn.Module):
    """The functions in a user's own forward, under the names that a user's module gives them."""

    def __init__(self):
        super().__init__()
        self.kernels = CARAFEUpsample(4)

    def forward(self, features):
        masks = self.kernels.predict_kernels(features)
        up = carafe(features, masks=masks, kernel_size=5, scale_factor=2)
        return up + reassemble_logits(features, self.kernels.predict_logits(features), *self.kernels.settings)


def test_fx_takes_a_function_as_one_node():
    module, features = Functions(), torch.randn(1, 4, 5, 6)
    traced = torch.fx.symbolic_trace(module)
    names = [node.name for node in traced.graph.nodes if node.op == "call_function"]
    assert names == ["masks_from_logits", "carafe", "reassemble_logits", "add"]
    assert carafe in [node.target for node in traced.graph.nodes]
    assert torch.equal(traced(features), module(features))


def test_features_are_extracted_by_name():
    extraction = pytest.importorskip("torchvision.models.feature_extraction", reason="torchvision is not installed")
    network, images = Network(CARAFEUpsample(8), NORMED(8)).eval(), torch.randn(1, 3, 6, 8)
    names = extraction.get_graph_node_names(network)[1]
    assert names[names.index("encoder.1") + 1 : names.index("head")] == [
        f"up.{node}" for node in ("check_features", "channel_compressor", "content_encoder", "reassemble_logits")
    ]
    up = network.up(network.encoder(images))
    for settings in ({}, {"tracer_kwargs": {"leaf_modules": [CARAFEUpsample]}}):
        extractor = extraction.create_feature_extractor(network, ["up", "down"], **settings)
        found = extractor(images)
        assert torch.equal(found["up"], up)
        assert torch.equal(found["down"], network(images))
    found["down"].sum().backward()
    assert network.encoder[0].weight.grad.any()


def test_fx_quantises_the_convolutions():
    """The kernels' prediction becomes int8 as all around it; the reassembly gets float32."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 12, 14)
    errors = []
    for network in (Network(CARAFEUpsample(8), NORMED(8)), Network(nn.Upsample(scale_factor=2), nn.MaxPool2d(2))):
        network.eval()
        prepared = quantize_fx.prepare_fx(copy.deepcopy(network), get_default_qconfig_mapping(), (images,))
        prepared(images)
        quantised = quantize_fx.convert_fx(prepared)
        errors.append(relative_error(quantised(images), network(images)))
        if isinstance(network.up, CARAFEUpsample):
            for place in (
                quantised.up.channel_compressor,
                quantised.up.content_encoder,
                quantised.down.content_encoder,
            ):
                assert "quantized" in type(place).__module__
    assert max(errors) < 0.05


def test_fx_folds_the_compressors_norm():
    network, images = Network(nn.Identity(), NORMED(8)).eval(), torch.randn(1, 3, 6, 8)
    nn.init.uniform_(network.down.compressor_norm.running_mean)
    folded = fuse(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert relative_error(folded(images), network(images)) < 1e-5


JIT = """
import io, torch
from carafe_plugin import CARAFEDownsample, CARAFEUpsample
from fractions import Fraction
torch.manual_seed(0)
network = torch.nn.Sequential(CARAFEUpsample(4), CARAFEDownsample(4), CARAFEUpsample(4, Fraction(3, 2)))
with torch.no_grad():
    for upsampler in network:
        torch.nn.init.normal_(upsampler.content_encoder.weight)
traced, file = torch.jit.trace(network, torch.randn(1, 4, 5, 6)), io.BytesIO()
torch.jit.save(traced, file)
file.seek(0)
loaded = torch.jit.load(file)
features = torch.randn(2, 4, 8, 7, requires_grad=True)
expected, got = network(features), loaded(features)
gradients = [torch.autograd.grad(output.square().sum(), features)[0] for output in (expected, got)]
print(torch.equal(expected, got), torch.equal(*gradients))
"""


def test_jit_traces_are_saved_and_loaded(capsys):
    exec(JIT, {})
    assert capsys.readouterr().out == "True True\n"


def test_jit_traces_are_saved_where_the_reference_serves():
    environment = {**os.environ, "CARAFE_BACKEND": "reference"}
    result = subprocess.run([sys.executable, "-c", JIT], env=environment, capture_output=True, text=True, timeout=300)
    assert result.stdout == "True True\n", result.stderr


class Bare(nn.Module):
    def forward(self, features: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        return carafe(features, masks, 3)


@pytest.mark.parametrize(
    "target",
    [carafe, Bare(), CARAFEUpsample(8), CARAFEUpsample(4), nn.Sequential(NORMED(8)), peers.GUMUpsample(8)],
    ids=["function", "in a forward", "module", "another", "submodule", "peer"],
)
def test_jit_script_says_what_to_use_instead(target):
    with pytest.raises(NotImplementedError) as error:
        torch.jit.script(target)
    assert str(error.value) == (
        "torch.jit.script does not compile CARAFE++: use torch.jit.trace(model, example) or "
        "torch.export.export(model, (example,)) instead"
    )


# ------------------------------------------------------------------------------------------------ initialisation


@pytest.mark.parametrize("parents_first", [True, False])
def test_reset_parameters_in_any_order(parents_first):
    """As FSDP and others give values to a model built on the meta device: module by module."""
    with torch.device("meta"):
        model = nn.ModuleList(kind(64) for kind in KINDS.values())
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, 7)
    modules = list(model.modules())
    for module in modules if parents_first else reversed(modules):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        else:
            assert not list(module.parameters(recurse=False)), type(module)
    assert list(wrong_starts(model)) == []


@pytest.mark.skipif(TORCH < (2, 4), reason="FSDP did not run on a CPU before torch 2.4")
def test_fsdp_fills_a_model_from_the_meta_device():
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.fsdp import FullyShardedDataParallel

    with torch.device("meta"):
        model = nn.Sequential(*(kind(64) for kind in KINDS.values()))
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
        with FullyShardedDataParallel.summon_full_params(model):
            assert list(wrong_starts(model)) == []
    finally:
        destroy_process_group()


def test_convolutions_keep_their_exact_type_and_their_start():
    """Tools that quantise, fuse and count look at the type; a copy resets itself, not its original."""
    module = CARAFEUpsample(64)
    assert type(module.channel_compressor) is type(module.content_encoder) is nn.Conv2d
    copied = copy.deepcopy(module)
    nn.init.ones_(copied.content_encoder.weight)
    before = copy.deepcopy(module.state_dict())
    copied.content_encoder.reset_parameters()
    assert list(wrong_starts(copied)) == []
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
