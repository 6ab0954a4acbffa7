"""Upsamplers that are guided by the encoder's map of the size to reach, in our reading of their papers.

All reassemble by :func:`carafe_plugin.ops.carafe`, with kernels that they predict at the encoder's resolution. The
encoder's map need not be exactly sigma times as large: a pyramid's levels are rounded, up or down.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._tracing import as_one_node
from ..ops.functional import carafe
from ..ops.reference import crop
from .checks import check_features, odd, positive
from .peers import Upsampler
from .rivals import sample_groups
from .sizes import _unknown, complete
from .starts import KeepsItsStart, near_zero_, starting, xavier_

SHORTEST = 1e-3  # vectors below count as similar to little: the gradient of a cosine grows as they become shorter


class GuidedUpsampler(KeepsItsStart, Upsampler):
    """An upsampler that is called with two maps, ``guided(features, encoder_features)``.

    The first, (N, C, H, W), is upsampled to the size (H', W') of the second, (N, C, H', W'), which must lie between
    sigma * (H - 1) and sigma * (H + 1), and so for W: what rounding leads to. Where H' exceeds sigma * H, the last row
    is repeated.

    The adapters of the toolboxes look for the attribute ``guided``: where they have no such map, they refuse one.
    """

    guided = True

    def forward(self, features: Tensor, encoder_features: Tensor) -> Tensor:  # type: ignore[override]
        """Features (N, C, H, W) and the encoder's (N, C, H', W') -> (N, C, H', W')."""
        check_features(features, self.channels)
        check_features(encoder_features, self.channels, "encoder_features")
        return self.fuse(_reaching(features, encoder_features, self.scale_factor), encoder_features)

    def fuse(self, features: Tensor, encoder_features: Tensor) -> Tensor:
        """The operator itself: the features are as large as ceil(H' / sigma), ceil(W' / sigma)."""
        raise NotImplementedError


