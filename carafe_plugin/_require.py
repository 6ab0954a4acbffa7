"""Packages that are optional, and those that do not go together."""

from __future__ import annotations

import importlib
import re
from importlib.metadata import PackageNotFoundError, version

_DISTRIBUTIONS = {
    "mmengine": "onedl-mmengine (or mmengine)",
    "mmcv": "onedl-mmcv (or mmcv-lite)",
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


def check_numpy() -> None:
    """Raise an ImportError: numpy 2 is installed beside a torch that was compiled for numpy 1.

    Such a torch prints a page of warnings when it is imported, and no tensor becomes an array or the other way round.
    Only the versions are asked for, so that this can come before that import.
    """
    try:
        versions = {name: version(name) for name in ("torch", "numpy")}
    except PackageNotFoundError:
        return
    torch, numpy = (tuple(map(int, re.findall(r"\d+", str(text))[:2])) for text in versions.values())
    if numpy >= (2,) and torch < (2, 3):
        raise ImportError(
            "torch {torch} was compiled for numpy 1, and numpy {numpy} is installed: install 'numpy<2'".format(
                **versions
            )
        )
