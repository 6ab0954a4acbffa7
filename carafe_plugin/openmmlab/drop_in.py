"""Put this package's operator behind MMCV's name ``carafe``: existing configurations and code run on it unmodified.

Import this module, from Python or from a configuration; nothing else is needed::

    import carafe_plugin.openmmlab.drop_in
    custom_imports = dict(imports=["carafe_plugin.openmmlab.drop_in"])

It changes two things in the running process:

1. ``mmcv.ops.carafe``, the operator, is this package's. MMCV's modules look the name up when they run, so the models
   that exist already use it as well; code that said ``from mmcv.ops import carafe`` earlier keeps MMCV's.
2. The type ``"carafe"`` means :class:`CARAFEPack` in MMDetection and MMSegmentation, whichever are installed. It is
   registered in *their* registries, which are searched first; the root registry keeps MMCV's class, which runs on this
   package's operator by the first point.

Where MMCV has no compiled operators, and :mod:`~carafe_plugin.openmmlab.mmcv_ops` puts none in their place, there is
nothing to replace, and the second point alone applies.

Parameter names, shapes and values are MMCV's: its checkpoints load with ``strict=True`` and give the same numbers. What
changes is where it runs: CPU, half precision, any memory layout, empty batches, second derivatives.

Importing twice changes nothing. An unrelated class that holds the key ``"carafe"`` is an error, never replaced.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from types import ModuleType
from typing import Any

from torch import nn

from carafe_plugin.openmmlab import require
from carafe_plugin.openmmlab.layers import CARAFEUpsample
from carafe_plugin.ops import carafe

require("mmcv", __name__)

TOOLBOXES = ("mmdet", "mmseg")


def _mmcv_carafe() -> ModuleType | None:
    """MMCV's module of the operator; None where MMCV was installed without compiled operators."""
    try:
        return importlib.import_module("mmcv.ops.carafe")  # its attribute of that name in mmcv.ops is the function
    except ModuleNotFoundError as error:
        if error.name not in ("mmcv._ext", "mmcv.ops", "mmcv.ops.carafe"):
            raise
        return None


_mmcv_module = _mmcv_carafe()


class _Stock(nn.Module if _mmcv_module is None else _mmcv_module.CARAFEPack):  # type: ignore[misc]
    """MMCV's class as a base that brings its identity, and neither its constructor nor its parameters.

    MMDetection's FPN_CARAFE gives every convolution Xavier's values and afterwards restores those modules that are
    instances of MMCV's class. A class that only looks like it would start from the wrong values, without a word.
    """

    def __init__(self) -> None:
        nn.Module.__init__(self)


class CARAFEPack(CARAFEUpsample, _Stock):
    """MMCV's CARAFEPack on this package's operator: the same arguments, parameters and results.

    The arguments are :class:`carafe_plugin.CARAFEUpsample`'s, of which the first seven are MMCV's.

    Example:
        >>> import torch
        >>> pack = CARAFEPack(channels=16, scale_factor=2, up_kernel=5, compressed_channels=8)
        >>> pack(torch.rand(1, 16, 4, 6)).shape
        torch.Size([1, 16, 8, 12])
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.up_kernel, self.up_group = self.kernel_size, self.group_size  # MMCV's names


def _register() -> None:
    for toolbox in TOOLBOXES:
        if importlib.util.find_spec(toolbox) is None:
            continue
        try:
            registry = importlib.import_module(f"{toolbox}.registry").MODELS
        except Exception as error:  # a toolbox that refuses this MMCV must not keep the other from working
            warnings.warn(f"{toolbox} does not import, so its type 'carafe' stays as it is: {error}", stacklevel=2)
            continue
        holder = registry.module_dict.get("carafe")
        if holder is not None and holder.__module__ != __name__:
            raise RuntimeError(
                f"the type 'carafe' in {toolbox}'s MODELS registry is already "
                f"{holder.__module__}.{holder.__qualname__}; {__name__} replaces MMCV's class alone"
            )
        registry.register_module(name="carafe", module=CARAFEPack, force=True)


_register()
if _mmcv_module is not None:
    _mmcv_module.carafe = sys.modules["mmcv.ops"].carafe = carafe  # type: ignore[attr-defined]
