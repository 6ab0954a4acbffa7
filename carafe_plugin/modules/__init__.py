"""CARAFE++ as plain ``torch.nn`` modules: they need neither mmcv nor mmengine."""

from .carafe import CARAFEDownsample, CARAFEUpsample

__all__ = ["CARAFEDownsample", "CARAFEUpsample"]
