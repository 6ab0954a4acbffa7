"""Torchvision: the pyramid of its detectors, and the heads of its segmentation models.

FCN, DeepLabV3 and LRASPP upsample scores, by 8 or 16: all that there is. Mask R-CNN's ``conv5_mask`` is a layer, which
any model's conversion finds; masks that are pasted into the image and Keypoint R-CNN's heatmaps are left.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

FEATURES = ("FeaturePyramidNetwork", "_SimpleSegmentationModel", "LRASPP", "LRASPPHead")


def example_inputs(model: nn.Module) -> Any:
    """An image, and for a detector a list of one; detectors make it as large as their transform says."""
    detects = type(getattr(model, "transform", None)).__name__ == "GeneralizedRCNNTransform"
    return ([torch.rand(3, 128, 128)],) if detects else torch.rand(1, 3, 128, 128)
