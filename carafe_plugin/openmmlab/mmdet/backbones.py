"""ResNets for MMDetection that downsample by CARAFE++ (arXiv 2012.04733, Sec. 4.1)."""

from __future__ import annotations

from typing import Any

from mmdet.models.backbones import ResNet, ResNetV1d, ResNeXt
from mmdet.registry import MODELS

from carafe_plugin.openmmlab.resnet import downsampling_resnets


class ResNetV1c(ResNet):
    """MMSegmentation's class of that name, its names of parameters and checkpoints included; MMDetection has none."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(deep_stem=True, avg_down=False, **kwargs)


CARAFEResNet, CARAFEResNetV1c, CARAFEResNetV1d, CARAFEResNeXt = downsampling_resnets(
    __name__, MODELS, ResNet, ResNetV1c, ResNetV1d, ResNeXt
)
