"""Inputs and ways of calling for the tests of MMCV's operators: through MMCV's own Python code, on either extension."""

import sys
from types import ModuleType

import mmcv.ops  # noqa: F401
import torch

from carafe_plugin.openmmlab import mmcv_operators


def stand_in():
    """A module filled as ``mmcv._ext`` is where MMCV has no compiled one."""
    module = ModuleType("mmcv._ext")
    mmcv_operators.fill(module)
    return module


def use_extension(monkeypatch, module):
    """MMCV's Python code calls ``module`` until the test ends."""
    for name, part in list(sys.modules.items()):
        if name.startswith("mmcv.ops.") and hasattr(part, "ext_module"):
            monkeypatch.setattr(part, "ext_module", module)


def boxes(count, size=100.0, seed=0, kind="random"):
    """Boxes (count, 4) and scores (count,): 'random', 'whole' coordinates with equal scores, or 'thin'."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, 2, generator=generator) * size
    corners = torch.cat([corners.amin(1), corners.amax(1)], dim=1)
    scores = torch.rand(count, generator=generator)
    if kind == "whole":  # overlaps of exactly a threshold, and ties
        corners, scores = (corners / 8).round() * 8, (scores * 8).round() / 8
    if kind == "thin":  # nothing to one pixel wide, some outside of the image
        corners[:, 2:] = corners[:, :2] + (torch.rand(count, 2, generator=generator) * 3).floor() / 2
        corners[::3] -= size
        corners[1::4] = corners[0::4][: len(corners[1::4])]
    return corners, scores


def rois(kind, images=2, count=12, size=40.0):
    """RoIs (count, 5) for maps of ``size`` at scale 1: 'usual', 'small', 'outside', 'empty' (none of them)."""
    corners, _ = boxes(count, size)
    if kind == "small":  # no size at all, one pixel, and less than a bin
        corners[:, 2:] = corners[:, :2] + torch.arange(count)[:, None] % 4 * torch.tensor([0.5, 0.25])
    if kind == "outside":
        corners += torch.tensor([-size, 0.7 * size, -size, 0.7 * size])
        corners[::2] -= 2 * size
    index = torch.arange(count, dtype=corners.dtype)[:, None] % images
    found = torch.cat([index, corners], dim=1)
    return found[:0] if kind == "empty" else found


def values_and_gradients(function, inputs):
    """The output of a function of tensors, and its gradients to those that require one."""
    leaves = [t.detach().clone().requires_grad_() if t.is_floating_point() else t for t in inputs]
    output = function(*leaves)
    grad_output = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(1))
    output.backward(grad_output.to(output.device))
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad and leaf.grad is not None)]
