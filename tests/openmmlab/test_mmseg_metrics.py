"""BoundaryIoUMetric: IoU near edges, against a count pixel by pixel."""

import itertools

import pytest
import torch

pytest.importorskip("mmseg", reason="MMSegmentation is not installed")

from mmengine.structures import PixelData
from mmseg.registry import METRICS
from mmseg.structures import SegDataSample

from carafe_plugin.openmmlab.mmseg import BoundaryIoUMetric

VOID, CLASSES = 255, 3


def naive_near(label, width):
    height, columns = label.shape
    near = torch.zeros(label.shape, dtype=torch.bool)
    for y, x in itertools.product(range(height), range(columns)):
        rows, cols = (range(max(0, at - width), min(most, at + width + 1)) for at, most in ((y, height), (x, columns)))
        others = {int(label[row, col]) for row, col in itertools.product(rows, cols)} - {VOID}
        near[y, x] = label[y, x] != VOID and len(others) > 1
    return near


def label_map(size=(13, 17)):
    blocks = torch.randint(CLASSES, (1, 1, 3, 4)).float()
    label = torch.nn.functional.interpolate(blocks, size=size, mode="nearest")[0, 0].long()
    label[torch.rand(size) < 0.1] = VOID
    return label


@pytest.mark.parametrize("width", [1, 3, 6])
def test_near_edges(width):
    torch.manual_seed(width)
    for _ in range(5):
        label = label_map()
        assert torch.equal(BoundaryIoUMetric(width=width).near_edges(label), naive_near(label, width))


def test_metric():
    """Of two images of different sizes, built by the registry from the path that a configuration says."""
    torch.manual_seed(0)
    metric = METRICS.build(dict(type="carafe_plugin.openmmlab.mmseg.BoundaryIoUMetric", width=2, iou_metrics=["mIoU"]))
    metric.dataset_meta = dict(classes=("a", "b", "c"))
    intersections, unions = torch.zeros(CLASSES), torch.zeros(CLASSES)
    for size in ((13, 17), (9, 24)):
        label = label_map(size)
        predicted = torch.where(torch.rand(size) < 0.3, torch.randint(CLASSES, size), label.clamp(max=CLASSES - 1))
        sample = SegDataSample(
            gt_sem_seg=PixelData(data=label[None].clone()), pred_sem_seg=PixelData(data=predicted[None])
        )
        metric.process({}, [sample.to_dict()])
        assert torch.equal(sample.gt_sem_seg.data[0], label)  # for the metrics that come after
        near = naive_near(label, 2)
        for index in range(CLASSES):
            one, other = (near & (labels == index) for labels in (label, predicted))
            intersections[index] += (one & other).sum()
            unions[index] += (one | other).sum()
    found = metric.evaluate(2)
    assert found["boundary/mIoU"] == pytest.approx(100 * (intersections / unions).mean().item(), abs=0.01)


def test_width_is_checked():
    with pytest.raises(ValueError, match="width must be a positive int, got 0"):
        BoundaryIoUMetric(width=0)
