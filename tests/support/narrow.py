"""The toolboxes' own models, made narrow enough for a test."""

from pathlib import Path

import mmdet
import mmseg
from mmengine.config import Config

CONFIGS = {module.__name__: Path(module.__file__).parent / ".mim" / "configs" for module in (mmdet, mmseg)}
# A ResNet-50 or UNet with an eighth of its channels, and heads and transformers to match.
NARROW = dict(
    base_channels=8,
    stem_channels=8,
    channels=16,
    embed_dims=32,
    feat_channels=32,
    out_channels=32,
    feedforward_channels=64,
    num_feats=16,
    num_layers=1,
    num_queries=10,
)
IN_CHANNELS = {(256, 512, 1024, 2048): [32, 64, 128, 256], (256,) * 4: [32] * 4, 1024: 128, 64: 8, 128: 16}
MMDET, MMSEG = "carafe_plugin.openmmlab.mmdet.", "carafe_plugin.openmmlab.mmseg."
# The toolbox's own file, what is changed in its model, and the CARAFE++ modules that must come of it.
PIXEL_DECODER = dict(type=MMDET + "CARAFEPixelDecoder", norm_cfg=dict(type="GN", num_groups=32), _delete_=True)
DETECTORS = {
    "Mask2Former": (
        "mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py",
        {"panoptic_head.pixel_decoder.type": MMDET + "CARAFEMSDeformAttnPixelDecoder"},
        1,
    ),
    "MaskFormer": (
        "maskformer/maskformer_r50_ms-16xb1-75e_coco.py",
        {"panoptic_head.pixel_decoder.type": MMDET + "CARAFETransformerEncoderPixelDecoder"},
        3,
    ),
    "MaskFormer without an encoder": (
        "maskformer/maskformer_r50_ms-16xb1-75e_coco.py",
        {"panoptic_head.type": MMDET + "CARAFEMaskFormerHead", "panoptic_head.pixel_decoder": PIXEL_DECODER},
        3,
    ),
}


def narrow(part):
    """Set the widths of everything in a model, down to its last dictionary."""
    for value in part.values() if isinstance(part, dict) else part:
        if isinstance(value, dict | list | tuple):
            narrow(value)
    if isinstance(part, dict):
        part.update({key: NARROW[key] for key in part.keys() & NARROW.keys()})
        channels = part.get("in_channels")
        channels = tuple(channels) if isinstance(channels, list) else channels
        if channels in IN_CHANNELS:
            part["in_channels"] = IN_CHANNELS[channels]
        if "depth" in part:
            # With residuals that start at zero, nothing inside a branch of the backbone has a gradient at first.
            part.update(base_channels=8, stem_channels=8, zero_init_residual=False, init_cfg=None)
        if part.get("type") == "SyncBN":
            part["type"] = "BN"


def narrow_model(toolbox, path, changes):
    """The model of one of the toolbox's own configurations, made narrow; ``changes``: a dotted path to its value."""
    config = Config.fromfile(CONFIGS[toolbox] / path)
    config.merge_from_dict({f"model.{key}": value for key, value in changes.items()})
    config.model.pop("pretrained", None)
    narrow(config.model)
    return config.model
