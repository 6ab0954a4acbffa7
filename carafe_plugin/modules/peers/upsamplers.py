"""The paper's other upsamplers (Tables 4 and 6). They raise what :class:`Resampler` does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Upsampler, odd, positive


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


class GUMUpsample(Upsampler):
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
        self.guidance = nn.Conv2d(channels, 2 * scale_factor**2, kernel_size, padding=padding)
        self.init_weights()

    def init_weights(self) -> None:
        """No offsets: bilinear interpolation."""
        nn.init.zeros_(self.guidance.weight)
        if self.guidance.bias is not None:
            nn.init.zeros_(self.guidance.bias)

    def resample(self, features: Tensor) -> Tensor:
        offsets = F.pixel_shuffle(self.guidance(features), self.scale_factor)  # (N, 2, H', W')
        offsets = offsets.to(torch.promote_types(offsets.dtype, torch.float32))  # half precision is too coarse to aim
        height, width = features.shape[2:]
        x = self._centres(width, offsets) + offsets[:, 0]
        y = self._centres(height, offsets)[:, None] + offsets[:, 1]
        # grid_sample counts from -1 to 1, edge to edge of the outermost pixels.
        grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
        sampled = F.grid_sample(features.to(grid.dtype), grid, padding_mode="border", align_corners=False)
        return sampled.to(features.dtype)

    def _centres(self, size: int, like: Tensor) -> Tensor:
        """Where the centres of the output's pixels lie along one axis, counted in pixels of the input."""
        target = torch.arange(size * self.scale_factor, dtype=like.dtype, device=like.device)
        return (target + 0.5) / self.scale_factor - 0.5


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
