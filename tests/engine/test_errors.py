"""A missing file that the user named is one line; one that this package wanted for itself keeps its traceback."""

from __future__ import annotations

import argparse
import codecs
from collections.abc import Callable
from pathlib import Path
from types import FunctionType

import pytest

pytest.importorskip("mmengine", reason="mmengine is not installed")

from mmengine.registry import Registry

from carafe_plugin.engine.cli import run_tool
from carafe_plugin.engine.config import load_config
from carafe_plugin.engine.errors import UsageError, construction_fault, read_json, reading_named_files


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


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", r"cannot read {path} \(0 bytes; truncated, or not JSON\): .*line 1 column 1 "),
        (b'{"a": 1,\n "b', r"cannot read {path} \(12 bytes; truncated, or not JSON\): .*: line 2 column 2 "),
        (b"\x89PNG\r\n", r"cannot read {path} \(6 bytes; not UTF-8\): .*0x89 in position 0"),
        ('{"name": "caf\u00e9"}'.encode("latin-1"), r"cannot read {path} \(16 bytes; not UTF-8\): .* in position 13"),
        (codecs.BOM_UTF8 + b"{}", "{path} begins with a byte order mark: save it as UTF-8 without one"),
        ("{}".encode("utf-16"), "{path} begins with a byte order mark"),
        ("{}".encode("utf-16-be"), r"cannot read {path} \(4 bytes; truncated, or not JSON\): "),
        (b"[" * 100_000, r"cannot read {path} \(100000 bytes; truncated, or not JSON\): maximum recursion depth"),
        (b"9" * 5000, r"cannot read {path} \(5000 bytes; truncated, or not JSON\): Exceeds the limit"),
    ],
)
def test_files_that_are_not_json(content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="^" + expected.replace("{path}", str(path))):
        read_json(path)


def test_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"n\u00e4me": [1, 2.5, null]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"n\u00e4me": [1, 2.5, None]}
    for path in (tmp_path, tmp_path / "absent.json"):
        with pytest.raises(UsageError, match=f"^cannot read {path}: (Is a directory|No such file or directory)$"):
            read_json(path)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", codecs.BOM_UTF8 + b"{}", "{path} begins with a byte order mark"),
        ("a.json", b'{"a": ', "cannot read {path} .*truncated, or not JSON.*line 1 column 7"),
        ("a.json", b"[1]", "configuration {path} must be a JSON object of settings"),
        ("a.yml", b"a: [1", "cannot read configuration {path}: "),
        ("a.py", "a = '\u00e9'".encode("latin-1"), "cannot read configuration {path}: .* 0xe9"),
        ("a.py", codecs.BOM_UTF8 + b"a = 1", r"cannot read configuration {path}: .*U\+FEFF"),
    ],
)
def test_configurations_that_cannot_be_read(name: str, content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError, match=expected.replace("{path}", str(path))):
        load_config(str(path))


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
