"""CARAFEUPerHead: UPerHead bit for bit with its switches off, the paper's PPM, FPN and FUSE with them on."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("mmseg", reason="MMSegmentation is not installed")

from mmengine.registry import DefaultScope
from mmseg.models.decode_heads import UPerHead
from mmseg.registry import MODELS as MMSEG_MODELS

from carafe_plugin.openmmlab.layers import CARAFEUpsample, fit_to_size
from carafe_plugin.openmmlab.mmseg import CARAFEUPerHead

# The warning is the parent's, about sizes that align_corners=True fits badly.
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:When align_corners=True")]

IN_CHANNELS = [4, 6, 8, 10]
SMALL = dict(in_channels=IN_CHANNELS, in_index=[0, 1, 2, 3], channels=8, num_classes=5, dropout_ratio=0)
OFF = dict(ppm=False, fpn=False, fuse=False)
COMBINATIONS = [dict(zip(OFF, on, strict=True)) for on in itertools.product([False, True], repeat=3)]
LISTS = dict(ppm=("ppm_upsamplers", 4), fpn=("upsample_modules", 3), fuse=("fuse_upsamplers", 3))
PYRAMIDS = {
    "even": [(32, 48), (16, 24), (8, 12), (4, 6)],
    "rounded up": [(25, 43), (13, 22), (7, 11), (4, 6)],
    "rounded down": [(27, 45), (13, 22), (6, 11), (3, 5)],
    "tiny": [(3, 5), (2, 3), (1, 2), (1, 1)],
}


def maps(sizes, batch=2, dtype=torch.float32):
    return [
        torch.randn(batch, c, *size, dtype=dtype, requires_grad=True)
        for c, size in zip(IN_CHANNELS, sizes, strict=True)
    ]


def assert_same_bits(head, parent, inputs):
    parent.load_state_dict(head.state_dict(), strict=True)
    out, expected = head(inputs), parent(inputs)
    assert torch.equal(out, expected)
    gradients = [
        torch.autograd.grad(y.square().sum(), [*inputs, *h.parameters()]) for h, y in ((head, out), (parent, expected))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(torch.equal(b, head.get_buffer(name)) for name, b in parent.named_buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("pyramid", PYRAMIDS)
def test_switched_off_it_is_the_parent_bit_for_bit(pyramid, align_corners, dtype):
    bilinear = dict(type="bilinear", align_corners=align_corners, ppm=False, fuse=False)  # the FPN's, as a module
    for carafe_cfg, norm_cfg, training in itertools.product(
        (OFF, bilinear), (None, dict(type="BN")), (False, True) if pyramid != "tiny" else (False,)
    ):
        options = dict(SMALL, align_corners=align_corners, norm_cfg=norm_cfg)
        torch.manual_seed(0)
        head = CARAFEUPerHead(**options, carafe_cfg=carafe_cfg).to(dtype).train(training)
        torch.manual_seed(0)
        parent = UPerHead(**options).to(dtype).train(training)
        assert all(torch.equal(p, head.get_parameter(name)) for name, p in parent.named_parameters())
        assert_same_bits(head, parent, maps(PYRAMIDS[pyramid], dtype=dtype))


@pytest.mark.parametrize("switches", COMBINATIONS, ids=lambda s: "+".join(k for k in s if s[k]) or "none")
def test_switches_modules_checkpoints_and_gradients(switches):
    torch.manual_seed(0)
    parent = UPerHead(**SMALL)
    torch.manual_seed(0)
    head = CARAFEUPerHead(**SMALL, carafe_cfg=switches)
    # The parent's parameters come first, so that a seed gives the same ones with and without CARAFE++.
    assert all(torch.equal(p, head.get_parameter(name)) for name, p in parent.named_parameters())
    expected = {f"{name}.{i}" for key, (name, n) in LISTS.items() if switches[key] for i in range(n)}
    assert {name for name, m in head.named_modules() if isinstance(m, CARAFEUpsample)} == expected

    missing, unexpected = head.load_state_dict(parent.state_dict(), strict=False)
    assert not unexpected
    convs = itertools.product(("channel_compressor", "content_encoder"), ("weight", "bias"))
    assert set(missing) == {f"{m}.{conv}.{kind}" for m, (conv, kind) in itertools.product(expected, convs)}

    head(maps(PYRAMIDS["rounded up"])).square().sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_default_is_the_papers_ten_modules_at_their_channels():
    """The counts are worked by hand: C * 64 + 64 for the compressor, 64 * 9 * 100 + 100 for the encoder."""
    with torch.device("meta"):
        head = CARAFEUPerHead(**dict(SMALL, in_channels=[256, 512, 1024, 2048], channels=512))
    upsamplers = {name: m for name, m in head.named_modules() if isinstance(m, CARAFEUpsample)}
    assert len(upsamplers) == 10
    assert [m.channels for m in head.ppm_upsamplers] == [512] * 4
    assert [m.channels for m in head.upsample_modules] == [512] * 3
    assert [m.channels for m in head.fuse_upsamplers] == [1536, 1024, 512]
    assert {(m.kernel_size, m.compressed_channels, m.up, m.down) for m in upsamplers.values()} == {(5, 64, 2, 1)}
    assert sum(p.numel() for m in upsamplers.values() for p in m.parameters()) == 8 * 90_532 + 123_300 + 156_068


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("pyramid", PYRAMIDS)
def test_the_papers_head_written_out(pyramid, align_corners):
    torch.manual_seed(0)
    head = CARAFEUPerHead(**SMALL, align_corners=align_corners, carafe_cfg=dict(compressed_channels=4))
    for m in head.modules():
        if isinstance(m, CARAFEUpsample):
            nn.init.normal_(m.content_encoder.weight)  # so that no two upsamplers can be confused
    sizes, inputs = PYRAMIDS[pyramid], maps(PYRAMIDS[pyramid])
    height, width = sizes[3]
    half = (-(-height // 2), -(-width // 2))
    pooled = [inputs[3]]
    for scale, (_, conv), upsampler in zip((1, 2, 3, 6), head.psp_modules, head.ppm_upsamplers, strict=True):
        halfway = F.interpolate(
            conv(F.adaptive_avg_pool2d(inputs[3], scale)), half, mode="bilinear", align_corners=align_corners
        )
        pooled.append(upsampler(halfway)[..., :height, :width])
    p5 = head.bottleneck(torch.cat(pooled, dim=1))
    laterals = [conv(x) for conv, x in zip(head.lateral_convs, inputs[:3], strict=True)] + [p5]
    for i in (2, 1, 0):
        laterals[i] = laterals[i] + fit_to_size(head.upsample_modules[i](laterals[i + 1]), sizes[i])
    p2, p3, p4 = (conv(x) for conv, x in zip(head.fpn_convs, laterals[:3], strict=True))
    p4_p5 = torch.cat([p4, fit_to_size(head.fuse_upsamplers[2](p5), sizes[2])], dim=1)
    p3_p4_p5 = torch.cat([p3, fit_to_size(head.fuse_upsamplers[1](p4_p5), sizes[1])], dim=1)
    fused = torch.cat([p2, fit_to_size(head.fuse_upsamplers[0](p3_p4_p5), sizes[0])], dim=1)
    assert torch.equal(head(inputs), head.conv_seg(head.fpn_bottleneck(fused)))


def test_fused_channels_lie_as_the_parents():
    """Nearest upsampling by 2 in turn is nearest upsampling by 8 at once, so the parent's order can be compared."""
    head = CARAFEUPerHead(**SMALL, carafe_cfg=dict(type="nearest", ppm=False, fpn=False))
    levels, fused = [], []
    for conv in (*head.fpn_convs, head.bottleneck):
        conv.register_forward_hook(lambda module, args, out: levels.append(out))
    head.fpn_bottleneck.register_forward_pre_hook(lambda module, args: fused.append(args[0]))
    head(maps(PYRAMIDS["even"]))
    p5, p2, p3, p4 = levels  # in the order of computation
    expected = [p2] + [F.interpolate(p, scale_factor=s) for p, s in ((p3, 2), (p4, 4), (p5, 8))]
    assert torch.equal(fused[0], torch.cat(expected, dim=1))


