"""torchvision's operators behind MMCV's names against the compiled ones: the same calls, on either extension.

The bounds are those of float32 where both compute the same sums in another order, and none where they compare.
"""

import copy
import importlib
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet", reason="MMDetection is not installed")
pytest.importorskip("mmseg", reason="MMSegmentation is not installed")
import mmcv.ops
from mmcv import _ext
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from operators import boxes, rois, stand_in, use_extension, values_and_gradients

pytestmark = [
    pytest.mark.skipif(
        hasattr(_ext, "is_stand_in"),
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

    def suppress():
        dets, kept = mmcv.ops.soft_nms(corners, scores, 0.3, 0.5, 0.05, method, offset)
        return [dets[:, :4], dets[:, 4], kept]

    compare(suppress, 1e-6 if method == "gaussian" else 0)  # C's exponential is not always the nearest float


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
@pytest.mark.parametrize(
    ("dtype", "pool_mode", "bound"),
    [
        (torch.float32, "avg", 1e-5),
        (torch.float32, "max", 1e-5),
        (torch.float64, "avg", 1e-6),
        (torch.float64, "max", 1e-6),
        # MMCV computes places and sums of half precision in half precision: samples lie up to 1/32 location elsewhere.
        # The largest is then another one, so that maxima are not compared.
        (torch.float16, "avg", 0.03),
    ],
)
def test_roi_align(compare, dtype, pool_mode, bound, aligned, sampling_ratio, kind):
    torch.manual_seed(0)
    features, places = torch.randn(2, 3, 20, 24).to(dtype), rois(kind).to(dtype)

    def pool():
        def function(features):
            return mmcv.ops.roi_align(features, places, (7, 5), 0.5, sampling_ratio, pool_mode, aligned)

        return values_and_gradients(function, [features])

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
    """A second backward pass over the same graph, for other inputs and of another gradient, is not the first's."""
    torch.manual_seed(0)
    tensors = dict(input=torch.randn(1, 2, 5, 6), offset=torch.randn(1, 18, 5, 6), weight=torch.randn(4, 2, 3, 3))
    grad_outputs = torch.randn(2, 1, 4, 5, 6)

    def twice():
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        output = mmcv.ops.deform_conv2d(*leaves.values(), 1, 1)
        torch.autograd.grad(output, list(leaves.values()), grad_outputs[0], retain_graph=True)
        return torch.autograd.grad(output, [leaves[name] for name in wanted], grad_outputs[1])

    compare(twice, 2e-6)


# ------------------------------------------------------------------------------------------------- whole models

DETECTORS = [
    "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
    "faster_rcnn/faster-rcnn_r50_fpn_soft-nms_1x_coco.py",
    "dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py",
    "dcnv2/mask-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py",
    "cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py",
    "retinanet/retinanet_r50_fpn_1x_coco.py",
    "solo/solo_r50_fpn_1x_coco.py",
    "mask2former/mask2former_r50_8xb2-lsj-50e_coco.py",
]


def model_of(toolbox, name):
    """The model of a toolbox's configuration, with weights as its constructors draw them."""
    module = pytest.importorskip(toolbox, reason=f"{toolbox} is not installed")
    importlib.import_module(f"{toolbox}.utils").register_all_modules(init_default_scope=False)
    config = Config.fromfile(Path(module.__file__).parent / ".mim" / "configs" / name).model
    config.backbone.init_cfg = None
    settings = (config.get("test_cfg") or {}).get("rcnn", config.get("test_cfg") or {})
    for threshold in ("score_thr", "filter_thr", "mask_thr"):
        if threshold in settings:
            settings[threshold] = 0.0  # random weights are sure of nothing
    if "num_queries" in (head := config.get("panoptic_head", {})):
        head.num_queries, config.train_cfg.num_points = 10, 128
        config.data_preprocessor.batch_augments = None  # to 1024 x 1024
    for part in ("rpn_proposal", "rpn"):
        for limits in (config.get("train_cfg", {}), config.get("test_cfg", {})):
            if "max_per_img" in limits.get(part, {}):
                limits[part].max_per_img = 100
    if toolbox == "mmseg":
        config.pretrained = None
        for part in (config.backbone, config.decode_head, config.auxiliary_head):
            part.norm_cfg.type = "BN"
        config.data_preprocessor.size = (64, 64)
    torch.manual_seed(0)
    registry = importlib.import_module(f"{toolbox}.registry")
    with DefaultScope.overwrite_default_scope(toolbox):
        model = registry.MODELS.build(config)
        model.init_weights()
    for name, parameter in model.named_parameters():
        if "conv_offset" in name:  # zero at first: an ordinary convolution
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def step_and_predict(model, toolbox, batch):
    """Losses and gradients of a training step, and what the model predicts."""
    model = copy.deepcopy(model)  # its running statistics change
    with DefaultScope.overwrite_default_scope(toolbox):
        data = model.data_preprocessor(copy.deepcopy(batch), True)
        torch.manual_seed(1)
        losses = model.train().loss(data["inputs"], data["data_samples"])
        total, values = model.parse_losses(losses)
        total.backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        with torch.no_grad():
            results = model.eval().predict(data["inputs"], data["data_samples"])
    found = []
    for result in results:
        if toolbox == "mmseg":
            found.append(result.seg_logits.data)
        else:
            instances = result.pred_instances
            assert len(instances) > 0
            found += [instances.scores, instances.labels, instances.bboxes]
            found += [instances.masks.float()] if "masks" in instances else []
    return [torch.stack([*values.values()]).detach(), torch.cat(grads), *found]


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors(compare, name):
    model = model_of("mmdet", name)
    batch = demo_mm_inputs(2, [(3, 64, 90), (3, 96, 64)], num_items=[3, 2], with_mask=True, num_classes=80)
    compare(lambda: step_and_predict(model, "mmdet", batch), 1e-6)


def test_segmentor(compare):
    model = model_of("mmseg", "upernet/upernet_r50_4xb2-40k_cityscapes-512x1024.py")
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(2):
        sample = SegDataSample(metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64), pad_shape=(64, 64)))
        sample.gt_sem_seg = PixelData(data=torch.randint(19, (1, 64, 64), generator=generator))
        samples.append(sample)
    images = [torch.randint(256, (3, 64, 64), dtype=torch.uint8, generator=generator) for _ in samples]
    compare(lambda: step_and_predict(model, "mmseg", dict(inputs=images, data_samples=samples)), 1e-6)
