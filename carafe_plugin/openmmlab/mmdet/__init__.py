"""CARAFE++ for MMDetection: change a ``type``, and nothing else.

==============================================  ===============================================  ======================
registered type                                 subclass of, with its arguments and checkpoints  CARAFE++ replaces
==============================================  ===============================================  ======================
``CARAFEFPN``                                   ``FPN``                                          nearest interpolation
``CARAFEPAFPN``                                 ``PAFPN`` (top-down path)                        nearest interpolation
``CARAFEFCNMaskHead``                           ``FCNMaskHead``                                  deconvolution
``CARAFEResNet`` (V1c, V1d), ``CARAFEResNeXt``  ``ResNet``, ``ResNeXt``, ...                     strides
``CARAFEPixelDecoder``                          ``PixelDecoder``                                 nearest interpolation
``CARAFETransformerEncoderPixelDecoder``        ``TransformerEncoderPixelDecoder``               nearest interpolation
``CARAFEMSDeformAttnPixelDecoder``              ``MSDeformAttnPixelDecoder``                     bilinear interpolation
==============================================  ===============================================  ======================

``CARAFEMaskFormerHead`` is ``MaskFormerHead`` for ``CARAFEPixelDecoder``.

The full path works in a configuration as it stands, the short name after ``custom_imports`` of this module::

    neck = dict(type="carafe_plugin.openmmlab.mmdet.CARAFEFPN")
    custom_imports = dict(imports=["carafe_plugin.openmmlab.mmdet"])  # then also type="CARAFEFPN"

CARAFE++ is "CARAFE++: Unified Content-Aware ReAssembly of FEatures" (arXiv 2012.04733), Sec. 4.1. ``CARAFEFPN`` is the
paper's: the plain FPN with its interpolation replaced. MMDetection's own ``FPN_CARAFE`` has another topology; it is
served by :mod:`carafe_plugin.openmmlab.drop_in`.
"""

from __future__ import annotations

from typing import Any

from carafe_plugin.openmmlab import require

require("mmdet", __name__)

from mmdet.models.backbones import ResNet, ResNetV1d, ResNeXt  # noqa: E402
from mmdet.registry import MODELS  # noqa: E402

from carafe_plugin.openmmlab.layers import CARAFEDownsample, CARAFEUpsample  # noqa: E402
from carafe_plugin.openmmlab.mmdet.upsampling import (  # noqa: E402
    CARAFEFPN,
    CARAFEPAFPN,
    CARAFEFCNMaskHead,
    CARAFEMaskFormerHead,
    CARAFEMSDeformAttnPixelDecoder,
    CARAFEPixelDecoder,
    CARAFETransformerEncoderPixelDecoder,
)
from carafe_plugin.openmmlab.resnet import downsampling_resnets  # noqa: E402

__all__ = [
    "CARAFEFPN",
    "CARAFEPAFPN",
    "CARAFEDownsample",
    "CARAFEFCNMaskHead",
    "CARAFEMSDeformAttnPixelDecoder",
    "CARAFEMaskFormerHead",
    "CARAFEPixelDecoder",
    "CARAFEResNeXt",
    "CARAFEResNet",
    "CARAFEResNetV1c",
    "CARAFEResNetV1d",
    "CARAFETransformerEncoderPixelDecoder",
    "CARAFEUpsample",
]


class ResNetV1c(ResNet):
    """MMSegmentation's class of that name, its names of parameters and checkpoints included; MMDetection has none."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(deep_stem=True, avg_down=False, **kwargs)


CARAFEResNet, CARAFEResNetV1c, CARAFEResNetV1d, CARAFEResNeXt = downsampling_resnets(
    __name__, MODELS, ResNet, ResNetV1c, ResNetV1d, ResNeXt
)
