"""CARAFEFPNHead and CARAFEInterpConv: their parents bit for bit without CARAFE++, and CARAFE++ in the right steps."""

import itertools

import pytest
import torch
from torch import nn

pytest.importorskip("mmseg", reason="MMSegmentation is not installed")

from mmcv.cnn import build_upsample_layer
from mmengine.registry import DefaultScope
from mmseg.models.backbones import UNet
from mmseg.models.backbones.unet import InterpConv
from mmseg.models.decode_heads import FPNHead
from mmseg.models.utils import Upsample
from mmseg.registry import MODELS as MMSEG_MODELS

from carafe_plugin.openmmlab.layers import CARAFEUpsample, fit_to_size
from carafe_plugin.openmmlab.mmseg import CARAFEFPNHead, CARAFEInterpConv

# The warning is the parents', about sizes that align_corners=True fits badly.
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:When align_corners=True")]

HEAD = dict(
    feature_strides=[4, 8, 16, 32],
    in_channels=[6] * 4,
    in_index=[0, 1, 2, 3],
    channels=8,
    num_classes=5,
    dropout_ratio=0,
)
STEPS = {"1.1", "2.1", "2.3", "3.1", "3.3", "3.5"}  # the level, and the step in it
PYRAMIDS = {
    "even": [(32, 48), (16, 24), (8, 12), (4, 6)],
    "rounded up": [(25, 43), (13, 22), (7, 11), (4, 6)],
    "rounded down": [(27, 45), (13, 22), (6, 11), (3, 5)],
    "tiny": [(3, 5), (2, 3), (1, 2), (1, 1)],
}
CARAFE_KEYS = {
    f"{conv}.{kind}" for conv, kind in itertools.product(("channel_compressor", "content_encoder"), ("weight", "bias"))
}


def maps(sizes, dtype=torch.float32):
    return [torch.randn(2, 6, *size, dtype=dtype, requires_grad=True) for size in sizes]


def make_distinct(module):
    """Content encoders far from each other, so that no two upsamplers can be confused."""
    for m in module.modules():
        if isinstance(m, CARAFEUpsample):
            nn.init.normal_(m.content_encoder.weight)


