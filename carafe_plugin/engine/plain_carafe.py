"""The parameters of a plain-PyTorch CARAFE module, from and to those of MMCV's, and what the two compute.

:mod:`~carafe_plugin.engine.checkpoint_layouts` says what this is for; here are numbers alone, no names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carafe_plugin.modules import CARAFEUpsample

__all__ = ["ACTIVATIONS", "NORM_PARTS", "ORDERS", "Fork", "Parts", "difference", "from_mmcv", "plain_carafe", "to_mmcv"]

#: What can follow the compressor. MMCV's own class has nothing there.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.1),  # the slope of the YOLO family
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "mish": nn.Mish,
    "hardswish": nn.Hardswish,
}

#: How the encoder's k^2 * s^2 channels lie. "taps": tap by tap with the s^2 positions inside, which is what a pixel
#: shuffle before the softmax reads, and MMCV. "positions": position by position with the k^2 taps inside, where the
#: logits are viewed as (s^2, k^2), normalised and applied, and the result is pixel-shuffled.
ORDERS = ("taps", "positions")
MMCV_EPS = 1e-5  # torch's default, and with it that of compressor_norm
NORM_PARTS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Fork:
    """What the names do not tell about the side that is not MMCV's."""

    act: str = "identity"  # after the compressor, one of ACTIVATIONS
    eps: float = 1e-5  # of the BatchNorms: 1e-3 in the YOLO family
    order: str = "taps"  # of the encoder's channels, one of ORDERS
    scale: int = 2  # s, the upsampling factor

    def __post_init__(self) -> None:
        if self.act not in ACTIVATIONS:
            raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, got {self.act!r}")
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {self.order!r}")
        if isinstance(self.scale, bool) or not isinstance(self.scale, int) or self.scale < 1:
            raise ValueError(f"scale must be a positive int, got {self.scale!r}")
        if not (isinstance(self.eps, int | float) and self.eps > 0):
            raise ValueError(f"eps must be positive, got {self.eps!r}")


@dataclass(frozen=True)
class Parts:
    """The parameters of one module, whatever their names: convolutions with bias, norms as (4, channels) or None."""

    compressor: tuple[Tensor, Tensor]
    compressor_norm: Tensor | None  # rows: weight, bias, running mean, running variance
    encoder: tuple[Tensor, Tensor]
    encoder_norm: Tensor | None


