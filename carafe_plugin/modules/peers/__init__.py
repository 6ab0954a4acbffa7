"""The operators that the paper compares CARAFE++ with (Tables 3, 4 and 6), as plain ``torch.nn`` modules.

Each has ``channels`` and ``scale_factor`` first, so that it fits wherever CARAFE++ does. Nearest and bilinear
interpolation are not here: PyTorch and the toolboxes bring them.
"""

from .base import Downsampler, Upsampler
from .downsamplers import (
    AveragePoolDownsample,
    DPPDownsample,
    LIPDownsample,
    MaxPoolDownsample,
    StridedConvDownsample,
)
from .upsamplers import (
    BilinearConvUpsample,
    DeconvUpsample,
    GUMUpsample,
    NearestConvUpsample,
    PixelShuffleUpsample,
    SpatialAttentionUpsample,
)

DOWNSAMPLERS = (StridedConvDownsample, MaxPoolDownsample, AveragePoolDownsample, DPPDownsample, LIPDownsample)
UPSAMPLERS = (
    NearestConvUpsample,
    BilinearConvUpsample,
    DeconvUpsample,
    PixelShuffleUpsample,
    GUMUpsample,
    SpatialAttentionUpsample,
)

__all__ = ["DOWNSAMPLERS", "UPSAMPLERS", "Downsampler", "Upsampler"]
__all__ += [peer.__name__ for peer in (*DOWNSAMPLERS, *UPSAMPLERS)]