def assert_same_bits(module, parent, *inputs):
    parent.load_state_dict(module.state_dict(), strict=True)
    results = []
    for m in (module, parent):
        leaves = [x for group in inputs for x in (group if isinstance(group, list) else [group])] + [*m.parameters()]
        for x in leaves:
            x.grad = None
        out = m(*inputs)
        out.square().sum().backward()
        results.append([out, *(x.grad for x in leaves), *m.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("pyramid", PYRAMIDS)
def test_bilinear_is_fpn_head_bit_for_bit(pyramid, align_corners, dtype):
    for norm_cfg in (None, dict(type="BN")):
        options = dict(HEAD, align_corners=align_corners, norm_cfg=norm_cfg)
        head = CARAFEFPNHead(**options, carafe_cfg=dict(type="bilinear", align_corners=align_corners))
        assert_same_bits(head.to(dtype), FPNHead(**options).to(dtype), maps(PYRAMIDS[pyramid], dtype))


def test_nearest_is_fpn_head_with_nearest_steps():
    parent = FPNHead(**HEAD)
    for m in parent.modules():
        if isinstance(m, Upsample):
            m.mode, m.align_corners = "nearest", None
    assert_same_bits(CARAFEFPNHead(**HEAD, carafe_cfg=dict(type="nearest")), parent, maps(PYRAMIDS["rounded up"]))


@pytest.mark.parametrize("pyramid", PYRAMIDS)
def test_fpn_head_written_out(pyramid):
    torch.manual_seed(0)
    head = CARAFEFPNHead(**HEAD, carafe_cfg=dict(compressed_channels=4))
    make_distinct(head)
    sizes, inputs = PYRAMIDS[pyramid], maps(PYRAMIDS[pyramid])
    expected = head.scale_heads[0][0](inputs[0])
    for level in (1, 2, 3):
        x = inputs[level]
        for step, reached in enumerate(reversed(range(level))):
            convolved = head.scale_heads[level][2 * step](x)
            x = fit_to_size(head.scale_heads[level][2 * step + 1](convolved), sizes[reached])
        expected = expected + x
    assert torch.equal(head(inputs), head.conv_seg(expected))


def test_fpn_head_fits_the_levels_that_it_has():
    """Strides 4 and 16 alone: two steps of 2, and only the second one has a level to fit."""
    head = CARAFEFPNHead(**dict(HEAD, feature_strides=[4, 16], in_channels=[6, 6], in_index=[0, 1]))
    assert head(maps([(25, 43), (7, 11)])).shape == (2, 5, 25, 43)


def test_fpn_heads_checkpoint_gradients_and_initialisation():
    torch.manual_seed(0)
    parent = FPNHead(**HEAD)
    torch.manual_seed(0)
    head = CARAFEFPNHead(**HEAD)
    assert all(torch.equal(p, head.get_parameter(name)) for name, p in parent.named_parameters())
    upsamplers = {name: m for name, m in head.named_modules() if isinstance(m, CARAFEUpsample)}
    assert set(upsamplers) == {f"scale_heads.{step}" for step in STEPS}
    missing, unexpected = head.load_state_dict(parent.state_dict(), strict=False)
    assert not unexpected
    assert set(missing) == {f"scale_heads.{step}.{key}" for step, key in itertools.product(STEPS, CARAFE_KEYS)}
    head.init_weights()
    for upsampler in upsamplers.values():
        assert abs(upsampler.content_encoder.weight.std().item() - 0.001) < 1e-4
    head(maps(PYRAMIDS["rounded up"])).square().sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("options", "carafe_cfg", "error", "message"),
    [
        ({}, "carafe", TypeError, "carafe_cfg must be a dictionary or None, got 'carafe'"),
        ({}, dict(up_kernal=3), TypeError, "carafe_cfg=.*'up_kernal'"),
        ({}, dict(scale_factor=2), ValueError, "carafe_cfg must not set 'scale_factor'"),
        ({}, dict(type="CARAFEUpsampel"), KeyError, "the type 'CARAFEUpsampel' is not registered"),
        (dict(feature_strides=[4] * 4), None, ValueError, r"feature_strides=\[4, 4, 4, 4\] leave nothing to upsample"),
    ],
)
def test_bad_arguments_of_fpn_head_are_named(options, carafe_cfg, error, message):
    with pytest.raises(error, match=message):
        CARAFEFPNHead(**dict(HEAD, **options), carafe_cfg=carafe_cfg)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("conv_first", [False, True])
@pytest.mark.parametrize("with_cp", [False, True])
def test_interpolating_it_is_interp_conv_bit_for_bit(conv_first, with_cp, mode):
    align = dict(align_corners=False) if mode == "bilinear" else {}
    options = dict(conv_first=conv_first, with_cp=with_cp, kernel_size=3, padding=1)
    for dtype, scale_factor in itertools.product((torch.float32, torch.float64), (2, 3)):
        parent = InterpConv(6, 4, **options, upsample_cfg=dict(scale_factor=scale_factor, mode=mode, **align))
        step = CARAFEInterpConv(
            6, 4, **options, upsample_cfg=dict(scale_factor=scale_factor), carafe_cfg=dict(type=mode, **align)
        )
        x = torch.randn(2, 6, 5, 7, dtype=dtype, requires_grad=True)
        assert_same_bits(step.to(dtype), parent.to(dtype), x)


@pytest.mark.parametrize("scale_factor", [2, 3])
@pytest.mark.parametrize("conv_first", [False, True])
def test_interp_conv_written_out(conv_first, scale_factor):
    options = dict(conv_first=conv_first, upsample_cfg=dict(scale_factor=scale_factor, mode="bilinear"))
    parent, step = InterpConv(6, 4, **options), CARAFEInterpConv(6, 4, **options, carafe_cfg=dict(up_kernel=3))
    place = 1 if conv_first else 0
    upsampler, conv = step.interp_upsample[place], step.interp_upsample[1 - place]
    assert isinstance(upsampler, CARAFEUpsample)
    assert (upsampler.channels, upsampler.kernel_size, upsampler.up) == (4 if conv_first else 6, 3, scale_factor)
    missing, unexpected = step.load_state_dict(parent.state_dict(), strict=False)
    assert not unexpected
    assert set(missing) == {f"interp_upsample.{place}.{key}" for key in CARAFE_KEYS}
    x = torch.randn(2, 6, 5, 7)
    out = step(x)
    assert torch.equal(out, upsampler(conv(x)) if conv_first else conv(upsampler(x)))
    assert out.shape == (2, 4, 5 * scale_factor, 7 * scale_factor)


def test_interp_conv_can_start_as_its_parent():
    """``init="bilinear"`` with the least spread: inside the outermost row and column, which the parent repeats."""
    parent, step = InterpConv(6, 4).eval(), CARAFEInterpConv(6, 4, carafe_cfg=dict(init="bilinear", init_spread=1e-6))
    step.eval().load_state_dict(parent.state_dict(), strict=False)
    x = torch.randn(2, 6, 5, 7)
    difference = (step(x) - parent(x)).abs()
    assert difference[..., 1:-1, 1:-1].max() < 1e-5 < difference.max()


@pytest.mark.parametrize("with_cp", [False, True])
@pytest.mark.parametrize("name", ["CARAFEInterpConv", "carafe_plugin.openmmlab.mmseg.CARAFEInterpConv"])
def test_unet_takes_it_by_its_protocol(name, with_cp):
    torch.manual_seed(0)
    options = dict(base_channels=4, num_stages=3, strides=(1, 1, 1), enc_num_convs=(1, 1, 1), dec_num_convs=(1, 1))
    options.update(downsamples=(True, True), enc_dilations=(1, 1, 1), dec_dilations=(1, 1), with_cp=with_cp)
    with DefaultScope.overwrite_default_scope("mmseg"):
        parent = UNet(**options)
        unet = UNet(**options, upsample_cfg=dict(type=name, carafe_cfg=dict(compressed_channels=8)))
    upsamplers = {key: m for key, m in unet.named_modules() if isinstance(m, CARAFEUpsample)}
    places = {f"decoder.{i}.upsample.interp_upsample.0" for i in range(2)}
    assert set(upsamplers) == places
    missing, unexpected = unet.load_state_dict(parent.state_dict(), strict=False)
    assert not unexpected
    assert set(missing) == {f"{place}.{key}" for place, key in itertools.product(places, CARAFE_KEYS)}
    unet.init_weights()  # Kaiming for every convolution, which must not reach the content encoders
    for upsampler in upsamplers.values():
        assert abs(upsampler.content_encoder.weight.std().item() - 0.001) < 2e-4
    images = torch.randn(2, 3, 12, 20, requires_grad=True)  # checkpointing needs an input that requires a gradient
    outs = unet(images)
    assert [tuple(out.shape[2:]) for out in outs] == [(3, 5), (6, 10), (12, 20)]
    outs[-1].square().sum().backward()
    for key, upsampler in upsamplers.items():
        for kind, parameter in upsampler.named_parameters():
            assert parameter.grad is not None, f"{key}.{kind}"
            assert parameter.grad.abs().max() > 0, f"{key}.{kind}"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(carafe_cfg="carafe"), TypeError, "carafe_cfg must be a dictionary or None, got 'carafe'"),
        (dict(carafe_cfg=dict(up_kernal=3)), TypeError, "carafe_cfg=.*'up_kernal'"),
        (dict(carafe_cfg=dict(channels=3)), ValueError, "carafe_cfg must not set 'channels'"),
        (dict(carafe_cfg=dict(type="CARAFEUpsampel")), KeyError, "the type 'CARAFEUpsampel' is not registered"),
        (dict(upsample_cfg=dict(size=(8, 8))), ValueError, r"upsample_cfg must set scale_factor .*got size=\(8, 8\)"),
        (dict(upsample_cfg=dict(scale_factor=1.5)), ValueError, "upsample_cfg must set .*scale_factor=1.5"),
        (
            dict(upsample_cfg=dict(scale_factor=(2, 3))),
            ValueError,
            r"upsample_cfg must set .*scale_factor=\(2.0, 3.0\)",
        ),
    ],
)
def test_bad_arguments_of_interp_conv_are_named(options, error, message):
    with pytest.raises(error, match=message):
        CARAFEInterpConv(6, 4, **options)


@pytest.mark.parametrize("scope", [None, "mmseg"])
def test_short_names_and_full_paths(scope):
    with DefaultScope.overwrite_default_scope(scope):
        for prefix in ("", "carafe_plugin.openmmlab.mmseg."):
            assert type(MMSEG_MODELS.build(dict(HEAD, type=f"{prefix}CARAFEFPNHead"))) is CARAFEFPNHead
            cfg = dict(type=f"{prefix}CARAFEInterpConv", in_channels=6, out_channels=4)
            assert type(MMSEG_MODELS.build(cfg)) is CARAFEInterpConv
            if scope or prefix:  # build_upsample_layer looks in the root registry where no scope is set
                assert type(build_upsample_layer(cfg)) is CARAFEInterpConv