def _fold(convolution: tuple[Tensor, Tensor], norm: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """A convolution with the norm after it as one convolution."""
    if norm is None:
        return convolution
    weight, bias, mean, variance = norm
    factor = weight / (variance + eps).sqrt()
    return convolution[0] * factor[:, None, None, None], (convolution[1] - mean) * factor + bias


def _at_eps(norm: Tensor, old: float, new: float) -> Tensor:
    """A norm that computes the same with another ``eps``."""
    weight, bias, mean, variance = norm
    return torch.stack((weight * ((variance + new) / (variance + old)).sqrt(), bias, mean, variance))


def _reorder(convolution: tuple[Tensor, Tensor], scale: int, to_taps: bool) -> tuple[Tensor, Tensor]:
    """The encoder's channels from position by position to tap by tap, or back."""

    def swap(values: Tensor) -> Tensor:
        inner = len(values) // scale**2 if to_taps else scale**2
        return values.unflatten(0, (-1, inner)).transpose(0, 1).flatten(0, 1)

    return swap(convolution[0]), swap(convolution[1])


def to_mmcv(source: Parts, fork: Fork) -> Parts:
    """MMCV's parameters of a fork's module: no norm, except where an activation follows the compressor's."""
    encoder = _fold(source.encoder, source.encoder_norm, fork.eps)
    if fork.order == "positions":
        encoder = _reorder(encoder, fork.scale, to_taps=True)
    norm = source.compressor_norm
    if fork.act == "identity" or norm is None:
        return Parts(_fold(source.compressor, norm, fork.eps), None, encoder, None)
    return Parts(source.compressor, _at_eps(norm, fork.eps, MMCV_EPS), encoder, None)


def from_mmcv(source: Parts, fork: Fork, compressor_norm: bool, encoder_norm: bool) -> Parts:
    """A fork's parameters of MMCV's, with norms in the two places that are asked for."""
    encoder = source.encoder
    if fork.order == "positions":
        encoder = _reorder(encoder, fork.scale, to_taps=False)
    compressor = source.compressor
    norm = source.compressor_norm
    if norm is not None and compressor_norm:
        weight, bias, mean, variance = _at_eps(norm, MMCV_EPS, fork.eps)
        # Such a block's convolution has no bias: what it adds, the norm need not subtract.
        norm = torch.stack((weight, bias, mean - compressor[1], variance))
        compressor = compressor[0], torch.zeros_like(compressor[1])
    else:
        compressor, norm = _split(_fold(compressor, norm, MMCV_EPS), compressor_norm, fork.eps)
    return Parts(compressor, norm, *_split(encoder, encoder_norm, fork.eps))


def _split(convolution: tuple[Tensor, Tensor], norm: bool, eps: float) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """A convolution as one without bias and a norm that adds it, where ``norm`` asks for one."""
    weight, bias = convolution
    if not norm:
        return convolution, None
    ones, zeros = torch.ones_like(bias), torch.zeros_like(bias)
    return (weight, zeros), torch.stack((ones * (1 + eps) ** 0.5, bias, zeros, ones))


def plain_carafe(features: Tensor, parts: Parts, fork: Fork) -> tuple[Tensor, Tensor]:
    """CARAFE as those projects compute it, from float64 features (N, C, H, W): the upsampled features, (N, C, sH, sW),
    and the logits of their kernels, (N, k^2, sH, sW).
    """
    n, channels, height, width = features.shape
    s = fork.scale
    content = F.conv2d(features, *parts.compressor)
    content = ACTIVATIONS[fork.act]()(_batch_norm(content, parts.compressor_norm, fork.eps))
    encoder = parts.encoder[0]
    logits = F.conv2d(content, encoder, parts.encoder[1], padding=encoder.shape[2] // 2)
    logits = _batch_norm(logits, parts.encoder_norm, fork.eps)
    k = math.isqrt(len(encoder) // s**2)
    if fork.order == "taps":
        logits = F.pixel_shuffle(logits, s)
        larger = F.interpolate(features, scale_factor=s, mode="nearest")
        patches = F.unfold(larger, k, dilation=s, padding=k // 2 * s)
        patches = patches.view(n, channels, k * k, s * height, s * width)
        return (patches * logits.softmax(1)[:, None]).sum(2), logits
    patches = F.unfold(features, k, padding=k // 2).view(n, channels, 1, k * k, height, width)
    logits = logits.view(n, 1, s * s, k * k, height, width)
    result = (patches * logits.softmax(3)).sum(3).flatten(1, 2)
    return F.pixel_shuffle(result, s), F.pixel_shuffle(logits[:, 0].transpose(1, 2).flatten(1, 2), s)


def _batch_norm(x: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    if norm is None:
        return x
    weight, bias, mean, variance = norm
    return F.batch_norm(x, mean, variance, weight, bias, eps=eps)


def difference(mmcv: Parts, other: Parts, kernel_size: int, fork: Fork) -> float:
    """How far this package's module is from the fork's formulation: outputs, and logits relative to the largest.

    The outputs alone would not do: near a fresh initialisation all kernels are alike, in whatever order.
    """
    compressed, channels = mmcv.compressor[0].shape[:2]
    module = CARAFEUpsample(
        channels,
        fork.scale,
        kernel_size,
        encoder_kernel=mmcv.encoder[0].shape[2],
        compressed_channels=compressed,
        norm=None if mmcv.compressor_norm is None else nn.BatchNorm2d,
        act=ACTIVATIONS[fork.act],
    ).double()
    with torch.no_grad():
        for layer, values in ((module.channel_compressor, mmcv.compressor), (module.content_encoder, mmcv.encoder)):
            for name, value in zip(("weight", "bias"), values, strict=True):
                getattr(layer, name).copy_(value)
        if mmcv.compressor_norm is not None:
            for name, value in zip(NORM_PARTS, mmcv.compressor_norm, strict=True):
                getattr(module.compressor_norm, name).copy_(value)
    features = torch.randn(1, channels, 7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs, logits = module.eval()(features), F.pixel_shuffle(module.predict_logits(features), fork.scale)
        expected, expected_logits = plain_carafe(features, other, fork)
        scale = expected_logits.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        return max((outputs - expected).abs().max().item(), ((logits - expected_logits).abs().max() / scale).item())
