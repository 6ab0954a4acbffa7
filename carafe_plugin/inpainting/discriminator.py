"""The discriminator: one PatchGAN, which judges the inpainted region."""

from __future__ import annotations

from itertools import pairwise

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class PatchDiscriminator(BaseModule):
    """Says of every patch of an image whether it looks real.

    Layers are those of Isola et al., Image-to-Image Translation with Conditional Adversarial Networks, CVPR 2017 (the
    paper's reference [20]): 4 x 4 convolutions with stride 2, then two with stride 1, leaky ReLU 0.2, batch norm
    everywhere but in the first and last layer; with three strided ones a patch is 70 x 70 pixels. It sees the holes as
    a fourth channel, as [20]'s sees its condition; that the *inpainted region* is judged is the loss's part
    (:func:`adversarial_loss`).

    Args:
        base_channels (int): channels of the first layer, doubled by each that follows, up to eight times as many.
        strided (int): how many convolutions have stride 2.
        init_cfg (dict | None): MMEngine's.

    Example:
        >>> import torch
        >>> PatchDiscriminator()(torch.rand(1, 3, 256, 256), torch.ones(1, 1, 256, 256)).shape
        torch.Size([1, 1, 30, 30])
    """

    def __init__(self, base_channels: int = 64, strided: int = 3, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        for name, value in (("base_channels", base_channels), ("strided", strided)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        widths = [base_channels * min(2**level, 8) for level in range(strided + 1)]
        layers: list[nn.Module] = [nn.Conv2d(4, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level, (before, after) in enumerate(pairwise(widths), 1):
            stride = 2 if level < strided else 1
            layers += [
                nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)  # as [20]

    def forward(self, images: Tensor, holes: Tensor) -> Tensor:
        """Judge completed images, (N, 3, H, W) in [-1, 1] with holes (N, 1, H, W) -> logits (N, 1, H', W')."""
        return self.layers(torch.cat([images, holes], dim=1))
