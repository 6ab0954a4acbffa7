"""The ResNets with CARAFE++: their parents bit for bit without it, and where it stands and what it computes with it."""

import copy
import doctest
import importlib
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from resnets import (
    DCN,
    NAMES,
    OFF,
    STRIDED,
    TOOLBOXES,
    assert_same,
    combinations,
    gradients,
    image,
    norms,
    ours,
    outputs,
    parent,
    places,
    randomise,
)
from torch import nn

pytest.importorskip("mmengine", reason="mmengine is not installed")
pytest.importorskip("mmcv", reason="mmcv is not installed")

from mmcv.cnn.utils import fuse_conv_bn
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope

from carafe_plugin.openmmlab.layers import CARAFEDownsample
from carafe_plugin.openmmlab.resnet import DownsampledConv2d
from carafe_plugin.testing import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

BOTTLENECKS = dict(depth=50, num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(0, 1, 2), base=4)
VARIANTS = {
    "plain": {},
    "bottlenecks": dict(BOTTLENECKS),
    "caffe": dict(BOTTLENECKS, style="caffe", norm_eval=True),
    "frozen": dict(frozen_stages=2, norm_eval=True, with_cp=True),
    "dilated": dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), zero_init_residual=False),
    "deep stem, pooled shortcuts": dict(deep_stem=True, avg_down=True),
    "deformable": dict(BOTTLENECKS, **DCN, stage_with_dcn=(False, True, True)),
}


@pytest.mark.parametrize(("toolbox", "name"), combinations(TOOLBOXES, NAMES))
def test_each_class_is_found_by_its_names_and_documented(toolbox, name):
    cls = type(ours(toolbox, name))
    registry = importlib.import_module(f"{toolbox}.registry").MODELS
    assert registry.module_dict[f"CARAFE{name}"] is cls
    assert registry.get(f"carafe_plugin.openmmlab.{toolbox}.CARAFE{name}") is cls
    assert pickle.loads(pickle.dumps(cls)) is cls
    assert repr(cls) == f"<class 'carafe_plugin.openmmlab.{toolbox}.CARAFE{name}'>"
    (examples,) = (found for found in doctest.DocTestFinder(recurse=False).find(cls) if found.examples)
    assert doctest.DocTestRunner().run(examples).failed == 0


@pytest.mark.parametrize(
    ("toolbox", "name", "variant"),
    combinations(TOOLBOXES, ["ResNet"], VARIANTS) + combinations(TOOLBOXES, NAMES[1:], ["plain"]),
)
def test_without_carafe_the_parent_bit_for_bit(toolbox, name, variant):
    if variant == "deformable" and toolbox == "mmpretrain":
        with pytest.raises(TypeError, match="dcn"):
            ours(toolbox, **VARIANTS[variant])
        return
    variant = VARIANTS[variant]
    nets = []
    off = dict(OFF, stages=OFF["stages"][: variant.get("num_stages", 4)])
    for build, more in ((ours, dict(carafe_cfg=off)), (parent, {})):
        torch.manual_seed(0)
        net = build(toolbox, name, **copy.deepcopy(variant), **more)
        net.init_weights()
        nets.append(net)
    assert_same(*(net.state_dict() for net in nets))
    assert nets[0].downsampler_names == []
    x = image(33, 48)
    for training in (False, True):
        results = []
        for net in nets:
            net.train(training)
            outs = outputs(net, x)
            results.append((outs, gradients(net, outs)))
        (out, grad), (expected, expected_grad) = results
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
        assert_same(grad, expected_grad)
    assert_same(*(net.state_dict() for net in nets))


