"""Which checkpoints a CARAFE++ backbone starts from, what is missing then, and which it refuses."""

import logging
import re
from argparse import Namespace

import pytest
import torch
from resnets import DCN, TOOLBOXES, carafe_keys, combinations, image, norms, ours, parent, randomise
from torch import nn

pytest.importorskip("mmengine", reason="mmengine is not installed")
pytest.importorskip("mmcv", reason="mmcv is not installed")

from mmengine.logging import MMLogger
from mmengine.runner import load_checkpoint

from carafe_plugin.engine.cli import run_tool
from carafe_plugin.openmmlab.layers import CARAFEDownsample
from carafe_plugin.openmmlab.resnet_checkpoints import CheckpointMismatch

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = ("torchvision", *TOOLBOXES)


def stock(source, depth=18, base=8, name="ResNet", **kwargs):
    """A stock net whose norms all differ."""
    if source == "torchvision":
        torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
        return randomise(getattr(torchvision.models, f"resnet{depth}")())
    return randomise(parent(source, name, depth=depth, base=base, **kwargs))


def write(net, path, prefix=""):
    """Save a net's state as its project's training would: with a head, and other things beside the weights."""
    state = {f"{prefix}{key}": value for key, value in net.state_dict().items()}
    torch.save(state if not prefix else dict(state_dict=state, meta=dict(epoch=1)), path)
    return str(path)


def assert_encoders_near_zero(net):
    """The paper's start: kernels nearly uniform."""
    encoders = [module.content_encoder for module in net.modules() if isinstance(module, CARAFEDownsample)]
    assert len(encoders) == 7
    for encoder in encoders:
        assert 0.0009 < encoder.weight.std() < 0.0011
        assert encoder.bias.abs().max() == 0


@pytest.mark.parametrize(("toolbox", "source"), combinations(TOOLBOXES, PLAIN))
def test_stock_checkpoints_load_but_for_carafe(toolbox, source, tmp_path):
    base = 64 if source == "torchvision" else 8
    net, start = ours(toolbox, base=base), stock(source, base=base)
    missing, unexpected = net.load_state_dict(start.state_dict(), strict=False)
    assert set(missing) == carafe_keys(net)
    assert len(missing) == 7 * 8  # compressor, norm and encoder: weight and bias each; the norm's mean and variance
    assert unexpected == (["fc.weight", "fc.bias"] if source == "torchvision" else [])

    prefix = "backbone." if source == "mmpretrain" else ""
    init_cfg = dict(type="Pretrained", checkpoint=write(start, tmp_path / "stock.pth", prefix))
    net = ours(toolbox, base=base, init_cfg=init_cfg | (dict(prefix=prefix) if prefix else {}))
    before = {key: net.state_dict()[key].clone() for key in carafe_keys(net)}
    net.init_weights()
    loaded, wanted = net.state_dict(), start.state_dict()
    for key, value in loaded.items():
        if key in wanted:
            assert torch.equal(value, wanted[key]), key
        elif key in before and "weight" not in key:  # the stem's weights are drawn anew
            assert torch.equal(value, before[key]), key
    assert set(loaded) - set(wanted) >= set(before)
    assert_encoders_near_zero(net)


@pytest.mark.parametrize("toolbox", TOOLBOXES)
def test_torchvisions_resnet50(toolbox):
    net = ours(toolbox, depth=50, base=64)
    start = stock("torchvision", 50)
    missing, unexpected = net.load_state_dict(start.state_dict(), strict=False)
    assert set(missing) == carafe_keys(net)
    assert unexpected == ["fc.weight", "fc.bias"]


# mmpretrain's deep stem has names of its own: see the tests of tools/convert_backbone.py.
SAME_NAMES = [
    ("mmdet", "mmdet"),
    ("mmdet", "mmseg"),
    ("mmseg", "mmdet"),
    ("mmseg", "mmseg"),
    ("mmpretrain", "mmpretrain"),
]


