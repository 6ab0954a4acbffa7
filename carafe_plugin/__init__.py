"""CARAFE++: content-aware reassembly of features, for PyTorch and the OpenMMLab toolboxes.

Importing this package needs torch alone. The adapters for mmdet, mmseg and mmpretrain live in
``carafe_plugin.openmmlab`` and are imported only on request.
"""

from ._version import __version__
from .modules import CARAFEDownsample, CARAFEUpsample
from .ops import carafe, is_compiled

__all__ = ["CARAFEDownsample", "CARAFEUpsample", "__version__", "carafe", "is_compiled"]
