"""CARAFE++: content-aware reassembly of features, for PyTorch and the OpenMMLab toolboxes.

Importing this package needs torch alone. The adapters for mmdet, mmseg and mmpretrain live in
``carafe_plugin.openmmlab`` and are imported only on request.
"""

from ._require import check_versions
from ._version import __version__

check_versions()  # before torch is imported

from .models import convert  # noqa: E402
from .modules import CARAFEDownsample, CARAFEUpsample  # noqa: E402
from .ops import carafe, is_compiled  # noqa: E402

__all__ = ["CARAFEDownsample", "CARAFEUpsample", "__version__", "carafe", "convert", "is_compiled"]
