"""torchvision's operators behind MMCV's names against the compiled ones: the same calls, on either extension.

The bounds are those of float32 where both compute the same sums in another order, and none where they compare.
"""

import pytest
import torch

pytest.importorskip("mmcv", reason="MMCV is not installed")
import mmcv.ops
from mmcv import _ext
from operators import boxes, rois, stand_in, use_extension, values_and_gradients

pytestmark = [
    pytest.mark.skipif(
        not hasattr(_ext, "__file__"),
        reason="MMCV has no compiled operators to compare with: make env MMCV=compiled builds them (10 to 30 minutes)",
    ),
    pytest.mark.usefixtures("one_thread"),
]

KINDS = ["random", "whole", "thin"]


@pytest.fixture
def compare(monkeypatch, record_property):
    """Calls a function on both extensions and compares; ``bound`` is relative to the largest value, 0 is equality."""

    def compare(function, bound):
        expected = function()
        with monkeypatch.context() as patch:
            use_extension(patch, stand_in())
            found = function()
        assert len(found) == len(expected)
        largest = 0.0
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == theirs.dtype
            assert ours.shape == theirs.shape
            scale = theirs.double().nan_to_num().abs().max().clamp(min=1e-30).item() if theirs.numel() else 1.0
            if theirs.numel():
                largest = max(largest, (ours.double() - theirs.double()).nan_to_num().abs().max().item() / scale)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=bound * scale, equal_nan=True)
        record_property("difference", largest)

    return compare


# ---------------------------------------------------------------------------------------------------------- boxes


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("iou_threshold", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 1, 300])
def test_nms(compare, count, kind, iou_threshold, offset):
    corners, scores = boxes(count, kind=kind)
    compare(lambda: mmcv.ops.nms(corners, scores, iou_threshold, offset=offset), 0)


def test_nms_options_of_mmcvs_own_code(compare):
    corners, scores = boxes(300)
    compare(lambda: mmcv.ops.nms(corners, scores, 0.5, score_threshold=0.4, max_num=7), 0)
    compare(lambda: [torch.from_numpy(a) for a in mmcv.ops.nms(corners.numpy(), scores.numpy(), 0.5)], 0)


@pytest.mark.parametrize("overlap", [(3, 10), (1, 2), (7, 10), (1, 3)])
def test_nms_at_the_threshold_itself(compare, overlap):
    """Boxes whose overlap is the threshold: rounded to float32 it may lie above the ratio, or below."""
    shared, whole = overlap
    corners = torch.tensor([[0.0, 0, whole, 1], [0, 0, shared, 1], [whole - shared, 0, whole, 1]])
    compare(lambda: mmcv.ops.nms(corners, torch.tensor([0.9, 0.8, 0.7]), shared / whole), 0)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 1, 120])
def test_soft_nms(compare, count, kind, method, offset):
    corners, scores = boxes(count, kind=kind)
    bound = 1e-6 if method == "gaussian" else 0  # C's exponential is not always the nearest float
    compare(lambda: mmcv.ops.soft_nms(corners, scores, 0.3, 0.5, 0.05, method, offset), bound)


