"""Trainings, tests and predictions on real images: those of small downloads, and those of CARAFE_REAL_DATA.

The environment variable names a folder with camvid, dsb2018 and bccd as tools/prepare_data.py lays them out, and with
coco-200: annotations/instances_{train,val}2017.json, train2017 and val2017 with some of COCO's images.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import downloads
import pytest
from tool_runs import ROOT, Trained, call_tool

pytest.importorskip("mmdet", reason="mmdet is not installed")
pytest.importorskip("mmseg", reason="mmseg is not installed")

pytestmark = pytest.mark.usefixtures("one_thread")

REAL = sorted((ROOT / "configs" / "real").glob("*.py"))
DATA = os.environ.get("CARAFE_REAL_DATA", "")


def real(name: str) -> Path:
    """The folder of a dataset, or a skip where it is not at hand."""
    if not DATA:
        pytest.skip("CARAFE_REAL_DATA names no folder with camvid, dsb2018, bccd and coco-200")
    if not (folder := Path(DATA, name)).is_dir():
        pytest.skip(f"CARAFE_REAL_DATA={DATA} has no folder {name}")
    return folder


def train(config: Path | str, work_dir: Path, *options: str, iterations: int = 2) -> Trained:
    """Train for some iterations, and validate."""
    settings = [f"train_cfg.max_iters={iterations}", f"train_cfg.val_interval={iterations}", *options]
    assert call_tool("train", config, "--work-dir", work_dir, "--cfg-options", *settings) == 0
    scope = "mmseg" if "upernet" in Path(config).name else "mmdet"
    return Trained(scope, Path(config), work_dir)


@pytest.mark.parametrize("config", REAL, ids=[path.stem for path in REAL])
def test_trains_and_tests_on_the_data(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two iterations, a validation and a test, of every configuration as it is, on two of the images for testing."""
    real(config.stem.rpartition("_")[2])
    monkeypatch.setenv("CARAFE_DATA_ROOT", DATA)
    options = ["train_dataloader.batch_size=2"]
    options += [f"{split}_dataloader.dataset.indices=2" for split in ("val", "test")]
    trained = train(config, tmp_path / "work", *options)
    assert trained.checkpoint.name == "iter_2.pth"
    assert trained.metrics()["mIoU" if "camvid" in config.stem else "coco/bbox_mAP"] >= 0
    arguments = [config, trained.checkpoint, "--work-dir", tmp_path / "test", "--cfg-options", *options]
    assert call_tool("test", *arguments) == 0


@pytest.mark.parametrize("data", ["camvid", "dsb2018", "bccd"])
def test_trains_on_a_download(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the form in which it is public to a metric: what is laid out is what the configurations read."""
    monkeypatch.setenv("CARAFE_DATA_ROOT", str(tmp_path / "data"))
    getattr(downloads, data)(tmp_path / "download")
    assert call_tool("prepare_data", data, tmp_path / "download", "--partial") == 0
    config = next(path for path in REAL if path.stem.endswith(data) and "carafe" in path.stem)
    trained = train(config, tmp_path / "work", "train_dataloader.batch_size=2", iterations=1)
    metrics = trained.metrics()
    expected = dict(camvid="mIoU", dsb2018="coco/segm_mAP", bccd="coco/bbox_mAP")[data]
    assert metrics[expected] >= 0, "not -1: there are objects to find"


#: COCO counts its 80 categories to 90.
UNUSED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
#: mmdet's own, but for where the data lie and how large images are.
COCO = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"


def coco_options(root: Path) -> list[str]:
    loaders = [f"{split}_dataloader" for split in ("train", "val", "test")]
    options = ["model.backbone.init_cfg=None"]  # its file lies on the net
    for loader, images, resize in zip(loaders, (4, 2, 2), (2, 1, 1), strict=True):
        options += [f"{loader}.num_workers=0", f"{loader}.persistent_workers=False"]
        options += [f"{loader}.dataset.data_root={root}/", f"{loader}.dataset.indices={images}"]
        options += [f"{loader}.dataset.pipeline.{resize}.scale=(96,64)"]
    return options + [
        f"{split}_evaluator.ann_file={root}/annotations/instances_val2017.json" for split in ("val", "test")
    ]


def test_cocos_own_configuration(tmp_path: Path) -> None:
    """An epoch, a validation, a test and a prediction with a few of COCO's photographs."""
    root = real("coco-200")
    # After four iterations all scores are low: none may be too low to be measured.
    options = [*coco_options(root), "train_cfg.max_epochs=1", "model.test_cfg.rcnn.score_thr=0.0"]
    assert call_tool("train", COCO, "--work-dir", tmp_path / "work", "--cfg-options", *options) == 0
    trained = Trained("mmdet", Path(COCO), tmp_path / "work")
    assert trained.checkpoint.name == "epoch_1.pth"
    assert 0 <= trained.metrics()["coco/segm_mAP"] <= 1
    arguments = [COCO, trained.checkpoint, "--work-dir", tmp_path / "test", "--cfg-options", *options]
    assert call_tool("test", *arguments) == 0
    picture = min((root / "val2017").iterdir())
    arguments = ["--config", COCO, "--checkpoint", trained.checkpoint, "--out-dir", tmp_path / "out"]
    assert call_tool("infer", picture, *arguments, "--score-thr", "0", "--cfg-options", *options) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [image["file_name"] for image in found["images"]] == [picture.name]
    assert {category["id"] for category in found["categories"]} == set(range(1, 91)) - UNUSED
