"""The README's blocks about other libraries and runtimes run, and what their comments say of the result holds."""

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parents[2] / "README.md").read_text()
SECTION = README.partition("## In other libraries, and in other runtimes")[2].partition("\n## ")[0]
BLOCKS = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)


def block(word):
    (found,) = (text for text in BLOCKS if word in text)
    return found


def test_torchvision(capsys):
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    names = {}
    exec(
        block("fasterrcnn_resnet50_fpn").replace("weights_backbone=None)", "weights_backbone=None, min_size=128)"),
        names,
    )
    printed = capsys.readouterr().out
    assert "dry run: the model is as it was" in printed
    assert [f"backbone.fpn.carafe_upsamplers.{i}" in printed for i in range(3)] == [True] * 3
    model = names["model"]
    assert len(model.backbone.fpn.carafe_upsamplers) == 3
    from carafe_plugin import CARAFEDownsample

    assert sum(isinstance(module, CARAFEDownsample) for module in model.modules()) == 7


def test_onnx(monkeypatch, tmp_path):
    for package in ("torchvision", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block("export.to_onnx"), names)
    with torch.no_grad():
        expected = names["model"](names["image"])["out"]
    torch.testing.assert_close(torch.from_numpy(names["scores"]), expected, rtol=1e-4, atol=1e-4)
