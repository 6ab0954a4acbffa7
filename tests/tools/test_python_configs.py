"""Configurations written in Python (MMEngine's new form): classes as types, and no default scope; and other forms."""

from __future__ import annotations

import importlib
import json
import re
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import Registry
from tiny_models import write_config, write_scenes
from tool_runs import call_tool, last_metrics, one_line

pytest.importorskip("mmdet", reason="tools: mmdet is not installed")
pytest.importorskip("mmseg", reason="tools: mmseg is not installed")
pytest.importorskip("mmpretrain", reason="tools: mmpretrain is not installed")

SCOPES = ("mmdet", "mmseg", "mmpretrain")
CHILD = """
from mmengine.config import read_base
with read_base():
    from .base_{scope} import *
train_cfg.update(max_epochs=1, val_interval=1)
"""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes") / "data", 5)


def write_python_config(folder: Path, scope: str, data: Path) -> Path:
    """The tiny configuration of a toolbox, with classes in the place of names, as a base and what is made of it."""
    importlib.import_module(f"carafe_plugin.openmmlab.{scope}")
    registries = vars(importlib.import_module(f"{scope}.registry")).values()
    registries = [registry for registry in registries if isinstance(registry, Registry) and registry.scope == scope]
    text = write_config(folder / f"text_{scope}.py", scope, data, epochs=1).read_text()
    imports = {}
    for name in set(re.findall(r"type='(\w+)'", text)):
        for registry in registries:
            with suppress(RuntimeError):  # what no registry knows: MMEngine looks for a module of that name
                if (found := registry.get(name)) and name not in imports:
                    imports[name] = f"from {found.__module__} import {found.__name__} as {name}\n"
    assert {"CheckpointHook", "OptimWrapper", "AdamW", "LoadImageFromFile", "ResNet"} <= set(imports)
    text = re.sub(r"type='(\w+)'", lambda found: f"type={found[1]}" if found[1] in imports else found[0], text)
    text = text.replace(f"default_scope = '{scope}'", "default_scope = None").replace(
        "dataset_type = 'CocoDataset'", ""
    )
    text = text.replace("type=dataset_type", "type=CocoDataset")
    if "CocoDataset" in text:
        imports["CocoDataset"] = "from mmdet.datasets import CocoDataset\n"
    (folder / f"base_{scope}.py").write_text("".join(imports.values()) + text)
    path = folder / f"python_{scope}.py"
    path.write_text(CHILD.format(scope=scope))
    return path


