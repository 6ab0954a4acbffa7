"""MMDetection's own tools/train.py trains our types: by full path as they stand, by short name with custom_imports.

It runs on MMCV's compiled operators, or on torchvision's where there are none (``mmcv_ops``).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet", reason="MMDetection is not installed")

import cv2
import mmdet

TRAIN_TOOL = Path(mmdet.__file__).parent / ".mim" / "tools" / "train.py"

CONFIG = """
_base_ = "mmdet::{base}"
{custom_imports}
model = dict(
    backbone=dict(depth=18, init_cfg=None),
    neck=dict(type="{prefix}CARAFEFPN", in_channels=[64, 128, 256, 512], out_channels=32),
    rpn_head=dict(in_channels=32, feat_channels=32),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=32),
        bbox_head=dict(in_channels=32, fc_out_channels=64),
        mask_roi_extractor=dict(out_channels=32),
        mask_head=dict(type="{prefix}CARAFEFCNMaskHead", num_convs=1, in_channels=32, conv_out_channels=32),
    ),
)
train_dataloader = dict(
    batch_size=1,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root={root!r},
        ann_file="annotations.json",
        data_prefix=dict(img=""),
        metainfo=dict(classes=("square",)),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
            dict(type="Resize", scale=(101, 77), keep_ratio=False),
            dict(type="PackDetInputs"),
        ],
    ),
)
train_cfg = dict(max_epochs=1)
val_cfg = val_dataloader = val_evaluator = None
test_cfg = test_dataloader = test_evaluator = None
default_hooks = dict(logger=dict(interval=1))
"""


@pytest.fixture
def dataset(tmp_path):
    """Two images of COCO format, a bright square in each."""
    annotations = []
    for i in range(2):
        image = np.random.default_rng(i).integers(0, 120, (77, 101, 3), dtype=np.uint8)
        image[20:50, 30:70] = 230
        cv2.imwrite(str(tmp_path / f"{i}.png"), image)
        outline = [30, 20, 70, 20, 70, 50, 30, 50]
        annotations.append(
            dict(
                id=i + 1, image_id=i, category_id=1, bbox=[30, 20, 40, 30], area=1200, iscrowd=0, segmentation=[outline]
            )
        )
    images = [dict(id=i, file_name=f"{i}.png", height=77, width=101) for i in range(2)]
    categories = [dict(id=1, name="square")]
    content = dict(images=images, annotations=annotations, categories=categories)
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize(
    ("prefix", "custom_imports"),
    [
        ("carafe_plugin.openmmlab.mmdet.", ""),
        ("", 'custom_imports = dict(imports=["carafe_plugin.openmmlab.mmdet"])'),
    ],
    ids=["full path", "short name"],
)
def test_stock_train_tool(dataset, prefix, custom_imports):
    if not TRAIN_TOOL.exists():
        pytest.skip(f"this MMDetection ships no {TRAIN_TOOL}")
    config = dataset / "config.py"
    config.write_text(
        CONFIG.format(
            base="mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
            prefix=prefix,
            custom_imports=custom_imports,
            root=f"{dataset}/",
        )
    )
    work_dir = dataset / "work_dir"
    command = [sys.executable, "-m", "carafe_plugin.openmmlab.mmcv_ops"]
    command += [str(TRAIN_TOOL), str(config), "--work-dir", str(work_dir)]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)), CUDA_VISIBLE_DEVICES="")
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=dataset)
    assert result.returncode == 0, result.stderr[-3000:]

    checkpoint = torch.load(work_dir / "epoch_1.pth", map_location="cpu", weights_only=False)
    upsamplers = {key.rsplit(".", 2)[0] for key in checkpoint["state_dict"] if "content_encoder" in key}
    assert upsamplers == {*(f"neck.upsample_modules.{i}" for i in range(3)), "roi_head.mask_head.upsample"}
    log = next(work_dir.glob("*/vis_data/scalars.json"))
    losses = [json.loads(line)["loss"] for line in log.read_text().splitlines()]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    # The runner initialises the model; two small steps leave the encoder near the paper's standard deviation of 0.001.
    encoder = checkpoint["state_dict"]["roi_head.mask_head.upsample.content_encoder.weight"]
    assert 0.0005 < encoder.std() < 0.01
