"""The part of a toolbox's model that other runtimes can run: raw pixels in, tensors out, and what that leaves to do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn

from carafe_plugin.engine.config import toolbox
from carafe_plugin.engine.errors import UsageError

FIT = "resize the image as the test pipeline does, and fill it up below and on the right with pad_value"
STRIDE = 32  #: by which the sizes of a model that takes several are divisible, unless its preprocessor asks for more


class Deployable(nn.Module):
    """Raw pixels to what a model computes of them, without a toolbox's samples.

    Attributes:
        pixels (Pixels): the preprocessing inside.
        left (list[str]): what is left to the caller, in words.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.pixels = Pixels(getattr(model, "data_preprocessor", None))
        self.model = model
        self.left: list[str] = []

    @property
    def unit(self) -> int:
        """By what the sides of the images are divisible where an exported model takes several sizes."""
        return math.lcm(STRIDE, self.pixels.divisor)

    def outputs(self, batch: Tensor) -> dict[str, Tensor]:
        """What the model computes of a normalised batch (N, 3, H, W), by name."""
        raise NotImplementedError

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Pixels (N, 3, H, W), float, RGB, 0 to 255, to the outputs."""
        return tuple(self.outputs(self.pixels(image)).values())


class Pixels(nn.Module):
    """The order of colours and the normalisation of a toolbox's ``data_preprocessor``, for pixels in RGB.

    The toolboxes read images with blue first; where their preprocessor turns that round, nothing is to be turned here.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, preprocessor: Any) -> None:
        super().__init__()
        # MMPretrain's own attribute, then that of the others, which are MMEngine's.
        self.reverse = not (
            getattr(preprocessor, "to_rgb", False) or getattr(preprocessor, "_channel_conversion", False)
        )
        mean, std = getattr(preprocessor, "mean", None), getattr(preprocessor, "std", None)
        self.register_buffer("mean", torch.zeros(1, 1, 1) if mean is None else mean.detach().clone().float())
        self.register_buffer("std", torch.ones(1, 1, 1) if std is None else std.detach().clone().float())
        test_cfg = getattr(preprocessor, "test_cfg", None) or {}  # MMSegmentation's pads by other rules in a test
        divisor = getattr(preprocessor, "pad_size_divisor", 1)
        if hasattr(preprocessor, "size_divisor"):
            divisor = test_cfg.get("size_divisor") or 1
        self.divisor, self.pad_value = int(divisor), getattr(preprocessor, "pad_value", 0)

    def forward(self, image: Tensor) -> Tensor:
        return ((image.flip(1) if self.reverse else image) - self.mean) / self.std

    def settings(self) -> dict[str, Any]:
        """What is done inside, and the value with which a caller fills up a smaller image; colours are R, G, B."""

        def by_colour(values: Any) -> list[float]:
            values = values.expand(3, 1, 1).flatten()
            return [round(value, 6) for value in (values.flip(0) if self.reverse else values).tolist()]

        return dict(
            channel_order="RGB",
            range=[0, 255],
            mean=by_colour(self.mean),
            std=by_colour(self.std),
            channel_order_of_the_model="BGR" if self.reverse else "RGB",
            pad_size_divisor=self.divisor,
            pad_value=by_colour(self.mean + self.pad_value * self.std),
        )


class Classifier(Deployable):
    """MMPretrain's: ``scores`` (N, classes), as its ``predict`` gives them."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        from mmpretrain.models.heads import ClsHead, MultiLabelClsHead

        head, make = getattr(model, "head", None), "_get_predictions"
        scored: list[tuple[type, Callable]] = [(ClsHead, lambda x: x.softmax(1)), (MultiLabelClsHead, torch.sigmoid)]
        for kind, scores in scored:
            if isinstance(head, kind) and all(
                getattr(type(head), name) is getattr(kind, name) for name in ("predict", make)
            ):
                self.scores = scores
                break
        else:
            raise UsageError(
                f"{type(model).__name__} with {type(head).__name__} as its head is no classifier whose scores are "
                "exported: those with MMPretrain's ClsHead or MultiLabelClsHead are, and heads made of them"
            )
        chosen = (
            "a threshold for each score" if scores is torch.sigmoid else "the class is the one of the highest score"
        )
        self.left = ["resize and crop the image as the test pipeline does", chosen]

    def outputs(self, batch: Tensor) -> dict[str, Tensor]:
        return dict(scores=self.scores(self.model.head(self.model.extract_feat(batch))))


class Segmentor(Deployable):
    """MMSegmentation's: ``logits`` (N, channels, H, W) at the size of the image, as its inference gives them."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        from mmseg.models.segmentors import EncoderDecoder

        if not isinstance(model, EncoderDecoder):
            raise UsageError(f"{type(model).__name__} is no segmentor that is exported: EncoderDecoder's kinds are")
        if (settings := model.test_cfg or {}).get("mode") == "slide":
            self.left.append(
                f"slide a window of {settings['crop_size']} (height, width) in steps of {settings['stride']}, as "
                "test_cfg says, and average the logits where windows overlap: the exported model takes one window"
            )
        self.left += [FIT, "cut off what was filled up, and resize the logits to the image's own size (bilinear)"]
        threshold = getattr(model.decode_head, "threshold", None)
        many = model.decode_head.out_channels > 1
        self.left.append("the class is the argmax over channels" if many else f"sigmoid, then above {threshold}")

    def outputs(self, batch: Tensor) -> dict[str, Tensor]:
        meta = dict(img_shape=batch.shape[2:], ori_shape=batch.shape[2:], pad_shape=batch.shape[2:])
        return dict(logits=self.model.encode_decode(batch, [meta]))


