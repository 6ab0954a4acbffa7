"""tools/convert_backbone.py: what mmpretrain trained gives the same maps in mmdet and mmseg, and what it refuses."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tool_runs import call_tool, one_line, run
from torch import nn

pytest.importorskip("mmpretrain", reason="tools: mmpretrain is not installed")

pytestmark = pytest.mark.usefixtures("one_thread")

META = dict(epoch=90, iter=7, dataset_meta=dict(classes=("red", "blue")))


def backbone(toolbox: str, name: str = "CARAFEResNet", depth: int = 18, **options: Any) -> Any:
    """A net of a few channels that returns all its maps."""
    pytest.importorskip(toolbox, reason=f"tools: {toolbox} is not installed")
    few = dict(depth=depth, base_channels=8, stem_channels=8, out_indices=(0, 1, 2, 3))
    return getattr(importlib.import_module(f"carafe_plugin.openmmlab.{toolbox}"), name)(**few, **options)


@pytest.fixture
def write(tmp_path: Path):
    """Write a checkpoint as mmpretrain's training does; no two of its tensors are alike."""

    def write(net: nn.Module, **more: Any) -> Path:
        torch.manual_seed(0)
        state = {f"backbone.{key}": fill(value) for key, value in net.state_dict().items()}
        state |= {"head.fc.weight": torch.rand(2, 64), "head.fc.bias": torch.rand(2)}
        path = tmp_path / "trained.pth"
        torch.save(dict(state_dict=state, meta=META, optimizer=dict(state={}), **more), path)
        return path

    def fill(value: torch.Tensor) -> torch.Tensor:
        if not value.is_floating_point():  # BatchNorm's counter
            return value + 5
        if value.dim() == 1:
            return value + 0.1 * torch.rand(value.shape)
        return torch.randn(value.shape) * (2 / value[0].numel()) ** 0.5  # so that maps keep their size

    return write


def convert(source: Path, destination: Path, to: str = "mmdet", *options: object) -> int:
    return call_tool("convert_backbone", source, destination, "--to", to, *options)


