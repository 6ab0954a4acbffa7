"""The three toolboxes' ResNets and ours at a few channels, for the tests of the backbones."""

import importlib
import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

TOOLBOXES = ("mmdet", "mmseg", "mmpretrain")
NAMES = ("ResNet", "ResNetV1c", "ResNetV1d", "ResNeXt")
OFF = dict(stem=False, stages=(False, False, False, False))
DCN = dict(dcn=dict(type="DCNv2", deform_groups=1))

#: In a net with four stages and the usual strides: the downsamplers' names without ``.downsampler``.
STRIDED = {
    "BasicBlock": ["maxpool", *(f"layer{i}.0.{place}" for i in (2, 3, 4) for place in ("conv1", "downsample.0"))],
    "Bottleneck": ["maxpool", *(f"layer{i}.0.{place}" for i in (2, 3, 4) for place in ("conv2", "downsample.0"))],
}


def options(toolbox, name, depth=None, base=8, **changes):
    """Arguments of a ResNet with few channels that returns all its maps, the last one by default the fourth's."""
    depth = depth or (50 if name == "ResNeXt" else 18)
    few = dict(depth=depth, base_channels=base, stem_channels=base, out_indices=(0, 1, 2, 3))
    if name == "ResNeXt":
        few |= dict(groups=4, **{"width_per_group" if toolbox == "mmpretrain" else "base_width": 4})
    return few | changes


def parent(toolbox, name="ResNet", **kwargs):
    """The toolbox's own backbone."""
    pytest.importorskip(toolbox, reason=f"{toolbox} is not installed")
    if toolbox == "mmdet" and name == "ResNetV1c":  # a class that it lacks
        name, kwargs = "ResNet", dict(kwargs, deep_stem=True)
    return getattr(importlib.import_module(f"{toolbox}.models.backbones"), name)(**options(toolbox, name, **kwargs))


def ours(toolbox, name="ResNet", **kwargs):
    """The backbone with CARAFE++ of the same name."""
    pytest.importorskip(toolbox, reason=f"{toolbox} is not installed")
    adapter = importlib.import_module(f"carafe_plugin.openmmlab.{toolbox}")
    return getattr(adapter, f"CARAFE{name}")(**options(toolbox, name, **kwargs))


def places(backbone):
    """The places where CARAFE++ stands, as :data:`STRIDED` names them."""
    return [name.removesuffix(".downsampler") for name in backbone.downsampler_names]


def carafe_keys(backbone):
    """The names in the backbone's state that belong to its downsamplers, without BatchNorm's counters.

    PyTorch does not miss those: where a file lacks them, it fills them in.
    """
    starts = tuple(f"{name}." for name in backbone.downsampler_names)
    return {key for key in backbone.state_dict() if key.startswith(starts) and not key.endswith("num_batches_tracked")}


def norms(module):
    return [m for m in module.modules() if isinstance(m, _BatchNorm)]


def randomise(module, seed=0):
    """Give every norm statistics and an affine map of its own, so that no key can be exchanged for another unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in norms(module):
            for tensor, centre in ((norm.weight, 1), (norm.bias, 0), (norm.running_mean, 0), (norm.running_var, 1)):
                tensor.copy_(centre + 0.2 * (torch.rand(tensor.shape, generator=generator) - 0.5))
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d) and layer.out_channels % 25 == 0:  # content encoders, which start near zero
                layer.weight.copy_(0.2 * torch.randn(layer.weight.shape, generator=generator))
    return module


def image(height=64, width=64, batch=2):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def outputs(backbone, x):
    with warnings.catch_warnings():  # PyTorch's, on the reentrant checkpoints that the toolboxes use
        warnings.simplefilter("ignore")
        return backbone(x)


def gradients(backbone, outs):
    loss = sum((out * torch.linspace(-1, 1, out[0].numel()).view(out.shape[1:])).mean() for out in outs)
    backbone.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss.backward()
    return {name: p.grad for name, p in backbone.named_parameters()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert value is second[key] is None or torch.equal(value, second[key]), key


def combinations(*lists):
    return list(itertools.product(*lists))
