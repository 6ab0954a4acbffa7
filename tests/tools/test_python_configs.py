"""Configurations written in Python (MMEngine's new form): classes as types, and no default scope."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tiny_runs import call_tool, one_line, write_config, write_scenes

pytest.importorskip("mmseg", reason="MMSegmentation is not installed")

IMPORTS = """
from mmcv.transforms import LoadImageFromFile
from mmengine.dataset import DefaultSampler
from mmengine.hooks import CheckpointHook, DistSamplerSeedHook, IterTimerHook, LoggerHook, ParamSchedulerHook
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, TestLoop, ValLoop
from mmengine.visualization import LocalVisBackend
from mmseg.datasets import BaseSegDataset, LoadAnnotations, PackSegInputs
from mmseg.engine.hooks import SegVisualizationHook
from mmseg.evaluation import IoUMetric
from mmseg.models import EncoderDecoder, SegDataPreProcessor
from mmseg.visualization import SegLocalVisualizer
from torch.optim import AdamW
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The tiny segmentor, with classes in the place of names."""
    data = write_scenes(tmp_path / "data", 5)
    text = write_config(tmp_path / "text.py", "mmseg", data, epochs=1).read_text()
    names = set(re.findall(r"[A-Z]\w+", IMPORTS))
    text = re.sub(r"type='(\w+)'", lambda found: f"type={found[1]}" if found[1] in names else found[0], text)
    path = tmp_path / "python_config.py"
    path.write_text(IMPORTS + text.replace("default_scope = 'mmseg'", "default_scope = None"))
    return path


def test_trained_and_tested_as_one_written_in_text(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "run"
    assert call_tool("train", config, "--work-dir", run) == 0
    checkpoint = run / "epoch_1.pth"
    assert "optimizer" in torch.load(checkpoint, weights_only=False)
    options = ("--work-dir", run, "--out", tmp_path / "maps", "--show-dir", tmp_path / "seen", "--tta")
    assert call_tool("test", config, checkpoint, *options) == 0
    assert len(list((tmp_path / "maps").glob("*.png"))) == 5
    assert list((tmp_path / "seen").rglob("*.png"))
    capsys.readouterr()
    assert call_tool("browse_model", config) == 0


def test_mistakes_are_the_same_lines(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert call_tool("train", config, "--amp", "--work-dir", tmp_path / "run") == 2
    assert "--amp needs a GPU" in one_line(capsys)
    (tmp_path / "data" / "labels" / "00.png").unlink()
    assert call_tool("train", config, "--work-dir", tmp_path / "run") == 2
    assert "1 of the 5 annotations are missing in" in one_line(capsys)
