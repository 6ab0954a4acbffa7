"""CARAFEFPN and CARAFEPAFPN: their parents bit for bit without CARAFE++, and the right top-down path with it."""

import itertools

import pytest
import torch
from torch import nn

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmdet.models.necks import FPN, PAFPN
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.registry import DefaultScope

from carafe_plugin.openmmlab.layers import CARAFEUpsample, fit_to_size
from carafe_plugin.openmmlab.mmdet import CARAFEFPN, CARAFEPAFPN
from carafe_plugin.testing import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

IN_CHANNELS = [4, 6, 8, 10]
NECKS = {CARAFEFPN: FPN, CARAFEPAFPN: PAFPN}
PYRAMIDS = {
    "even": [(32, 48), (16, 24), (8, 12), (4, 6)],
    "rounded up": [(25, 43), (13, 22), (7, 11), (4, 6)],
    "rounded down": [(27, 45), (13, 22), (6, 11), (3, 5)],
    "tiny": [(3, 5), (2, 3), (1, 2), (1, 1)],
}
# PAFPN's own bottom-up path adds maps of ceil(H / 2) rows to those of the backbone: it fails where that rounds down.
PAFPN_REFUSES = ("rounded down",)
# (start_level, end_level, extra levels); an end_level below the last admits none.
LEVELS = [(0, -1, 0), (0, -1, 1), (1, -1, 2), (0, 3, 3), (1, 2, 0), (0, 2, 0), (3, -1, 1)]


def maps(sizes, batch=2, in_channels=IN_CHANNELS):
    return [torch.randn(batch, c, *size, requires_grad=True) for c, size in zip(in_channels, sizes, strict=True)]


def level_options(start, end, extra):
    used = (len(IN_CHANNELS) if end == -1 else end + 1) - start
    return dict(start_level=start, end_level=end, num_outs=used + extra)


def gradients(neck, inputs, outs):
    sources = [x for x in (*inputs, *neck.parameters()) if x.requires_grad]
    return torch.autograd.grad(sum((out**2).sum() for out in outs), sources, allow_unused=True)


