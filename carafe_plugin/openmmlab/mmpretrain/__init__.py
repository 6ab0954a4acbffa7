"""CARAFE++ for MMPretrain: change a ``type``, and nothing else.

==============================================  ===============================================  ======================
registered type                                 subclass of, with its arguments and checkpoints  CARAFE++ replaces
==============================================  ===============================================  ======================
``CARAFEResNet`` (V1c, V1d), ``CARAFEResNeXt``  ``ResNet``, ``ResNetV1c``, ...                   max pooling, strides
==============================================  ===============================================  ======================

The full path works in a configuration as it stands, the short name after ``custom_imports`` of this module::

    backbone = dict(type="carafe_plugin.openmmlab.mmpretrain.CARAFEResNet", depth=50)

What is trained here on ImageNet becomes MMDetection's and MMSegmentation's backbone by ``tools/convert_backbone.py``.
CARAFE++ is "CARAFE++: Unified Content-Aware ReAssembly of FEatures" (arXiv 2012.04733), Sec. 4.1 and 5.1.
"""

from __future__ import annotations

from carafe_plugin.openmmlab import require

require("mmpretrain", __name__)

from mmpretrain.models.backbones import ResNet, ResNetV1c, ResNetV1d, ResNeXt  # noqa: E402
from mmpretrain.registry import MODELS  # noqa: E402

from carafe_plugin.openmmlab.layers import CARAFEDownsample, CARAFEUpsample  # noqa: E402
from carafe_plugin.openmmlab.resnet import downsampling_resnets  # noqa: E402

__all__ = [
    "CARAFEDownsample",
    "CARAFEResNeXt",
    "CARAFEResNet",
    "CARAFEResNetV1c",
    "CARAFEResNetV1d",
    "CARAFEUpsample",
]

CARAFEResNet, CARAFEResNetV1c, CARAFEResNetV1d, CARAFEResNeXt = downsampling_resnets(
    __name__, MODELS, ResNet, ResNetV1c, ResNetV1d, ResNeXt
)
