"""torchvision's operators behind MMCV's names: each against its definition, called through MMCV's own Python code.

What a compiled MMCV computes is compared in ``test_mmcv_ops_compiled.py``.
"""

import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("mmcv", reason="MMCV is not installed")
import mmcv.ops
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch
from operators import boxes, rois, stand_in, use_extension, values_and_gradients

from carafe_plugin.ops import reference

pytestmark = pytest.mark.usefixtures("one_thread")

HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def extension(monkeypatch):
    module = stand_in()
    use_extension(monkeypatch, module)
    return module


# ---------------------------------------------------------------------------------------------------------- boxes


def overlap(first, second, offset):
    """The ratio of what two boxes share to what both cover, in float32 throughout."""
    width, height = (
        np.maximum(np.float32(0), min(first[i + 2], second[i + 2]) - max(first[i], second[i]) + np.float32(offset))
        for i in (0, 1)
    )
    areas = [(box[2] - box[0] + np.float32(offset)) * (box[3] - box[1] + np.float32(offset)) for box in (first, second)]
    with np.errstate(invalid="ignore"):
        return width * height / (areas[0] + areas[1] - width * height)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("kind", ["random", "whole", "thin"])
@pytest.mark.parametrize("iou_threshold", [0.3, 0.5, 0.7])
def test_nms(iou_threshold, kind, offset):
    corners, scores = boxes(60, 30.0, kind=kind)
    kept = []
    for index in scores.sort(descending=True).indices.tolist():
        others = (overlap(corners[i].numpy(), corners[index].numpy(), offset) for i in kept)
        if not any(other > np.float32(iou_threshold) for other in others):
            kept.append(index)
    dets, found = mmcv.ops.nms(corners, scores, iou_threshold, offset=offset)
    assert found.tolist() == kept
    assert torch.equal(dets, torch.cat([corners, scores[:, None]], 1)[kept])


@pytest.mark.parametrize("dtype", [torch.float64, *HALVES], ids=str)
def test_nms_of_other_dtypes(dtype):
    corners, scores = boxes(60, 30.0)
    corners, scores = corners.to(dtype), scores.to(dtype)
    dets, found = mmcv.ops.nms(corners, scores, 0.5)
    assert dets.dtype == dtype
    assert torch.equal(found, mmcv.ops.nms(corners.float(), scores.float(), 0.5)[1])


def naive_soft_nms(corners, scores, iou_threshold, sigma, min_score, method, offset):
    left = [[*corner, score, index] for index, (corner, score) in enumerate(zip(corners, scores, strict=True))]
    done = []
    while left:
        left.sort(key=lambda box: -box[4])
        best, left = left[0], left[1:]
        done.append(best)
        for box in left:
            shared = overlap(best, box, offset)
            if method == "gaussian":
                box[4] *= np.exp(-(shared * shared) / np.float32(sigma))
            elif shared >= np.float32(iou_threshold):
                box[4] *= 1 - shared if method == "linear" else 0
        left = [box for box in left if not box[4] < np.float32(min_score)]
    return np.array([box[:5] for box in done], np.float32), [box[5] for box in done]


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
def test_soft_nms(method, offset):
    corners, scores = boxes(80, 30.0)
    dets, found = mmcv.ops.soft_nms(corners, scores, 0.3, 0.5, 0.1, method, offset)
    expected, indices = naive_soft_nms(corners.numpy(), scores.numpy(), 0.3, 0.5, 0.1, method, offset)
    assert found.tolist() == indices
    assert 5 < len(indices) < 80
    torch.testing.assert_close(dets, torch.from_numpy(expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("function", [mmcv.ops.nms, mmcv.ops.soft_nms], ids=["nms", "soft_nms"])
def test_no_boxes(function):
    dets, found = function(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert dets.shape == (0, 5)
    assert found.shape == (0,)
    assert found.dtype == torch.long


def test_classes_do_not_suppress_one_another():
    corners = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 8]])
    scores, classes = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 1, 0])
    assert mmcv.ops.batched_nms(corners, scores, classes, dict(type="nms", iou_threshold=0.5))[1].tolist() == [0, 1]
    settings = dict(type="nms", iou_threshold=0.5, class_agnostic=True)
    assert mmcv.ops.batched_nms(corners, scores, classes, settings)[1].tolist() == [0]


def test_bbox_overlaps():
    first, second = boxes(9, 20.0)[0], boxes(9, 20.0, seed=1)[0]
    expected = torch.tensor([[float(overlap(a, b, 1)) for b in second.numpy()] for a in first.numpy()])
    torch.testing.assert_close(mmcv.ops.bbox_overlaps(first, second, offset=1), expected)
    aligned = mmcv.ops.bbox_overlaps(first, second, offset=1, aligned=True)
    torch.testing.assert_close(aligned, expected.diagonal())


