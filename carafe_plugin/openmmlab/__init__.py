"""Adapters to OpenMMLab: one folder per toolbox, imported only on request.

* :mod:`~carafe_plugin.openmmlab.layers` registers the layers with MMEngine;
* :mod:`~carafe_plugin.openmmlab.mmdet`, ``mmseg`` and ``mmpretrain`` serve the toolbox of that name;
* :mod:`~carafe_plugin.openmmlab.drop_in` puts this package's operator behind MMCV's name ``carafe``;
* :mod:`~carafe_plugin.openmmlab.mmcv_ops` lets an MMCV that was not compiled run on torchvision's operators.

Importing this package itself imports none of them, and no toolbox.
"""

from carafe_plugin._require import require

__all__ = ["require"]