@pytest.mark.parametrize(
    ("name", "toolbox", "source"),
    [
        *((name, *pair) for name, pair in combinations(["ResNetV1c", "ResNetV1d"], SAME_NAMES)),
        *(("ResNeXt", *pair) for pair in zip(TOOLBOXES, TOOLBOXES[1:] + TOOLBOXES[:1], strict=True)),
    ],
)
def test_other_variants_checkpoints(name, toolbox, source):
    net = ours(toolbox, name)
    start = stock(source, 50 if name == "ResNeXt" else 18, name=name)
    missing, unexpected = net.load_state_dict(start.state_dict(), strict=False)
    assert set(missing) == carafe_keys(net)
    assert unexpected == []
    assert all(torch.equal(net.state_dict()[key], value) for key, value in start.state_dict().items())


@pytest.mark.parametrize("toolbox", ["mmdet", "mmseg"])
def test_deformable_checkpoints_lose_the_strided_offsets(toolbox):
    deformable = dict(depth=50, base=4, **DCN, stage_with_dcn=(False, True, True, True))
    net, start = ours(toolbox, **deformable), parent(toolbox, **deformable)
    missing, unexpected = net.load_state_dict(start.state_dict(), strict=False)
    assert set(missing) == carafe_keys(net)
    offsets = [f"layer{i}.0.conv2.conv_offset.{kind}" for i in (2, 3, 4) for kind in ("weight", "bias")]
    assert sorted(unexpected) == sorted(offsets)
    assert torch.equal(net.layer3[0].conv2.weight, start.layer3[0].conv2.weight)


@pytest.mark.parametrize("toolbox", TOOLBOXES)
@pytest.mark.parametrize("name", ["ResNet", "ResNetV1d"])
@pytest.mark.parametrize("zero_init_residual", [True, False])
def test_initialisation_from_nothing(toolbox, name, zero_init_residual):
    net = ours(toolbox, name, depth=50, zero_init_residual=zero_init_residual)
    net.init_weights()
    assert_encoders_near_zero(net)
    for block in (block for stage in net.res_layers for block in getattr(net, stage)):
        assert torch.equal(block.norm3.weight, torch.full_like(block.norm3.weight, float(not zero_init_residual)))
    for module in net.modules():
        if isinstance(module, CARAFEDownsample):
            limit = (6 / (module.channels + 16)) ** 0.5  # Xavier's, uniform
            assert 0.8 * limit < module.channel_compressor.weight.abs().max() <= limit
            assert module.channel_compressor.bias.abs().max() == 0
            assert torch.equal(module.compressor_norm.weight, torch.ones(16))
    conv = net.layer2[0].conv2.weight  # He's, as any other convolution of the net
    assert abs(conv.std().item() / (2 / (9 * conv.shape[0])) ** 0.5 - 1) < 0.1


@pytest.mark.parametrize("toolbox", TOOLBOXES)
def test_a_pretrained_carafe_backbone_comes_back_whole(toolbox, tmp_path):
    trained = randomise(ours(toolbox))
    init_cfg = dict(type="Pretrained", checkpoint=write(trained, tmp_path / "carafe.pth"))
    net = ours(toolbox, init_cfg=init_cfg)
    net.init_weights()
    assert all(torch.equal(net.state_dict()[key], value) for key, value in trained.state_dict().items())
    first = net.maxpool.content_encoder.weight
    assert first.std() > 0.1, "what was loaded stays, and is not set to its start again"
    assert all(torch.equal(a, b) for a, b in zip(net.eval()(image()), trained.eval()(image()), strict=True))


WRONG = [  # the backbone's depth, the checkpoint's, what the message says
    (18, 34, "depth 34, the backbone's depth is 18"),
    (34, 18, "depth 18, the backbone's depth is 34"),
    (34, 50, "depth 50, the backbone's depth is 34"),
    (50, 34, "depth 34, the backbone's depth is 50"),
    (50, 101, "depth 101, the backbone's depth is 50"),
]


