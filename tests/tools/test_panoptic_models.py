"""Panoptic models with CARAFE++ through the tools: Panoptic FPN, and MMDetection's own files of the two MaskFormers."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("mmdet", reason="tools: mmdet is not installed")
pytest.importorskip("mmseg", reason="narrow models: mmseg is not installed")

from mmdet.evaluation import INSTANCE_OFFSET
from mmengine.config import Config
from narrow import CONFIGS, DETECTORS, narrow
from tiny_models import scene, write_config
from tool_runs import call_tool, last_metrics, one_line

VOID = 3  # the number of classes


def test_trained_tested_and_drawn(trained: Callable, data: Path, tmp_path: Path) -> None:
    model, out = trained("panoptic"), tmp_path / "found.pkl"
    options = ["--out", out, "--show-dir", tmp_path / "shown"]
    assert call_tool("test", model.config, model.checkpoint, "--work-dir", tmp_path / "run", *options) == 0
    tested = last_metrics(tmp_path / "run")
    assert tested == pytest.approx(model.metrics())
    assert tested["coco_panoptic/PQ_st"] > 70
    assert tested["coco_panoptic/PQ_th"] > 20
    # What was dumped is what was measured: the share of the ground's pixels that are found as ground.
    shares = []
    for found in pickle.loads(out.read_bytes()):
        index = found["img_id"]
        segments = np.asarray(found["pred_panoptic_seg"]["sem_seg"][0])
        ground = cv2.imread(str(data / f"labels/{index:02d}.png"), cv2.IMREAD_UNCHANGED) == 0
        shares.append((segments[ground] % INSTANCE_OFFSET == 2).mean())
    assert np.mean(shares) > 0.8
    assert sorted(path.name for path in (tmp_path / "shown").iterdir()) == [f"{index:02d}.png" for index in range(7)]


def test_what_belongs_to_no_segment_stays_so(trained: Callable, tmp_path: Path) -> None:
    """MMDetection's metric would leave 0 there, the first class, for whoever dumps or draws; and it cannot be drawn."""
    model, out = trained("panoptic"), tmp_path / "found.pkl"
    nothing = ["model.test_cfg.panoptic.stuff_area_limit=10000", "model.test_cfg.rcnn.score_thr=1.0"]
    options = ["--out", out, "--show-dir", tmp_path / "shown", "--cfg-options", *nothing]
    assert call_tool("test", model.config, model.checkpoint, "--work-dir", tmp_path / "run", *options) == 0
    for found in pickle.loads(out.read_bytes()):
        assert np.unique(found["pred_panoptic_seg"]["sem_seg"]).tolist() == [VOID]
    assert last_metrics(tmp_path / "run")["coco_panoptic/PQ"] == 0
    drawn = cv2.imread(str(tmp_path / "shown/00.png"))[:, -64:]  # to the right of the image
    assert np.array_equal(drawn, scene(0)[0])