@pytest.mark.parametrize("toolbox", TOOLBOXES)
@pytest.mark.parametrize("name", NAMES)
def test_type_alone_gives_seven(toolbox, name):
    """A stock configuration of depth 50 with the type changed, through the toolbox's registry, by either name."""
    pytest.importorskip(toolbox, reason=f"{toolbox} is not installed")
    registry = importlib.import_module(f"{toolbox}.registry").MODELS
    cls = getattr(importlib.import_module(f"carafe_plugin.openmmlab.{toolbox}"), f"CARAFE{name}")
    with DefaultScope.overwrite_default_scope(toolbox):
        net = registry.build(dict(type=f"carafe_plugin.openmmlab.{toolbox}.CARAFE{name}", depth=50))
        assert type(net) is cls is registry.get(f"CARAFE{name}")
    found = [key for key, module in net.named_modules() if isinstance(module, CARAFEDownsample)]
    assert sorted(net.downsampler_names) == sorted(found)
    assert places(net) == STRIDED["Bottleneck"]
    channels = []
    for key in net.downsampler_names:
        module = net.get_submodule(key)
        channels.append(module.channels)
        assert (module.up, module.down, module.kernel_size, module.group_size) == (1, 2, 5, 1)
        assert (module.compressed_channels, module.encoder_kernel, module.normalizer) == (16, 3, "softmax")
        assert type(module.compressor_norm) is nn.BatchNorm2d
        assert type(module.compressor_act) is nn.ReLU
    conv2 = [net.get_submodule(f"layer{i}.0.conv2").in_channels for i in (2, 3, 4)]
    assert channels == [64, conv2[0], 256, conv2[1], 512, conv2[2], 1024]
    assert name == "ResNeXt" or conv2 == [128, 256, 512]
    # a compressor C x 16 + 16, a content encoder 16 x 9 x 25 + 25, a norm 2 x 16
    added = [sum(p.numel() for p in net.get_submodule(key).parameters()) for key in net.downsampler_names]
    assert added == [16 * c + 16 + 16 * 9 * 25 + 25 + 32 for c in channels]
    # what is left of strides: the stem's convolution on the image
    layers = {key: m for key, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d))}
    strided = [key for key, m in layers.items() if max(_pair(m.stride)) > 1 and "content_encoder" not in key]
    assert len(strided) == 1
    assert strided[0].startswith(("conv1", "stem.0"))


def _pair(stride):
    return stride if isinstance(stride, tuple) else (stride, stride)


@pytest.mark.parametrize("toolbox", TOOLBOXES)
@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_every_depth(toolbox, depth):
    net = ours(toolbox, depth=depth, base=4)
    assert places(net) == STRIDED["BasicBlock" if depth < 50 else "Bottleneck"]
    sizes = [tuple(out.shape[2:]) for out in net.eval()(image(45, 70))]
    assert sizes == [(12, 18), (6, 9), (3, 5), (2, 3)]


@pytest.mark.parametrize("toolbox", TOOLBOXES)
@pytest.mark.parametrize("name", NAMES)
def test_maps_have_the_parents_sizes(toolbox, name):
    net, stock = ours(toolbox, name).eval(), parent(toolbox, name)
    stock.eval()  # which returns nothing: the toolboxes' train() forgets to
    for size in ((64, 64), (63, 65), (33, 47), (1, 70)):
        x = image(*size)
        assert [out.shape for out in net(x)] == [out.shape for out in stock(x)], size


SWITCHES = [
    (dict(stages=(False,) * 4), ["maxpool"]),
    (dict(stem=False, stages=[False, True, False, False]), ["layer2.0.conv1", "layer2.0.downsample.0"]),
    (dict(stem=False, stages=(False, False, False, True)), ["layer4.0.conv1", "layer4.0.downsample.0"]),
    (dict(stem=False), STRIDED["BasicBlock"][1:]),
    (dict(stem=True, stages=None), STRIDED["BasicBlock"]),
    (dict(), STRIDED["BasicBlock"]),
    (None, STRIDED["BasicBlock"]),
]


@pytest.mark.parametrize("toolbox", TOOLBOXES)
@pytest.mark.parametrize(("carafe_cfg", "expected"), SWITCHES)
def test_each_place_is_a_switch(toolbox, carafe_cfg, expected):
    net, stock = ours(toolbox, carafe_cfg=carafe_cfg), parent(toolbox)
    assert places(net) == expected
    for key, module in stock.named_modules():
        if key in STRIDED["BasicBlock"] and key not in expected:
            assert type(net.get_submodule(key)) is type(module)
            assert net.get_submodule(key).stride == module.stride
    assert [out.shape for out in net(image())] == [out.shape for out in stock(image())]


