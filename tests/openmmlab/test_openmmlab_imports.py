"""The adapters' place in the arrow of imports: below what the commands run on."""

import re
from pathlib import Path

import pytest

import carafe_plugin.openmmlab as package

ROOT = Path(package.__file__).parent


@pytest.mark.parametrize("source", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(source):
    found = re.search(r"^\s*(from|import)\s+(carafe_plugin)?\.*(engine|inpainting|tools)\b", source.read_text(), re.M)
    assert not found, found.group(0)
