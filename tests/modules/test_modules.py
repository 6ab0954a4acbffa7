"""CARAFEUpsample and CARAFEDownsample: shapes, kernel prediction, normalisers, initialisation, compatibility."""

import copy
import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from carafe_plugin import CARAFEDownsample, CARAFEUpsample
from carafe_plugin.ops import reference
from carafe_plugin.ops.reference import NORMALIZERS, normalize_kernels
from carafe_plugin.testing import relative_error


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 1.5, Fraction(4, 3)], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (5, 8), (7, 6)], ids=str)
def test_shapes(scale, size, device):
    features = torch.randn(2, 8, *size, device=device)
    up = CARAFEUpsample(8, scale).to(device)(features)
    down = CARAFEDownsample(8, scale).to(device)(features)
    assert up.shape == (2, 8, *(math.ceil(s * Fraction(scale)) for s in size))
    assert down.shape == (2, 8, *(math.ceil(s / Fraction(scale)) for s in size))


def test_downsampling_is_as_large_as_a_strided_max_pool(device):
    for size in ((8, 8), (7, 9), (25, 42)):
        features = torch.randn(1, 4, *size, device=device)
        assert CARAFEDownsample(4).to(device)(features).shape == F.max_pool2d(features, 3, 2, 1).shape


def formulated(module, features):
    """The module in its published formulation: pixel shuffle, softmax, and one neighbourhood per output."""
    k, g, up = module.kernel_size, module.group_size, module.up
    logits = F.pixel_shuffle(module.content_encoder(module.channel_compressor(features)), up)
    n, _, h, w = logits.shape
    kernels = logits.view(n, g, k * k, h, w).softmax(2)
    patches = F.unfold(features, k, padding=k // 2).view(n, -1, *features.shape[2:])
    patches = patches.repeat_interleave(up, -2).repeat_interleave(up, -1).view(n, g, -1, k * k, h, w)
    return torch.einsum("ngckhw,ngkhw->ngchw", patches, kernels).reshape(n, -1, h, w)


@pytest.mark.parametrize(("scale", "group", "kernel"), [(2, 1, 5), (2, 4, 3), (3, 2, 5), (1, 1, 3)])
def test_upsampling_equals_the_published_formulation(scale, group, kernel, device):
    module = CARAFEUpsample(8, scale, up_kernel=kernel, up_group=group, compressed_channels=6).double().to(device)
    nn.init.normal_(module.content_encoder.weight)  # kernels far from uniform
    features = torch.randn(2, 8, 5, 6, dtype=torch.float64, device=device)
    assert relative_error(module(features), formulated(module, features)) < 1e-12


def test_kernels_follow_the_scale_when_up_and_down_exceed_one():
    # The kernel of output i' is the one that the shuffle puts at i' * down of the map upsampled by `up`.
    module = CARAFEUpsample(4, Fraction(3, 2)).double()
    nn.init.normal_(module.content_encoder.weight)
    features = torch.randn(1, 4, 5, 6, dtype=torch.float64)
    logits = F.pixel_shuffle(module.content_encoder(module.channel_compressor(features)), 3)
    expected = logits[..., ::2, ::2].softmax(1)
    torch.testing.assert_close(module.predict_kernels(features), expected)
    got = reference.reassemble(features, expected, 5, 1, 3, 2)
    torch.testing.assert_close(module(features), got)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_normalizers(normalizer, device):
    logits = torch.randn(2, 2 * 9, 4, 5, dtype=torch.float64, device=device)
    got = normalize_kernels(logits, 3, 2, normalizer).view(2, 2, 9, 4, 5)
    values = logits.view(2, 2, 9, 4, 5)
    expected = {
        "softmax": values.exp() / values.exp().sum(2, keepdim=True),
        "sigmoid": values.sigmoid(),
        "sigmoid_normalized": values.sigmoid() / values.sigmoid().sum(2, keepdim=True),
    }[normalizer]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("level", [-1e4, 1e4], ids=str)
def test_normalizers_are_stable_when_saturated(normalizer, level):
    logits = torch.full((1, 9, 2, 2), level)
    logits[:, 0] += 1
    logits.requires_grad_()
    kernels = normalize_kernels(logits, 3, 1, normalizer)
    kernels.pow(2).sum().backward()
    assert kernels.isfinite().all()
    assert logits.grad.isfinite().all()
    if normalizer != "sigmoid":
        torch.testing.assert_close(kernels.sum(1), torch.ones(1, 2, 2))


@pytest.mark.parametrize("cls", [CARAFEUpsample, CARAFEDownsample])
def test_compressor_can_be_removed(cls, device):
    module = cls(8, compressed_channels=None).to(device)
    assert module.channel_compressor is None
    assert module.content_encoder.in_channels == 8
    assert set(module.state_dict()) == {"content_encoder.weight", "content_encoder.bias"}
    module(torch.randn(1, 8, 5, 6, device=device)).sum().backward()


def test_norm_and_activation_follow_the_compressor():
    module = CARAFEDownsample(8, norm=nn.BatchNorm2d, act=nn.ReLU)
    assert isinstance(module.compressor_norm, nn.BatchNorm2d)
    assert module.compressor_norm.num_features == 16
    features = torch.randn(2, 8, 6, 6)
    expected_module = copy.deepcopy(module)
    content = expected_module.compressor_norm(expected_module.channel_compressor(features)).relu()
    expected = expected_module.content_encoder(content).softmax(1)
    torch.testing.assert_close(module.predict_kernels(features), expected)
    assert {name.split(".")[0] for name in module.state_dict()} == {
        "channel_compressor",
        "compressor_norm",
        "content_encoder",
    }


def test_size_and_layout_of_mmcv_carafe_pack():
    module = CARAFEUpsample(256)
    assert count(module) == 74148
    assert {name: tuple(p.shape) for name, p in module.state_dict().items()} == {
        "channel_compressor.weight": (64, 256, 1, 1),
        "channel_compressor.bias": (64,),
        "content_encoder.weight": (100, 64, 3, 3),
        "content_encoder.bias": (100,),
    }


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"scale_factor": 3, "up_kernel": 3, "up_group": 2, "encoder_kernel": 5, "compressed_channels": 12},
        {"encoder_dilation": 2},
    ],
    ids=["defaults", "others", "dilated"],
)
def test_state_dict_is_that_of_mmcv(arguments):
    pytest.importorskip("mmcv", reason="mmcv is not installed: its CARAFEPack is what is compared with")
    from mmcv.ops.carafe import CARAFEPack

    arguments = {"channels": 16, "scale_factor": 2, **arguments}
    torch.manual_seed(0)
    theirs = CARAFEPack(**arguments)
    torch.manual_seed(0)
    ours = CARAFEUpsample(**arguments)
    theirs_state, ours_state = theirs.state_dict(), ours.state_dict()
    assert list(theirs_state) == list(ours_state)
    # Of the same values, too: both draw the same random numbers.
    assert all(torch.equal(a, b) for a, b in zip(theirs_state.values(), ours_state.values(), strict=True))
    ours.load_state_dict(theirs_state, strict=True)
    logits = theirs.content_encoder(theirs.channel_compressor(features := torch.randn(1, 16, 5, 6)))
    torch.testing.assert_close(ours.predict_kernels(features), theirs.kernel_normalizer(logits))


