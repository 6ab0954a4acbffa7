"""CARAFE++ as plain ``torch.nn`` modules: they need neither mmcv nor mmengine."""

from .downsample import CARAFEDownsample
from .upsample import CARAFEUpsample

__all__ = ["CARAFEDownsample", "CARAFEUpsample"]
