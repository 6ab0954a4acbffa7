"""How well a segmentation follows the edges between classes, which is what an upsampler decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS
from torch import Tensor

from carafe_plugin.modules.checks import positive


@METRICS.register_module()
class BoundaryIoUMetric(IoUMetric):
    """IoUMetric among the pixels near an edge between two classes alone.

    Takes IoUMetric's arguments and gives its metrics, as ``boundary/mIoU`` and so on. Pixels that are void are near
    nothing, and count as little as in IoUMetric. For both figures a configuration lists both metrics::

        val_evaluator = [
            dict(type="IoUMetric", iou_metrics=["mIoU"]),
            dict(type="carafe_plugin.openmmlab.mmseg.BoundaryIoUMetric", width=3, iou_metrics=["mIoU"]),
        ]

    Args:
        width (int): a pixel is near an edge where a square of ``2 * width + 1`` pixels around it has another class.

    Raises:
        ValueError: ``width`` is not a positive int.

    Example:
        >>> import torch
        >>> metric = BoundaryIoUMetric(width=1)
        >>> metric.near_edges(torch.tensor([[0, 0, 0, 1, 1, 255]])).int()
        tensor([[0, 0, 1, 1, 0, 0]], dtype=torch.int32)
    """

    default_prefix = "boundary"

    def __init__(self, width: int = 3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.width = positive("width", width)

    def near_edges(self, label: Tensor) -> Tensor:
        """Which pixels of a label map (H, W) are near an edge: a bool for each."""
        valid = label != self.ignore_index
        values = label.float()[None, None]  # exact for labels below 2^24
        window = (2 * self.width + 1, 1, self.width)  # size, stride, padding
        highest = F.max_pool2d(values.masked_fill(~valid, -torch.inf), *window)
        lowest = -F.max_pool2d((-values).masked_fill(~valid, -torch.inf), *window)
        return valid & (highest != lowest)[0, 0]

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Take a batch of predictions into account, as IoUMetric does."""
        near = []
        for sample in data_samples:
            if self.format_only:
                near.append(sample)
                continue
            truth = sample["gt_sem_seg"]["data"]
            label = truth.reshape(truth.shape[-2:])
            label = label.masked_fill(~self.near_edges(label), self.ignore_index)
            near.append({**sample, "gt_sem_seg": {"data": label[None]}})
        super().process(data_batch, near)
