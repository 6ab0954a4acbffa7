"""A backbone goes from classification to other tasks: trained, evaluated, converted, the same in mmdet and mmseg."""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from tiny_models import SIZE, write_config
from tool_runs import Trained, call_tool, last_metrics

for _toolbox in ("mmpretrain", "mmdet", "mmseg"):
    pytest.importorskip(_toolbox, reason=f"a backbone goes from one toolbox to others: {_toolbox} is not installed")

#: Colour (RGB) and whether the stripes lie: neither tells the class alone.
CLASSES = {
    "lying_red": ((220, 40, 40), True),
    "lying_blue": ((40, 40, 220), True),
    "standing_red": ((220, 40, 40), False),
    "standing_blue": ((40, 40, 220), False),
}
CHANCE = 100 / len(CLASSES)
BACKBONE = dict(depth=18, base_channels=16, stem_channels=16, out_indices=(0, 1, 2, 3))


def write_tree(root: Path, split: str, images: int) -> None:
    """Write ``images`` pictures of each class as ImageNet has them: ``<split>/<class>/<name>.JPEG``."""
    for index, (name, (colour, lying)) in enumerate(CLASSES.items()):
        folder = root / split / name
        folder.mkdir(parents=True)
        for number in range(images):
            rng = np.random.default_rng([split == "val", index, number])
            image = rng.integers(90, 130, (SIZE, SIZE, 3), dtype=np.uint8)
            period, phase = rng.integers(10, 20), rng.integers(20)
            stripes = (np.arange(SIZE) + phase) % period < period // 2
            image[stripes if lying else (slice(None), stripes)] = colour
            Image.fromarray(image).save(folder / f"{number:03d}.JPEG", quality=95)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A tiny ResNet-18 with CARAFE++ at all seven places, trained from scratch."""
    folder = tmp_path_factory.mktemp("classification")
    write_tree(folder / "data", "train", 24)
    write_tree(folder / "data", "val", 8)
    cfg = Config.fromfile(write_config(folder / "tiny.py", "mmpretrain", folder / "data", epochs=6, lr=4e-3))
    backbone = dict(BACKBONE, type="carafe_plugin.openmmlab.mmpretrain.CARAFEResNet")
    cfg.merge_from_dict(
        {
            **{f"model.backbone.{key}": value for key, value in backbone.items()},
            "model.head.num_classes": len(CLASSES),
            "data_preprocessor.num_classes": len(CLASSES),
            "train_dataloader.batch_size": 16,
            "train_dataloader.dataset.data_prefix": "train",
            "val_dataloader.dataset.data_prefix": "val",
            "test_dataloader.dataset.data_prefix": "val",
        }
    )
    config = folder / "carafe.py"
    cfg.dump(config)
    assert call_tool("train", config, "--work-dir", folder / "run") == 0
    return Trained("mmpretrain", config, folder / "run")


def test_training_and_evaluation(trained: Trained, tmp_path: Path) -> None:
    accuracy = trained.metrics()["accuracy/top1"]
    assert accuracy > 3 * CHANCE
    out = tmp_path / "predictions.pkl"
    assert call_tool("test", trained.config, trained.checkpoint, "--work-dir", tmp_path / "test", "--out", out) == 0
    assert last_metrics(tmp_path / "test")["accuracy/top1"] == accuracy
    predictions = pickle.loads(out.read_bytes())
    assert len(predictions) == 8 * len(CLASSES)
    right = [int(item["pred_label"]) == int(item["gt_label"]) for item in predictions]
    assert 100 * np.mean(right) == pytest.approx(accuracy, abs=0.01)


@pytest.mark.parametrize("toolbox", ["mmdet", "mmseg"])
def test_converted_backbone_gives_the_same_features(toolbox: str, trained: Trained, tmp_path: Path) -> None:
    file = tmp_path / "backbone.pth"
    assert call_tool("convert_backbone", trained.checkpoint, file, "--to", toolbox, "--depth", 18) == 0

    from mmpretrain.apis import get_model

    original = get_model(str(trained.config), pretrained=str(trained.checkpoint)).backbone.eval()
    registry = importlib.import_module(f"{toolbox}.registry").MODELS
    init_cfg = dict(type="Pretrained", checkpoint=str(file))
    converted = registry.build(
        dict(BACKBONE, type=f"carafe_plugin.openmmlab.{toolbox}.CARAFEResNet", init_cfg=init_cfg)
    )
    converted.init_weights()
    converted.eval()
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        expected, got = original(images), converted(images)
    assert len(got) == 4
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.std() > 1e-3, "trained, not dead"
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)  # the same arithmetic in the same order
