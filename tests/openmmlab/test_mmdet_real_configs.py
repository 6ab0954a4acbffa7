"""The one-line change on detectors as MMDetection ships them, at full size (800 x 1333)."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet", reason="MMDetection is not installed")

import mmdet
from mmdet.registry import MODELS as MMDET_MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope

from carafe_plugin.modules import CARAFEUpsample

CONFIGS = Path(mmdet.__file__).parent / ".mim" / "configs"
PREFIX = "carafe_plugin.openmmlab.mmdet."
# What changes, and the CARAFE++ modules that must come of it. A cascade has a mask head per stage.
DETECTORS = {
    "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py": (["neck"], 3),
    "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py": (["neck", "roi_head.mask_head"], 4),
    "cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py": (["neck", "roi_head.mask_head"], 6),
    "retinanet/retinanet_r50_fpn_1x_coco.py": (["neck"], 2),
    "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py": (["neck"], 2),
    "pafpn/faster-rcnn_r50_pafpn_1x_coco.py": (["neck"], 3),
    "solo/solo_r50_fpn_1x_coco.py": (["neck"], 3),
}


def one_line_change(config, place):
    part = config.model
    for key in place.split("."):
        part = part[key]
    part.type = f"{PREFIX}CARAFE{part.type}"


@pytest.mark.parametrize("name", DETECTORS)
def test_one_line_change(name):
    places, expected = DETECTORS[name]
    config = Config.fromfile(CONFIGS / name)
    config.model.backbone.init_cfg = None  # its weights would be downloaded
    for place in places:
        one_line_change(config, place)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmdet"):
        detector = MMDET_MODELS.build(config.model)
        optim_wrapper = build_optim_wrapper(detector, config.optim_wrapper)
        detector.init_weights()
        upsamplers = {key: m for key, m in detector.named_modules() if isinstance(m, CARAFEUpsample)}
        assert len(upsamplers) == expected
        for upsampler in upsamplers.values():
            assert abs(upsampler.content_encoder.weight.std().item() - 0.001) < 1e-4
        parameters = {f"{key}.{kind}": p for key, m in upsamplers.items() for kind, p in m.named_parameters()}
        before = {key: p.detach().clone() for key, p in parameters.items()}
        has_masks = "mask_head" in config.model or "mask_head" in config.model.get("roi_head", {})
        batch = demo_mm_inputs(1, [(3, 800, 1333)], num_items=[4], num_classes=80, with_mask=has_masks)

        data = detector.train().data_preprocessor(batch, training=True)
        loss, _ = detector.parse_losses(detector(**data, mode="loss"))
        assert torch.isfinite(loss)
        loss.backward()
        for key, parameter in parameters.items():
            assert parameter.grad is not None, key
            assert torch.isfinite(parameter.grad).all(), key
            assert parameter.grad.abs().max() > 0, key
        optim_wrapper.step()
        assert all(not torch.equal(p, before[key]) for key, p in parameters.items())

        detect_something(detector)
        with torch.no_grad():
            predictions = detector.eval().test_step(batch)[0].pred_instances
    assert torch.isfinite(predictions.scores).all()
    if "roi_head" in config.model:
        assert len(predictions) > 0
    if has_masks and len(predictions):
        assert predictions.masks.shape == (len(predictions), 800, 1333)


def detect_something(detector):
    """Let an untrained two-stage detector see a few instances of one class, so that its mask head has work to do."""
    if not hasattr(detector, "roi_head"):
        return
    detector.roi_head.test_cfg.max_per_img = 5
    for module in detector.modules():
        if hasattr(module, "fc_cls"):
            with torch.no_grad():
                module.fc_cls.bias[3] += 20
