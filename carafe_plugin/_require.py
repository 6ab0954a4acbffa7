"""Packages that are optional, and those that do not go together."""

from __future__ import annotations

import contextlib
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
            f"{purpose} needs {package}, which is not installed: install {_DISTRIBUTIONS.get(package, package)}",
            name=package,
        ) from error


def major_minor(version: str) -> tuple[int, ...]:
    """The first two numbers of a version, as it is compared: (2, 11) of '2.11.0a0+cu130', () of ''."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def check_versions() -> None:
    """Raise an ImportError: torch is older than 2.1, or numpy 2 is installed beside a torch made for numpy 1.

    Such a torch prints a page of warnings when it is imported, and no tensor becomes an array or the other way round.
    Only the versions are asked for, so that this can come before that import.
    """
    found = {}
    for name in ("torch", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    torch, numpy = (major_minor(found.get(name, "")) for name in ("torch", "numpy"))
    if torch and torch < (2, 1):
        raise ImportError(f"carafe_plugin needs torch >= 2.1, found {found['torch']}")
    if torch and torch < (2, 3) and numpy >= (2,):
        raise ImportError(
            f"torch {found['torch']} was compiled for numpy 1, and numpy {found['numpy']} is installed: "
            "install 'numpy<2'"
        )
