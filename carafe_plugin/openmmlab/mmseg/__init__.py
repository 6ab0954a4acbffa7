"""CARAFE++ for MMSegmentation: change a ``type``, and nothing else.

==============================================  ===============================================  ======================
registered type                                 subclass of, with its arguments and checkpoints  CARAFE++ replaces
==============================================  ===============================================  ======================
``CARAFEResNet`` (V1c, V1d), ``CARAFEResNeXt``  ``ResNet``, ``ResNetV1c``, ...                   strides
``CARAFEUPerHead``                              ``UPerHead`` (PPM, FPN, FUSE)                    bilinear interpolation
``CARAFEFPNHead``                               ``FPNHead`` (Semantic FPN)                       bilinear interpolation
``CARAFEInterpConv``                            ``InterpConv`` (UNet's ``upsample_cfg``)         interpolation
==============================================  ===============================================  ======================

The full path works in a configuration as it stands, the short name after ``custom_imports`` of this module::

    decode_head = dict(type="carafe_plugin.openmmlab.mmseg.CARAFEUPerHead")

MMSegmentation builds MaskFormer and Mask2Former on MMDetection's: where that is installed, its pixel decoders are here
under the full path as well (see :mod:`carafe_plugin.openmmlab.mmdet`), and ``CARAFEMaskFormerHead`` is
``MaskFormerHead`` for ``CARAFEPixelDecoder``. ``BoundaryIoUMetric`` measures along edges alone. CARAFE++ is "CARAFE++:
Unified Content-Aware ReAssembly of FEatures" (arXiv 2012.04733), Sec. 4.2.
"""

from __future__ import annotations

import importlib.util
from contextlib import suppress

from carafe_plugin.openmmlab import require

require("mmseg", __name__)

from mmseg.models.backbones import ResNet, ResNetV1c, ResNetV1d, ResNeXt  # noqa: E402
from mmseg.registry import MODELS  # noqa: E402

from carafe_plugin.openmmlab.layers import CARAFEDownsample, CARAFEUpsample  # noqa: E402
from carafe_plugin.openmmlab.mmseg.metrics import BoundaryIoUMetric  # noqa: E402
from carafe_plugin.openmmlab.mmseg.upsampling import CARAFEFPNHead, CARAFEInterpConv, CARAFEUPerHead  # noqa: E402
from carafe_plugin.openmmlab.resnet import downsampling_resnets  # noqa: E402

__all__ = [
    "BoundaryIoUMetric",
    "CARAFEDownsample",
    "CARAFEFPNHead",
    "CARAFEInterpConv",
    "CARAFEResNeXt",
    "CARAFEResNet",
    "CARAFEResNetV1c",
    "CARAFEResNetV1d",
    "CARAFEUPerHead",
    "CARAFEUpsample",
]

CARAFEResNet, CARAFEResNetV1c, CARAFEResNetV1d, CARAFEResNeXt = downsampling_resnets(
    __name__, MODELS, ResNet, ResNetV1c, ResNetV1d, ResNeXt
)

# MMSegmentation builds MaskFormer and Mask2Former on MMDetection's; it works without where MMDetection is missing or
# lacks something itself, and so does this module.
if importlib.util.find_spec("mmdet") is not None:
    with suppress(ModuleNotFoundError):
        from mmseg.models.decode_heads import MaskFormerHead

        from carafe_plugin.openmmlab.mmdet.upsampling import (
            CARAFEMSDeformAttnPixelDecoder,
            CARAFEPixelDecoder,
            CARAFETransformerEncoderPixelDecoder,
            MemoryProjection,
        )

        @MODELS.register_module()
        class CARAFEMaskFormerHead(MemoryProjection, MaskFormerHead):
            """MaskFormerHead, with its arguments and checkpoints, for CARAFEPixelDecoder as its ``pixel_decoder``."""

        __all__ += [
            "CARAFEMSDeformAttnPixelDecoder",
            "CARAFEMaskFormerHead",
            "CARAFEPixelDecoder",
            "CARAFETransformerEncoderPixelDecoder",
        ]
