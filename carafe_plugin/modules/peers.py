"""The operators that the paper compares CARAFE++ with (Tables 3, 4 and 6), as plain ``torch.nn`` modules.

Each has ``channels`` and ``scale_factor`` first, so that it fits wherever CARAFE++ does, and raises what
:class:`Resampler` does. Nearest and bilinear interpolation are not here: PyTorch and the toolboxes bring them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._tracing import as_one_node, refuse_scripting
from .checks import check_features, odd, positive
from .starts import KeepsItsStart, starting, zero_

DPP_EPSILON = 1e-3  # the original's: keeps the root differentiable where a pixel equals its window's mean
LIP_GATE = 12.0  # the original's: the importance of two pixels differs by e^12 at most


class Resampler(nn.Module):
    """An operator that keeps the channels of a map and changes its size by an integer factor.

    Args:
        channels (int): C.
        scale_factor (int): sigma, how many times larger or smaller the map becomes.
        kernel_size (int): where a class has one, k of its convolution or window; odd unless the class says otherwise.

    Raises:
        ValueError: ``channels`` or ``scale_factor`` is not a positive int, another argument is out of its range, or the
            input is not a map of C channels.
    """

    __prepare_scriptable__ = staticmethod(refuse_scripting)

    def __init__(self, channels: int, scale_factor: int = 2) -> None:
        super().__init__()
        self.channels = positive("channels", channels)
        self.scale_factor = positive("scale_factor", scale_factor)

    def resample(self, features: Tensor) -> Tensor:
        """The operator itself, on a map whose channels have been checked."""
        raise NotImplementedError

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, C, H, W) -> (N, C, H', W')."""
        check_features(features, self.channels)
        return self.resample(features)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, scale_factor={self.scale_factor}"


class Upsampler(Resampler):
    """A :class:`Resampler` to (N, C, sigma * H, sigma * W)."""


class Downsampler(Resampler):
    """A :class:`Resampler` to (N, C, ceil(H / sigma), ceil(W / sigma))."""


class StridedConvDownsample(Downsampler):
    """A k x k convolution with stride sigma: (N, C, H, W) -> (N, C, ceil(H / sigma), ceil(W / sigma)).

    CARAFE++ paper, Table 3, 'Conv'. That row is the plain ResNet, whose own convolutions have the stride; this module
    is for places without a convolution of their own, the stem's pooling for instance.

    Example:
        >>> import torch
        >>> StridedConvDownsample(16)(torch.rand(1, 16, 25, 42)).shape
        torch.Size([1, 16, 13, 21])
    """

    def __init__(self, channels: int, scale_factor: int = 2, kernel_size: int = 3) -> None:
        super().__init__(channels, scale_factor)
        padding = odd("kernel_size", kernel_size) // 2
        self.conv = nn.Conv2d(channels, channels, kernel_size, stride=scale_factor, padding=padding)

    def resample(self, features: Tensor) -> Tensor:
        return self.conv(features)


