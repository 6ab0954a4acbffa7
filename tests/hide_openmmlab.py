"""A pytest plugin (-p hide_openmmlab): no OpenMMLab package can be imported, and carafe_plugin comes from where the
environment variable CARAFE_EXPECTED_FOLDER says."""

import os
import sys
from pathlib import Path

for name in ("mmcv", "mmengine", "mmdet", "mmseg", "mmpretrain"):
    sys.modules[name] = None

import carafe_plugin  # noqa: E402

found = Path(carafe_plugin.__file__).parents[1].resolve()
expected = Path(os.environ["CARAFE_EXPECTED_FOLDER"]).resolve()
assert found == expected, f"carafe_plugin comes from {found}, expected {expected}"
