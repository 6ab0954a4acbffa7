"""A missing file that the user named is one line; one that this package wanted for itself keeps its traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import FunctionType

import pytest

pytest.importorskip("mmengine", reason="mmengine is not installed")

from mmengine.registry import Registry

from carafe_plugin.engine.errors import UsageError, construction_fault, reading_named_files


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


class Layer:
    def __init__(self, size: int, norm: dict) -> None:
        if size < 0:
            raise ValueError(f"size must be positive, got {size}")
        self.size = size // norm["groups"]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            dict(type="Layer", size=1, nrom={}),
            "Layer(size=1): Layer.__init__() got an unexpected keyword argument 'nrom'",
        ),
        (
            dict(type="Layer", size=-1, norm=dict(type="BN")),
            f"Layer(size=-1, norm=BN): size must be positive, got -1 (raised in {__name__})",
        ),
        (dict(type="Layer", size=1, norm=[]), f"Layer(size=1): list indices must be {{}} (raised in {__name__})"),
        (dict(type=Layer, size=1, norm={}), f"Layer(size=1): groups (raised in {__name__})"),
        (dict(type="Lair", size=1), "Lair(size=1): Lair is not in the mmengine::layers registry."),
    ],
)
def test_what_cannot_be_built(settings: dict, line: str) -> None:
    registry = Registry("layers", scope="mmengine")
    registry.register_module(module=Layer)
    with pytest.raises(Exception) as caught:  # noqa: PT011, of any kind
        registry.build(settings)
    assert construction_fault(caught.value) == line.format("integers or slices, not str")


def test_errors_from_elsewhere_are_bugs() -> None:
    with pytest.raises(KeyError) as caught:
        Layer(1, {})
    assert construction_fault(caught.value) is None