# ------------------------------------------------------------------------------------------- regions of interest


def bilinear(plane, y, x):
    """A value between the locations of a map (H, W); 0 more than one location outside."""
    height, width = plane.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return plane.new_zeros(())
    y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = plane[top, left] * (1 - (x - left)) + plane[top, right] * (x - left)
    lower = plane[bottom, left] * (1 - (x - left)) + plane[bottom, right] * (x - left)
    return upper * (1 - (y - top)) + lower * (y - top)


def naive_roi_align(features, places, size, scale, ratio, pool_mode, aligned):
    output = features.new_zeros(len(places), features.shape[1], *size)
    for r, (image, *corners) in enumerate(places.tolist()):
        x1, y1, x2, y2 = (corner * scale - 0.5 * aligned for corner in corners)
        extent = [y2 - y1, x2 - x1] if aligned else [max(y2 - y1, 1), max(x2 - x1, 1)]
        bins = [extent[0] / size[0], extent[1] / size[1]]
        rows, columns = (ratio or math.ceil(side) for side in bins)
        for c, i, j in np.ndindex(features.shape[1], *size):
            samples = [
                bilinear(
                    features[int(image), c],
                    y1 + (i + (u + 0.5) / rows) * bins[0],
                    x1 + (j + (v + 0.5) / columns) * bins[1],
                )
                for u in range(rows)
                for v in range(columns)
            ]
            if pool_mode == "avg":
                output[r, c, i, j] = sum(samples) / max(1, len(samples))
            else:
                output[r, c, i, j] = torch.stack(samples).max() if samples else -10000
    return output


@pytest.mark.parametrize("kind", ["usual", "small", "outside", "empty"])
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("pool_mode", ["avg", "max"])
def test_roi_align(pool_mode, aligned, ratio, kind):
    torch.manual_seed(0)
    features, places = torch.randn(2, 2, 10, 12, dtype=torch.float64), rois(kind, count=8, size=20.0).double()
    settings = ((3, 2), 0.5, ratio, pool_mode, aligned)
    found = values_and_gradients(lambda x: mmcv.ops.roi_align(x, places, *settings), [features])
    expected = values_and_gradients(lambda x: naive_roi_align(x, places, *settings) + 0 * x.sum(), [features])
    for ours, naive in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, naive, rtol=0, atol=1e-6)  # MMCV's scale is a float32