@pytest.mark.parametrize("cls", [CARAFEUpsample, CARAFEDownsample])
def test_initialisation(cls):
    torch.manual_seed(0)
    module = cls(256)
    bound = math.sqrt(6 / (256 + module.compressed_channels))
    weight = module.channel_compressor.weight
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert module.content_encoder.weight.std().item() == pytest.approx(0.001, rel=0.05)
    assert not module.channel_compressor.bias.any()
    assert not module.content_encoder.bias.any()
    nn.init.ones_(module.content_encoder.weight)
    module.init_weights()
    assert module.content_encoder.weight.std().item() == pytest.approx(0.001, rel=0.05)


def test_fresh_module_is_near_a_plain_average():
    module = CARAFEUpsample(4)
    kernels = module.predict_kernels(torch.randn(1, 4, 6, 6))
    torch.testing.assert_close(kernels, torch.full_like(kernels, 1 / 25), rtol=0.2, atol=0)


def test_repr_tells_the_geometry():
    text = repr(CARAFEUpsample(8, Fraction(3, 2), up_group=2))
    assert "channels=8, scale=3/2, kernel_size=5, group_size=2, normalizer='softmax'" in text
    assert "scale=1/2" in repr(CARAFEDownsample(8))


def test_every_parameter_learns(device):
    for module in (CARAFEUpsample(8), CARAFEDownsample(8, norm=nn.BatchNorm2d, act=nn.ReLU)):
        module.to(device)
        features = torch.randn(2, 8, 6, 7, device=device, requires_grad=True)
        module(features).pow(2).sum().backward()
        # A bias in front of a batch norm has no effect, and so no gradient, by construction.
        idle = {"channel_compressor.bias"} if module.compressor_norm is not None else set()
        for name, parameter in module.named_parameters():
            assert name in idle or parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("cls", [CARAFEUpsample, CARAFEDownsample])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_empty_batch(cls, normalizer, device):
    module = cls(8, up_group=2, normalizer=normalizer) if cls is CARAFEUpsample else cls(8, normalizer=normalizer)
    features = torch.randn(0, 8, 5, 6, device=device, requires_grad=True)
    output = module.to(device)(features)
    assert output.shape[0] == 0
    output.sum().backward()
    assert features.grad.shape == features.shape
    assert all(not p.grad.any() for p in module.parameters())