@pytest.mark.parametrize("to", ["mmdet", "mmseg"])
@pytest.mark.parametrize(
    ("name", "depth", "options"),
    [
        ("CARAFEResNet", 18, {}),
        ("CARAFEResNet", 50, {}),
        ("CARAFEResNetV1c", 18, {}),
        ("CARAFEResNetV1c", 50, dict(norm_cfg=dict(type="SyncBN", requires_grad=True))),
        ("CARAFEResNetV1d", 18, {}),
        ("CARAFEResNetV1d", 50, {}),
        ("CARAFEResNetV1d", 50, dict(carafe_cfg=dict(stages=(False, True, False, False)))),
        ("CARAFEResNeXt", 50, {}),
    ],
)
def test_the_same_maps(to: str, name: str, depth: int, options: dict, write: Any, tmp_path: Path, capsys: Any) -> None:
    from mmengine.model import revert_sync_batchnorm

    groups = dict(groups=4) if "X" in name else {}
    source = backbone("mmpretrain", name, depth, **options, **groups)
    trained = write(source)
    converted = tmp_path / "folder" / "backbone.pth"
    assert convert(trained, converted, to, "--depth", depth) == 0
    modules = len(source.downsampler_names)
    stem = "plain" if name in ("CARAFEResNet", "CARAFEResNeXt") else "deep"
    assert f"ResNet-{depth}, {stem} stem, {modules} CARAFE++" in capsys.readouterr().out

    content = torch.load(converted)
    assert content["meta"] == META
    assert content.keys() == {"meta", "state_dict"}
    target = backbone(to, name, depth, **options, **groups, init_cfg=dict(type="Pretrained", checkpoint=str(converted)))
    assert content["state_dict"].keys() == target.state_dict().keys()
    target.init_weights()
    state = torch.load(trained)["state_dict"]
    source.load_state_dict({k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")})
    source, target = (revert_sync_batchnorm(net).eval() for net in (source, target))
    x = torch.rand(1, 3, 45, 64)
    for out, expected in zip(target(x), source(x), strict=True):
        assert expected.std() > 0
        assert torch.equal(out, expected)
    assert [path.name for path in converted.parent.iterdir()] == ["backbone.pth"]


def test_another_depth(write: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    destination = tmp_path / "backbone.pth"
    assert convert(write(backbone("mmpretrain", depth=34)), destination, "mmdet", "--depth", 50) == 2
    assert f"{tmp_path}/trained.pth holds a ResNet of depth 34, expected --depth 50" in one_line(capsys)
    odd = backbone("mmpretrain", depth=50)
    del odd.layer3[2:]
    assert convert(write(odd), destination) == 2
    assert "its blocks are of no ResNet of depth 18, 34, 50, 101, 152" in one_line(capsys)
    assert not destination.exists()


def test_checkpoints_of_something_else(write: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, destination = tmp_path / "source.pth", tmp_path / "backbone.pth"
    for state, message in (
        (backbone("mmdet").state_dict(), "no parameter starts with 'backbone.'.* found conv1.weight, "),
        ({}, "no parameter starts with 'backbone.'.* found none at all"),
        (nn.ModuleDict(dict(backbone=nn.Linear(2, 2))).state_dict(), "not a ResNet: .* found weight, bias"),
        (
            nn.ModuleDict(dict(backbone=backbone("mmdet", "CARAFEResNetV1c"))).state_dict(),
            "the deep stem is not MMPretrain's .*stem.0.weight",
        ),
    ):
        torch.save(dict(state_dict=state), source)
        assert convert(source, destination) == 2
        line = one_line(capsys)
        assert str(source) in line
        assert re.search(message, line), line
    source.write_bytes(b"no checkpoint")
    assert convert(source, destination) == 2
    assert f"cannot read checkpoint {source}" in one_line(capsys)
    assert convert(tmp_path / "absent.pth", destination) == 2
    assert f"no such checkpoint: {tmp_path}/absent.pth" in one_line(capsys)
    assert not destination.exists()


def test_without_carafe(write: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A stock ResNet would leave CARAFE++ at its start, unnoticed: only where that is asked for."""
    off = dict(stem=False, stages=(False,) * 4)
    source, destination = write(backbone("mmpretrain", "CARAFEResNetV1c", carafe_cfg=off)), tmp_path / "backbone.pth"
    assert convert(source, destination) == 2
    assert "holds a ResNet without CARAFE++; pass --stock" in one_line(capsys)
    assert not destination.exists()
    assert convert(source, destination, "mmseg", "--stock") == 0
    assert "deep stem, 0 CARAFE++" in capsys.readouterr().out
    backbone("mmseg", "CARAFEResNetV1c", carafe_cfg=off).load_state_dict(torch.load(destination)["state_dict"])


def test_destinations(write: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = write(backbone("mmpretrain"))
    content = source.read_bytes()
    assert convert(source, tmp_path) == 2
    assert f"DST must be a file, and is a folder: {tmp_path}" in one_line(capsys)
    assert convert(source, source) == 2
    assert "DST must be another file than SRC" in one_line(capsys)
    assert convert(source, source / "below.pth") == 2
    assert f"cannot write {source}/below.pth" in one_line(capsys)
    assert source.read_bytes() == content
    assert convert(source, tmp_path / "x.pth", "mmpose") == 2
    assert "invalid choice: 'mmpose'" in capsys.readouterr().err


def test_a_kill_leaves_the_old_file(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, destination = write(backbone("mmpretrain")), tmp_path / "out" / "backbone.pth"
    assert convert(source, destination) == 0
    content = destination.read_bytes()

    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        convert(write(backbone("mmpretrain", depth=34)), destination)
    assert destination.read_bytes() == content
    assert len(list(destination.parent.iterdir())) == 1


def test_command_line(write: Any, tmp_path: Path) -> None:
    """In a process of its own, as a user runs it."""
    source = write(backbone("mmpretrain"))
    done = run("convert_backbone.py", source, tmp_path / "backbone.pth", "--to", "mmseg")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(f"{tmp_path}/backbone.pth: ResNet-18, plain stem, 7 CARAFE++")
