"""The models' package: its place in the arrow of imports, what it brings along, and the docstrings' examples."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmengine", reason="mmengine is not installed")

import carafe_plugin.inpainting as package

SOURCES = sorted(Path(package.__file__).parent.glob("*.py"))


def test_imports_go_down_only():
    for source in SOURCES:
        found = re.search(
            r"^\s*(from|import)\s+((carafe_plugin)?\.*(engine|openmmlab)|[\w.]*\bmm(cv|det|seg|pretrain))\b",
            source.read_text(),
            re.M,
        )
        assert not found, f"{source.name}: {found.group(0)}"


def test_mmengine_is_enough():
    hide = "import sys\nfor name in ('mmcv', 'mmdet', 'mmseg', 'mmpretrain'): sys.modules[name] = None\n"
    code = hide + "import carafe_plugin.inpainting as m; print(len(m.__all__))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) == len(package.__all__)
