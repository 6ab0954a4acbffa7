"""ResNets for MMSegmentation that downsample by CARAFE++ (arXiv 2012.04733, Sec. 4.1)."""

from __future__ import annotations

from mmseg.models.backbones import ResNet, ResNetV1c, ResNetV1d, ResNeXt
from mmseg.registry import MODELS

from carafe_plugin.openmmlab.resnet import DownsamplingBackbone


@MODELS.register_module()
class CARAFEResNet(DownsamplingBackbone, ResNet):
    """ResNet that downsamples by CARAFE++: seven of them in a ResNet-50 (Sec. 4.1, Fig. 4).

    Takes ResNet's arguments and loads its checkpoints, torchvision's included, with only CARAFE++'s keys missing.
    ``carafe_cfg`` switches each place and sets the operator: see
    :class:`~carafe_plugin.openmmlab.resnet.DownsamplingBackbone`.

    Args:
        *args: ResNet's.
        carafe_cfg: The places, and CARAFE++'s arguments. Defaults to the paper's setting at every place with a stride.
        **kwargs: ResNet's.

    Raises:
        TypeError: ``carafe_cfg`` is no dictionary, has an unknown key, or a value of a wrong type; or a convolution
            with a stride is of a type (``conv_cfg``) whose stride CARAFE++ cannot take.
        ValueError: ``carafe_cfg`` asks for CARAFE++ where there is no stride, or ``stages`` has a wrong length.
        KeyError: ``carafe_cfg`` names a type that is not registered.

    Example:
        >>> import torch
        >>> backbone = CARAFEResNet(depth=18, carafe_cfg=dict(stages=(False, True, True, True)))
        >>> [tuple(m.shape[2:]) for m in backbone(torch.rand(1, 3, 64, 96))]
        [(16, 24), (8, 12), (4, 6), (2, 3)]
    """


@MODELS.register_module()
class CARAFEResNetV1c(DownsamplingBackbone, ResNetV1c):
    """ResNetV1c (a stem of three 3x3 convolutions) that downsamples by CARAFE++, as :class:`CARAFEResNet` does.

    Args:
        **kwargs: ResNetV1c's, and ``carafe_cfg``.

    Raises:
        TypeError, ValueError, KeyError: As :class:`CARAFEResNet`.

    Example:
        >>> import torch
        >>> backbone = CARAFEResNetV1c(depth=18)
        >>> [tuple(m.shape[2:]) for m in backbone(torch.rand(1, 3, 64, 96))]
        [(16, 24), (8, 12), (4, 6), (2, 3)]
    """


@MODELS.register_module()
class CARAFEResNetV1d(DownsamplingBackbone, ResNetV1d):
    """ResNetV1d (V1c with average pooling in the shortcuts) that downsamples by CARAFE++.

    As :class:`CARAFEResNet`; in the shortcuts CARAFE++ stands in the pooling's place.

    Args:
        **kwargs: ResNetV1d's, and ``carafe_cfg``.

    Raises:
        TypeError, ValueError, KeyError: As :class:`CARAFEResNet`.

    Example:
        >>> import torch
        >>> backbone = CARAFEResNetV1d(depth=18)
        >>> [tuple(m.shape[2:]) for m in backbone(torch.rand(1, 3, 64, 96))]
        [(16, 24), (8, 12), (4, 6), (2, 3)]
    """


@MODELS.register_module()
class CARAFEResNeXt(DownsamplingBackbone, ResNeXt):
    """ResNeXt that downsamples by CARAFE++, as :class:`CARAFEResNet` does; its grouped convolutions stay grouped.

    Args:
        *args: ResNeXt's.
        **kwargs: ResNeXt's, and ``carafe_cfg``.

    Raises:
        TypeError, ValueError, KeyError: As :class:`CARAFEResNet`.

    Example:
        >>> import torch
        >>> backbone = CARAFEResNeXt(depth=50, groups=32, base_width=4)
        >>> [tuple(m.shape[2:]) for m in backbone(torch.rand(1, 3, 64, 96))]
        [(16, 24), (8, 12), (4, 6), (2, 3)]
    """
