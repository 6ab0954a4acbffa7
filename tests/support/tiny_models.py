"""Tiny datasets, models and configurations, on which the tools run in seconds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("mmengine", reason="tools: mmengine is not installed")

COLOURS = {"red": (40, 40, 220), "blue": (220, 40, 40)}  # BGR
SIZE = 64


@dataclass(frozen=True)
class Square:
    """One object: a filled square; its class is its colour."""

    name: str
    x: int
    y: int
    side: int


def scene(index: int) -> tuple[np.ndarray, Square]:
    """Image number ``index``, (64, 64, 3) uint8 BGR with one square on noise, and the square."""
    rng = np.random.default_rng(index)
    image = rng.integers(90, 130, (SIZE, SIZE, 3), dtype=np.uint8)
    side = int(rng.integers(24, 36))
    x, y = (int(v) for v in rng.integers(2, SIZE - side - 2, 2))
    square = Square(list(COLOURS)[index % 2], x, y, side)
    image[y : y + side, x : x + side] = COLOURS[square.name]
    return image, square


def write_scenes(root: Path, images: int) -> Path:
    """Write ``images`` scenes for all three toolboxes: COCO instances and panoptic segments (squares are things, the
    ground is stuff), label maps, one folder per class.
    """
    names = list(COLOURS)
    coco: dict = dict(images=[], annotations=[], categories=[dict(id=7 + i, name=n) for i, n in enumerate(names)])
    kinds = [dict(category, isthing=1) for category in coco["categories"]] + [dict(id=99, name="ground", isthing=0)]
    panoptic: dict = dict(images=coco["images"], annotations=[], categories=kinds)
    for folder in ("images", "labels", "panoptic", *(f"classes/{name}" for name in names)):
        (root / folder).mkdir(parents=True)
    for index in range(images):
        image, square = scene(index)
        file = f"{index:02d}.png"
        label = np.zeros((SIZE, SIZE), np.uint8)
        x, y, side = square.x, square.y, square.side
        label[y : y + side, x : x + side] = 1 + names.index(square.name)
        cv2.imwrite(str(root / "images" / file), image)
        cv2.imwrite(str(root / "labels" / file), label)
        cv2.imwrite(str(root / "classes" / square.name / file), image)
        coco["images"].append(dict(id=index, file_name=file, width=SIZE, height=SIZE))
        outline = [x, y, x + side, y, x + side, y + side, x, y + side]
        coco["annotations"].append(
            dict(
                id=index + 1,
                image_id=index,
                category_id=7 + names.index(square.name),
                bbox=[x, y, side, side],
                area=side * side,
                iscrowd=0,
                segmentation=[outline],
            )
        )
        thing = {key: coco["annotations"][-1][key] for key in ("category_id", "bbox", "area", "iscrowd")}
        ground = dict(category_id=99, bbox=[0, 0, SIZE, SIZE], area=SIZE**2 - side**2, iscrowd=0)
        segments = [dict(thing, id=300 + index), dict(ground, id=70000 + index)]
        write_segments(root / "panoptic" / file, np.where(label > 0, segments[0]["id"], segments[1]["id"]))
        panoptic["annotations"].append(dict(image_id=index, file_name=file, segments_info=segments))
    (root / "instances.json").write_text(json.dumps(coco))
    (root / "panoptic.json").write_text(json.dumps(panoptic))
    return root


def write_segments(path: Path, ids: np.ndarray) -> None:
    """Write the ids of segments, (H, W), as COCO's panoptic format has them: id = R + 256 G + 65536 B."""
    cv2.imwrite(str(path), np.stack([ids // 65536, ids // 256 % 256, ids % 256], -1).astype(np.uint8))


COMMON = """
default_scope = '{scope}'
default_hooks = dict(
    timer=dict(type='IterTimerHook'), logger=dict(type='LoggerHook', interval=5),
    param_scheduler=dict(type='ParamSchedulerHook'), sampler_seed=dict(type='DistSamplerSeedHook'),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=2),
    visualization=dict(type='{visualization}'))
env_cfg = dict(cudnn_benchmark=False, mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0))
visualizer = dict(type='{visualizer}', name='visualizer', vis_backends=[dict(type='LocalVisBackend')])
randomness = dict(seed=0)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr={lr}), clip_grad=dict(max_norm=10.0))
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs={epochs}, val_interval={epochs})
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
def loader(dataset, train):
    return dict(batch_size=4 if train else 1, num_workers=0,
                sampler=dict(type='DefaultSampler', shuffle=train), dataset=dataset)
"""

BACKBONE = """dict(type='ResNet', depth=18, base_channels=16, stem_channels=16, num_stages=4, out_indices={out},
                     norm_cfg=dict(type='{norm}', requires_grad=True), norm_eval=False, style='pytorch')"""

DETECTION = """
channels = 32
model = dict(
    type='MaskRCNN',
    data_preprocessor=dict(type='DetDataPreprocessor', mean=[110.0] * 3, std=[50.0] * 3, pad_mask=True,
                           pad_size_divisor=32),
    backbone={backbone},
    neck=dict(type='CARAFEFPN', in_channels=[16, 32, 64, 128], out_channels=channels, num_outs=4,
              carafe_cfg=dict(compressed_channels=8)),
    rpn_head=dict(
        type='RPNHead', in_channels=channels, feat_channels=channels,
        anchor_generator=dict(type='AnchorGenerator', scales=[4], ratios=[1.0], strides=[4, 8, 16, 32]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True), loss_bbox=dict(type='L1Loss')),
    roi_head=dict(
        type='StandardRoIHead',
        bbox_roi_extractor=dict(type='SingleRoIExtractor', roi_layer=dict(type='RoIAlign', output_size=7),
                                out_channels=channels, featmap_strides=[4, 8, 16, 32]),
        bbox_head=dict(type='Shared2FCBBoxHead', in_channels=channels, fc_out_channels=64, num_classes=2,
                       bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_stds=[0.1, 0.1, 0.2, 0.2])),
        mask_roi_extractor=dict(type='SingleRoIExtractor', roi_layer=dict(type='RoIAlign', output_size=14),
                                out_channels=channels, featmap_strides=[4, 8, 16, 32]),
        mask_head=dict(type='CARAFEFCNMaskHead', num_convs=1, in_channels=channels, conv_out_channels=channels,
                       num_classes=2, loss_mask=dict(type='CrossEntropyLoss', use_mask=True))),
    train_cfg=dict(
        rpn=dict(assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.6, neg_iou_thr=0.3, min_pos_iou=0.3),
                 sampler=dict(type='RandomSampler', num=32, pos_fraction=0.5, add_gt_as_proposals=False),
                 pos_weight=-1, allowed_border=-1),
        rpn_proposal=dict(nms_pre=100, max_per_img=20, nms=dict(type='nms', iou_threshold=0.7)),
        rcnn=dict(assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.5),
                  sampler=dict(type='RandomSampler', num=16, pos_fraction=0.5, add_gt_as_proposals=True),
                  mask_size=28, pos_weight=-1)),
    test_cfg=dict(rpn=dict(nms_pre=100, max_per_img=20, nms=dict(type='nms', iou_threshold=0.7)),
                  rcnn=dict(score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=5,
                            mask_thr_binary=0.5)))
dataset_type = 'CocoDataset'
def dataset(train):
    pack = dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))
    load = [dict(type='LoadAnnotations', with_bbox=True, with_mask=True)] if train else []
    return dict(type=dataset_type, data_root='{data}', ann_file='instances.json', data_prefix=dict(img='images'),
                metainfo=dict(classes=('red', 'blue'), palette=[(220, 40, 40), (40, 40, 220)]), test_mode=not train,
                pipeline=[dict(type='LoadImageFromFile'), *load, dict(type='Resize', scale_factor=1.0), pack])
train_dataloader = loader(dataset(True), True)
val_dataloader = test_dataloader = loader(dataset(False), False)
val_evaluator = test_evaluator = dict(type='CocoMetric', ann_file='{data}/instances.json', metric=['bbox', 'segm'])
"""

# What makes a Panoptic FPN of the Mask R-CNN above.
PANOPTIC = """
model.update(
    type='PanopticFPN',
    semantic_head=dict(
        type='PanopticFPNHead', num_things_classes=2, num_stuff_classes=1, in_channels=channels, inner_channels=16,
        start_level=0, end_level=4, norm_cfg=dict(type='GN', num_groups=4),
        loss_seg=dict(type='CrossEntropyLoss', ignore_index=255)),
    panoptic_fusion_head=dict(type='HeuristicFusionHead', num_things_classes=2, num_stuff_classes=1))
model['data_preprocessor'].update(pad_seg=True)
model['test_cfg']['panoptic'] = dict(mask_overlap=0.5, stuff_area_limit=16)
for part in (train_dataloader, val_dataloader):
    part['dataset'].update(
        type='CocoPanopticDataset', ann_file='panoptic.json', data_prefix=dict(img='images', seg='panoptic'),
        metainfo=dict(classes=('red', 'blue', 'ground'), thing_classes=('red', 'blue'), stuff_classes=('ground',),
                      palette=[(220, 40, 40), (40, 40, 220), (90, 90, 90)]))
train_dataloader['dataset']['pipeline'][1] = dict(type='LoadPanopticAnnotations')
val_evaluator = test_evaluator = dict(
    type='CocoPanopticMetric', ann_file='{data}/panoptic.json', seg_prefix='{data}/panoptic')
del part
"""

SEGMENTATION = """
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor', mean=[110.0] * 3, std=[50.0] * 3, size=(64, 64)),
    backbone={backbone},
    decode_head=dict(type='FCNHead', in_channels=64, in_index=2, channels=16, num_convs=1, num_classes=3,
                     norm_cfg=dict(type='BN')),
    test_cfg=dict(mode='whole'))
def dataset(train):
    return dict(type='BaseSegDataset', data_root='{data}', img_suffix='.png', seg_map_suffix='.png',
                data_prefix=dict(img_path='images', seg_map_path='labels'),
                metainfo=dict(classes=('ground', 'red', 'blue'), palette=[(0, 0, 0), (220, 40, 40), (40, 40, 220)]),
                pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')])
train_dataloader = loader(dataset(True), True)
val_dataloader = test_dataloader = loader(dataset(False), False)
val_evaluator = test_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
"""

CLASSIFICATION = """
model = dict(
    type='ImageClassifier', backbone={backbone}, neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=2, in_channels=128, topk=(1,),
              loss=dict(type='CrossEntropyLoss', loss_weight=1.0)))
data_preprocessor = dict(num_classes=2, mean=[110.0] * 3, std=[50.0] * 3)
def dataset(train):
    return dict(type='CustomDataset', data_root='{data}', data_prefix='classes',
                pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')])
train_dataloader = loader(dataset(True), True)
val_dataloader = test_dataloader = loader(dataset(False), False)
val_evaluator = test_evaluator = dict(type='Accuracy', topk=(1,))
auto_scale_lr = dict(base_batch_size=8)
"""

SCOPES = {
    "mmdet": dict(body=DETECTION, visualization="DetVisualizationHook", visualizer="DetLocalVisualizer"),
    "panoptic": dict(
        scope="mmdet",
        body=DETECTION + PANOPTIC,
        visualization="DetVisualizationHook",
        visualizer="DetLocalVisualizer",
    ),
    "mmseg": dict(body=SEGMENTATION, visualization="SegVisualizationHook", visualizer="SegLocalVisualizer"),
    "mmpretrain": dict(body=CLASSIFICATION, visualization="VisualizationHook", visualizer="UniversalVisualizer"),
}
OUTPUTS = dict(mmdet=(0, 1, 2, 3), panoptic=(0, 1, 2, 3), mmseg=(0, 1, 2), mmpretrain=(3,))


def write_config(path: Path, scope: str, data: Path, epochs: int = 2, lr: float = 2e-3, norm: str = "BN") -> Path:
    """Write the tiny configuration of a toolbox, a key of SCOPES, to ``path`` and return it."""
    parts = SCOPES[scope]
    backbone = BACKBONE.format(out=OUTPUTS[scope], norm=norm)
    hooks = {key: parts[key] for key in ("visualization", "visualizer")}
    common = COMMON.format(scope=parts.get("scope", scope), epochs=epochs, lr=lr, **hooks)
    body = parts["body"].replace("{backbone}", backbone).replace("{data}", str(data))
    path.write_text(f"{common}\n{body}\ndel loader, dataset\n")
    return path


TOY_MODULE = '''
"""A model of a few numbers: what the tools do around a model can be tested without a toolbox."""
import torch
from mmengine.dataset import BaseDataset
from mmengine.evaluator import BaseMetric
from mmengine.hooks import CheckpointHook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS


@MODELS.register_module()
class Toy(BaseModel):
    def __init__(self, norm='BatchNorm1d'):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.norm = getattr(torch.nn, norm)(2).eval()

    def train(self, mode=True):  # running statistics would differ between one process and two
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, inputs, targets, mode):
        inputs, targets = torch.stack(inputs), torch.stack(targets)
        error = (self.norm(self.linear(inputs)) - targets).square().mean(1)
        return dict(loss=error.mean()) if mode == 'loss' else [dict(error=float(e)) for e in error]


@DATASETS.register_module()
class Numbers(torch.utils.data.Dataset):
    def __init__(self, length):
        self.inputs = torch.randn(length, 3, generator=torch.Generator().manual_seed(0))
        self.targets = self.inputs[:, :2] * 3

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return dict(inputs=self.inputs[index], targets=self.targets[index])


@METRICS.register_module()
class Error(BaseMetric):
    default_prefix = 'toy'

    def process(self, data_batch, data_samples):
        self.results += data_samples

    def compute_metrics(self, results):
        return dict(error=sum(r['error'] for r in results) / len(results), images=float(len(results)))


@HOOKS.register_module()
class StockHook(CheckpointHook):
    """mmengine's own hook, under a name that tools/train.py leaves alone."""
'''

TOY_CONFIG = """
custom_imports = dict(imports={imports})
default_scope = 'mmengine'
default_hooks = dict(checkpoint=dict(type='{hook}', interval=1, max_keep_ckpts=1, save_best='toy/error', rule='less'))
model = dict(type='Toy', norm='{norm}')
def loader(shuffle):
    return dict(batch_size={batch}, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=shuffle),
                dataset=dict(type='Numbers', length=16))
train_dataloader = loader(True)
val_dataloader = test_dataloader = loader(False)
val_evaluator = test_evaluator = dict(type='Error')
train_cfg = dict(by_epoch=True, max_epochs=5)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='Adam', lr=0.1))
param_scheduler = dict(type='ExponentialLR', gamma=0.9, by_epoch=True)
randomness = dict(seed=0)
del loader
"""


def write_toy(
    folder: Path, hook: str = "CheckpointHook", batch: int = 8, norm: str = "BatchNorm1d", imports: tuple = ("toy",)
) -> Path:
    """Write the toy model's module and configuration into ``folder`` and return the configuration's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "toy.py").write_text(TOY_MODULE)
    config = folder / "toy_config.py"
    config.write_text(TOY_CONFIG.format(imports=list(imports), hook=hook, batch=batch, norm=norm))
    return config


KILL_MODULE = '''
"""Kill this process with SIGKILL at the point that KILL_AT names."""
import builtins
import io
import os
import signal

POINT = os.environ.get('KILL_AT')
counts = {}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Half:
    """A file that takes half of what is written to it, on the disk, and then the process dies."""
    def __init__(self, file):
        self.file = file
    def __enter__(self):
        return self
    def __exit__(self, *_):
        self.file.close()
    def write(self, content):
        self.file.write(content[:len(content) // 2])
        self.file.flush()
        os.fsync(self.file.fileno())
        die()


def nth(kind, n):
    counts[kind] = counts.get(kind, 0) + 1
    return counts[kind] == n


def event():
    return POINT.startswith('event ') and nth('event', int(POINT.split()[1]))


real_open, real_replace, real_remove = builtins.open, os.replace, os.remove


def open_(file, mode='r', *args, **kwargs):
    opened, name = real_open(file, mode, *args, **kwargs), os.path.basename(str(file))
    if 'w' in mode and (POINT == 'writing' and name.startswith('epoch_3.pth')
                        or POINT == 'writing the pointer' and name.startswith('last_checkpoint') and nth('pointer', 4)
                        or POINT == 'writing the best' and name.startswith('best_') and nth('best', 2)
                        or POINT == 'naming the best' and name.startswith('epoch_3.pth') and nth('state', 2)):
        return Half(opened)
    if 'w' in mode and name.endswith('.tmp') and event():
        return Half(opened)
    return opened


def replace(source, target):
    if event():
        die()
    if POINT == 'renaming' and os.path.basename(target) == 'epoch_3.pth':
        die()
    real_replace(source, target)


def remove(path):
    name = os.path.basename(path)
    if event() or (POINT, name) in (('deleting', 'epoch_2.pth'), ('deleting the best', 'best_toy_error_epoch_2.pth')):
        die()
    real_remove(path)


if POINT and POINT.startswith('validation '):
    from mmengine.evaluator import Evaluator

    real_evaluate = Evaluator.evaluate

    def evaluate(self, size):
        if nth('validation', int(POINT.split()[1])):
            die()
        return real_evaluate(self, size)

    Evaluator.evaluate = evaluate
elif POINT:
    builtins.open = io.open = open_
    os.replace, os.remove = replace, remove
'''
