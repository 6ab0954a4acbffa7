"""The layers in MMEngine's root registry, and the helpers that the adapters share."""

import importlib
import sys

import pytest
import torch
from torch import nn

mmengine = pytest.importorskip("mmengine", reason="MMEngine is not installed")
pytest.importorskip("mmcv", reason="MMCV is not installed")

from mmcv.cnn import build_upsample_layer  # noqa: E402
from mmengine.model import BaseModule  # noqa: E402
from mmengine.registry import MODELS  # noqa: E402

import carafe_plugin  # noqa: E402
from carafe_plugin.openmmlab import layers, require  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

ENCODER_STD = 0.001


def is_near(value: float, expected: float) -> bool:
    return abs(value - expected) < 0.1 * expected


@pytest.mark.parametrize("name", ["CARAFEUpsample", "CARAFEDownsample"])
def test_registered_layer_is_the_plain_module(name):
    layer = MODELS.build(dict(type=name, channels=8, compressed_channels=4))
    plain = getattr(carafe_plugin, name)(8, compressed_channels=4)
    assert isinstance(layer, type(plain))
    plain.load_state_dict(layer.state_dict(), strict=True)
    x = torch.randn(2, 8, 5, 7)
    assert torch.equal(layer(x), plain(x))


def test_usable_as_upsample_cfg():
    """The protocol of MMDetection's necks and heads: channels, scale_factor and the rest of upsample_cfg."""
    layer = build_upsample_layer(dict(type="CARAFEUpsample", up_kernel=3, up_group=2), channels=8, scale_factor=3)
    assert isinstance(layer, layers.CARAFEUpsample)
    assert layer(torch.rand(1, 8, 4, 5)).shape == (1, 8, 12, 15)


@pytest.mark.parametrize("name", ["CARAFEUpsample", "CARAFEDownsample"])
def test_norm_and_activation_from_configurations(name):
    cfg = dict(type=name, channels=8, norm_cfg=dict(type="BN", requires_grad=False), act_cfg=dict(type="ReLU"))
    layer = MODELS.build(cfg)
    assert isinstance(layer.compressor_norm, nn.BatchNorm2d)
    assert layer.compressor_norm.num_features == layer.compressed_channels
    assert not layer.compressor_norm.weight.requires_grad
    assert isinstance(layer.compressor_act, nn.ReLU)
    grouped = MODELS.build(dict(type=name, channels=8, norm_cfg=dict(type="GN", num_groups=4)))
    assert isinstance(grouped.compressor_norm, nn.GroupNorm)
    assert MODELS.build(cfg).compressor_norm is not layer.compressor_norm
    assert cfg["norm_cfg"] == dict(type="BN", requires_grad=False), "a configuration must survive its use"


@pytest.mark.parametrize("argument", ["norm_cfg", "act_cfg"])
@pytest.mark.parametrize("value", ["BN", {"num_groups": 2}, 3])
def test_bad_norm_and_activation(argument, value):
    with pytest.raises(TypeError, match=rf"{argument} must be None or a dictionary with the key 'type'"):
        layers.CARAFEUpsample(8, **{argument: value})


@pytest.mark.parametrize("initializer", ["Xavier", "Kaiming", "Normal", "Uniform", "TruncNormal", "Constant"])
@pytest.mark.parametrize("layer_type", [layers.CARAFEUpsample, layers.CARAFEDownsample])
def test_initialisation_survives_any_enclosing_module(initializer, layer_type):
    """Inside plain containers init_weights never arrives, while the enclosing module's init_cfg does."""
    options = dict(Constant=dict(val=0.3)).get(initializer, {})

    class Network(BaseModule):
        def __init__(self):
            super().__init__(init_cfg=dict(type=initializer, layer="Conv2d", bias=0.7, **options))
            self.direct = layer_type(64)
            self.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(64, 64, 3), layer_type(64))])

    network = Network()
    network.init_weights()
    for layer in (network.direct, network.blocks[0][1]):
        assert is_near(layer.content_encoder.weight.std().item(), ENCODER_STD)
        assert abs(layer.content_encoder.weight.mean().item()) < ENCODER_STD
        assert layer.content_encoder.bias.abs().max() == 0
        bound = (6 / (64 + layer.compressed_channels)) ** 0.5  # Xavier-uniform
        assert is_near(layer.channel_compressor.weight.abs().max().item(), bound)
        assert layer.channel_compressor.bias.abs().max() == 0
    convolution = network.blocks[0][0]
    assert (convolution.bias == torch.tensor(0.7)).all(), "the other layers must follow init_cfg"
    assert convolution.weight.std() > 10 * ENCODER_STD or initializer == "Constant"


def test_apply_keeps_its_meaning_for_any_other_function():
    layer = layers.CARAFEUpsample(8)
    seen = []
    assert layer.apply(seen.append) is layer
    assert set(seen) == set(layer.modules())
    layer.apply(lambda m: nn.init.constant_(m.weight, 2.0) if isinstance(m, nn.Conv2d) else None)
    assert (layer.content_encoder.weight == 2).all()


