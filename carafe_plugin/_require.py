"""The OpenMMLab packages, which are optional."""

from __future__ import annotations

import importlib

_DISTRIBUTIONS = {
    "mmengine": "onedl-mmengine (or mmengine)",
    "mmcv": "onedl-mmcv (or mmcv)",
    "mmdet": "onedl-mmdetection (or mmdet)",
    "mmseg": "onedl-mmsegmentation (or mmsegmentation)",
    "mmpretrain": "onedl-mmpretrain (or mmpretrain)",
}


def require(toolbox: str, purpose: str) -> None:
    """Import a toolbox, or say which package is missing and what asked for it.

    Args:
        toolbox (str): the toolbox's import name, such as ``"mmdet"``.
        purpose (str): who needs it, for the message.

    Raises:
        ImportError: the toolbox is not installed. A toolbox that is installed but fails to import (a version that it
            does not accept, a missing dependency of its own) keeps its own error.
    """
    try:
        importlib.import_module(toolbox)
    except ModuleNotFoundError as error:
        if error.name != toolbox:
            raise
        raise ImportError(
            f"{purpose} needs {toolbox}, which is not installed: install {_DISTRIBUTIONS[toolbox]}", name=toolbox
        ) from error