@pytest.mark.parametrize("pool_mode", ["avg", "max"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_roi_align_in_half_precision(dtype, pool_mode):
    """Also where a bin has more samples than half precision counts."""
    torch.manual_seed(0)
    features = torch.randn(2, 1, 20, 300).to(dtype)
    places = torch.cat([rois("usual"), torch.tensor([[0.0, 0, 0, 299, 19]])]).to(dtype)

    def pool(features, places):
        return mmcv.ops.roi_align(features, places, (1, 1), 1.0, 0, pool_mode, True)

    found = values_and_gradients(lambda x: pool(x, places), [features])
    values = pool(features.float(), places.float())
    assert torch.equal(found[0], values.to(dtype))
    grads = values_and_gradients(lambda x: pool(x, places.float()), [features.float()])[1]
    assert torch.equal(found[1] == 0, grads.to(dtype) == 0)
    torch.testing.assert_close(found[1].float(), grads, rtol=0.02, atol=0.02)  # grad_output differs by a rounding


def naive_roi_pool(features, places, size, scale):
    """As MMCV's CUDA kernel has it: nothing is rounded before the bins."""
    height, width = features.shape[2:]
    output = []
    for image, *corners in places.tolist():
        x1, y1 = corners[0] * scale, corners[1] * scale
        sides = [(corners[3] + 1) * scale - y1, (corners[2] + 1) * scale - x1]
        for i, j in np.ndindex(*size):
            (top, bottom), (left, right) = (
                [
                    min(max(edge, 0), limit)
                    for edge in (
                        math.floor(number * side / bins + start),
                        math.ceil((number + 1) * side / bins + start),
                    )
                ]
                for number, side, bins, start, limit in (
                    (i, sides[0], size[0], y1, height),
                    (j, sides[1], size[1], x1, width),
                )
            )
            found = features[int(image), :, top:bottom, left:right].flatten(1)
            nothing = min(sides) <= 0 or found.shape[1] == 0
            output.append(features.new_zeros(features.shape[1]) if nothing else found.max(dim=1).values)
    return torch.stack(output).reshape(len(places), *size, -1).permute(0, 3, 1, 2)


@pytest.mark.parametrize("kind", ["usual", "small", "outside", "malformed"])
def test_roi_pool(kind):
    torch.manual_seed(0)
    features = torch.randn(2, 3, 20, 24)
    places = rois("usual" if kind == "malformed" else kind)
    if kind == "malformed":
        places = places[:, [0, 3, 4, 1, 2]]
    found = values_and_gradients(lambda x: mmcv.ops.roi_pool(x, places, (7, 5), 0.5), [features])
    expected = values_and_gradients(lambda x: naive_roi_pool(x, places, (7, 5), 0.5) + 0 * x.sum(), [features])
    for ours, naive in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, naive)
    assert mmcv.ops.roi_pool(features, places[:0], 7, 0.5).shape == (0, 3, 7, 7)
    nothing = features[:0].clone().requires_grad_()
    mmcv.ops.roi_pool(nothing, places[:0], 7, 0.5).sum().backward()
    assert nothing.grad.shape == (0, 3, 20, 24)
    half = mmcv.ops.roi_pool(features.half(), places, (7, 5), 0.5)
    assert torch.equal(half, mmcv.ops.roi_pool(features.half().float(), places, (7, 5), 0.5).half())


# --------------------------------------------------------------------------------------------------- convolutions


def naive_deform_conv(features, offset, mask, weight, bias, stride, padding, dilation, deform_groups):
    """One location of a tap after the other; one group of channels."""
    padded = F.pad(features, [1] * 4)  # a location outside, by less than one, takes part of the border
    output = features.new_zeros(features.shape[0], weight.shape[0], *offset.shape[2:])
    share = features.shape[1] // deform_groups
    for n, g, i, j, u, v in np.ndindex(features.shape[0], deform_groups, *offset.shape[2:], *weight.shape[2:]):
        tap = g * weight[0, 0].numel() + u * weight.shape[3] + v
        y = i * stride - padding + u * dilation + offset[n, 2 * tap, i, j].item()
        x = j * stride - padding + v * dilation + offset[n, 2 * tap + 1, i, j].item()
        if not (-1 < y < features.shape[2] and -1 < x < features.shape[3]):
            continue
        channels = slice(g * share, (g + 1) * share)
        values = torch.stack([bilinear(plane, y + 1, x + 1) for plane in padded[n, channels]])
        factor = 1 if mask is None else mask[n, tap, i, j]
        output[n, :, i, j] += weight[:, channels, u, v] @ values * factor
    return output if bias is None else output + bias[:, None, None]


@pytest.mark.parametrize("deform_groups", [1, 2])
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), (2, 1, 1), (1, 2, 2)])
@pytest.mark.parametrize("modulated", [False, True])
def test_deformable_convolution(modulated, stride, padding, dilation, deform_groups):
    torch.manual_seed(0)
    kind = mmcv.ops.ModulatedDeformConv2d if modulated else mmcv.ops.DeformConv2d
    settings = dict(stride=stride, padding=padding, dilation=dilation)
    layer = kind(4, 3, 3, **settings, deform_groups=deform_groups, bias=modulated).double()
    features = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    size = F.conv2d(features[:, :1], features.new_ones(1, 1, 3, 3), **settings).shape[2:]
    offset = 2 * torch.randn(2, deform_groups * 18, *size, dtype=torch.float64)
    mask = torch.rand(2, deform_groups * 9, *size, dtype=torch.float64) if modulated else None
    inputs = [features, offset, *([mask] if modulated else [])]
    bias = layer.bias if modulated else None
    expected = naive_deform_conv(features, offset, mask, layer.weight, bias, stride, padding, dilation, deform_groups)
    torch.testing.assert_close(layer(*inputs), expected, rtol=0, atol=1e-12)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(layer, leaves)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_deformable_convolution_in_half_precision(dtype):
    torch.manual_seed(0)
    layer = mmcv.ops.ModulatedDeformConv2d(4, 3, 3, padding=1).to(dtype)
    inputs = [torch.randn(1, channels, 5, 6).to(dtype) for channels in (4, 18, 9)]
    expected = layer.float()(*(tensor.float() for tensor in inputs))
    assert torch.equal(layer.to(dtype)(*inputs), expected.to(dtype))


def test_masked_convolution():
    torch.manual_seed(0)
    layer = mmcv.ops.MaskedConv2d(3, 5, (3, 5), padding=(1, 2))
    features, mask = torch.randn(1, 3, 7, 8), torch.rand(1, 7, 8) > 0.6
    torch.testing.assert_close(layer(features, mask), layer(features) * mask, rtol=1e-5, atol=1e-6)
    assert layer(features, torch.zeros(1, 7, 8)).count_nonzero() == 0


