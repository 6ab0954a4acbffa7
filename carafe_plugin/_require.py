"""Packages that are optional."""

from __future__ import annotations

import importlib

_DISTRIBUTIONS = {
    "mmengine": "onedl-mmengine (or mmengine)",
    "mmcv": "onedl-mmcv (or mmcv)",
    "mmdet": "onedl-mmdetection (or mmdet)",
    "mmseg": "onedl-mmsegmentation (or mmsegmentation)",
    "mmpretrain": "onedl-mmpretrain (or mmpretrain)",
    "skimage": "scikit-image",
}


def require(package: str, purpose: str) -> None:
    """Import a package, or raise an ImportError: it is not installed, and ``purpose`` needs it.

    A package that is installed but fails to import (a version that it does not accept, a missing dependency of its own)
    keeps its own error.
    """
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ImportError(
            f"{purpose} needs {package}, which is not installed: install {_DISTRIBUTIONS[package]}", name=package
        ) from error
