"""docs/libraries.md: its examples run, and its table has the models that are tested."""

import re
from pathlib import Path

import pytest
import torch
from library_models import MODELS

from carafe_plugin.modules.carafe import KernelPrediction

TEXT = (Path(__file__).parents[2] / "docs" / "libraries.md").read_text()
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## )", TEXT, re.MULTILINE | re.DOTALL))
LIBRARIES = list(dict.fromkeys(row.library for row in MODELS))


def test_table_has_the_models_that_are_tested():
    rows = re.findall(r"^\| (\w+) [\d.]+\S* \| ([^|]+?) \|", TEXT, re.MULTILINE)
    names = [f"{row.name} ({row.part_name})" if row.part_name else row.name for row in MODELS]
    assert rows == list(zip([row.library for row in MODELS], names, strict=True))
    assert "not run" not in TEXT


@pytest.mark.parametrize("library", LIBRARIES)
def test_example(library, tmp_path, monkeypatch, one_thread):
    pytest.importorskip(library, reason=f"{library} is not installed")
    monkeypatch.chdir(tmp_path)
    if library == "ultralytics":
        from yolo_data import write_data

        write_data(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", SECTIONS[library], re.DOTALL)
    assert len(code.strip().splitlines()) <= 14
    names = {}
    exec(code, names)
    model = names["model"]
    model = model if isinstance(model, torch.nn.Module) else model.model
    count = sum(isinstance(module, KernelPrediction) for module in model.modules())
    expected = dict(torchvision=3, timm=7, transformers=6, segmentation_models_pytorch=5, ultralytics=2)
    assert count == expected[library]
