"""A CARAFE++ backbone in training: gradients, freezing, statistics, recomputation, learning rates."""

import copy

import pytest
import torch
from resnets import (
    NAMES,
    TOOLBOXES,
    combinations,
    gradients,
    image,
    norms,
    ours,
    outputs,
    randomise,
)
from torch import nn

pytest.importorskip("mmengine", reason="mmengine is not installed")
pytest.importorskip("mmcv", reason="mmcv is not installed")

from mmengine.model import revert_sync_batchnorm

pytestmark = pytest.mark.usefixtures("one_thread")


def learning(net):
    """The names of the norms that learn their statistics, in training mode."""
    net.train()
    return {name for name, module in net.named_modules() if module in norms(net) and module.training}


@pytest.mark.parametrize(("toolbox", "name"), combinations(TOOLBOXES, NAMES))
@pytest.mark.parametrize("norm_eval", [False, True])
def test_every_parameter_learns(toolbox, name, norm_eval):
    """From the first step on; the last norm of a block would start at zero and hide the others, so not with that.

    A norm in training mode takes the compressor's bias away again: its gradient is zero but for rounding.
    """
    torch.manual_seed(0)
    net = ours(toolbox, name, depth=50, zero_init_residual=False, norm_eval=norm_eval, carafe_cfg=dict(norm_eval=True))
    net.init_weights()
    net = randomise(net).double().train()
    assert len(net.downsampler_names) == 7
    for key, gradient in gradients(net, net(image(96, 96).double())).items():
        assert gradient is not None, key
        if key.endswith("channel_compressor.bias") and not norm_eval:
            assert gradient.abs().max() < 1e-12, key
        else:
            assert gradient.abs().max() > 1e-9, key


@pytest.mark.parametrize("toolbox", TOOLBOXES)
def test_a_few_steps_reduce_a_loss(toolbox):
    """Everything that is CARAFE++'s, and nothing else, is trained."""
    torch.manual_seed(0)
    net = ours(toolbox, norm_eval=True)
    net.init_weights()
    parameters = [p for name in net.downsampler_names for p in net.get_submodule(name).parameters()]
    optimiser = torch.optim.Adam(parameters, lr=0.02)
    losses = []
    for _ in range(12):
        net.train()
        losses.append(sum((out - out.detach().roll(1, -1)).square().mean() for out in net(image(48, 48))))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("toolbox", TOOLBOXES)
@pytest.mark.parametrize("name", ["ResNet", "ResNetV1d"])
@pytest.mark.parametrize("frozen", [-1, 0, 2, 4])
@pytest.mark.parametrize("norm_eval", [False, True])
def test_frozen_stages(toolbox, name, frozen, norm_eval):
    """The stem's CARAFE++ freezes with the stem, the blocks' with their stage, whatever norm_eval says."""
    net = ours(toolbox, name, frozen_stages=frozen, norm_eval=norm_eval, norm_cfg=dict(type="BN", requires_grad=True))
    stem = ("conv1", "bn1", "stem", "maxpool")
    frozen_parts = (stem if frozen >= 0 else ()) + tuple(f"layer{i}" for i in range(1, frozen + 1))
    for key, parameter in net.named_parameters():
        assert parameter.requires_grad == (key.split(".")[0] not in frozen_parts), key
    free = {n for n in learning(net) if n.split(".")[0] not in frozen_parts}
    assert learning(net) == free, "frozen norms keep their statistics"
    carafe = {f"{n}.compressor_norm" for n in net.downsampler_names if n.split(".")[0] not in frozen_parts}
    assert carafe <= free
    assert free == carafe or not norm_eval
    before = copy.deepcopy(net.state_dict())
    net.train()
    outs = net(image(48, 48))
    if any(p.requires_grad for p in net.parameters()):
        gradients(net, outs)
    changed = {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
    assert {key.rpartition(".")[0] for key in changed} == free
    net.eval()
    assert not any(module.training for module in net.modules())


@pytest.mark.parametrize("toolbox", TOOLBOXES)
@pytest.mark.parametrize("backbone_eval", [False, True])
@pytest.mark.parametrize("own_eval", [False, True])
def test_norm_eval_both_ways(toolbox, backbone_eval, own_eval):
    net = ours(toolbox, norm_eval=backbone_eval, carafe_cfg=dict(norm_eval=own_eval))
    everything = {name for name, module in net.named_modules() if module in norms(net)}
    own = {f"{name}.compressor_norm" for name in net.downsampler_names}
    assert len(own) == 7
    if not backbone_eval:
        assert learning(net) == everything
    else:
        assert learning(net) == (set() if own_eval else own)
    assert not any(norm.training for norm in norms(net.eval()))


@pytest.mark.parametrize("toolbox", TOOLBOXES)
def test_statistics_on_a_stock_checkpoint(toolbox):
    """With its norms in evaluation mode the backbone keeps what it was given, and CARAFE++ learns what it sees."""
    net = randomise(ours(toolbox, norm_eval=True))
    net.train()
    compressed = []
    net.maxpool.channel_compressor.register_forward_hook(lambda module, args, out: compressed.append(out.detach()))
    before = copy.deepcopy(net.state_dict())
    steps = 4
    for _ in range(steps):
        with torch.no_grad():
            net(image(32, 32))
    norm, seen = net.maxpool.compressor_norm, compressed[-1].transpose(0, 1).flatten(1)
    left = 0.9**steps  # of what was there before, at BatchNorm's usual momentum
    for statistic, of_batch in (("running_mean", seen.mean(1)), ("running_var", seen.var(1))):
        expected = left * before[f"maxpool.compressor_norm.{statistic}"] + (1 - left) * of_batch
        torch.testing.assert_close(getattr(norm, statistic), expected, rtol=1e-4, atol=1e-6)
    kept = {key for key, value in net.state_dict().items() if torch.equal(value, before[key])}
    changed = net.state_dict().keys() - kept
    assert changed == {
        f"{name}.compressor_norm.{statistic}"
        for name in net.downsampler_names
        for statistic in ("running_mean", "running_var", "num_batches_tracked")
    }


@pytest.mark.parametrize("toolbox", TOOLBOXES)
@pytest.mark.parametrize("depth", [18, 50])
def test_recomputation_changes_nothing(toolbox, depth):
    """with_cp: the same outputs, and the same gradients up to the order in which a map's are summed.

    The statistics aside, which every norm of a recomputed block sees twice, in the toolboxes' own nets as well.
    """
    results = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        net = ours(toolbox, depth=depth, with_cp=with_cp)
        net.init_weights()
        net = net.double().train()
        outs = outputs(net, image().double().requires_grad_())
        results.append((outs, gradients(net, outs)))
    (out, grad), (expected, expected_grad) = results
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    for key, value in expected_grad.items():
        torch.testing.assert_close(grad[key], value, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("toolbox", TOOLBOXES)
@pytest.mark.parametrize("norm_eval", [False, True])
def test_sync_batch_norm_on_a_cpu(toolbox, norm_eval):
    """mmengine's Runner reverts it there; what norm_eval and frozen_stages say still holds."""
    net = ours(toolbox, norm_cfg=dict(type="SyncBN", requires_grad=True), norm_eval=norm_eval, frozen_stages=0)
    own = {f"{name}.compressor_norm" for name in net.downsampler_names} - {"maxpool.compressor_norm"}
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in net.modules()) == 20 + 7
    reverted = revert_sync_batchnorm(net)
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in reverted.modules())
    assert own <= learning(reverted)
    assert learning(reverted) == own or not norm_eval
    gradients(reverted, reverted(image()))
    assert not reverted.maxpool.compressor_norm.weight.requires_grad