@pytest.mark.parametrize(
    ("given", "wanted"),
    [((4, 6), (4, 6)), ((4, 6), (3, 5)), ((4, 6), (5, 7)), ((4, 6), (3, 7)), ((1, 1), (4, 3)), ((4, 6), (1, 1))],
)
@pytest.mark.parametrize("batch", [2, 0])
def test_fit_to_size_crops_and_completes_at_the_bottom_and_right(given, wanted, batch):
    features = torch.randn(batch, 3, *given, dtype=torch.float64, requires_grad=True)
    fitted = layers.fit_to_size(features, wanted)
    rows = torch.arange(wanted[0]).clamp(max=given[0] - 1)
    columns = torch.arange(wanted[1]).clamp(max=given[1] - 1)
    assert torch.equal(fitted, features[:, :, rows][..., columns])
    if batch:
        assert torch.autograd.gradcheck(lambda x: layers.fit_to_size(x, wanted), (features[:1],))


def test_fit_to_size_gradient_is_deterministic_by_torchs_own_standard():
    torch.use_deterministic_algorithms(True)
    try:
        features = torch.randn(1, 2, 3, 3, requires_grad=True)
        layers.fit_to_size(features, (4, 5)).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert features.grad.sum() == 2 * 4 * 5


class Doubling(nn.Module):
    """An upsampler that this package does not know."""

    def __init__(self, channels, scale_factor, gain=1.0):
        super().__init__()
        self.channels, self.scale_factor, self.gain = channels, scale_factor, gain

    def forward(self, x):
        return self.gain * x.repeat_interleave(self.scale_factor, 2).repeat_interleave(self.scale_factor, 3)


def test_build_upsampler_takes_any_registered_type_class_or_path(monkeypatch):
    assert isinstance(layers.build_upsampler(None, 8), layers.CARAFEUpsample)
    assert layers.build_upsampler(dict(up_kernel=3), 8).kernel_size == 3
    assert isinstance(layers.build_upsampler(dict(type="nearest"), 8), layers.Interpolation)
    assert isinstance(layers.build_upsampler(dict(type=Doubling), 8), Doubling)
    path = "carafe_plugin.modules.CARAFEUpsample"
    assert type(layers.build_upsampler(dict(type=path), 8)) is carafe_plugin.CARAFEUpsample
    monkeypatch.setitem(MODELS.module_dict, "Doubling", Doubling)
    cfg = dict(type="Doubling", gain=2.0)
    upsampler = layers.build_upsampler(cfg, 8, 4)
    assert (upsampler.channels, upsampler.scale_factor, upsampler.gain) == (8, 4, 2.0)
    assert cfg == dict(type="Doubling", gain=2.0)
    assert layers.upsample_to(upsampler, torch.rand(1, 8, 3, 3), (11, 13)).shape == (1, 8, 11, 13)


@pytest.mark.parametrize(
    ("cfg", "error", "message"),
    [
        (5, TypeError, "carafe_cfg must be a dictionary or None, got 5"),
        (dict(up_kernal=3), TypeError, "carafe_cfg=.*unexpected keyword argument 'up_kernal'"),
        (dict(type="nearest", up_kernel=3), TypeError, "carafe_cfg=.*unexpected keyword argument 'up_kernel'"),
        (dict(type="CARAFEUpsampel"), KeyError, "carafe_cfg: the type 'CARAFEUpsampel' is not registered"),
        (dict(type="no.such.Thing"), KeyError, "carafe_cfg: the type 'no.such.Thing' is not registered"),
        (dict(channels=8), ValueError, "carafe_cfg must not set 'channels'"),
        (dict(scale_factor=4), ValueError, "carafe_cfg must not set 'scale_factor'"),
        (dict(up_kernel=4), ValueError, "carafe_cfg=.*must be an odd"),
        (dict(up_group=3), ValueError, "carafe_cfg=.*multiple of up_group=3"),
        (dict(normalizer="relu"), ValueError, "carafe_cfg=.*normalizer"),
    ],
)
def test_bad_carafe_cfg(cfg, error, message):
    with pytest.raises(error, match=message):
        layers.build_upsampler(cfg, 8)


@pytest.mark.parametrize("toolbox", ["mmdet", "mmseg", "mmpretrain"])
def test_missing_toolbox_is_named(monkeypatch, toolbox):
    monkeypatch.setitem(sys.modules, toolbox, None)
    monkeypatch.delitem(sys.modules, f"carafe_plugin.openmmlab.{toolbox}", raising=False)
    with pytest.raises(ImportError, match=rf"carafe_plugin.openmmlab.{toolbox} needs {toolbox}, .*onedl-{toolbox[:3]}"):
        importlib.import_module(f"carafe_plugin.openmmlab.{toolbox}")


def test_broken_toolbox_keeps_its_own_error(monkeypatch, tmp_path):
    (tmp_path / "mmdet.py").write_text("import something_that_is_missing")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mmdet", raising=False)
    with pytest.raises(ModuleNotFoundError, match="something_that_is_missing"):
        require("mmdet", "the test")


@pytest.mark.parametrize("toolbox", ["mmseg", "mmpretrain"])
def test_other_toolboxes_find_the_layers(toolbox):
    pytest.importorskip(toolbox, reason=f"{toolbox} is not installed")
    adapter = importlib.import_module(f"carafe_plugin.openmmlab.{toolbox}")
    registry = importlib.import_module(f"{toolbox}.registry").MODELS
    assert type(registry.build(dict(type="CARAFEUpsample", channels=8))) is adapter.CARAFEUpsample
    assert type(registry.build(dict(type="CARAFEDownsample", channels=8))) is adapter.CARAFEDownsample
