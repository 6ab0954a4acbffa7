"""Networks: Global&Local's completion network, its Partial Conv variant, CARAFE++ in both, and the discriminator."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule, kaiming_init, xavier_init
from mmengine.registry import MODELS
from torch import Tensor, nn

from carafe_plugin.modules import CARAFEDownsample, CARAFEUpsample
from carafe_plugin.modules.checks import positive
from carafe_plugin.modules.starts import starting

from .masked import MaskedCARAFEDownsample, MaskedCARAFEUpsample, PartialConv2d, fill_unknown

#: Height and width of an image must be multiples of it: two halvings.
STRIDE = 4
UPSAMPLINGS = ("deconv", "nearest")
#: Convolution, down- and upsampling of a network.
PLAIN = (nn.Conv2d, CARAFEDownsample, CARAFEUpsample)
PARTIAL = (PartialConv2d, MaskedCARAFEDownsample, MaskedCARAFEUpsample)

#: What every layer takes and returns: features, and their validity in a Partial Conv network, None in another.
Masked = tuple[Tensor, Tensor | None]


def _apply(layer: nn.Module, features: Tensor, validity: Tensor | None) -> Masked:
    """Call a layer that takes and returns a validity where there is one, and a plain layer where there is none."""
    return (layer(features), None) if validity is None else layer(features, validity)


class _Convolution(nn.Module):
    """A convolution, plain, partial or transposed, its norm and its activation."""

    def __init__(self, convolution: nn.Conv2d | nn.ConvTranspose2d, norm: bool) -> None:
        super().__init__()
        self.convolution = convolution
        self.norm = nn.BatchNorm2d(convolution.out_channels) if norm else nn.Identity()
        starting(convolution, functools.partial(kaiming_init, mode="fan_in")).reset_parameters()

    def forward(self, features: Tensor, validity: Tensor | None) -> Masked:
        features, validity = _apply(self.convolution, features, validity)
        return F.relu(self.norm(features)), validity


class _CARAFE(nn.Module):
    """A CARAFE++, plain or masked."""

    def __init__(self, resampler: nn.Module) -> None:
        super().__init__()
        self.resampler = resampler

    def forward(self, features: Tensor, validity: Tensor | None) -> Masked:
        return _apply(self.resampler, features, validity)


class _Nearest(nn.Module):
    """Nearest interpolation by 2, of the validity too."""

    def forward(self, features: Tensor, validity: Tensor | None) -> Masked:
        larger = None if validity is None else F.interpolate(validity, scale_factor=2, mode="nearest")
        return F.interpolate(features, scale_factor=2, mode="nearest"), larger


@MODELS.register_module()
class InpaintingGenerator(BaseModule):
    """Completes an image: an encoder that halves it twice, a dilated bottleneck, a decoder.

    Layers and channels are those of the completion network of Iizuka et al., Globally and Locally Consistent Image
    Completion, SIGGRAPH 2017 (the paper's reference [15]); its sigmoid, on images in [-1, 1], is a tanh. ``partial``
    makes every convolution a partial one (reference [26]): the holes then travel as a validity map with the features,
    not as a fourth channel of the input.

    With ``carafe_cfg``, a convolution with stride 2 becomes CARAFE++ and the same convolution with stride 1, and an
    upsampling layer becomes CARAFE++ and a 3 x 3 convolution (Sec. 4.3), two of each.

    Args:
        base_channels (int): channels at full size; twice as many at half the size and four times at a quarter.
        partial (bool): partial convolutions.
        upsampling (str | None): without CARAFE++, 'deconv' (4 x 4, stride 2, as [15]) or 'nearest' and a 3 x 3
            convolution (as [26]; the only one with partial convolutions). None takes what the network's own paper has.
        carafe_cfg (dict | None): where CARAFE++ is: ``down`` and ``up``, each True, False, or a dictionary of arguments
            of :class:`CARAFEDownsample` and :class:`CARAFEUpsample`. What is left out is False.
        norm (bool): batch norm after all convolutions but the last, as [15].
        dilations (Sequence[int]): of the bottleneck's convolutions, at a quarter of the size. [15] has 2, 4, 8 and 16
            for images of 256 x 256. Trained on smaller images, taps that are never inside learn nothing, and spoil
            larger images then.
        init_cfg (dict | None): MMEngine's.

    Raises:
        ValueError: an argument is out of its range; or, calling, the image's size is not a multiple of 4.

    Example:
        >>> import torch
        >>> generator = InpaintingGenerator(base_channels=8, partial=True, carafe_cfg=dict(down=True, up=True))
        >>> holes = torch.zeros(2, 1, 32, 32)
        >>> holes[..., 8:20, 10:24] = 1
        >>> generator(torch.rand(2, 3, 32, 32), holes).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self,
        base_channels: int = 64,
        partial: bool = False,
        upsampling: str | None = None,
        carafe_cfg: Mapping[str, Any] | None = None,
        norm: bool = True,
        dilations: Sequence[int] = (2, 4, 8, 16),
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if isinstance(base_channels, bool) or not isinstance(base_channels, int) or base_channels < 2:
            raise ValueError(f"base_channels must be an int of at least 2, got {base_channels!r}")
        if not isinstance(dilations, Sequence) or not all(type(d) is int and d > 0 for d in dilations):
            raise ValueError(f"dilations must be a sequence of positive ints, got {dilations!r}")
        upsampling = upsampling or ("nearest" if partial else "deconv")
        if upsampling not in UPSAMPLINGS:
            raise ValueError(f"upsampling must be one of {', '.join(UPSAMPLINGS)}, got {upsampling!r}")
        if partial and upsampling == "deconv":
            raise ValueError("upsampling must be 'nearest' with partial=True: a deconvolution has no partial form")
        self.partial, self.upsampling, self.norm = partial, upsampling, norm
        self.kinds = PARTIAL if partial else PLAIN
        down, up = _switches(carafe_cfg)
        full, half, quarter = base_channels, 2 * base_channels, 4 * base_channels
        self.encoder = nn.ModuleList([self._convolution(3 if partial else 4, full, 5)])
        self.encoder.extend([*self._downsampling(full, half, down), self._convolution(half, half)])
        self.encoder.extend([*self._downsampling(half, quarter, down), self._convolution(quarter, quarter)])
        self.encoder.append(self._convolution(quarter, quarter))
        self.bottleneck = nn.ModuleList([self._convolution(quarter, quarter, dilation=d) for d in dilations])
        self.decoder = nn.ModuleList([self._convolution(quarter, quarter), self._convolution(quarter, quarter)])
        self.decoder.extend([*self._upsampling(quarter, half, up), self._convolution(half, half)])
        self.decoder.extend([*self._upsampling(half, full, up), self._convolution(full, full // 2)])
        self.to_image = self.kinds[0](full // 2, 3, 3, padding=1)
        starting(self.to_image, functools.partial(xavier_init, distribution="normal")).reset_parameters()

    def _convolution(self, channels: int, out_channels: int, kernel: int = 3, **settings: Any) -> _Convolution:
        padding = settings.get("dilation", 1) * (kernel // 2)
        convolution = self.kinds[0](channels, out_channels, kernel, padding=padding, bias=not self.norm, **settings)
        return _Convolution(convolution, self.norm)

    def _downsampling(self, channels: int, out_channels: int, carafe: dict | None) -> list[nn.Module]:
        if carafe is None:
            return [self._convolution(channels, out_channels, stride=2)]
        return [_CARAFE(self.kinds[1](channels, **carafe)), self._convolution(channels, out_channels)]

    def _upsampling(self, channels: int, out_channels: int, carafe: dict | None) -> list[nn.Module]:
        if carafe is None and self.upsampling == "deconv":
            deconvolution = nn.ConvTranspose2d(channels, out_channels, 4, stride=2, padding=1, bias=not self.norm)
            return [_Convolution(deconvolution, self.norm)]
        larger = _Nearest() if carafe is None else _CARAFE(self.kinds[2](channels, **carafe))
        return [larger, self._convolution(channels, out_channels)]

    def forward(self, images: Tensor, holes: Tensor) -> Tensor:
        """Predict the paper's y_hat, (N, 3, H, W) in [-1, 1], from images likewise.

        What these hold in the holes has no influence. ``holes`` (N, 1, H, W) is the paper's M, 1 in the holes and 0
        elsewhere, of the dtype of ``images``.
        """
        if images.shape[-1] % STRIDE or images.shape[-2] % STRIDE:
            shape = tuple(map(int, images.shape))
            raise ValueError(f"images must have a height and width that are multiples of {STRIDE}, got shape {shape}")
        known = (holes == 0).to(images.dtype)
        features, validity = fill_unknown(images, known), known if self.partial else None
        if not self.partial:
            features = torch.cat([features, holes], dim=1)
        for layer in (*self.encoder, *self.bottleneck, *self.decoder):
            features, validity = layer(features, validity)
        return _apply(self.to_image, features, validity)[0].tanh()


def _switches(carafe_cfg: Mapping[str, Any] | None) -> tuple[dict | None, dict | None]:
    """The arguments of CARAFE++ down and up; None where it is off."""
    cfg = dict(carafe_cfg or {})
    found = []
    for name in ("down", "up"):
        value = cfg.pop(name, False)
        if not isinstance(value, (bool, Mapping)):
            raise ValueError(f"carafe_cfg[{name!r}] must be True, False or a dictionary of arguments, got {value!r}")
        if isinstance(value, Mapping) and {"channels", "scale_factor"} & set(value):
            raise ValueError(f"carafe_cfg[{name!r}] must not set channels or scale_factor: the network does")
        found.append(None if value is False else {} if value is True else dict(value))
    if cfg:
        raise ValueError(f"carafe_cfg must have no keys but 'down' and 'up', got {', '.join(map(repr, cfg))}")
    return found[0], found[1]


def _normal_(conv: nn.Conv2d) -> None:
    nn.Conv2d.reset_parameters(conv)  # for the bias
    nn.init.normal_(conv.weight, std=0.02)


@MODELS.register_module()
class PatchDiscriminator(BaseModule):
    """Judges of every patch of an image whether it looks real.

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
        positive("base_channels", base_channels)
        widths = [base_channels * min(2**level, 8) for level in range(positive("strided", strided) + 1)]
        layers: list[nn.Module] = [nn.Conv2d(4, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level, (before, after) in enumerate(pairwise(widths), 1):
            stride = 2 if level < strided else 1
            layers.append(nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=False))
            layers.extend([nn.BatchNorm2d(after), nn.LeakyReLU(0.2)])
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(starting(layer, _normal_).weight, std=0.02)  # as [20]

    def forward(self, images: Tensor, holes: Tensor) -> Tensor:
        """Judge completed images, (N, 3, H, W) in [-1, 1] with holes (N, 1, H, W) -> logits (N, 1, H', W')."""
        return self.layers(torch.cat([images, holes], dim=1))
