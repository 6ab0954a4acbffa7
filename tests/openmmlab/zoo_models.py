"""MMDetection's two CARAFE models: configurations, the layout of their checkpoints, and CARAFE as in textbooks."""

from pathlib import Path

import mmdet
import pytest
import torch.nn.functional as F
from mmengine.config import Config

NAME = "carafe_plugin.openmmlab.drop_in"
ZOO = Path(mmdet.__file__).parent / ".mim" / "configs" / "carafe"


def textbook(pack, x):
    """CARAFE as textbooks write it: pixel shuffle, softmax, unfold."""
    logits = F.pixel_shuffle(pack.content_encoder(pack.channel_compressor(x)), pack.scale_factor)
    n, _, h, w = logits.shape
    k2 = pack.up_kernel**2
    kernels = logits.reshape(n, pack.up_group, 1, k2, h, w).softmax(3)
    patches = F.unfold(x, pack.up_kernel, padding=pack.up_kernel // 2).reshape(n, x.shape[1] * k2, *x.shape[2:])
    patches = F.interpolate(patches, scale_factor=pack.scale_factor, mode="nearest")
    patches = patches.reshape(n, pack.up_group, -1, k2, h, w)
    return (patches * kernels).sum(3).reshape(n, -1, h, w)


def zoo_config(name):
    path = ZOO / name
    if not path.exists():
        pytest.skip(f"this MMDetection ships no {path}")
    config = Config.fromfile(path)
    config.model.backbone.init_cfg = None  # its weights would be downloaded
    return config


def stock_model(masks):
    """The model with the stock FPN that the zoo's configuration modifies."""
    name = "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py" if masks else "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"
    stock = Config.fromfile(ZOO.parent / name)
    stock.model.backbone.init_cfg = None
    return stock.model


def carafe_keys(masks):
    """Keys and shapes of the zoo's two checkpoints, beyond the stock detector's."""
    keys = {}
    for i, channels in enumerate([256, 512, 1024, 2048]):
        keys[f"neck.lateral_convs.{i}.conv.weight"] = (256, channels, 1, 1)
    keys["neck.lateral_convs.4.conv.weight"] = (256, 2048, 3, 3)
    for i in range(5):
        keys[f"neck.lateral_convs.{i}.conv.bias"] = keys[f"neck.fpn_convs.{i}.conv.bias"] = (256,)
        keys[f"neck.fpn_convs.{i}.conv.weight"] = (256, 256, 3, 3)
    upsamplers = [f"neck.upsample_modules.{i}" for i in range(4)] + ["roi_head.mask_head.upsample"] * masks
    for upsampler in upsamplers:
        keys[f"{upsampler}.channel_compressor.weight"] = (64, 256, 1, 1)
        keys[f"{upsampler}.channel_compressor.bias"] = (64,)
        keys[f"{upsampler}.content_encoder.weight"] = (100, 64, 3, 3)
        keys[f"{upsampler}.content_encoder.bias"] = (100,)
    return keys