@pytest.mark.parametrize("depth", [50, 101])
@pytest.mark.parametrize("name", ["ResNet", "ResNetV1d"])
def test_layer_depth_for_learning_rates(name, depth):
    """mmpretrain's layer-wise decay: CARAFE++ has the depth of the block, or the stem, that it stands in."""
    net = ours("mmpretrain", name, depth=depth, base=4)
    found = {key: net.get_layer_depth(f"backbone.{key}", "backbone.") for key, _ in net.named_parameters()}
    assert {found[key] for key in found if key.startswith(("conv1", "bn1", "stem", "maxpool"))} == {
        (0, found_max(found))
    }
    for stage in ("layer2", "layer3", "layer4"):
        block = {value for key, value in found.items() if key.startswith(f"{stage}.0.")}
        inside = {value for key, value in found.items() if key.startswith(f"{stage}.0.") and "content_encoder" in key}
        assert len(block) == 1
        assert inside == block
    assert found["layer2.0.conv1.weight"] < found["layer4.0.conv1.weight"]


def found_max(found):
    return next(iter(found.values()))[1]


def test_learning_rates_in_mmpretrains_optimizer():
    pytest.importorskip("mmpretrain", reason="mmpretrain is not installed")
    from mmengine.registry import DefaultScope
    from mmpretrain.engine import LearningRateDecayOptimWrapperConstructor
    from mmpretrain.models import ImageClassifier

    from carafe_plugin.openmmlab import mmpretrain  # noqa: F401

    with DefaultScope.overwrite_default_scope("mmpretrain"):  # an earlier test's runner may have left another
        model = ImageClassifier(
            backbone=dict(type="mmpretrain.CARAFEResNet", depth=50, base_channels=4, stem_channels=4, out_indices=(3,)),
            neck=dict(type="mmpretrain.GlobalAveragePooling"),
            head=dict(type="mmpretrain.LinearClsHead", num_classes=2, in_channels=128),
        )
    build = LearningRateDecayOptimWrapperConstructor(
        dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=1.0, weight_decay=0.1)),
        paramwise_cfg=dict(layer_decay_rate=0.5),
    )
    rates = {id(p): group["lr"] for group in build(model).optimizer.param_groups for p in group["params"]}
    backbone = model.backbone
    for place, neighbour in (("maxpool", "conv1"), ("layer2.0.conv2.downsampler", "layer2.0.conv2")):
        module = backbone.get_submodule(place)
        assert {rates[id(p)] for p in module.parameters()} == {rates[id(backbone.get_submodule(neighbour).weight)]}
    assert rates[id(backbone.maxpool.content_encoder.weight)] == 0.5**7
    assert rates[id(backbone.layer4[0].conv2.downsampler.content_encoder.weight)] == 0.5
