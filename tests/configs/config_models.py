"""Models of configurations at reduced size, the files that their backbones start from, and what to feed them."""

import copy
import functools
import importlib
import runpy
import sys
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from config_table import CONFIGS
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData, PixelData

from carafe_plugin.modules import CARAFEDownsample, CARAFEUpsample

HEIGHT, WIDTH = 60, 90  # maps of odd sizes where nothing is padded


def load(name):
    """The configuration ``folder/name``; skips the test where its toolbox is missing."""
    folder = name.partition("/")[0]
    if folder in ("demo", "real"):
        folder = "mmseg" if "upernet" in name else "mmdet"
    pytest.importorskip(folder, reason=f"{folder} is not installed")
    return copy.deepcopy(parse(CONFIGS / f"{name}.py"))


@functools.cache
def parse(path):
    """The configuration in a file, read once: MMEngine reads all of a toolbox's metafiles for each."""
    return Config.fromfile(path)


def toolbox_config(toolbox, path):
    """A configuration that came with a toolbox."""
    package = importlib.import_module(toolbox)
    return copy.deepcopy(parse(Path(package.__file__).parent / ".mim" / "configs" / path))


def load_reduced(name):
    """The same with little to compute: few regions, small heads, no large padding. The places of CARAFE++ stay."""
    return reduced(load(name))


def reduced(config):
    """A configuration with little to compute."""
    model = config.model
    if config.default_scope == "mmdet":
        model.roi_head.bbox_head.fc_out_channels = 64
        model.train_cfg.rcnn.sampler.num = 16
        model.train_cfg.rpn_proposal.max_per_img = model.test_cfg.rpn.max_per_img = 50
        # Without training all scores are low: none may be too low for the mask head to run in prediction.
        model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=5)
    elif config.default_scope == "mmseg":
        model.decode_head.channels = 64
        if "size" in model.data_preprocessor:
            model.data_preprocessor.size = (64, 96)
    else:  # mmengine's Runner puts it there
        model.setdefault("data_preprocessor", config.data_preprocessor)
    return config


def build(part, scope):
    """Build ``model`` or ``model.backbone`` of a configuration of the toolbox ``scope``."""
    registry = importlib.import_module(f"{scope}.registry").MODELS
    with DefaultScope.overwrite_default_scope(scope):
        return registry.build(part)


def carafe_modules(model):
    """Name -> module of every CARAFE++ in ``model``."""
    kinds = (CARAFEDownsample, CARAFEUpsample)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def write_weights(source, path):
    """Write the file that ``init_cfg.checkpoint=source`` names, from an untrained model of the same kind.

    Args:
        source: what a configuration says: ``torchvision://resnet50``, ``open-mmlab://resnet50_v1c``, or
            ``checkpoints/.../resnet50-carafe.pth``, which is converted from a model of configs/mmpretrain.
        path: where to.
    """
    name = source.rpartition("/")[2].removesuffix(".pth")
    torch.manual_seed(zlib.crc32(name.encode()))
    if name.endswith("-carafe"):
        config = load(f"mmpretrain/{name}_16xb64_in1k")
        state = build(config.model.backbone, "mmpretrain").state_dict()
        state = {f"backbone.{key}": value for key, value in state.items()}
    elif name.endswith("_v1c"):
        depth = int(name.removeprefix("resnet").removesuffix("_v1c"))
        state = build(dict(type="ResNetV1c", depth=depth), "mmseg").state_dict()
    else:
        torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
        state = torchvision.models.get_model(name, weights=None).state_dict()
    for value in state.values():
        if value.is_floating_point() and value.dim() == 1:  # norms are all ones and zeros in every model
            value.add_(0.01 * torch.randn_like(value))
    torch.save(dict(state_dict=state), path)
    if name.endswith("-carafe"):
        trained = path.rename(path.with_suffix(".mmpretrain"))
        run_tool("convert_backbone.py", trained, path, "--to", source.split("/")[1])
        trained.unlink()


def run_tool(name, *arguments):
    """Run a tool's command line in this process."""
    command = [name, *map(str, arguments)]
    with mock.patch.object(sys, "argv", command), pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(CONFIGS.parent / "tools" / name), run_name="__main__")
    assert exit_info.value.code == 0, command


def batch(config, size, labelled=True):
    """``size`` images as the toolbox's data loader hands them to the model."""
    torch.manual_seed(0)
    images = [torch.randint(0, 256, (3, HEIGHT, WIDTH), dtype=torch.uint8) for _ in range(size)]
    make = {"mmdet": detection_sample, "mmseg": segmentation_sample, "mmpretrain": classification_sample}
    samples = [make[config.default_scope](config, labelled) for _ in range(size)]
    if config.default_scope == "mmpretrain":
        images = torch.stack(images)
    return dict(inputs=images, data_samples=samples)


def detection_sample(config, labelled):
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    shape = (HEIGHT, WIDTH)
    sample = DetDataSample(metainfo=dict(img_id=0, img_shape=shape, ori_shape=shape, scale_factor=(1.0, 1.0)))
    if labelled:
        masks = np.zeros((2, HEIGHT, WIDTH), dtype=np.uint8)
        masks[0, 4:40, 4:44], masks[1, 16:56, 40:88] = 1, 1
        boxes = torch.tensor([[4.0, 4.0, 44.0, 40.0], [40.0, 16.0, 88.0, 56.0]])
        last = min(config.model.roi_head.bbox_head.num_classes - 1, 3)
        sample.gt_instances = InstanceData(
            bboxes=boxes, labels=torch.tensor([0, last]), masks=BitmapMasks(masks, *shape)
        )
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4))
    return sample


def segmentation_sample(config, labelled):
    from mmseg.structures import SegDataSample

    sample = SegDataSample(metainfo=dict(img_shape=(HEIGHT, WIDTH), ori_shape=(HEIGHT, WIDTH)))
    if labelled:
        classes = config.model.decode_head.num_classes
        sample.gt_sem_seg = PixelData(data=torch.randint(0, classes, (1, HEIGHT, WIDTH)))
    return sample


def classification_sample(config, labelled):
    from mmpretrain.structures import DataSample

    return DataSample().set_gt_label(torch.randint(0, 1000, (1,))) if labelled else DataSample()
