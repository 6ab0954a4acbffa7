"""The one-line change on the toolboxes' own segmentation models, made narrow: a training step and a prediction."""

import copy
import subprocess
import sys

import pytest
import torch

pytest.importorskip("mmseg", reason="MMSegmentation is not installed")
pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmdet.registry import MODELS as MMDET_MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from mmseg.registry import MODELS as MMSEG_MODELS
from mmseg.structures import SegDataSample
from narrow import DETECTORS, MMSEG, narrow_model

from carafe_plugin.modules import CARAFEDownsample, CARAFEUpsample

pytestmark = pytest.mark.usefixtures("one_thread")

# The toolbox's own file, what is changed in its model, and the CARAFE++ modules that must come of it.
SEGMENTORS = {
    "UperNet": ("_base_/models/upernet_r50.py", {"decode_head.type": MMSEG + "CARAFEUPerHead"}, 10),
    "UperNet, all": (
        "_base_/models/upernet_r50.py",
        {"decode_head.type": MMSEG + "CARAFEUPerHead", "backbone.type": MMSEG + "CARAFEResNetV1c"},
        17,
    ),
    "Semantic FPN": ("_base_/models/fpn_r50.py", {"decode_head.type": MMSEG + "CARAFEFPNHead"}, 6),
    "UNet": (
        "_base_/models/fcn_unet_s5-d16.py",
        {"backbone.upsample_cfg.type": MMSEG + "CARAFEInterpConv", "test_cfg.mode": "whole"},
        4,
    ),
    "Mask2Former": (
        "mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py",
        {"decode_head.pixel_decoder.type": MMSEG + "CARAFEMSDeformAttnPixelDecoder"},
        1,
    ),
    "MaskFormer": (
        "maskformer/maskformer_r50-d32_8xb2-160k_ade20k-512x512.py",
        {
            "decode_head.type": MMSEG + "CARAFEMaskFormerHead",
            "decode_head.pixel_decoder.type": MMSEG + "CARAFEPixelDecoder",
        },
        3,
    ),
}