@pytest.mark.parametrize(("toolbox", "depths"), combinations(TOOLBOXES, WRONG))
def test_another_depth_is_refused(toolbox, depths, tmp_path):
    mine, theirs, message = depths
    path = write(stock(toolbox, theirs, base=4), tmp_path / "other.pth")
    net = ours(toolbox, depth=mine, base=4, init_cfg=dict(type="Pretrained", checkpoint=path))
    with pytest.raises(CheckpointMismatch, match=f"the checkpoint {re.escape(str(path))} is a ResNet's of {message}"):
        net.init_weights()
    with pytest.raises(CheckpointMismatch, match=message):
        ours(toolbox, depth=mine, base=4).load_state_dict(torch.load(path), strict=False)


def test_a_tool_says_it_in_one_line(capsys):
    def load(args):
        ours("mmpretrain").load_state_dict(stock("mmpretrain", 34).state_dict(), strict=False)

    assert run_tool(load, Namespace()) == 2
    assert capsys.readouterr().err == "error: the checkpoint is a ResNet's of depth 34, the backbone's depth is 18\n"


@pytest.mark.parametrize("toolbox", ["mmdet", "mmseg"])
def test_mmpretrains_deep_stem_is_not_taken_as_it_is(toolbox):
    state = ours("mmpretrain", "ResNetV1c").state_dict()
    with pytest.raises(CheckpointMismatch, match=r"MMPretrain's names for the stem: tools/convert_backbone\.py"):
        ours(toolbox, "ResNetV1c").load_state_dict(state, strict=False)
    ours("mmpretrain", "ResNetV1c").load_state_dict(state)


@pytest.mark.parametrize("toolbox", TOOLBOXES)
def test_a_frozen_carafe_that_nothing_was_loaded_into(toolbox):
    """The usual detectors freeze the stem: with a stock checkpoint its CARAFE++ would never learn."""
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    start = parent(toolbox).state_dict()
    try:
        for frozen in (-1, 0, 2):
            net = ours(toolbox, frozen_stages=frozen)
            net.load_state_dict(start, strict=False)
            net.load_state_dict(net.state_dict())
            net.load_state_dict({}, strict=False)
    finally:
        logger.removeHandler(handler)
    assert len(messages) == 2
    assert "frozen_stages=0 freezes maxpool, for which the checkpoint holds nothing: " in messages[0]
    assert "maxpool, layer2.0.conv1.downsampler, layer2.0.downsample.0.downsampler, for" in messages[1]


@pytest.mark.parametrize("toolbox", TOOLBOXES)
def test_a_checkpoint_of_a_whole_model(toolbox, tmp_path):
    """The backbone as a part: its depth is read below the prefix, and other parts do not matter."""
    model = nn.ModuleDict(dict(backbone=ours(toolbox), head=nn.Conv2d(3, 3, 1)))
    whole = nn.ModuleDict(dict(backbone=randomise(ours(toolbox)), head=nn.Conv2d(3, 3, 1), layer1=nn.Linear(2, 2)))
    load_checkpoint(model, write(whole, tmp_path / "whole.pth"), logger="silent")
    assert torch.equal(model["backbone"].norm1.running_var, whole["backbone"].norm1.running_var)
    other = nn.ModuleDict(dict(backbone=parent(toolbox, depth=34)))
    with pytest.raises(CheckpointMismatch, match="depth 34"):
        load_checkpoint(model, write(other, tmp_path / "other.pth"), logger="silent")


@pytest.mark.parametrize("toolbox", TOOLBOXES)
def test_fewer_stages_take_a_whole_nets_checkpoint(toolbox):
    stages = dict(num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(0, 1))
    net = ours(toolbox, depth=50, base=4, **stages)
    missing, unexpected = net.load_state_dict(stock(toolbox, 50, base=4).state_dict(), strict=False)
    assert set(missing) == carafe_keys(net)
    assert {key.split(".")[0] for key in unexpected} == {"layer3", "layer4"}
    fewer = ours(toolbox, depth=101, base=4, **stages).state_dict()
    assert net.load_state_dict(fewer, strict=True), "the first two stages of depth 50 and 101 are alike"
    assert len(norms(net)) == 1 + 3 * 7 + 2 + 3