@pytest.mark.parametrize("toolbox", TOOLBOXES)
@pytest.mark.parametrize(
    ("name", "changes"), [("ResNet", {}), ("ResNet", dict(depth=50, base=4)), ("ResNetV1d", {}), ("ResNeXt", {})]
)
def test_what_a_backbone_computes(toolbox, name, changes):
    """The whole of it anew, from the parent's definition and the paper's Fig. 4."""
    net = randomise(ours(toolbox, name, **changes)).eval()

    def carafe(key, x):
        module = net.get_submodule(key)
        content = module.compressor_norm(module.channel_compressor(x)).relu()
        logits = F.conv2d(content, module.content_encoder.weight, module.content_encoder.bias, stride=2, padding=1)
        n, channels = x.shape[:2]
        windows = F.unfold(x, 5, padding=2, stride=2).view(n, channels, 25, *logits.shape[2:])
        return (windows * logits.softmax(1)[:, None]).sum(2)

    def conv(key, x):
        layer = net.get_submodule(key)
        if f"{key}.downsampler" in net.downsampler_names:
            x = carafe(f"{key}.downsampler", x)
        assert _pair(layer.stride) == (1, 1)
        return F.conv2d(x, layer.weight, layer.bias, 1, layer.padding, layer.dilation, layer.groups)

    x = image(45, 64)
    x = net.stem(x) if net.deep_stem else net.norm1(net.conv1(x)).relu()
    x = carafe("maxpool", x)
    expected = []
    for stage in net.res_layers:
        for index, block in enumerate(getattr(net, stage)):
            key, y = f"{stage}.{index}", x
            convs = [n for n in ("conv1", "conv2", "conv3") if hasattr(block, n)]
            for name in convs:
                y = getattr(block, name.replace("conv", "norm"))(conv(f"{key}.{name}", y))
                y = y if name == convs[-1] else y.relu()
            if block.downsample is not None:
                shortcut, first = block.downsample, f"{key}.downsample.0"
                pooled = len(shortcut) == 3
                if pooled:
                    x = carafe(first, x) if first in net.downsampler_names else shortcut[0](x)
                x = shortcut[-1](conv(f"{key}.downsample.{int(pooled)}", x))
            x = (x + y).relu()
        expected.append(x)
    for out, wanted in zip(net(image(45, 64)), expected, strict=True):
        torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("toolbox", TOOLBOXES)
def test_caffe_style_strides_in_the_first_convolution(toolbox):
    net = ours(toolbox, **VARIANTS["caffe"])
    assert places(net) == ["maxpool", *(f"layer{i}.0.{p}" for i in (2, 3) for p in ("conv1", "downsample.0"))]
    assert net.layer2[0].conv1.kernel_size == (1, 1)
    assert [out.shape[2:] for out in net(image(45, 64))] == [(12, 16), (6, 8), (3, 4)]


@pytest.mark.parametrize("toolbox", TOOLBOXES)
def test_pooled_shortcuts_are_replaced_where_they_shrink(toolbox):
    net, stock = ours(toolbox, "ResNetV1d"), parent(toolbox, "ResNetV1d")
    for stage in ("layer2", "layer3", "layer4"):
        shortcut = getattr(net, stage)[0].downsample
        assert [type(m) for m in shortcut] == [CARAFEDownsample, nn.Conv2d, nn.BatchNorm2d]
        assert shortcut[0].channels == shortcut[1].in_channels
    assert repr(net.layer1) == repr(stock.layer1)
    assert type(net.maxpool) is CARAFEDownsample


@pytest.mark.parametrize("toolbox", TOOLBOXES)
def test_dilated_nets_have_fewer_places(toolbox):
    """The usual nets of stride 8 for segmentation; and strides that none of the usual nets has."""
    net = ours(toolbox, "ResNetV1c", depth=50, base=4, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))
    assert places(net) == ["maxpool", "layer2.0.conv2", "layer2.0.downsample.0"]
    assert net.layer4[1].conv2.dilation == (4, 4)
    assert [out.shape[2:] for out in net(image(45, 64))] == [(12, 16), (6, 8), (6, 8), (6, 8)]
    net = ours(toolbox, strides=(2, 3, 1, 1))
    assert places(net) == ["maxpool", *(f"layer{i}.0.{place}" for i in (1, 2) for place in ("conv1", "downsample.0"))]
    assert [net.get_submodule(name).down for name in net.downsampler_names] == [2, 2, 2, 3, 3]
    assert [out.shape[2:] for out in net(image(63, 95))] == [(8, 12), (3, 4), (3, 4), (3, 4)]
    net = ours(toolbox, depth=50, base=4, strides=(1, 2, 2, 2), dilations=(1, 1, 1, 2))
    assert net.layer4[0].conv2.dilation == net.layer4[0].conv2.padding == (2, 2)
    assert net(image(63, 95))[3].shape[2:] == (2, 3)