# ----------------------------------------------------------------------------------------- attention, losses, CARAFE


def test_multi_scale_deformable_attention():
    torch.manual_seed(0)
    shapes, starts = torch.tensor([[4, 5], [2, 3]]), torch.tensor([0, 20])
    inputs = [torch.randn(2, 26, 2, 4), torch.rand(2, 3, 2, 2, 3, 2), torch.rand(2, 3, 2, 2, 3)]

    def ours(value, locations, weights):
        return MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights, 64)

    def theirs(value, locations, weights):
        return multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)

    for found, expected in zip(*(values_and_gradients(f, inputs) for f in (ours, theirs)), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_losses_of_sure_predictions_are_finite(gamma):
    target = torch.tensor([0, 0, 3])
    for dtype in (torch.float32, torch.float16):
        logits = torch.tensor([[-20.0, 2, 20], [40, -40, 0], [0, 0, 0]], dtype=dtype)
        for result in values_and_gradients(lambda x: mmcv.ops.sigmoid_focal_loss(x, target, gamma), [logits]):
            assert torch.isfinite(result).all()
    if gamma >= 1:  # MMCV's own formula of the other has a slope without bound there
        for result in values_and_gradients(lambda x: mmcv.ops.softmax_focal_loss(x, target[:2], gamma), [logits[:2]]):
            assert torch.isfinite(result).all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_sigmoid_focal_loss(gamma, weighted):
    torch.manual_seed(0)
    logits, target = 3 * torch.randn(9, 4, dtype=torch.float64), torch.arange(9) % 4
    weight = torch.rand(4, dtype=torch.float64) if weighted else None
    if not weighted:
        target[4] = 4  # the background: no class

    def definition(logits):
        chosen = (target[:, None] == torch.arange(4)).double()
        p = logits.sigmoid()
        loss = -0.25 * chosen * (1 - p) ** gamma * p.log() - 0.75 * (1 - chosen) * p**gamma * (1 - p).log()
        return (loss * weight[target][:, None] if weighted else loss).sum() / 9

    found = values_and_gradients(
        lambda x: mmcv.ops.sigmoid_focal_loss(x, target, gamma, 0.25, weight, "mean"), [logits]
    )
    for ours, expected in zip(found, values_and_gradients(definition, [logits]), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_softmax_focal_loss(gamma, weighted):
    torch.manual_seed(0)
    logits, target = 3 * torch.randn(9, 4, dtype=torch.float64), torch.arange(9) % 4
    weight = torch.rand(4, dtype=torch.float64) if weighted else None
    target[4] = -1  # ignored

    def definition(logits):
        p = logits.softmax(1)[torch.arange(9), target]
        loss = -0.25 * (1 - p) ** gamma * p.log() * (target >= 0)
        return (loss * weight[target] if weighted else loss).sum()

    found = values_and_gradients(lambda x: mmcv.ops.softmax_focal_loss(x, target, gamma, 0.25, weight, "sum"), [logits])
    for ours, expected in zip(found, values_and_gradients(definition, [logits]), strict=True):
        torch.testing.assert_close(ours, expected)


def test_carafe():
    from mmcv.ops.carafe import CARAFEFunction, CARAFENaiveFunction

    torch.manual_seed(0)
    features, masks = torch.randn(2, 6, 4, 5), torch.randn(2, 18, 8, 10)
    found = values_and_gradients(lambda x, m: CARAFEFunction.apply(x, m, 3, 2, 2), [features, masks])
    expected = values_and_gradients(lambda x, m: reference.reassemble(x, m, 3, 2, 2, 1), [features, masks])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(CARAFENaiveFunction.apply(features, masks, 3, 2, 2), expected[0])


def test_zoo_config_trains_on_mmcvs_own_class(monkeypatch):
    """MMDetection's CARAFE configuration without the drop-in, on a CPU, where MMCV's own operator does not run."""
    pytest.importorskip("mmdet", reason="MMDetection is not installed")
    from mmcv.ops import CARAFEPack
    from mmdet.registry import MODELS
    from mmdet.testing import demo_mm_inputs
    from mmdet.utils import register_all_modules
    from mmengine.registry import DefaultScope
    from zoo_models import textbook, zoo_config

    register_all_modules(init_default_scope=False)
    torch.manual_seed(0)
    monkeypatch.delitem(MODELS.module_dict, "carafe", raising=False)  # the drop-in's
    with DefaultScope.overwrite_default_scope("mmdet"):
        detector = MODELS.build(zoo_config("faster-rcnn_r50_fpn-carafe_1x_coco.py").model)
    packs = [part for part in detector.modules() if type(part) is CARAFEPack]
    assert len(packs) == 4
    torch.nn.init.normal_(packs[0].content_encoder.weight, std=0.5)
    features = torch.randn(1, 256, 4, 5)
    torch.testing.assert_close(packs[0](features), textbook(packs[0], features), rtol=1e-5, atol=1e-5)
    data = detector.data_preprocessor(demo_mm_inputs(1, [(3, 96, 130)], num_items=[3]), True)
    losses, _ = detector.parse_losses(detector.loss(data["inputs"], data["data_samples"]))
    losses.backward()
    assert torch.isfinite(losses)
    assert all(parameter.grad.abs().max() > 0 for pack in packs for parameter in pack.parameters())


# -------------------------------------------------------------------------------------------------------- on a GPU

SHAPES, STARTS = torch.tensor([[4, 5], [2, 3]]), torch.tensor([0, 20])
ON_A_GPU = {
    "nms": lambda b, s: mmcv.ops.nms(b, s, 0.5)[0],
    "soft_nms": lambda b, s: mmcv.ops.soft_nms(b, s, 0.5)[0],
    "bbox_overlaps": lambda b, s: mmcv.ops.bbox_overlaps(b, b),
    "roi_align": lambda x, r: mmcv.ops.roi_align(x, r, 7, 0.5, 0, "avg", True),
    "roi_align_max": lambda x, r: mmcv.ops.roi_align(x, r, 7, 0.5, 0, "max", True),
    "roi_pool": lambda x, r: mmcv.ops.roi_pool(x, r, 7, 0.5),
    "deform_conv": lambda x, o, m, w: mmcv.ops.deform_conv2d(x, o, w, 1, 1),
    "modulated_deform_conv": lambda x, o, m, w: mmcv.ops.modulated_deform_conv2d(x, o, m, w, None, 1, 1),
    "ms_deform_attn": lambda v, x, w: MultiScaleDeformableAttnFunction.apply(
        v, SHAPES.to(v.device), STARTS.to(v.device), x, w, 64
    ),
    "sigmoid_focal_loss": lambda x, t: mmcv.ops.sigmoid_focal_loss(x, t),
    "softmax_focal_loss": lambda x, t: mmcv.ops.softmax_focal_loss(x, t),
}


def inputs_of(name):
    torch.manual_seed(0)
    if name in ("nms", "soft_nms", "bbox_overlaps"):
        return boxes(80, 30.0)
    if name.startswith("roi"):
        return torch.randn(2, 3, 20, 24), rois("usual")
    if name.endswith("deform_conv"):
        return torch.randn(2, 4, 6, 7), torch.randn(2, 18, 6, 7), torch.rand(2, 9, 6, 7), torch.randn(5, 4, 3, 3)
    if name == "ms_deform_attn":
        return torch.randn(2, 26, 2, 4), torch.rand(2, 3, 2, 2, 3, 2), torch.rand(2, 3, 2, 2, 3)
    return torch.randn(9, 4), torch.arange(9) % 4


@pytest.mark.parametrize("name", ON_A_GPU)
def test_every_device_computes_the_same(name, device):
    """On the CPU it shows that the cases themselves run, forward and backward."""
    inputs = inputs_of(name)

    def results(device):
        leaves = [tensor.to(device) for tensor in inputs]
        if name in ("nms", "soft_nms", "bbox_overlaps"):
            return [ON_A_GPU[name](*leaves).cpu()]
        return [tensor.cpu() for tensor in values_and_gradients(ON_A_GPU[name], leaves)]

    found, expected = results(device), results("cpu")
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)  # sums in another order, and fused


# ---------------------------------------------------------------------------------------- what torchvision has not


@pytest.mark.parametrize("name", ["psamask_forward", "line_nms", "of_a_later_mmcv"])
def test_other_operators_raise_at_their_call(extension, name):
    operator = getattr(extension, name)
    with pytest.raises(NotImplementedError) as raised:
        operator(1, keyword=2)
    message = str(raised.value)
    assert message.startswith(f"mmcv's operator {name} is compiled code, and torchvision has nothing in its place: ")
    assert "make env MMCV=compiled" in message
    assert "\n" not in message


def test_every_name_that_mmcv_asks_for_is_there(extension):
    from mmcv.ops.info import get_compiler_version
    from mmcv.utils import ext_loader

    assert "torchvision" in get_compiler_version()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "mmcv._ext", extension)
        assert ext_loader.load_ext("_ext", ["nms", "anything"]) is extension
    assert not hasattr(extension, "__file__")