@pytest.mark.parametrize("scope", SCOPES)
def test_as_written_in_text(scope: str, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Trained, tested, resumed, read back from what the run has written, and looked at by the other tools."""
    config, run = write_python_config(tmp_path, scope, scenes), tmp_path / "run"
    assert Config.fromfile(config).default_scope is None
    assert call_tool("train", config, "--work-dir", run) == 0
    assert call_tool("train", tmp_path / f"text_{scope}.py", "--work-dir", tmp_path / "text") == 0
    metrics = last_metrics(tmp_path / "text")
    assert last_metrics(run) == pytest.approx(metrics), "the same seed: the same training"
    checkpoint = run / "epoch_1.pth"
    assert "optimizer" in torch.load(checkpoint, weights_only=False)

    out, shown = tmp_path / ("maps" if scope == "mmseg" else "out.pkl"), tmp_path / "seen"
    dumped = next(run.glob("*/vis_data/config.py"))
    assert "AtomicCheckpointHook" in dumped.read_text()
    for index, file in enumerate((config, dumped)):
        command = (file, checkpoint, "--work-dir", tmp_path / f"test_{index}", "--out", out, "--show-dir", shown)
        assert call_tool("test", *command[: 6 if index else None]) == 0
        assert last_metrics(tmp_path / f"test_{index}") == pytest.approx(metrics)
        assert out.exists()
    assert list(shown.rglob("*.png"))

    boxes_alone = ("model.type=FasterRCNN", "model.roi_head.mask_head=None", "test_evaluator.metric=bbox")
    options = ("--cfg-options", *boxes_alone, "model.roi_head.mask_roi_extractor=None") if scope == "mmdet" else ()
    assert call_tool("test", dumped, checkpoint, "--work-dir", tmp_path / "flips", "--tta", *options) == 0

    scaled = ("auto_scale_lr.base_batch_size=8", "train_cfg.max_epochs=2", "runner_type=FlexibleRunner")
    assert call_tool("train", dumped, "--work-dir", run, "--resume", "--auto-scale-lr", "--cfg-options", *scaled) == 0
    log = max(run.glob("*/*.log")).read_text()
    assert "resumed epoch: 1, iter: 2" in log
    assert "batch size of 8" in log
    capsys.readouterr()
    assert call_tool("browse_model", run / config.name) == 0
    if scope != "mmdet":
        return
    image = scenes / "images" / "00.png"
    for file in (config, dumped):
        given = ("--config", file, "--checkpoint", checkpoint)
        assert call_tool("infer", image, *given, "--out-dir", tmp_path / "found", "--score-thr", 0.4) == 0
        assert json.loads((tmp_path / "found" / "results.json").read_text())["images"][0]["file_name"] == "00.png"
    assert call_tool("visualize_reassembly", image, *given, "--points", "9,9", "--out", tmp_path / "seen") == 0


def test_benchmark(scenes: Path, tmp_path: Path) -> None:
    config = write_python_config(tmp_path, "mmdet", scenes)
    report = tmp_path / "times.json"
    options = ("--shape", 64, 64, "--repeats", 1, "--threads", 1, "--json", report)
    assert call_tool("benchmarks.model", config, *options) == 0
    assert json.loads(report.read_text())


@pytest.mark.parametrize("scope", SCOPES)
def test_mistakes_are_the_same_lines(
    scope: str, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("carafe_plugin.engine.processes.get_device", lambda: "cpu")
    config = write_python_config(tmp_path, scope, scenes)
    place = {"mmdet": "ann_file", "mmseg": "data_prefix.seg_map_path", "mmpretrain": "data_prefix"}[scope]
    for options, expected in (
        (["--amp"], "--amp needs a GPU"),
        (["--cfg-options", "optim_wrapper.type=AmpOptimWrapper"], "AmpOptimWrapper in the configuration needs a GPU"),
        (["--cfg-options", f"train_dataloader.dataset.{place}=absent"], f"{scenes}/absent"),
        (["--cfg-options", "default_scope.name=mmdet"], "--cfg-options do not fit"),
    ):
        capsys.readouterr()
        assert call_tool("train", config, "--work-dir", tmp_path / "run", *options) == 2
        assert expected in one_line(capsys)


def test_a_class_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for line, expected in (
        ("from mmdet.nowhere import Net", "No module named 'mmdet.nowhere'"),
        ("from mmdet.models import Net", "Failed to import Net from mmdet.models"),
    ):
        (tmp_path / "absent.py").write_text(f"{line}\nmodel = dict(type=Net)\n")
        for tool in ("train", "browse_model"):
            assert call_tool(tool, tmp_path / "absent.py") == 2
            assert expected in one_line(capsys)


@pytest.mark.parametrize("ending", ["json", "yaml"])
def test_json_and_yaml(ending: str, scenes: Path, tmp_path: Path) -> None:
    text = Config.fromfile(write_config(tmp_path / "text.py", "mmpretrain", scenes, epochs=1))
    config, run = tmp_path / f"config.{ending}", tmp_path / "run"
    text.dump(config)
    assert call_tool("train", config, "--work-dir", run) == 0
    for file in (config, run / config.name):
        assert call_tool("test", file, run / "epoch_1.pth", "--work-dir", tmp_path / "test") == 0
        assert last_metrics(tmp_path / "test") == pytest.approx(last_metrics(run))


def test_bases_of_a_toolbox(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """By MMEngine's name for them, and without a file of one's own; with a module of one's own."""
    base = "mmpretrain::resnet/resnet18_8xb32_in1k.py"
    (tmp_path / "own.py").write_text(
        f"_base_ = '{base}'\ncustom_imports = dict(imports=['carafe_plugin.openmmlab.mmpretrain'])\n"
        "model = dict(backbone=dict(type='CARAFEResNet'))\n"
    )
    for config, modules in ((tmp_path / "own.py", 7), (base, 0)):
        assert call_tool("browse_model", config, "--shape", 64, 64, "--json", tmp_path / "seen.json") == 0
        assert json.loads((tmp_path / "seen.json").read_text())["carafe"]["modules"] == modules
    capsys.readouterr()
    assert call_tool("train", base, "--work-dir", tmp_path / "run") == 2
    assert "no such" in one_line(capsys)


UNREADABLE = {
    "cut.yaml": (b"a: [1, 2\nb: }", "ParserError: while parsing"),
    "latin.py": (b'a = "\xe9"', "UnicodeDecodeError: "),
    "unknown.py": (b"model = dict(type=undefined)", "NameError: name 'undefined' is not defined"),
    "base.py": (
        b"from mmengine.config import read_base\nwith read_base():\n    from .absent import *\n",
        "absent.py not found",
    ),
    "words.txt": (b"model", "Only py/yml/yaml/json type"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_files_that_cannot_be_read(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    content, expected = UNREADABLE[name]
    (tmp_path / name).write_bytes(content)
    assert call_tool("train", tmp_path / name) == 2
    message = one_line(capsys)
    assert f"cannot read configuration {tmp_path / name}: " in message
    assert expected in message
