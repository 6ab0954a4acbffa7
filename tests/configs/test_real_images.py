"""How the pipelines of configs/real read image files of every kind, and which label maps are refused before a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmengine", reason="MMEngine is not installed")
pytest.importorskip("mmseg", reason="mmseg is not installed")
pytest.importorskip("mmdet", reason="mmdet is not installed")

import downloads
from config_table import CONFIGS
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope

from carafe_plugin.engine.config import import_adapters
from carafe_plugin.engine.dataset_checks import check_dataset_files
from carafe_plugin.engine.errors import UsageError

#: Pillow's modes of an image, and the endings of files that hold them without a loss.
KINDS = [("RGB", ".png"), ("L", ".png"), ("RGBA", ".png"), ("P", ".png"), ("I;16", ".png")]
KINDS += [("RGB", ".webp"), ("RGBA", ".webp")]
SHAPE = downloads.SIZE[::-1]
LABELS = np.random.default_rng(0).integers(0, 11, SHAPE, dtype=np.uint8)
LABELS[:2] = 255


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``config(name)`` is a configuration whose data lie in the test's folder."""
    monkeypatch.setenv("CARAFE_DATA_ROOT", str(tmp_path))

    def load(name: str) -> Config:
        cfg = Config.fromfile(CONFIGS / "real" / f"{name}.py")
        import_adapters(cfg.default_scope)
        return cfg

    return load


def first(cfg: Config, split: str) -> dict:
    """What a split's pipeline makes of its first image."""
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return DATASETS.build(cfg[f"{split}_dataloader"].dataset)[0]


def seen(record: dict) -> np.ndarray:
    """The pixels of a record's image as RGB; the toolboxes' are BGR until the model's preprocessor turns them."""
    return record["inputs"].numpy()[::-1].transpose(1, 2, 0)


def write_camvid(root: Path, ending: str = ".png", mode: str = "RGB") -> np.ndarray:
    """One image a split with ``LABELS``; returns its pixels."""
    for split in ("train", "val", "test"):
        pixels = downloads.picture(root / "camvid" / "images" / split / f"0{ending}", mode)
        place = root / "camvid" / "annotations" / split / "0.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(LABELS).save(place)
    return pixels


@pytest.mark.parametrize(("mode", "ending"), KINDS, ids=[f"{mode}{ending}" for mode, ending in KINDS])
def test_camvids_images(config, tmp_path: Path, mode: str, ending: str) -> None:
    expected = write_camvid(tmp_path, ending, mode)
    cfg = config("upernet_r18_camvid")
    check_dataset_files(cfg, "train", "val", "test")
    record = first(cfg, "test")
    assert np.array_equal(seen(record), expected)
    assert np.array_equal(record["data_samples"].gt_sem_seg.data[0].numpy(), LABELS)


def saved_as(mode: str, path: Path) -> None:
    """Write ``LABELS`` as a label map in a mode of Pillow's; of RGB, as grey."""
    image = Image.fromarray(LABELS.astype(np.uint16) if mode == "I;16" else LABELS)
    if mode == "P":
        image.putpalette(np.random.default_rng(1).integers(0, 256, 768, dtype=np.uint8).tobytes())
    (image.convert(mode) if mode in ("RGB", "RGBA", "LA") else image).save(path)
    assert Image.open(path).mode == mode


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_label_maps_are_indices(config, tmp_path: Path, mode: str) -> None:
    write_camvid(tmp_path)
    saved_as(mode, tmp_path / "camvid" / "annotations" / "test" / "0.png")
    cfg = config("upernet_r18_camvid")
    check_dataset_files(cfg, "test")
    assert np.array_equal(first(cfg, "test")["data_samples"].gt_sem_seg.data[0].numpy(), LABELS)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("RGB", "must hold one label per pixel (Pillow's mode 1 or L or P or I or I;16 or I;16B or F), got RGB"),
        ("RGBA", "got RGBA"),
        ("LA", "got LA"),
        ("16 bits", "holds labels from 0 to 300; mmseg keeps 8 bits"),
        ("void 11", "holds the labels 11, which are no class: the 11 classes"),
        ("webp", "1 of the 1 annotations are missing"),
        ("size", "is 24 x 64, its image"),
    ],
)
def test_other_label_maps_are_refused(config, tmp_path: Path, case: str, message: str) -> None:
    """In one line, before anything is built."""
    write_camvid(tmp_path)
    place = tmp_path / "camvid" / "annotations" / "train" / "0.png"
    if case in ("RGB", "RGBA", "LA"):
        saved_as(case, place)
    elif case == "16 bits":
        Image.fromarray(np.where(LABELS == 10, 300, LABELS.astype(np.uint16))).save(place)
    elif case == "void 11":
        Image.fromarray(np.where(LABELS == 255, 11, LABELS).astype(np.uint8)).save(place)
    elif case == "webp":
        Image.fromarray(LABELS).save(place.with_suffix(".webp"), lossless=True)
        place.unlink()
    else:
        Image.fromarray(LABELS[:24]).save(place)
    with pytest.raises(UsageError) as error:
        check_dataset_files(config("upernet_r18_camvid"), "train", "val", "test")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("mode", "ending"), KINDS, ids=[f"{mode}{ending}" for mode, ending in KINDS])
@pytest.mark.parametrize("name", ["mask-rcnn_r18_fpn_dsb2018", "faster-rcnn_r18_fpn_bccd"])
def test_detectors_images(config, tmp_path: Path, name: str, mode: str, ending: str) -> None:
    data = name.rpartition("_")[2]
    width, height = downloads.SIZE
    folders = dict(dsb2018=("train", "val"), bccd=("images",))[data]
    for folder in folders:
        expected = downloads.picture(tmp_path / data / folder / f"0{ending}", mode)
    square = [4, 6, 24, 6, 24, 26, 4, 26]
    image = dict(id=1, file_name=f"0{ending}", width=width, height=height)
    annotation = dict(id=1, image_id=1, category_id=1, iscrowd=0, area=400, bbox=[4, 6, 20, 20], segmentation=[square])
    names = ["nucleus"] if data == "dsb2018" else downloads.CELLS
    content = dict(images=[image], annotations=[annotation], categories=[])
    content["categories"] = [dict(id=number, name=each) for number, each in enumerate(names, 1)]
    (tmp_path / data / "annotations").mkdir()
    for split in ("train", "val", "test"):
        (tmp_path / data / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    cfg = config(name)
    check_dataset_files(cfg, "train", "val", "test")
    for split in ("val", "test"):
        cfg[f"{split}_dataloader"].dataset.pipeline[1] = dict(type="Resize", scale_factor=1.0, keep_ratio=True)
    assert np.array_equal(seen(first(cfg, "test")), expected)