def test_channels_last_gives_the_same(device):
    module = CARAFEUpsample(8).to(device)
    features = torch.randn(2, 8, 5, 6, device=device)
    last = module.to(memory_format=torch.channels_last)(features.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(last, module(features)) < 1e-5


def test_modules_copy_and_pickle(tmp_path):
    module = CARAFEDownsample(4, norm=nn.BatchNorm2d, act=nn.ReLU).eval()
    torch.save(module, tmp_path / "module.pt")
    features = torch.randn(1, 4, 5, 5)
    for other in (copy.deepcopy(module), torch.load(tmp_path / "module.pt", weights_only=False)):
        assert torch.equal(other(features), module(features))


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (CARAFEUpsample, {"channels": 0}, "channels must be a positive int, got 0"),
        (CARAFEUpsample, {"channels": 8, "up_kernel": 4}, "up_kernel must be an odd positive int, got 4"),
        (CARAFEUpsample, {"channels": 8, "encoder_kernel": 2}, "encoder_kernel must be an odd positive int, got 2"),
        (CARAFEUpsample, {"channels": 8, "up_group": 3}, "channels must be a multiple of up_group=3, got 8"),
        (CARAFEUpsample, {"channels": 8, "scale_factor": 0.5}, "scale_factor must be at least 1, got 0.5"),
        (CARAFEDownsample, {"channels": 8, "scale_factor": 0}, "scale_factor must be finite and greater than 0, got 0"),
        (CARAFEDownsample, {"channels": 8, "normalizer": "l2"}, "normalizer must be one of softmax, sigmoid, .* 'l2'"),
        (CARAFEDownsample, {"channels": 8, "compressed_channels": -1}, "compressed_channels must be a positive int"),
        (CARAFEDownsample, {"channels": 8, "compressed_channels": None, "act": nn.ReLU}, "admits neither"),
    ],
)
def test_bad_arguments(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls(**arguments)


@pytest.mark.parametrize("shape", [(1, 4, 5, 5), (8, 5, 5)], ids=str)
def test_features_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"features must have shape \(N, 8, H, W\) as channels=8 says, got"):
        CARAFEUpsample(8)(torch.zeros(shape))