def test_nearest_and_bilinear_take_the_same_places():
    for mode in ("nearest", "bilinear"):
        head = CARAFEUPerHead(**SMALL, carafe_cfg=dict(type=mode))
        assert head.state_dict().keys() == UPerHead(**SMALL).state_dict().keys()
        halfway = []
        head.ppm_upsamplers[0].register_forward_hook(lambda module, args, out, h=halfway: h.append((args[0], out)))
        assert head(maps(PYRAMIDS["rounded down"])).shape == (2, 5, 27, 45)
        ((before, after),) = halfway
        assert before.shape[2:] == (2, 3)
        assert torch.equal(after, F.interpolate(before, (3, 5), mode=mode))


def test_initialisation_is_the_papers():
    head = CARAFEUPerHead(**SMALL)
    head.init_weights()
    upsamplers = [m for m in head.modules() if isinstance(m, CARAFEUpsample)]
    assert len(upsamplers) == 10
    for upsampler in upsamplers:
        assert abs(upsampler.content_encoder.weight.std().item() - 0.001) < 1e-4
        assert upsampler.content_encoder.bias.abs().max() == 0
    assert abs(head.conv_seg.weight.std().item() - 0.01) < 5e-3


@pytest.mark.parametrize("scope", [None, "mmseg"])
def test_short_name_and_full_path(scope):
    with DefaultScope.overwrite_default_scope(scope):
        for name in ("CARAFEUPerHead", "carafe_plugin.openmmlab.mmseg.CARAFEUPerHead"):
            assert type(MMSEG_MODELS.build(dict(SMALL, type=name))) is CARAFEUPerHead


