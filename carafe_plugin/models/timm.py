"""Timm: backbones and classifiers.

They upsample by ``nn.Upsample`` (HRNet), in CoaT's parallel blocks and in MobileNetV5's fusion. Their ResNets shrink
the map where the paper's do: with ``downsample=True`` CARAFE++ stands in the seven places of Fig. 4 (the max pooling;
in three stages the first block's strided convolution and the shortcut's), with ``features_only=True`` as well.
``aa_layer`` would have four others.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

FEATURES = ("ParallelBlock", "MobileNetV5MultiScaleFusionAdapter")


def example_inputs(model: nn.Module) -> Tensor:
    """An image of the size that the model is made for."""
    settings = getattr(model, "pretrained_cfg", None) or {}
    return torch.rand(1, *settings.get("input_size", (3, 224, 224)))