@as_one_node
def _reaching(features: Tensor, encoder_features: Tensor, scale_factor: int) -> Tensor:
    """Features as large as the encoder's divided by the scale factor, rounded up."""
    size = encoder_features.shape[2:]
    if not _unknown(size, features):
        sides = zip(features.shape[2:], size, strict=True)
        fits = all(scale_factor * (side - 1) < length < scale_factor * (side + 1) for side, length in sides)
        if not fits or features.shape[0] != encoder_features.shape[0]:
            raise ValueError(
                f"encoder_features must be {scale_factor} times as large as features, give or take rounding, and as "
                f"many: got {tuple(encoder_features.shape)} for {tuple(features.shape)}"
            )
    return complete(features, [-(-length // scale_factor) for length in size])


@as_one_node
def nearest(maps: Tensor, size_of: Tensor, scale_factor: int) -> Tensor:
    """Maps (N, ..., H, W) with every pixel repeated, as large as another map."""
    return crop(F.interpolate(maps, scale_factor=float(scale_factor), mode="nearest"), size_of.shape[2:])


@as_one_node
def reassembled(features: Tensor, logits: Tensor, kernel_size: int, scale_factor: int) -> Tensor:
    """Features reassembled by the softmax of logits (N, k^2, H', W')."""
    return carafe(features, logits.softmax(1), kernel_size, 1, scale_factor, logits.shape[2:])


class FADE(GuidedUpsampler):
    r"""Kernels are predicted from both maps, and details of the encoder's pass a gate.

    Lu, Liu, Fu and Cao, "FADE: Fusing the Assets of Decoder and Encoder for Task-Agnostic Upsampling" (ECCV 2022, arXiv
    2207.10392). The semi-shift convolution compresses both maps, each by 1x1 weights of its own, and encodes both by
    one and the same convolution, each at its own resolution; the decoder's is repeated to the encoder's:

        W = softmax(conv(a_en X_en) + up(conv(a_de X_de)) + b)
        F = carafe(X_de, W),    G = up(sigmoid(conv_1x1(X_de))),    output = G X_en + (1 - G) F

    With a compressed width of 64, kernels of 5x5 and the shared 3x3 convolution, it has the parameters that its authors
    state for SegFormer-B1, +0.29M in six places (and +0.1M in an FPN).

    Chosen here, where the paper does not say: the two compressions have one bias, the encoder's, as one convolution of
    the concatenated maps has; fresh weights are those of CARAFE++, so that kernels start nearly uniform, and the gate's
    are Xavier's, so that it starts around a half.

    Args:
        up_kernel (int): k of the reassembly, odd.
        encoder_kernel (int): k of the shared convolution, odd.
        compressed_channels (int): channels after compression.

    Example:
        >>> import torch
        >>> FADE(16)(torch.rand(1, 16, 5, 7), torch.rand(1, 16, 9, 14)).shape
        torch.Size([1, 16, 9, 14])
    """

    def __init__(
        self,
        channels: int,
        scale_factor: int = 2,
        up_kernel: int = 5,
        encoder_kernel: int = 3,
        compressed_channels: int = 64,
    ) -> None:
        super().__init__(channels, scale_factor)
        width = positive("compressed_channels", compressed_channels)
        padding = odd("encoder_kernel", encoder_kernel) // 2
        self.encoder_compressor = starting(nn.Conv2d(channels, width, 1), xavier_)
        self.decoder_compressor = starting(nn.Conv2d(channels, width, 1, bias=False), xavier_)
        self.up_kernel = odd("up_kernel", up_kernel)
        encoder = nn.Conv2d(width, up_kernel**2, encoder_kernel, padding=padding)
        self.content_encoder = starting(encoder, near_zero_)
        self.gate = starting(nn.Conv2d(channels, 1, 1), xavier_)
        self.init_weights()

    def fuse(self, features: Tensor, encoder_features: Tensor) -> Tensor:
        shared = self.content_encoder
        coarse = F.conv2d(self.decoder_compressor(features), shared.weight, padding=shared.padding)  # b counts once
        fine = shared(self.encoder_compressor(encoder_features))
        logits = fine + nearest(coarse, fine, self.scale_factor)
        upsampled = reassembled(features, logits, self.up_kernel, self.scale_factor)
        gate = nearest(torch.sigmoid(self.gate(features)), fine, self.scale_factor)
        return gate * encoder_features + (1 - gate) * upsampled


class SAPA(GuidedUpsampler):
    r"""Kernels are the similarity of the encoder's point to the decoder's points around it.

    Lu, Liu, Ye, Fu, Liu and Cao, "SAPA: Similarity-Aware Point Affiliation for Feature Upsampling" (NeurIPS 2022, arXiv
    2209.12866). Of its three similarity functions this is the bilinear one, of low rank (SAPA-B): with x the encoder's
    point at an output location and y_t the points of the k x k window around its source location,

        w_t = softmax_t(<P_x norm(x), P_y norm(y_t)>),    output = sum_t w_t y_t

    where norm is a layer normalisation and P_x and P_y are linear layers to ``embedded_channels``. There is no gate:
    values of the encoder's map do not reach the output.

    Chosen here, where the paper's text could not be checked: 32 embedded channels, which agree with the +0.1M that is
    published for an FPN (52K; 64 would as well); both linear layers have a bias; points beyond the map are zeros,
    similar to nothing, as CARAFE++ reads them; fresh weights have a standard deviation of 0.02, so that no similarity
    is large.

    Args:
        up_kernel (int): k, odd.
        embedded_channels (int): channels in which points are compared, the rank of the bilinear form.

    Example:
        >>> import torch
        >>> SAPA(16)(torch.rand(1, 16, 5, 7), torch.rand(1, 16, 9, 14)).shape
        torch.Size([1, 16, 9, 14])
    """

    def __init__(self, channels: int, scale_factor: int = 2, up_kernel: int = 5, embedded_channels: int = 32) -> None:
        super().__init__(channels, scale_factor)
        self.up_kernel = odd("up_kernel", up_kernel)
        width = positive("embedded_channels", embedded_channels)
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.encoder_embedding = starting(nn.Linear(channels, width), _small_)
        self.decoder_embedding = starting(nn.Linear(channels, width), _small_)
        self.init_weights()

    def fuse(self, features: Tensor, encoder_features: Tensor) -> Tensor:
        points = self.encoder_embedding(self.encoder_norm(encoder_features.permute(0, 2, 3, 1)))
        around = self.decoder_embedding(self.decoder_norm(features.permute(0, 2, 3, 1)))
        maps = points.permute(0, 3, 1, 2), around.permute(0, 3, 1, 2)
        logits = _similarities(*maps, self.up_kernel, self.scale_factor)
        return reassembled(features, logits, self.up_kernel, self.scale_factor)


def _small_(linear: nn.Linear) -> None:
    nn.init.normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)


@as_one_node
def _similarities(points: Tensor, around: Tensor, kernel_size: int, scale_factor: int) -> Tensor:
    """Inner products of points (N, D, H', W') with the k x k of (N, D, H, W) around each: (N, k^2, H', W')."""
    height, width = around.shape[2:]
    whole = complete(points, (scale_factor * height, scale_factor * width))
    # (N, D, H, sigma, W, sigma) with the windows (N, D, k^2, H, W): sigma^2 points share one window.
    phases = whole.unflatten(3, (width, scale_factor)).unflatten(2, (height, scale_factor))
    windows = F.unfold(around, kernel_size, padding=kernel_size // 2).unflatten(1, (-1, kernel_size**2))
    products = torch.einsum("ndhawb,ndthw->nthawb", phases, windows.unflatten(3, (height, width)))
    return crop(products.flatten(4).flatten(2, 3), points.shape[2:])


class FreqFusion(GuidedUpsampler):
    r"""A smoothed and moved map, and what is sharp in the encoder's: what is to be added to the encoder's map.

    Chen, Fu, Gu, Yan, Harada and Huang, "Frequency-aware Feature Fusion for Dense Image Prediction" (TPAMI 2024, arXiv
    2408.12879). With X the encoder's map and Y the coarser one, x and y both compressed by 1x1 convolutions, and Z an
    initial fusion of x and y, the fused map is

        Y~ = carafe(Y, softmax(conv_low(Z)), scale sigma)               adaptive low-pass filter
        H(X) = X - carafe(X, softmax(conv_high(Z)), scale 1)            adaptive high-pass filter
        fused = Y~[moved by O] + X + H(X),    O = D sigmoid(A)          offsets: direction D and scale A

    where convolutions predict D and A from Z together with the cosine similarities of each location to its eight
    neighbours. All but the last X is the output: a feature pyramid adds that itself. (Where the sum does not follow,
    add ``encoder_features``.)

    Chosen here, where the paper's formulas are not the whole of it. The initial fusion has two steps: Z_0 = x + up(y),
    then with the filters that the same convolutions predict from Z_0, Z = carafe(y) + x + H(x). Offsets are predicted
    twice, from Z with its similarities and from y with its own, whose sigma^2 offsets of a location are shuffled, and
    D and A are sums of both: without the second pair it would have 0.2M parameters in an FPN, and 0.3M are published.
    They count in pixels of the encoder's map, and each of four groups of channels has its own. Kernels are not windowed
    and nothing is normalised. What lies beyond the map is a zero, to filters as to similarities; positions there are
    moved to its border. Fresh filters are nearly uniform and offsets near zero, as CARAFE++'s weights are small.

    Args:
        low_pass_kernel (int): k of the reassembly by sigma, odd.
        high_pass_kernel (int): k of the reassembly at scale 1, odd.
        encoder_kernel (int): k of the convolutions that predict kernels and offsets, odd.
        compressed_channels (int): channels of x, y and Z.
        groups (int): groups of channels with offsets of their own; divides ``channels``.

    Example:
        >>> import torch
        >>> FreqFusion(16)(torch.rand(1, 16, 5, 7), torch.rand(1, 16, 9, 14)).shape
        torch.Size([1, 16, 9, 14])
    """

    def __init__(
        self,
        channels: int,
        scale_factor: int = 2,
        low_pass_kernel: int = 5,
        high_pass_kernel: int = 3,
        encoder_kernel: int = 3,
        compressed_channels: int = 64,
        groups: int = 4,
    ) -> None:
        super().__init__(channels, scale_factor)
        if channels % positive("groups", groups):
            raise ValueError(f"channels must be a multiple of groups={groups}, got {channels}")
        width = positive("compressed_channels", compressed_channels)
        padding = odd("encoder_kernel", encoder_kernel) // 2

        def predict(inputs: int, outputs: int) -> nn.Conv2d:
            return starting(nn.Conv2d(inputs, outputs, encoder_kernel, padding=padding), near_zero_)

        self.encoder_compressor = starting(nn.Conv2d(channels, width, 1), xavier_)
        self.decoder_compressor = starting(nn.Conv2d(channels, width, 1), xavier_)
        self.low_pass_kernel = odd("low_pass_kernel", low_pass_kernel)
        self.high_pass_kernel = odd("high_pass_kernel", high_pass_kernel)
        self.low_pass, self.high_pass = predict(width, low_pass_kernel**2), predict(width, high_pass_kernel**2)
        # The direction and the scale of the offsets, at the resolution of Z and of y.
        self.direction, self.scale = (predict(width + 8, 2 * groups) for _ in range(2))
        phases = scale_factor**2
        self.coarse_direction, self.coarse_scale = (predict(width + 8, 2 * groups * phases) for _ in range(2))
        self.init_weights()

    def _smooth(self, features: Tensor, fusion: Tensor) -> Tensor:
        return reassembled(features, self.low_pass(fusion), self.low_pass_kernel, self.scale_factor)

    def _sharp(self, features: Tensor, fusion: Tensor) -> Tensor:
        return features - reassembled(features, self.high_pass(fusion), self.high_pass_kernel, 1)

    def fuse(self, features: Tensor, encoder_features: Tensor) -> Tensor:
        sigma = self.scale_factor
        fine, coarse = self.encoder_compressor(encoder_features), self.decoder_compressor(features)
        fusion = fine + nearest(coarse, fine, sigma)
        fusion = self._smooth(coarse, fusion) + fine + self._sharp(fine, fusion)
        similar, coarse_similar = with_similarities(fusion), with_similarities(coarse)
        direction = self.direction(similar) + shuffled(self.coarse_direction(coarse_similar), fine, sigma)
        scale = self.scale(similar) + shuffled(self.coarse_scale(coarse_similar), fine, sigma)
        moved = sample_groups(self._smooth(features, fusion), direction * torch.sigmoid(scale), 1)
        return moved + self._sharp(encoder_features, fusion)


@as_one_node
def shuffled(maps: Tensor, size_of: Tensor, scale_factor: int) -> Tensor:
    """Pixel shuffle of maps, as large as another map."""
    return crop(F.pixel_shuffle(maps, scale_factor), size_of.shape[2:])


@as_one_node
def with_similarities(maps: Tensor) -> Tensor:
    """Maps (N, C, H, W) and, as channels after theirs, the cosine similarities to the eight neighbours, row by row."""
    height, width = maps.shape[2:]
    directions = F.normalize(maps.to(torch.promote_types(maps.dtype, torch.float32)), dim=1, eps=SHORTEST)
    padded = F.pad(directions, [1] * 4)
    neighbours = (padded[..., u : u + height, v : v + width] for u in range(3) for v in range(3) if (u, v) != (1, 1))
    similarities = [(directions * each).sum(1, keepdim=True).to(maps.dtype) for each in neighbours]
    return torch.cat([maps, *similarities], dim=1)


GUIDED = (FADE, SAPA, FreqFusion)
