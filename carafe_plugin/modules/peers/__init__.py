"""The operators that the paper compares CARAFE++ with (Tables 3, 4 and 6), as plain ``torch.nn`` modules.

One operator a file, each with ``channels`` and ``scale_factor`` first, so that it fits wherever CARAFE++ does. Nearest
and bilinear interpolation are not here: PyTorch and the toolboxes bring them.
"""

from .average_pool import AveragePoolDownsample
from .base import Downsampler, Upsampler
from .deconv import DeconvUpsample
from .dpp import DPPDownsample
from .gum import GUMUpsample
from .interpolation_conv import BilinearConvUpsample, NearestConvUpsample
from .lip import LIPDownsample
from .max_pool import MaxPoolDownsample
from .pixel_shuffle import PixelShuffleUpsample
from .spatial_attention import SpatialAttentionUpsample
from .strided_conv import StridedConvDownsample

DOWNSAMPLERS = (StridedConvDownsample, MaxPoolDownsample, AveragePoolDownsample, DPPDownsample, LIPDownsample)
UPSAMPLERS = (
    NearestConvUpsample,
    BilinearConvUpsample,
    DeconvUpsample,
    PixelShuffleUpsample,
    GUMUpsample,
    SpatialAttentionUpsample,
)

__all__ = [
    "DOWNSAMPLERS",
    "UPSAMPLERS",
    "AveragePoolDownsample",
    "BilinearConvUpsample",
    "DPPDownsample",
    "DeconvUpsample",
    "Downsampler",
    "GUMUpsample",
    "LIPDownsample",
    "MaxPoolDownsample",
    "NearestConvUpsample",
    "PixelShuffleUpsample",
    "SpatialAttentionUpsample",
    "StridedConvDownsample",
    "Upsampler",
]
