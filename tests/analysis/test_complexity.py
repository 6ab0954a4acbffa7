"""FLOPs by MMEngine's analyser: exact, attributed to the module that spends them, the model left as it was."""

from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from carafe_plugin import CARAFEDownsample, CARAFEUpsample

pytest.importorskip("mmengine", reason="adapters: mmengine is not installed")
from mmengine.analysis import FlopAnalyzer

from carafe_plugin.analysis.complexity import carafe_sites, count


class Net(nn.Module):
    """Takes and returns what no tracer does."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.down = CARAFEDownsample(8, down_group=2, compressed_channels=4, norm=nn.BatchNorm2d)
        self.up = nn.ModuleList([CARAFEUpsample(8, Fraction(3, 2), up_kernel=3, compressed_channels=None)])
        self.spare = CARAFEUpsample(8, normalizer="sigmoid")

    def forward(self, inputs, data_samples=None, mode="loss"):
        assert mode == "tensor"
        assert data_samples == ["anything"]
        features = self.down(self.stem(inputs))
        return dict(maps=[self.up[0](features)], samples=data_samples)


def test_every_module_worked_by_hand():
    model = Net().eval()
    found = count(model, torch.rand(2, 3, 5, 7), data_samples=["anything"], mode="tensor")
    compressor, norm, encoder, reassembly = 70 * 8 * 4, 2 * 70 * 4, 24 * 4 * 9 * 2 * 25, 24 * 8 * 25
    assert found.flops["stem"] == 70 * 3 * 9 * 8
    assert found.flops["down.channel_compressor"] == compressor
    assert found.flops["down.compressor_norm"] == norm  # MMEngine counts two FLOPs for each element
    assert found.flops["down.content_encoder"] == encoder
    assert found.flops["down"] == compressor + norm + encoder + reassembly
    # 3 x 4 becomes 5 x 6: nine kernels of nine taps for each of the twelve locations are predicted, thirty are kept.
    assert found.flops["up.0"] == 24 * 8 * 9 * 9 * 9 + 2 * 30 * 8 * 9
    assert found.flops[""] == sum(found.flops[name] for name in ("stem", "down", "up.0"))
    assert found.parameters["down"] == 8 * 4 + 4 + 2 * 4 + 4 * 9 * 50 + 50
    assert found.parameters[""] == sum(parameter.numel() for parameter in model.parameters())
    assert "spare" in found.idle
    assert "down" not in found.idle
    assert found.uncounted == {}
    assert "forward" not in vars(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_half_of_what_torch_counts():
    model, features = CARAFEUpsample(32, up_group=4), torch.rand(1, 32, 3, 5)
    with FlopCounterMode(display=False) as counter:
        model(features)
    assert 2 * count(model, features).flops[""] == counter.get_total_flops()


def test_sites_in_the_papers_terms():
    model = Net().eval()
    found = count(model, torch.rand(1, 3, 6, 6), data_samples=["anything"], mode="tensor")
    down, up, spare = carafe_sites(model, found)
    assert (down.name, down.direction, down.scale, down.channels) == ("down", "down", "2", 8)
    assert (down.kernel_size, down.encoder_kernel, down.group_size, down.compressed_channels) == (5, 3, 2, 4)
    assert (up.name, up.direction, up.scale, up.compressed_channels) == ("up.0", "up", "3/2", None)
    assert (spare.normalizer, spare.flops, spare.runs, spare.share) == ("sigmoid", 0, False, 0)
    assert down.runs
    assert down.flops == found.flops["down"]
    assert down.share == found.flops["down"] / found.flops[""]
    assert up.parameters == 8 * 9 * 81 + 81


def test_a_stock_model_has_none_and_counts_as_in_mmengine():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5)).eval()
    inputs = torch.rand(1, 3, 6, 6)
    found = count(model, inputs)
    assert list(carafe_sites(model, found)) == []
    assert found.flops[""] == FlopAnalyzer(model, (inputs,)).total() == 16 * 108 + 2 * 64 + 320


def test_an_unknown_operator_is_named_and_a_forward_of_ones_own_stays():
    class Foreign(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

    model = nn.Conv2d(1, 1, 1)
    model.forward = lambda x: Foreign.apply(x)
    own = model.forward
    found = count(model, torch.rand(1, 1, 2, 2))
    assert found.uncounted == {"Foreign": 1}
    assert model.forward is own


def test_the_model_is_restored_when_it_fails():
    model = nn.Conv2d(1, 1, 1)
    with pytest.raises(RuntimeError):
        count(model, torch.rand(1, 2, 2, 2))
    assert "forward" not in vars(model)


def test_modulated_deformable_convolution_counts_as_a_convolution():
    ops = pytest.importorskip("mmcv.ops", reason="mmcv is not installed")
    conv = ops.ModulatedDeformConv2dPack(8, 6, 3, padding=1, groups=2, bias=False)
    found = count(conv, torch.rand(2, 8, 4, 5))
    # Half the input channels, in groups; beside it the convolution that predicts 2 offsets and a weight for each tap.
    assert found.flops[""] - found.flops["conv_offset"] == 40 * 6 * 4 * 9
    assert found.flops["conv_offset"] == 40 * 27 * 8 * 9
    assert found.uncounted == {}


def test_attention_is_named_where_it_is_not_counted():
    features = torch.rand(1, 5, 32)
    for mode in (True, False):  # torch takes another way in evaluation
        attention = nn.MultiheadAttention(32, 4, batch_first=True).train(mode)
        found = count(attention, features, key=features, value=features, need_weights=False)
        assert any("attention" in name for name in found.uncounted), found.uncounted