def scenes(height, width, num_classes):
    """Two images and their label maps, as MMSegmentation's data loader gives them."""
    samples = []
    for _ in range(2):
        meta = dict(img_shape=(height, width), ori_shape=(height, width), pad_shape=(height, width))
        labels = torch.randint(num_classes, (1, height // 8 + 1, width // 8 + 1))
        labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :height, :width]
        labels[:, :3] = 255  # the label that is ignored
        samples.append(SegDataSample(metainfo=meta, gt_sem_seg=PixelData(data=labels)))
    return dict(inputs=list(torch.randint(256, (2, 3, height, width), dtype=torch.uint8)), data_samples=samples)


def train(model, batch, carafe_modules):
    """One step of SGD, which must move every parameter of CARAFE++."""
    model.init_weights()
    found = {k: m for k, m in model.named_modules() if isinstance(m, CARAFEUpsample | CARAFEDownsample)}
    assert len(found) == carafe_modules, list(found)
    for m in found.values():
        assert abs(m.content_encoder.weight.std().item() - 0.001) < 2e-4
    parameters = {f"{key}.{kind}": p for key, m in found.items() for kind, p in m.named_parameters()}
    before = {key: p.detach().clone() for key, p in parameters.items()}
    optim_wrapper = build_optim_wrapper(model, dict(optimizer=dict(type="SGD", lr=1.0)))
    data = model.train().data_preprocessor(batch, training=True)
    loss, _ = model.parse_losses(model(**data, mode="loss"))
    assert torch.isfinite(loss)
    loss.backward()
    for key, parameter in parameters.items():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.abs().max() > 0, key
    optim_wrapper.step()
    unmoved = [key for key, p in parameters.items() if torch.equal(p, before[key])]
    assert not unmoved


def predict(model, batch):
    with torch.no_grad():
        return model.eval().test_step(batch)


@pytest.mark.parametrize("name", SEGMENTORS)
def test_segmentor(name):
    torch.manual_seed(0)
    path, changes, carafe_modules = SEGMENTORS[name]
    cfg = narrow_model("mmseg", path, changes)
    cfg.data_preprocessor.size = (64, 96)
    num_classes = cfg.decode_head.num_classes
    with DefaultScope.overwrite_default_scope("mmseg"):
        model = MMSEG_MODELS.build(cfg)
        train(model, scenes(64, 96, num_classes), carafe_modules)
        # UNet asks for multiples of 16; the others take what comes.
        height, width = (64, 80) if name == "UNet" else (67, 101)
        predictions = predict(model, scenes(height, width, num_classes))
    for prediction in predictions:
        assert torch.isfinite(prediction.seg_logits.data).all()
        assert prediction.pred_sem_seg.data.shape == (1, height, width)


@pytest.mark.parametrize("name", DETECTORS)
def test_detector(name):
    torch.manual_seed(0)
    path, changes, carafe_modules = DETECTORS[name]
    cfg = narrow_model("mmdet", path, changes)
    cfg.data_preprocessor.batch_augments = None  # they pad every batch to 1024 x 1024
    inputs = dict(num_classes=80, with_mask=True, with_semantic=True)
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MMDET_MODELS.build(cfg)
        train(model, demo_mm_inputs(2, [(3, 64, 96), (3, 60, 80)], num_items=[3, 2], **inputs), carafe_modules)
        predictions = predict(model, demo_mm_inputs(1, [(3, 67, 101)], **inputs))
    assert predictions[0].pred_panoptic_seg.sem_seg.shape == (1, 67, 101)


@pytest.mark.parametrize("enforce", [False, True])
@pytest.mark.parametrize("toolbox", ["mmdet", "mmseg"])
def test_maskformer_head_projects_the_memory_as_its_parent_does(toolbox, enforce):
    """MaskFormerHead knows PixelDecoder by its exact type, and would leave a subclass's memory as it is."""
    path, changes, _ = DETECTORS["MaskFormer without an encoder"] if toolbox == "mmdet" else SEGMENTORS["MaskFormer"]
    model_cfg = narrow_model(toolbox, path, changes)
    cfg = model_cfg.panoptic_head if toolbox == "mmdet" else model_cfg.decode_head
    cfg.update(enforce_decoder_input_project=enforce, train_cfg=None)
    parent_cfg = copy.deepcopy(cfg)
    cfg.pixel_decoder.carafe_cfg = dict(type="nearest")
    parent_cfg.type, parent_cfg.pixel_decoder.type = "MaskFormerHead", "mmdet.PixelDecoder"
    # The transformer decoder's 32 channels need no projection, unless it is enforced.
    for channels, projected in ((256, True), (32, enforce)):
        heads = []
        for head_cfg in (cfg, parent_cfg):
            head_cfg.in_channels = [32, 64, 128, channels]
            with DefaultScope.overwrite_default_scope(toolbox):
                registry = MMDET_MODELS if toolbox == "mmdet" else MMSEG_MODELS
                heads.append(registry.build(copy.deepcopy(head_cfg)).eval())
        head, parent = heads
        assert ("decoder_input_proj.weight" in head.state_dict()) == projected
        parent.load_state_dict(head.state_dict(), strict=True)
        maps = [torch.randn(1, c, 32 >> i, 48 >> i) for i, c in enumerate(cfg.in_channels)]
        sample = SegDataSample(metainfo=dict(batch_input_shape=(128, 192), img_shape=(128, 192)))
        for out, expected in zip(head(maps, [sample]), parent(maps, [sample]), strict=True):
            assert torch.equal(out, expected)


def test_without_mmdetection_the_pixel_decoders_alone_are_missing():
    code = """
import sys
sys.modules["mmdet"] = None
from carafe_plugin.openmmlab import mmseg
print(sorted(name for name in mmseg.__all__ if "Decoder" in name or "Head" in name))
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "['CARAFEFPNHead', 'CARAFEUPerHead']"