@pytest.mark.parametrize("toolbox", ["mmdet", "mmseg"])
@pytest.mark.parametrize("stages", [(False, True, True, True), (True, True, True, False)])
@pytest.mark.parametrize("fallback", [False, True])
def test_deformable_convolutions(toolbox, stages, fallback):
    """Both readings of the paper's "Res-2, Res-3, Res-4": stride 2 becomes CARAFE++ and a plain 3x3 convolution."""
    dcn = dict(type="DCNv2", deform_groups=1, **(dict(fallback_on_stride=True) if fallback else {}))
    net = ours(toolbox, depth=50, base=4, dcn=dcn, stage_with_dcn=stages)
    net.init_weights()
    assert places(net) == STRIDED["Bottleneck"]
    plain = {f"layer{i}.0.conv2" for i in (2, 3, 4)}
    plain |= {"layer1.0.conv2"} if fallback and stages[0] else set()  # the first block built, as the toolboxes have it
    for index, name in enumerate(net.res_layers):
        for number, block in enumerate(getattr(net, name)):
            deformable = stages[index] and f"{name}.{number}.conv2" not in plain
            assert hasattr(block.conv2, "conv_offset") == deformable, (name, number)
            assert isinstance(block.conv2, nn.Conv2d) != deformable
    assert net.layer2[0].conv2.bias is None
    outs = net(image())
    assert [out.shape[2:] for out in outs] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    # the convolution that was deformable starts as any other: He's initialisation
    weight = net.layer3[0].conv2.weight
    assert abs(weight.std().item() / (2 / (weight.shape[0] * 9)) ** 0.5 - 1) < 0.2


@pytest.mark.parametrize("toolbox", ["mmdet", "mmseg"])
def test_the_first_kind_of_deformable_convolution(toolbox):
    dcn = dict(type="DCN", deform_groups=1)
    net = ours(toolbox, depth=50, base=4, dcn=dcn, stage_with_dcn=(False, True, True, True))
    assert places(net) == STRIDED["Bottleneck"]
    assert hasattr(net.layer2[1].conv2, "conv_offset")
    assert net(image(96, 128))[3].shape[2:] == (3, 4)


@pytest.mark.parametrize("toolbox", TOOLBOXES)
@pytest.mark.parametrize("compressed_channels", [16, 25])  # 25: as many as the kernel has taps
def test_norms_fold_into_the_convolutions_before_them(toolbox, compressed_channels):
    net = randomise(ours(toolbox, "ResNetV1d", carafe_cfg=dict(compressed_channels=compressed_channels))).eval()
    fused = fuse_conv_bn(copy.deepcopy(net))
    assert not norms(fused.maxpool)
    assert len(norms(fused)) == 3 < len(norms(net))  # those before the blocks' convolutions, which are not looked into
    for got, expected in zip(fused(image()), net(image()), strict=True):
        assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize("toolbox", ["mmdet", "mmseg"])
def test_deformable_convolutions_stay_where_carafe_is_off(toolbox):
    carafe_cfg = dict(stages=(False, True, False, True))
    net = ours(toolbox, depth=50, base=4, **DCN, stage_with_dcn=(False, True, True, True), carafe_cfg=carafe_cfg)
    assert _pair(net.layer3[0].conv2.stride) == (2, 2)
    assert hasattr(net.layer3[0].conv2, "conv_offset")
    assert type(net.layer2[0].conv2) is type(net.layer4[0].conv2) is DownsampledConv2d
    assert net(image())[3].shape[2:] == (2, 2)


def test_taking_a_convolution_over_draws_nothing():
    conv = nn.Conv2d(6, 8, 3, stride=2, padding=2, dilation=2, groups=2, padding_mode="reflect")
    weight, bias = conv.weight, conv.bias
    downsampler = CARAFEDownsample(6)
    state = torch.get_rng_state()
    layer = DownsampledConv2d(conv, downsampler)
    assert torch.equal(state, torch.get_rng_state())
    assert layer.weight is weight
    assert layer.bias is bias
    x = torch.randn(1, 6, 11, 14)
    conv.stride = (1, 1)
    assert torch.equal(layer(x), conv(downsampler(x)))
    assert layer.to_empty(device="cpu").weight.device.type == "cpu"


