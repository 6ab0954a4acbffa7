"""CARAFE++: content-aware reassembly of features, for PyTorch and the OpenMMLab toolboxes.

Importing this package needs torch alone. The adapters for mmdet, mmseg and mmpretrain live in
``carafe_plugin.openmmlab`` and are imported only on request.
"""

import torch

from ._version import __version__

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 1):
    raise ImportError(f"carafe_plugin needs torch >= 2.1, found {torch.__version__}")

from .modules import CARAFEDownsample, CARAFEUpsample
from .ops import carafe, is_compiled

__all__ = ["CARAFEDownsample", "CARAFEUpsample", "__version__", "carafe", "is_compiled"]