class _Pooling(Downsampler):
    def __init__(self, channels: int, scale_factor: int = 2, kernel_size: int = 3) -> None:
        super().__init__(channels, scale_factor)
        self.kernel_size = odd("kernel_size", kernel_size)
        self.window = (kernel_size, scale_factor, kernel_size // 2)  # size, stride, padding


class MaxPoolDownsample(_Pooling):
    """The largest value of each window: (N, C, H, W) -> (N, C, ceil(H / sigma), ceil(W / sigma)).

    CARAFE++ paper, Table 3, 'MPool': "in the same manner with CARAFE++". The window's size is not said. Here it is 3x3
    around the source location sigma * (i', j'), as in a ResNet's stem, which so remains what it was.
    """

    def resample(self, features: Tensor) -> Tensor:
        return F.max_pool2d(features, *self.window)


class AveragePoolDownsample(_Pooling):
    """The mean of each window: (N, C, H, W) -> (N, C, ceil(H / sigma), ceil(W / sigma)).

    CARAFE++ paper, Table 3, 'APool': "in the same manner with CARAFE++". The window's size is not said. Here it is that
    of :class:`MaxPoolDownsample`, 3x3 around the source location; at a border it averages what lies inside the map.
    """

    def resample(self, features: Tensor) -> Tensor:
        return F.avg_pool2d(features, *self.window, count_include_pad=False)


class DPPDownsample(Downsampler):
    r"""Pixels that stand out from their surroundings count more: (N, C, H, W) -> (N, C, ceil(H/sigma), ceil(W/sigma)).

    Saeedan, Weber, Goesele and Roth, "Detail-Preserving Pooling in Deep Networks" (CVPR 2018); CARAFE++ paper, Table 3,
    'DPP'. Over a window of sigma x sigma pixels q,

        out[p] = sum_q w[p, q] I[q] / sum_q w[p, q],    w[p, q] = alpha + (sqrt((I[q] - D[p])^2 + epsilon^2))^lambda

    where D is a smoothed downsampling of I, and alpha (a floor) and lambda (the reward of details) are learnt for each
    channel, positive as exponentials of the parameters.

    Chosen here, since the table does not say which variant it used: the "lite" one, in which D is the mean of the
    window; the symmetric reward above; both exponentials start at 1. The authors' code further divides the squared
    distances by their mean over the window, which the formula does not have, and neither has this module.
    A window that the border cuts consists of what lies inside the map.
    """

    def __init__(self, channels: int, scale_factor: int = 2) -> None:
        super().__init__(channels, scale_factor)
        self.log_alpha = nn.Parameter(torch.zeros(channels, 1, 1))
        self.log_lambda = nn.Parameter(torch.zeros(channels, 1, 1))

    def reset_parameters(self) -> None:
        """Both exponentials at 1."""
        nn.init.zeros_(self.log_alpha)
        nn.init.zeros_(self.log_lambda)

    def _window_mean(self, features: Tensor) -> Tensor:
        return F.avg_pool2d(features, self.scale_factor, ceil_mode=True)

    def resample(self, features: Tensor) -> Tensor:
        height, width = features.shape[2:]
        smoothed = self._window_mean(features)
        smoothed = smoothed.repeat_interleave(self.scale_factor, 2).repeat_interleave(self.scale_factor, 3)
        squares = (features - smoothed[..., :height, :width]) ** 2 + DPP_EPSILON**2
        weights = self.log_alpha.exp() + squares ** (0.5 * self.log_lambda.exp())
        return self._window_mean(weights * features) / self._window_mean(weights)


class LIPDownsample(KeepsItsStart, _Pooling):
    """An average weighted by a learnt importance: (N, C, H, W) -> (N, C, ceil(H / sigma), ceil(W / sigma)).

    Gao, Wang and Wu, "LIP: Local Importance-based Pooling" (ICCV 2019); CARAFE++ paper, Table 3, 'LIP', and Sec. 3.4.
    A small network predicts a logit for every value of the map; a window's output is the mean of its values weighted by
    the exponentials of the logits, 12 sigmoid(.), so that a weight is never far from the others by more than e^12.

    The original's two networks: with ``bottleneck``, convolutions 1x1, 3x3 and 1x1 of that width, each followed by an
    instance normalisation, ReLU between them (in its residual blocks, 128 wide); without, one 3x3 convolution and an
    instance normalisation (in its stem). The last convolution starts at zero: the pooling starts as a plain average.

    The original places it at a ResNet's seven strides, after the 1x1 of a block, and lets a 1x1 convolution at stride
    1 follow where there was the 3x3: ``carafe_cfg=dict(type="LIPDownsample", stem=dict(bottleneck=None),
    pointwise=True)`` of the package's ResNets. One thing is decided otherwise: its code shares the first two
    convolutions between a block's path and shortcut, here each pooling has its own, predicted from its own input.

    Args:
        bottleneck (int | None): width of the bottleneck; None for a single 3x3 convolution.

    Raises:
        ValueError: the input has one pixel.
        IndexError: the batch is empty. Both are of PyTorch's instance normalisation.
    """

    def __init__(
        self, channels: int, scale_factor: int = 2, kernel_size: int = 3, bottleneck: int | None = 128
    ) -> None:
        super().__init__(channels, scale_factor, kernel_size)
        if bottleneck is None:
            layers = _normed(channels, channels, 3)
        else:
            width = positive("bottleneck", bottleneck)
            layers = [*_normed(channels, width, 1), nn.ReLU(inplace=True), *_normed(width, width, 3)]
            layers += [nn.ReLU(inplace=True), *_normed(width, channels, 1)]
        starting(layers[-2], zero_)  # equal importance everywhere
        self.logits = nn.Sequential(*layers)
        self.init_weights()

    def resample(self, features: Tensor) -> Tensor:
        # Shifted by the largest value possible, which cancels out: in half precision e^12 would be infinite.
        weights = torch.exp(LIP_GATE * (torch.sigmoid(self.logits(features)) - 1))
        return F.avg_pool2d(weights * features, *self.window) / F.avg_pool2d(weights, *self.window)


def _normed(channels: int, out_channels: int, kernel_size: int) -> list[nn.Module]:
    conv = nn.Conv2d(channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    starting(conv, nn.Conv2d.reset_parameters)  # as convolutions do, whatever a model's init_cfg says of its own
    return [conv, nn.InstanceNorm2d(out_channels, affine=True)]


class NearestConvUpsample(Upsampler):
    """Nearest interpolation, then a k x k convolution: (N, C, H, W) -> (N, C, sigma * H, sigma * W).

    CARAFE++ paper, Table 4, 'N.C.': "we add an extra 3x3 convolution layer after the corresponding upsampling".

    Example:
        >>> import torch
        >>> NearestConvUpsample(16)(torch.rand(1, 16, 5, 7)).shape
        torch.Size([1, 16, 10, 14])
    """

    mode = "nearest"
    align_corners: bool | None = None

    def __init__(self, channels: int, scale_factor: int = 2, kernel_size: int = 3) -> None:
        super().__init__(channels, scale_factor)
        self.conv = nn.Conv2d(channels, channels, kernel_size, padding=odd("kernel_size", kernel_size) // 2)

    def resample(self, features: Tensor) -> Tensor:
        scale = float(self.scale_factor)
        return self.conv(F.interpolate(features, scale_factor=scale, mode=self.mode, align_corners=self.align_corners))


class BilinearConvUpsample(NearestConvUpsample):
    """Bilinear interpolation, then a k x k convolution: (N, C, H, W) -> (N, C, sigma * H, sigma * W).

    CARAFE++ paper, Table 4, 'B.C.'; otherwise as :class:`NearestConvUpsample`. Corners are not aligned, as in the
    toolboxes.
    """

    mode = "bilinear"
    align_corners = False


class DeconvUpsample(Upsampler):
    """A transposed convolution with stride sigma: (N, C, H, W) -> (N, C, sigma * H, sigma * W).

    Noh, Hong and Han, "Learning Deconvolution Network for Semantic Segmentation" (ICCV 2015); CARAFE++ paper, Table 4,
    'Deconv'. The kernel's size is not said: 3 x 3 as the other learnt operators of the table have. (The baseline of
    Table 6 is the mask head's own 2 x 2 one, the type ``"deconv"``.) ``kernel_size`` may be even, but not below sigma,
    else some pixels would get nothing.
    """

    def __init__(self, channels: int, scale_factor: int = 2, kernel_size: int = 3) -> None:
        super().__init__(channels, scale_factor)
        if positive("kernel_size", kernel_size) < scale_factor:
            raise ValueError(f"kernel_size must be at least the scale factor {scale_factor}, got {kernel_size}")
        # sigma * (H - 1) + k rows, of which so many at the top and at the bottom are too many.
        excess = kernel_size - scale_factor
        padding = (excess + 1) // 2
        self.deconv = nn.ConvTranspose2d(
            channels, channels, kernel_size, scale_factor, padding, output_padding=2 * padding - excess
        )

    def resample(self, features: Tensor) -> Tensor:
        return self.deconv(features)


class PixelShuffleUpsample(Upsampler):
    """A k x k convolution to sigma^2 * C channels, laid out as pixels: (N, C, H, W) -> (N, C, sigma * H, sigma * W).

    Shi et al., "Real-Time Single Image and Video Super-Resolution Using an Efficient Sub-Pixel Convolutional Neural
    Network" (CVPR 2016), eq. 3 and 4; CARAFE++ paper, Table 4, 'P.S.', and Table 6. The kernel's size is not said: here
    3 x 3, as the other learnt operators of the table have.
    """

    def __init__(self, channels: int, scale_factor: int = 2, kernel_size: int = 3) -> None:
        super().__init__(channels, scale_factor)
        padding = odd("kernel_size", kernel_size) // 2
        self.conv = nn.Conv2d(channels, channels * scale_factor**2, kernel_size, padding=padding)

    def resample(self, features: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(features), self.scale_factor)


class GUMUpsample(KeepsItsStart, Upsampler):
    """Bilinear interpolation whose sampling positions are moved: (N, C, H, W) -> (N, C, sigma * H, sigma * W).

    Mazzini, "Guided Upsampling Network for Real-Time Semantic Segmentation" (BMVC 2018, arXiv 1807.07466); CARAFE++
    paper, Tables 4 and 6, 'GUM'. A guidance table holds an offset (p, q) for every output location, which is added to
    the regular grid (x, y) before sampling:

        V[i] = sum_n sum_m U[n, m] max(0, 1 - |x_i + p_i - m|) max(0, 1 - |y_i + q_i - n|)

    Chosen here, since the original predicts the table by a branch of its own network, which an FPN does not have: one
    k x k convolution of the input predicts the sigma^2 offsets of each pixel, in pixels of the input, horizontal ones
    first. It starts at zero: the operator starts as bilinear interpolation. Positions outside the map are moved to its
    border.
    """

    def __init__(self, channels: int, scale_factor: int = 2, kernel_size: int = 3) -> None:
        super().__init__(channels, scale_factor)
        padding = odd("kernel_size", kernel_size) // 2
        self.guidance = starting(nn.Conv2d(channels, 2 * scale_factor**2, kernel_size, padding=padding), zero_)
        self.init_weights()

    def resample(self, features: Tensor) -> Tensor:
        return _sample_moved(features, F.pixel_shuffle(self.guidance(features), self.scale_factor), self.scale_factor)


@as_one_node
def _sample_moved(features: Tensor, offsets: Tensor, scale_factor: int) -> Tensor:
    """Interpolate features (N, C, H, W) where offsets (N, 2, H', W') move the centres of the output's pixels to."""
    # Half precision is too coarse to aim; and at no number PyTorch's backward pass reads beyond the map.
    offsets = offsets.to(torch.promote_types(offsets.dtype, torch.float32)).nan_to_num()
    height, width = features.shape[2:]
    x = _centres(width, scale_factor, offsets) + offsets[:, 0]
    y = _centres(height, scale_factor, offsets)[:, None] + offsets[:, 1]
    # grid_sample counts from -1 to 1, edge to edge of the outermost pixels.
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
    sampled = F.grid_sample(features.to(grid.dtype), grid, padding_mode="border", align_corners=False)
    return sampled.to(features.dtype)


def _centres(size: int, scale_factor: int, like: Tensor) -> Tensor:
    """Where the centres of the output's pixels lie along one axis, counted in pixels of the input."""
    target = torch.arange(size * scale_factor, dtype=like.dtype, device=like.device)
    return (target + 0.5) / scale_factor - 0.5


class SpatialAttentionUpsample(Upsampler):
    """A predicted weight for each location, then interpolation: (N, C, H, W) -> (N, C, sigma * H, sigma * W).

    Chen et al., "SCA-CNN: Spatial and Channel-wise Attention in Convolutional Networks for Image Captioning" (CVPR
    2017), of which this takes the spatial half; CARAFE++ paper, Tables 4 and 6, 'S.A.', and Sec. 3.4: it "predicts an
    attention map with the same spatial size as the input feature, and then rescales the feature map on each location".

    Chosen here, where neither paper says: a k x k convolution predicts one weight for all channels of a location; a
    sigmoid bounds it (the original's softmax over all locations would make a weight depend on the image's size); the
    interpolation is nearest, the baseline's, so that weighting before or after it is the same.
    """

    def __init__(self, channels: int, scale_factor: int = 2, kernel_size: int = 3) -> None:
        super().__init__(channels, scale_factor)
        self.attention = nn.Conv2d(channels, 1, kernel_size, padding=odd("kernel_size", kernel_size) // 2)

    def resample(self, features: Tensor) -> Tensor:
        weighted = features * torch.sigmoid(self.attention(features))
        return F.interpolate(weighted, scale_factor=float(self.scale_factor), mode="nearest")


DOWNSAMPLERS = (StridedConvDownsample, MaxPoolDownsample, AveragePoolDownsample, DPPDownsample, LIPDownsample)
UPSAMPLERS = (
    NearestConvUpsample,
    BilinearConvUpsample,
    DeconvUpsample,
    PixelShuffleUpsample,
    GUMUpsample,
    SpatialAttentionUpsample,
)