@pytest.mark.parametrize(
    "settings",
    [
        dict(type="nms", iou_threshold=0.5),
        dict(type="nms", iou_threshold=0.5, class_agnostic=True),
        dict(type="nms", iou_threshold=0.5, split_thr=50),
        dict(type="nms", iou_threshold=0.5, split_thr=50, max_num=9),
        dict(type="nms", iou_threshold=0.7, offset=1, max_num=9),
        dict(type="soft_nms", iou_threshold=0.5, min_score=0.05),
        dict(type="soft_nms", iou_threshold=0.5, min_score=0.05, split_thr=50),
        None,
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["random", "whole"])
def test_batched_nms(compare, kind, settings):
    corners, scores = boxes(200, kind=kind)
    classes = torch.arange(200) % 5
    compare(lambda: mmcv.ops.batched_nms(corners, scores, classes, settings), 0)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("mode", ["iou", "iof"])
def test_bbox_overlaps(compare, mode, aligned, offset):
    first, second = boxes(20)[0], boxes(20, seed=1)[0]
    compare(lambda: [mmcv.ops.bbox_overlaps(first, second, mode, aligned, offset)], 1e-6)


# ------------------------------------------------------------------------------------------- regions of interest


@pytest.mark.parametrize("kind", ["usual", "small", "outside", "empty"])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("pool_mode", ["avg", "max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_roi_align(compare, dtype, pool_mode, aligned, sampling_ratio, kind):
    torch.manual_seed(0)
    features, places = torch.randn(2, 3, 20, 24).to(dtype), rois(kind).to(dtype)

    def pool():
        def function(features):
            return mmcv.ops.roi_align(features, places, (7, 5), 0.5, sampling_ratio, pool_mode, aligned)

        return values_and_gradients(function, [features])

    # MMCV computes places and sums of half precision in half precision: a sample may lie 1/32 location elsewhere.
    bound = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 0.1}[dtype]
    if dtype == torch.float16 and pool_mode == "max":
        pytest.skip("in half precision the two take different samples for the largest")
    compare(pool, bound)


def test_roi_align_of_a_negative_size_is_an_error_of_both(compare):
    places = torch.tensor([[0.0, 10, 10, 5, 12]])

    def message():
        with pytest.raises(RuntimeError, match=r"ROIs in ROIAlign|RoIAlign: rois must have x1 <= x2"):
            mmcv.ops.roi_align(torch.zeros(1, 1, 20, 20), places, 7, 1.0, 2, "avg", True)
        return []

    compare(message, 0)


# ------------------------------------------------------------------------------------------ deformable convolutions

GEOMETRIES = [
    dict(),
    dict(stride=2),
    dict(dilation=2, padding=2),
    dict(groups=2),
    dict(deform_groups=2),
    dict(stride=(2, 1), padding=(0, 2), groups=2, deform_groups=4),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_deformable_convolution(compare, batch, modulated, geometry, dtype):
    torch.manual_seed(0)
    settings = dict(padding=1, bias=modulated) | geometry
    kind = mmcv.ops.ModulatedDeformConv2d if modulated else mmcv.ops.DeformConv2d
    layer = kind(8, 6, 3, **settings).to(dtype)
    features = torch.randn(batch, 8, 11, 9, dtype=dtype)
    size = torch.nn.functional.conv2d(features[:, :1], features[:1, :1, :3, :3], None, *placed(layer)).shape[2:]
    offset = 3 * torch.randn(batch, layer.deform_groups * 18, *size, dtype=dtype)
    mask = torch.rand(batch, layer.deform_groups * 9, *size, dtype=dtype)

    def convolve():
        layer.zero_grad()
        found = values_and_gradients(layer, [features, offset, *([mask] if modulated else [])])
        return [*found, *(parameter.grad.clone() for parameter in layer.parameters())]

    compare(convolve, 1e-12 if dtype == torch.float64 else 2e-6)


def placed(layer):
    return layer.stride, layer.padding, layer.dilation


def test_deformable_convolution_of_a_map_smaller_than_its_kernel(compare):
    torch.manual_seed(0)
    layer = mmcv.ops.DeformConv2d(2, 3, 3, padding=1)
    features, offset = torch.randn(1, 2, 2, 2), torch.randn(1, 18, 2, 2)
    compare(lambda: values_and_gradients(layer, [features, offset]), 2e-6)


def test_many_images_in_steps(compare):
    torch.manual_seed(0)
    layer = mmcv.ops.DeformConv2d(2, 3, 3, padding=1, im2col_step=4)
    features, offset = torch.randn(8, 2, 6, 5), torch.randn(8, 18, 6, 5)
    compare(lambda: values_and_gradients(layer, [features, offset]), 2e-6)


@pytest.mark.parametrize("wanted", [("weight",), ("input",), ("offset", "weight")], ids=str)
def test_gradients_asked_for_one_by_one(compare, wanted):
    """A second backward pass over the same graph, for other inputs and of another cotangent, is not the first's."""
    torch.manual_seed(0)
    tensors = dict(input=torch.randn(1, 2, 5, 6), offset=torch.randn(1, 18, 5, 6), weight=torch.randn(4, 2, 3, 3))
    cotangents = torch.randn(2, 1, 4, 5, 6)

    def twice():
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        output = mmcv.ops.deform_conv2d(*leaves.values(), 1, 1)
        torch.autograd.grad(output, list(leaves.values()), cotangents[0], retain_graph=True)
        return torch.autograd.grad(output, [leaves[name] for name in wanted], cotangents[1])

    compare(twice, 2e-6)