class SingleStageDetector(Deployable):
    """MMDetection's with a dense head: what its forward gives, by kind and level."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.kinds = _output_names(model.bbox_head)
        self.left = [
            FIT,
            *_decoding(model.bbox_head),
            f"scores: {_activation(model.bbox_head)}; then the threshold and non-maximum suppression of test_cfg",
        ]

    def outputs(self, batch: Tensor) -> dict[str, Tensor]:
        return _by_level(self.kinds, self.model.bbox_head(self.model.extract_feat(batch)))


class TwoStageDetector(Deployable):
    """MMDetection's with regions of interest: the maps of its pyramid, and its region proposal network's outputs."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.kinds = [f"rpn_{name}" for name in _output_names(model.rpn_head)] if model.with_rpn else []
        self.left = [FIT]
        if model.with_rpn:
            self.left += [
                *_decoding(model.rpn_head),
                f"objectness: {_activation(model.rpn_head)}; then the non-maximum suppression of test_cfg.rpn",
            ]
        else:
            self.left.append("proposals, which the model takes from elsewhere")
        heads = [getattr(model, name, None) for name in ("roi_head", "semantic_head", "panoptic_fusion_head")]
        names = [type(head).__name__ for head in heads if head is not None]
        self.left += [f"what works on the maps feature_*, and its decoding: {', '.join(names)}"] if names else []

    def outputs(self, batch: Tensor) -> dict[str, Tensor]:
        features = self.model.extract_feat(batch)
        proposals = _by_level(self.kinds, self.model.rpn_head(features)) if self.kinds else {}
        return {**proposals, **_by_level(["feature"], (features,))}


def _output_names(head: Any) -> list[str]:
    """What a dense head's forward gives, in the singular: what its loss calls it."""
    taken = list(signature(head.loss_by_feat).parameters) if hasattr(head, "loss_by_feat") else []
    names = taken[: taken.index("batch_gt_instances")] if "batch_gt_instances" in taken else []
    return [name[: -2 if name.endswith("sses") else -1] if name.endswith("s") else name for name in names]


def _by_level(kinds: Sequence[str], outputs: Any) -> dict[str, Tensor]:
    """Lists of maps, one for each kind, as one dictionary; whatever else a head gives is a UsageError."""
    outputs = tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)
    named = {}
    if not kinds or len(kinds) != len(outputs):
        raise UsageError(f"the head gives {len(outputs)} kinds of outputs, expected {len(kinds)}: {', '.join(kinds)}")
    for kind, levels in zip(kinds, outputs, strict=True):
        for level, value in enumerate(levels if isinstance(levels, (tuple, list)) else [levels]):
            if not isinstance(value, Tensor):
                raise UsageError(f"the head gives {type(value).__name__} as {kind}_{level}, and tensors are exported")
            named[f"{kind}_{level}"] = value
    return named


def _decoding(head: Any) -> list[str]:
    generator, coder = getattr(head, "prior_generator", None), getattr(head, "bbox_coder", None)
    left = [f"locations or anchors: {type(generator).__name__} of strides {generator.strides}"] if generator else []
    return [*left, f"boxes: the decoding of {type(coder or head).__name__}"]


def _activation(head: Any) -> str:
    sigmoid = getattr(head, "use_sigmoid_cls", None)
    return "the head's activation" if sigmoid is None else "sigmoid" if sigmoid else "softmax"


def deployable(cfg: Config, model: Any) -> Deployable:
    """The part of a model that is exported. Raises UsageError where it is of a kind that is not."""
    scope = toolbox(cfg)
    if scope == "mmpretrain":
        return Classifier(model).eval()
    if scope == "mmseg":
        return Segmentor(model).eval()
    if scope == "mmdet":
        from mmdet.models import detectors

        if isinstance(model, detectors.TwoStageDetector):
            return TwoStageDetector(model).eval()
        if isinstance(model, detectors.SingleStageDetector) and hasattr(model, "bbox_head"):
            return SingleStageDetector(model).eval()
    raise UsageError(
        f"{cfg.filename}: {type(model).__name__} is not exported: MMPretrain's classifiers, MMSegmentation's "
        "encoder-decoders and MMDetection's single-stage and two-stage detectors are"
    )