def test_carafe_cfg_reaches_every_upsampler_and_survives():
    cfg = dict(type="CARAFEUpsample", ppm=True, up_kernel=3, compressed_channels=16, norm_cfg=dict(type="BN"))
    head = CARAFEUPerHead(**SMALL, carafe_cfg=cfg)
    upsamplers = [m for m in head.modules() if isinstance(m, CARAFEUpsample)]
    assert [(m.kernel_size, m.compressed_channels) for m in upsamplers] == [(3, 16)] * 10
    assert all(isinstance(m.compressor_norm, nn.BatchNorm2d) for m in upsamplers)
    assert cfg == dict(type="CARAFEUpsample", ppm=True, up_kernel=3, compressed_channels=16, norm_cfg=dict(type="BN"))


def test_a_head_of_one_level_has_ppm_alone():
    options = dict(SMALL, in_channels=[10], in_index=[0])
    head = CARAFEUPerHead(**options)
    assert {name for name, m in head.named_modules() if isinstance(m, CARAFEUpsample)} == {
        f"ppm_upsamplers.{i}" for i in range(4)
    }
    assert head([torch.randn(2, 10, 7, 5)]).shape == (2, 5, 7, 5)


@pytest.mark.parametrize(
    ("options", "carafe_cfg", "error", "message"),
    [
        ({}, "carafe", TypeError, "carafe_cfg must be a dictionary or None, got 'carafe'"),
        ({}, dict(ppm="yes"), TypeError, "carafe_cfg: the switch 'ppm' must be True or False, got 'yes'"),
        ({}, dict(fuse=None), TypeError, "carafe_cfg: the switch 'fuse' must be True or False, got None"),
        ({}, dict(fpm=True), TypeError, "carafe_cfg=.*'fpm'.*the switches are ppm, fpn, fuse"),
        ({}, dict(up_kernal=3), TypeError, "carafe_cfg=.*'up_kernal'"),
        ({}, dict(up_kernel=4), ValueError, "carafe_cfg=.*odd positive int, got 4"),
        ({}, dict(channels=3), ValueError, "carafe_cfg must not set 'channels'"),
        ({}, dict(type="CARAFEUpsampel"), KeyError, "carafe_cfg: the type 'CARAFEUpsampel' is not registered"),
        (dict(pool_scales=()), dict(ppm=True), ValueError, "ppm=True, .* nothing to upsample: pool_scales is empty"),
        (dict(in_channels=[10], in_index=[0]), dict(fpn=True), ValueError, "fpn=True, .*in_channels has one level"),
        (dict(in_channels=[10], in_index=[0]), dict(fuse=True), ValueError, "fuse=True, .*in_channels has one level"),
    ],
)
def test_bad_arguments_are_named(options, carafe_cfg, error, message):
    with pytest.raises(error, match=message):
        CARAFEUPerHead(**dict(SMALL, **options), carafe_cfg=carafe_cfg)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device on this machine")
def test_cuda_agrees_with_cpu(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    head, inputs = CARAFEUPerHead(**SMALL), maps(PYRAMIDS["rounded down"])
    expected = head(inputs)
    # The same float32 sums in another order, through six convolutions on the longest path.
    torch.testing.assert_close(head.cuda()([x.cuda() for x in inputs]).cpu(), expected, atol=1e-5, rtol=1e-4)