def assert_same_bits(neck, parent, inputs):
    parent.load_state_dict(neck.state_dict(), strict=True)
    outs, parent_outs = neck(inputs), parent(inputs)
    assert len(outs) == len(parent_outs)
    assert all(torch.equal(a, b) for a, b in zip(outs, parent_outs, strict=True))
    for a, b in zip(gradients(neck, inputs, outs), gradients(parent, inputs, parent_outs), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    for name, buffer in parent.named_buffers():
        assert torch.equal(buffer, neck.get_buffer(name))


@pytest.mark.parametrize("add_extra_convs", [False, True, "on_input", "on_lateral", "on_output"])
@pytest.mark.parametrize("neck_type", NECKS)
def test_nearest_is_the_parent_bit_for_bit(neck_type, add_extra_convs):
    """Every choice of levels on every pyramid; norm, training and ReLU before extra levels take turns."""
    conv_norm_act = dict(norm_cfg=dict(type="BN"), act_cfg=dict(type="ReLU"))
    norms = [dict(), conv_norm_act, dict(conv_norm_act, no_norm_on_lateral=True)]
    turns = itertools.cycle(itertools.product(norms, [False, True], [True, False]))
    pyramids = [sizes for name, sizes in PYRAMIDS.items() if neck_type is CARAFEFPN or name not in PAFPN_REFUSES]
    for levels, sizes in itertools.product(LEVELS, pyramids):
        norm, relu, training = next(turns)
        options = dict(level_options(*levels), add_extra_convs=add_extra_convs, relu_before_extra_convs=relu, **norm)
        neck = neck_type(IN_CHANNELS, 8, carafe_cfg=dict(type="nearest"), **options).train(training)
        parent = NECKS[neck_type](IN_CHANNELS, 8, **options).train(training)
        assert_same_bits(neck, parent, maps(sizes))


@pytest.mark.parametrize("align_corners", [None, False, True])
@pytest.mark.parametrize("pyramid", PYRAMIDS)
def test_bilinear_is_the_parent_bit_for_bit(pyramid, align_corners):
    parent = FPN(IN_CHANNELS, 8, 5, upsample_cfg=dict(mode="bilinear", align_corners=align_corners))
    neck = CARAFEFPN(IN_CHANNELS, 8, 5, carafe_cfg=dict(type="bilinear", align_corners=align_corners))
    assert_same_bits(neck, parent, maps(PYRAMIDS[pyramid]))


@pytest.mark.parametrize("pyramid", ["even", "rounded up", "tiny"])
@pytest.mark.parametrize("neck_type", NECKS)
def test_can_start_as_its_parent(neck_type, pyramid):
    """``init="nearest"`` with the least spread: the parent's maps on every pyramid that is rounded up."""
    neck = neck_type(IN_CHANNELS, 8, 5, carafe_cfg=dict(init="nearest", init_spread=1e-6))
    parent = NECKS[neck_type](IN_CHANNELS, 8, 5)
    neck.load_state_dict(parent.state_dict(), strict=False)
    inputs = maps(PYRAMIDS[pyramid])
    for out, expected in zip(neck(inputs), parent(inputs), strict=True):
        assert relative_error(out, expected) < 1e-5


@pytest.mark.parametrize("pyramid", PYRAMIDS)
@pytest.mark.parametrize("neck_type", NECKS)
def test_upsample_module_i_feeds_lateral_i(neck_type, pyramid):
    """The top-down path, written out: from the coarsest level, upsample, fit, add; then the parent's convolutions."""
    torch.manual_seed(0)
    neck = neck_type(IN_CHANNELS, 8, 4, carafe_cfg=dict(compressed_channels=4))
    for upsampler in neck.upsample_modules:
        nn.init.normal_(upsampler.content_encoder.weight)  # so that no two upsamplers can be confused
    inputs = maps(PYRAMIDS[pyramid])
    expected = [conv(x) for conv, x in zip(neck.lateral_convs, inputs, strict=True)]
    for i in (2, 1, 0):
        expected[i] = expected[i] + fit_to_size(neck.upsample_modules[i](expected[i + 1]), PYRAMIDS[pyramid][i])
    finest = neck(inputs)[0]
    assert torch.equal(finest, neck.fpn_convs[0](expected[0]))
    if neck_type is CARAFEFPN:
        for out, conv, lateral in zip(neck(inputs), neck.fpn_convs, expected, strict=True):
            assert torch.equal(out, conv(lateral))
    else:
        bottom_up = [conv(lateral) for conv, lateral in zip(neck.fpn_convs, expected, strict=True)]
        for i in range(3):
            size = PYRAMIDS[pyramid][i + 1]
            bottom_up[i + 1] = bottom_up[i + 1] + fit_to_size(neck.downsample_convs[i](bottom_up[i]), size)
            assert torch.equal(neck(inputs)[i + 1], neck.pafpn_convs[i](bottom_up[i + 1]))


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("neck_type", NECKS)
def test_number_of_upsamplers_and_their_gradients(neck_type, levels):
    options = level_options(*levels)
    neck = neck_type(IN_CHANNELS, 8, **options)
    laterals = options["num_outs"] - levels[2]
    assert len(neck.upsample_modules) == laterals - 1
    assert all(isinstance(m, CARAFEUpsample) for m in neck.upsample_modules)
    inputs = maps(PYRAMIDS["rounded up"])
    sum((out**2).sum() for out in neck(inputs)).backward()
    for name, parameter in neck.upsample_modules.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("neck_type", NECKS)
def test_parents_checkpoint_loads(neck_type):
    parent = NECKS[neck_type](IN_CHANNELS, 8, 5)
    neck = neck_type(IN_CHANNELS, 8, 5)
    missing, unexpected = neck.load_state_dict(parent.state_dict(), strict=False)
    assert not unexpected
    assert set(missing) == {
        f"upsample_modules.{i}.{conv}.{kind}"
        for i in range(3)
        for conv in ("channel_compressor", "content_encoder")
        for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("neck_type", NECKS)
def test_initialisation_is_the_papers(neck_type):
    neck = neck_type([64] * 4, 64, 5)
    neck.init_weights()
    for upsampler in neck.upsample_modules:
        assert abs(upsampler.content_encoder.weight.std().item() - 0.001) < 1e-4
        assert upsampler.content_encoder.bias.abs().max() == 0
    assert neck.fpn_convs[0].conv.weight.std() > 0.01


@pytest.mark.parametrize("scope", [None, "mmdet"])
@pytest.mark.parametrize("name", ["CARAFEFPN", "CARAFEPAFPN"])
def test_short_name_and_full_path(name, scope):
    cfg = dict(in_channels=IN_CHANNELS, out_channels=8, num_outs=5)
    with DefaultScope.overwrite_default_scope(scope):
        short = MMDET_MODELS.build(dict(cfg, type=name))
        full = MMDET_MODELS.build(dict(cfg, type=f"carafe_plugin.openmmlab.mmdet.{name}"))
    assert type(short) is type(full)


@pytest.mark.parametrize("neck_type", NECKS)
def test_carafe_cfg_reaches_every_upsampler_and_survives(neck_type):
    cfg = dict(type="CARAFEUpsample", up_kernel=3, compressed_channels=16, norm_cfg=dict(type="BN"))
    neck = neck_type(IN_CHANNELS, 8, 4, carafe_cfg=cfg)
    assert [(m.kernel_size, m.compressed_channels) for m in neck.upsample_modules] == [(3, 16)] * 3
    assert cfg == dict(type="CARAFEUpsample", up_kernel=3, compressed_channels=16, norm_cfg=dict(type="BN"))


def test_upsample_cfg_of_a_replaced_fpn_is_accepted():
    """Stock configurations set it (YOLACT, CrowdDet); changing the type alone must do."""
    neck = CARAFEFPN(IN_CHANNELS, 8, 4, upsample_cfg=dict(mode="bilinear"))
    assert all(isinstance(m, CARAFEUpsample) for m in neck.upsample_modules)


@pytest.mark.parametrize("neck_type", NECKS)
def test_empty_batch(neck_type):
    neck = neck_type(IN_CHANNELS, 8, 5)
    outs = neck(maps(PYRAMIDS["rounded down"], batch=0))
    assert [out.shape for out in outs[:4]] == [(0, 8, *size) for size in PYRAMIDS["rounded down"]]


@pytest.mark.parametrize("neck_type", NECKS)
def test_bad_input_is_named(neck_type):
    neck = neck_type(IN_CHANNELS, 8, 4)
    inputs = maps(PYRAMIDS["even"])
    with pytest.raises(ValueError, match=r"inputs must hold 4 maps \(in_channels\), got 3"):
        neck(inputs[:3])
    inputs[2] = torch.randn(2, 7, 8, 12)
    with pytest.raises(ValueError, match=r"inputs\[2\] must have shape \(N, 8, H, W\) as in_channels\[2\]=8 says, got"):
        neck(inputs)
    with pytest.raises(TypeError, match=r"carafe_cfg=.*up_kernal"):
        neck_type(IN_CHANNELS, 8, 4, carafe_cfg=dict(up_kernal=5))


@pytest.mark.cuda
@pytest.mark.parametrize("neck_type", NECKS)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device on this machine")
def test_cuda_agrees_with_cpu(neck_type, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    neck = neck_type(IN_CHANNELS, 8, 5)
    inputs = maps(PYRAMIDS["rounded down"])
    expected = neck(inputs)
    for out, wanted in zip(neck.cuda()([x.cuda() for x in inputs]), expected, strict=True):
        # The same float32 sums in another order, through three convolutions on the longest path.
        torch.testing.assert_close(out.cpu(), wanted, atol=1e-5, rtol=1e-4)