class HalfPool(nn.Module):
    """Another downsampler, with a parameter of its own."""

    def __init__(self, channels, scale_factor, gain=1.0):
        super().__init__()
        self.channels, self.scale_factor = channels, scale_factor
        self.gain = nn.Parameter(torch.full((channels, 1, 1), gain))

    def forward(self, x):
        return self.gain * F.avg_pool2d(x, self.scale_factor, ceil_mode=True, count_include_pad=False)


@pytest.mark.parametrize("toolbox", TOOLBOXES)
def test_other_pooling_operators_take_the_same_places(toolbox, monkeypatch):
    """The comparison of Table 3."""
    monkeypatch.setitem(MODELS.module_dict, "HalfPool", HalfPool)
    net = ours(toolbox, "ResNetV1d", carafe_cfg=dict(type="HalfPool", gain=0.5, stem=False))
    found = {name: net.get_submodule(name) for name in net.downsampler_names}
    assert places(net) == STRIDED["BasicBlock"][1:]
    assert all(type(module) is HalfPool and module.scale_factor == 2 for module in found.values())
    assert [module.channels for module in found.values()] == [8, 8, 16, 16, 32, 32]
    assert net.layer2[0].downsample[0].gain.mean() == 0.5
    by_class = ours(toolbox, carafe_cfg=dict(type=HalfPool))
    assert [out.shape[2:] for out in by_class(image(45, 64))] == [(12, 16), (6, 8), (3, 4), (2, 2)]
    assert not any(isinstance(module, CARAFEDownsample) for module in by_class.modules())


NORMS = [
    # the backbone's norm, carafe_cfg, the type and the epsilon expected behind the compressor
    (dict(type="BN", requires_grad=False, eps=1e-3), {}, nn.BatchNorm2d, 1e-3),
    (dict(type="SyncBN", requires_grad=True), {}, nn.SyncBatchNorm, 1e-5),
    (dict(type=nn.BatchNorm2d), {}, nn.BatchNorm2d, 1e-5),
    (dict(type="GN", num_groups=2), {}, nn.BatchNorm2d, 1e-5),
    (dict(type="BN"), dict(norm_cfg=dict(type="GN", num_groups=4, eps=1e-4)), nn.GroupNorm, 1e-4),
    (dict(type="BN"), dict(norm_cfg=None), type(None), None),
    (dict(type="BN"), dict(compressed_channels=None), type(None), None),
]


@pytest.mark.parametrize("toolbox", TOOLBOXES)
@pytest.mark.parametrize(("norm_cfg", "carafe_cfg", "kind", "eps"), NORMS)
def test_the_compressors_norm_follows_the_backbones(toolbox, norm_cfg, carafe_cfg, kind, eps):
    net = ours(toolbox, norm_cfg=dict(norm_cfg), carafe_cfg=carafe_cfg)
    for name in net.downsampler_names:
        norm = net.get_submodule(name).compressor_norm
        assert isinstance(norm, kind)
        assert norm is None or norm.eps == eps
        assert norm is None or (norm.weight.requires_grad and norm.bias.requires_grad)
    net = revert_sync_batchnorm(net)  # as mmengine's Runner does on a CPU
    assert net.train()(image())[3].shape[2:] == (2, 2)
    if norm_cfg.get("requires_grad") is False:
        assert not net.norm1.weight.requires_grad
        assert len([p for norm in norms(net) for p in norm.parameters() if p.requires_grad]) == 2 * 7


@pytest.mark.parametrize("toolbox", TOOLBOXES)
def test_arguments_reach_every_downsampler(toolbox):
    cfg = dict(
        type="carafe_plugin.openmmlab.layers.CARAFEDownsample",
        down_kernel=3,
        down_group=2,
        encoder_kernel=1,
        compressed_channels=4,
        normalizer="sigmoid",
        act_cfg=None,
    )
    net = ours(toolbox, carafe_cfg=cfg)
    for name in net.downsampler_names:
        module = net.get_submodule(name)
        assert (module.kernel_size, module.group_size, module.encoder_kernel) == (3, 2, 1)
        assert (module.compressed_channels, module.normalizer) == (4, "sigmoid")
        assert type(module.compressor_norm) is nn.BatchNorm2d
        assert module.compressor_act is None
    assert cfg.keys() >= {"type", "down_kernel"}, "the caller's dictionary stays as it was"


