"""CARAFE++ for MMPretrain: importing this module makes ``CARAFEUpsample`` and ``CARAFEDownsample`` known by name.

MMPretrain finds them through MMEngine's root registry; see :mod:`carafe_plugin.openmmlab.layers`.
"""

from __future__ import annotations

from carafe_plugin.openmmlab import require

require("mmpretrain", __name__)

from carafe_plugin.openmmlab.layers import CARAFEDownsample, CARAFEUpsample  # noqa: E402

__all__ = ["CARAFEDownsample", "CARAFEUpsample"]