def test_objects_and_segments_of_images(
    trained: Callable, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = trained("panoptic")
    capsys.readouterr()
    command = ("--config", model.config, "--checkpoint", model.checkpoint, "--out-dir", tmp_path)
    assert call_tool("infer", data / "images", *command) == 0
    said = capsys.readouterr().out.splitlines()
    assert f"{tmp_path}/results.json lists objects alone: the panoptic segmentation is in the pictures" in said
    listed = json.loads((tmp_path / "results.json").read_text())
    assert [category["id"] for category in listed["categories"]] == [7, 8, 99]
    assert listed["annotations"] == []  # Panoptic FPN has segments alone
    for index in range(7):
        drawn = cv2.imread(str(tmp_path / f"pictures/{index:02d}.png"))
        assert not np.array_equal(drawn, scene(index)[0])


def test_counted_and_looked_into(trained: Callable, data: Path, tmp_path: Path) -> None:
    model = trained("panoptic")
    assert call_tool("browse_model", model.config, "--shape", 64, 64, "--json", tmp_path / "found.json") == 0
    assert json.loads((tmp_path / "found.json").read_text())["carafe"]["modules"] == 4
    command = ("--config", model.config, "--checkpoint", model.checkpoint, "--points", "30,30", "--out", tmp_path)
    assert call_tool("visualize_reassembly", data / "images/00.png", *command, "--chain", "fpn") == 0
    assert (tmp_path / "00.png").is_file()


def write_former(path: Path, name: str, data: Path) -> Path:
    """MMDetection's own configuration of a MaskFormer: narrow, for the tiny scenes, for one epoch."""
    file, changes, _ = DETECTORS[name]
    cfg = Config.fromfile(CONFIGS["mmdet"] / file)
    cfg.merge_from_dict({f"model.{key}": value for key, value in changes.items()})
    narrow(cfg.model)
    for head in (cfg.model.panoptic_head, cfg.model.panoptic_fusion_head):
        head.update(num_things_classes=2, num_stuff_classes=1)
    cfg.model.panoptic_head.loss_cls.class_weight = [1.0, 1.0, 1.0, 0.1]
    cfg.model.data_preprocessor.batch_augments = None
    cfg.model.test_cfg.max_per_image = 10
    tiny = Config.fromfile(write_config(path.with_name(f"tiny_{path.name}"), "panoptic", data))
    for split in ("train", "val", "test"):
        loader, dataset = cfg[f"{split}_dataloader"], tiny[f"{split}_dataloader"].dataset
        loader.update(batch_size=4 if split == "train" else 1, num_workers=0, persistent_workers=False)
        loader.dataset.update({key: value for key, value in dataset.items() if key != "pipeline"})
        _shrink(loader.dataset.pipeline)
    instances = dict(type="CocoMetric", ann_file=f"{data}/instances.json", metric=["bbox", "segm"])
    cfg.val_evaluator = cfg.test_evaluator = [tiny.test_evaluator, *([instances] if name == "Mask2Former" else [])]
    cfg.train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=1)
    cfg.default_hooks.checkpoint = dict(type="CheckpointHook")
    cfg.log_processor, cfg.param_scheduler = dict(by_epoch=True), None
    cfg.dump(path)
    return path


def _shrink(part: object) -> None:
    for value in part.values() if isinstance(part, dict) else part if isinstance(part, (list, tuple)) else ():
        _shrink(value)
    if isinstance(part, dict):
        part.update({key: (96, 96) for key in part.keys() & {"scale", "crop_size"}})
        part.update({key: [(64, 96)] for key in part.keys() & {"scales"}})


@pytest.mark.parametrize("name", DETECTORS)
def test_maskformers(name: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config, run = write_former(tmp_path / "former.py", name, data), tmp_path / "run"
    assert call_tool("train", config, "--work-dir", run) == 0
    checkpoint = Path((run / "last_checkpoint").read_text())
    weights = torch.load(checkpoint, weights_only=False)["state_dict"]
    encoders = [key for key in weights if "upsample_modules" in key and key.endswith("content_encoder.weight")]
    assert len(encoders) == DETECTORS[name][2]
    command = (config, checkpoint, "--work-dir", tmp_path / "test")
    assert call_tool("test", *command) == 0
    tested = last_metrics(tmp_path / "test")
    assert tested == pytest.approx(last_metrics(run))
    assert "coco_panoptic/PQ" in tested
    assert ("coco/segm_mAP" in tested) == (name == "Mask2Former")
    capsys.readouterr()
    assert call_tool("test", *command, "--tta") == 2
    assert f"mmdet merges boxes, not masks, and the model of {config} has a panoptic head" in one_line(capsys)
    found = ("--config", config, "--checkpoint", checkpoint, "--out-dir", tmp_path / "found")
    assert call_tool("infer", data / "images", *found, "--score-thr", 0) == 0
    listed = json.loads((tmp_path / "found/results.json").read_text())["annotations"]
    assert bool(listed) == (name == "Mask2Former"), "the other has segments alone"
