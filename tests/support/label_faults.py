"""The campaign of annotation_faults.py against mmseg's label maps: one of three is at fault, or of another format."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from annotation_faults import Loader, Meaningless, judge
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from PIL import Image

from carafe_plugin.engine.dataset_checks import check_dataset_files, check_not_empty

CLASSES, SIZE, FILES = ("ground", "red", "blue"), (20, 24), ("a", "b", "c")


def _encode(labels: np.ndarray, mode: str = "L", kind: str = "PNG", **options: object) -> bytes:
    image = Image.fromarray(labels)
    if mode == "P":
        image.putpalette([0, 0, 0, 250, 0, 0, 0, 0, 250])
    elif mode == "I;16":
        image = Image.fromarray(labels.astype(np.uint16))
    elif mode != "L":
        image = image.convert(mode)
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def _with_label(labels: np.ndarray, draw: random.Random) -> bytes:
    y, x = draw.randrange(SIZE[0]), draw.randrange(SIZE[1])
    labels = labels.copy()
    labels[y : y + draw.choice([1, 5]), x : x + draw.choice([1, 5])] = draw.choice([0, 1, 2, 3, 4, 128, 254, 255])
    return _encode(labels)


CHANGES: dict[str, Callable[[np.ndarray, random.Random], bytes]] = {
    "with another label": _with_label,
    "of another size": lambda labels, draw: _encode(labels[draw.randrange(3) :, draw.randrange(3) :]),
    "transposed": lambda labels, draw: _encode(labels.T.copy()),
    "in another mode": lambda labels, draw: _encode(labels, draw.choice(["P", "1", "LA", "RGB", "RGBA", "I;16"])),
    "as a JPEG": lambda labels, draw: _encode(labels, kind="JPEG"),
    "as a GIF": lambda labels, draw: _encode(labels, "P", kind="GIF"),
    "as a TIFF": lambda labels, draw: _encode(labels, draw.choice(["L", "I;16"]), kind="TIFF"),
    "cut off": lambda labels, draw: (content := _encode(labels))[: draw.randrange(len(content))],
    "with a byte changed": lambda labels, draw: _one_byte(_encode(labels), draw),
    "as a page": lambda labels, draw: b"<html>404</html>",
    "turned": lambda labels, draw: _encode(labels, exif=_orientation(draw.randrange(2, 9))),
}


def _one_byte(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content))
    return content[:place] + bytes([draw.randrange(256)]) + content[place + 1 :]


def _orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def meaning(path: Path) -> np.ndarray:
    """The labels that are stored in a file, by Pillow; raises Meaningless where there is not one per pixel."""
    try:
        with Image.open(path) as image:
            labels = np.asarray(image)
    except Exception as error:
        raise Meaningless(f"{type(error).__name__}: {error}") from error
    if labels.shape != SIZE or not set(np.unique(labels)) <= {0, 1, 2, 255}:
        raise Meaningless(f"labels of shape {labels.shape}: {np.unique(labels)[:9]}")
    return labels.astype(int)


def mean_iou(truth: list[np.ndarray], found: list[np.ndarray]) -> float:
    labels, predicted = np.stack(truth), np.stack(found)
    predicted = np.where(labels == 255, -1, predicted)
    ious = [
        ((labels == k) & (predicted == k)).sum() / max(((labels == k) | (predicted == k)).sum(), 1)
        for k in range(len(CLASSES))
    ]
    return 100 * float(np.mean(ious))


class LabelCampaign:
    """Runs cases in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for part in ("images", "labels"):
            (folder / part).mkdir(parents=True)
        for name in FILES:
            Image.new("RGB", SIZE[::-1], (9, 99, 199)).save(folder / "images" / f"{name}.png")

    def case(self, number: int) -> tuple[str, str, str]:
        """Run a case; returns what came of it ('right', 'refused' or 'WRONG'), the change and the details."""
        draw, rng = random.Random(number), np.random.default_rng(number)
        truth = rng.integers(0, 3, (3, *SIZE), dtype=np.uint8)
        found = [np.where(rng.random(SIZE) < 0.7, labels, rng.integers(0, 3, SIZE)) for labels in truth]
        for name, labels in zip(FILES, truth, strict=True):
            (self.folder / "labels" / f"{name}.png").write_bytes(_encode(labels))
        change, place = draw.choice(list(CHANGES)), draw.randrange(3)
        path = self.folder / "labels" / f"{FILES[place]}.png"
        path.write_bytes(CHANGES[change](truth[place], draw))
        outcome, details = judge(lambda: self._run(found), path)
        return outcome, change, details

    def _run(self, found: list[np.ndarray]) -> str:
        init_default_scope("mmseg")  # a case may follow one of another toolbox
        dataset = dict(
            type="BaseSegDataset", data_root=str(self.folder), img_suffix=".png", seg_map_suffix=".png",
            data_prefix=dict(img_path="images", seg_map_path="labels"), metainfo=dict(classes=CLASSES),
            pipeline=[dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs")],
        )  # fmt: skip
        metric = dict(type="IoUMetric", iou_metrics=["mIoU"])
        cfg = Config(dict(default_scope="mmseg", test_dataloader=dict(dataset=dataset), test_evaluator=metric))
        check_dataset_files(cfg, "test")
        from mmseg.registry import DATASETS, METRICS

        loader = Loader(lambda: DATASETS.build(dict(dataset)))
        check_not_empty(SimpleNamespace(cfg=cfg, test_dataloader=loader), "test")
        try:
            truth = [meaning(self.folder / "labels" / f"{name}.png") for name in FILES]
        except Meaningless as error:
            return f"accepted, although it holds {error}"
        measure = METRICS.build(metric)
        measure.dataset_meta = loader.dataset.metainfo
        for sample, labels in zip(loader.dataset, found, strict=True):
            sample = sample["data_samples"]
            sample.pred_sem_seg = PixelData(data=torch.from_numpy(labels)[None])
            measure.process({}, [sample.to_dict()])
        got, expected = measure.evaluate(len(FILES))["mIoU"], mean_iou(truth, found)
        return "" if abs(got - expected) < 0.02 else f"mIoU {got} for {expected:.3f}"
