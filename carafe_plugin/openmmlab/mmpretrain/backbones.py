"""ResNets for MMPretrain that downsample by CARAFE++ (arXiv 2012.04733, Sec. 4.1)."""

from __future__ import annotations

from mmpretrain.models.backbones import ResNet, ResNetV1c, ResNetV1d, ResNeXt
from mmpretrain.registry import MODELS

from carafe_plugin.openmmlab.resnet import downsampling_resnets

CARAFEResNet, CARAFEResNetV1c, CARAFEResNetV1d, CARAFEResNeXt = downsampling_resnets(
    __name__, MODELS, ResNet, ResNetV1c, ResNetV1d, ResNeXt
)
