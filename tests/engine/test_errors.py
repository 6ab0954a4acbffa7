"""A missing file that the user named is one line; one that this package wanted for itself keeps its traceback."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from types import FunctionType

import pytest

pytest.importorskip("mmengine", reason="mmengine is not installed")

from carafe_plugin.engine.cli import run_tool
from carafe_plugin.engine.errors import UsageError, reading_named_files


def read(path: Path) -> str:
    return path.read_text()


def of_module(name: str) -> Callable[[Path], str]:
    """The function above, as if the module ``name`` had it."""
    return FunctionType(read.__code__, dict(__name__=name))


@pytest.mark.parametrize("module", ["mmdet.datasets.coco", "my_dataset", "carafe_plugin.inpainting.dataset", "tools.x"])
def test_files_that_the_user_names(module: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"^no such file or folder: {tmp_path}/absent$"), reading_named_files():
        of_module(module)(tmp_path / "absent")
    with pytest.raises(UsageError, match="no such file or folder"), reading_named_files():
        (tmp_path / "absent").read_text()


def test_a_workers_error() -> None:
    """torch puts the worker's traceback into the message, and names no file."""
    with pytest.raises(UsageError, match=r"^No such file: 'a\.png'$"), reading_named_files():
        raise FileNotFoundError("Caught in worker 0.\nTraceback (most recent call last):\nNo such file: 'a.png'")


def test_files_of_our_own(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), reading_named_files():
        of_module("carafe_plugin.engine.checkpoint_hook")(tmp_path / "absent")


def test_other_errors_pass() -> None:
    with pytest.raises(PermissionError), reading_named_files():
        raise PermissionError("not yours")


def test_packages_that_a_toolbox_wants(capsys: pytest.CaptureFixture) -> None:
    """An ImportError that names no module is a toolbox's advice; any other is a bug, or a broken installation."""

    def ask(**settings: str) -> int:
        def main(args: object) -> None:
            raise ImportError("Package lvis is not installed.\nPlease run pip install lvis", **settings)

        return run_tool(main, argparse.Namespace())

    assert ask() == 2
    assert capsys.readouterr().err == "error: Package lvis is not installed. Please run pip install lvis\n"
    with pytest.raises(ImportError, match="lvis"):
        ask(name="lvis")
