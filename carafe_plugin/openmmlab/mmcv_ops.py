"""torchvision's operators behind MMCV's names, where MMCV was installed without compiling its own.

MMCV takes minutes to hours to compile. Of its operators the models of MMDetection, MMSegmentation and MMPretrain mostly
need those that torchvision has compiled as well, for CPU and CUDA: non-maximum suppression, RoIAlign and deformable
convolution. To run a command on them, put this module in front of it::

    python -m carafe_plugin.openmmlab.mmcv_ops tools/train.py CONFIG      # instead of: python tools/train.py CONFIG
    python -m carafe_plugin.openmmlab.mmcv_ops -m torch.distributed.run --nproc_per_node 2 tools/train.py CONFIG

or, in Python, before the first import of a toolbox::

    from carafe_plugin.openmmlab import mmcv_ops
    mmcv_ops.install()

Either holds for the process and for those that it starts. This package's own tools do it by themselves. One line on
stderr says that the operators are torchvision's, when MMCV first asks for them. Importing this module changes nothing.

A compiled MMCV is never replaced. One that is there and does not load, because it was built for another torch, is an
error that offers ``CARAFE_MMCV_OPS=torchvision``: with that variable set, the operators here take its place.

Only the functions of MMCV's extension are replaced (by those of :mod:`~carafe_plugin.openmmlab.mmcv_operators`); what
MMCV's Python code around them checks and returns stays MMCV's.

==========================================  =========================================================================
nms, roi_align (average), deform_conv,      torchvision's operators
modulated_deform_conv
roi_align (maximum), roi_pool               torchvision's operators, one sample or one bin each
ms_deform_attn, bbox_overlaps               MMCV's own PyTorch functions
softnms, masked_im2col, masked_col2im,      NumPy and PyTorch
sigmoid_focal_loss, softmax_focal_loss
carafe, carafe_naive                        this package's operator
==========================================  =========================================================================

Every other operator raises a NotImplementedError when it is called.

They agree with MMCV's on a CPU to the rounding of float32, and what nms and softnms keep is the same (with ``offset=1``
but for overlaps that rounding takes across the threshold). Beyond that, all take float64, float16 and bfloat16, and
RoIPool, masked convolution, the focal losses and CARAFE run on a CPU. There half precision is computed in float32, as
everywhere in the focal losses; the sigmoid's keeps its logarithm where MMCV cuts it off at the smallest float's.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Sequence

from carafe_plugin.openmmlab.startup.sitecustomize import EXTENSION, FOLDER, VARIABLE, ExtensionFinder, is_ours

__all__ = ["install"]

USAGE = "usage: python -m carafe_plugin.openmmlab.mmcv_ops SCRIPT [ARGUMENT ...] (or -m MODULE [ARGUMENT ...])"


def install() -> None:
    """Let ``mmcv._ext`` be torchvision's operators where it is absent, here and in processes started from here.

    No toolbox is imported; ``PYTHONPATH`` gets one more folder. Calling it again changes nothing.

    Raises:
        ValueError: the environment variable ``CARAFE_MMCV_OPS`` is set, and not to ``torchvision``.

    Example:
        >>> install()
        >>> from mmcv.ops import nms
    """
    choice = os.environ.get(VARIABLE) or "torchvision"
    if choice != "torchvision":
        raise ValueError(f"the environment variable {VARIABLE} must be 'torchvision' or unset, got {choice!r}")
    if any(map(is_ours, sys.meta_path)):
        return
    early = [name for name in ("mmdet", "mmseg", "mmpretrain") if name in sys.modules]
    if early and importlib.util.find_spec(EXTENSION) is None:
        warnings.warn(
            f"{', '.join(early)} was imported before mmcv's operators were there, and may do without them: call "
            f"{__name__}.install() first",
            stacklevel=2,
        )
    sys.meta_path.insert(0, ExtensionFinder)
    folders = os.environ.get("PYTHONPATH")  # an empty one among them is the current folder
    os.environ["PYTHONPATH"] = f"{FOLDER}{os.pathsep}{folders}" if folders else str(FOLDER)


def main(arguments: Sequence[str]) -> int:
    """Become ``python ARGUMENTS``, with the operators available; returns only for ``--help`` or a usage error."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    try:
        install()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sys.stdout.flush()
    options = sys.orig_argv[1 : sys.orig_argv.index("-m")] if "-m" in sys.orig_argv else []  # such as -u
    os.execv(sys.executable, [sys.executable, *options, *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