@pytest.mark.parametrize("toolbox", TOOLBOXES)
def test_copies_and_files(toolbox):
    net = randomise(ours(toolbox, norm_eval=True)).eval()
    x = image()
    expected = net(x)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    loaded = ours(toolbox, norm_eval=True).eval()
    loaded.load_state_dict(torch.load(file), strict=True)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), loaded):
        assert twin is not net
        assert all(torch.equal(a, b) for a, b in zip(twin(x), expected, strict=True))
        twin.train()
        assert {id(norm) for norm in norms(twin) if norm.training} == {
            id(norm) for name in twin.downsampler_names for norm in norms(twin.get_submodule(name))
        }
    assert all(name in repr(net) for name in ("CARAFEResNet", "DownsampledConv2d", "layer4.0.conv1.downsampler"))


@pytest.mark.parametrize("toolbox", TOOLBOXES)
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(carafe_cfg="all"), TypeError, "carafe_cfg must be a dictionary or None, got 'all'"),
        (dict(carafe_cfg=dict(stem=1)), TypeError, "'stem' must be True or False, got 1"),
        (dict(carafe_cfg=dict(norm_eval=None)), TypeError, "'norm_eval' must be True or False, got None"),
        (dict(carafe_cfg=dict(stages=True)), TypeError, "'stages' must be a sequence of one bool .* got True"),
        (dict(carafe_cfg=dict(stages=(2, 3, 4, 5))), TypeError, "'stages' must be a sequence of one bool"),
        (dict(carafe_cfg=dict(stages="TTTT")), TypeError, "'stages' must be a sequence of one bool"),
        (dict(carafe_cfg=dict(stages=(False, True))), ValueError, "'stages' must have 4 entries"),
        (dict(carafe_cfg=dict(stages=(True,) * 4)), ValueError, r"stages\[0\] is True, but layer1 has no stride"),
        (
            dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), carafe_cfg=dict(stages=(False, True, True, False))),
            ValueError,
            r"stages\[2\] is True, but layer3 has no stride",
        ),
        (dict(carafe_cfg=dict(layer2=True)), TypeError, "unknown key 'layer2'; expected 'stem' and 'stages'"),
        (dict(carafe_cfg=dict(OFF, up_kernel=5)), TypeError, "unknown key 'up_kernel'; expected .*'down_kernel'"),
        (dict(carafe_cfg=dict(down_kernel=4)), ValueError, "kernel must be an odd positive int, got 4"),
        (dict(carafe_cfg=dict(channels=64)), ValueError, "carafe_cfg must not set 'channels'"),
        (dict(carafe_cfg=dict(scale_factor=2)), ValueError, "carafe_cfg must not set 'scale_factor'"),
        (dict(carafe_cfg=dict(type="CARAFEDownsampel")), KeyError, "the type 'CARAFEDownsampel' is not registered"),
        (dict(carafe_cfg=dict(type=7)), TypeError, "7"),
        (dict(carafe_cfg=dict(type="CARAFEUpsample")), ValueError, "must describe a downsampler, got type='CARAFEUps"),
        (dict(carafe_cfg=dict(norm_cfg="BN")), TypeError, "norm_cfg must be None or a dictionary"),
        (
            dict(conv_cfg=dict(type="ConvWS")),
            TypeError,
            "CARAFE.. in layer2.0.conv1: expected a plain or a deformable convolution, got ConvWS2d",
        ),
    ],
)
def test_bad_arguments_are_named(toolbox, changes, error, message):
    with pytest.raises(error, match=message):
        ours(toolbox, **changes)


@pytest.mark.parametrize("toolbox", TOOLBOXES)
def test_other_plain_convolutions(toolbox):
    """MMCV's wrapper is a plain convolution; a stage of another kind works with its place switched off."""
    assert places(ours(toolbox, conv_cfg=dict(type="Conv"))) == STRIDED["BasicBlock"]
    assert ours(toolbox, conv_cfg=dict(type="ConvWS"), carafe_cfg=dict(stages=(False,) * 4))(image())
