"""Detection in images of the user's own: find them, load a detector, write what it finds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config

from carafe_plugin.engine.atomic import AtomicLocalBackend
from carafe_plugin.engine.checkpoint import check_checkpoint_exists, use_safe_loading
from carafe_plugin.engine.config import dataset_configs, import_adapters
from carafe_plugin.engine.errors import UsageError, reading_named_files
from carafe_plugin.images import IMAGE_ENDINGS


def find_images(path: Path) -> list[Path]:
    """The image that ``path`` is, or those directly in the folder, by name. Raises UsageError where there is none."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"no such image or folder: {path.absolute()}")
    images = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_ENDINGS and file.is_file())
    if not images:
        raise UsageError(f"no images ({', '.join(IMAGE_ENDINGS)}) in folder {path.absolute()}")
    return images


def load_detector(cfg: Config, checkpoint: str, device: str, drop_in: bool = False) -> Any:
    """Build mmdet's detector with the weights and classes of a checkpoint: a file, or a URL that mmengine loads. Raises
    UsageError where the configuration is of another toolbox, or the checkpoint cannot be read.
    """
    scope = cfg.get("default_scope", "mmdet")
    if scope not in (None, "mmdet"):
        raise UsageError(f"tools/infer.py serves detectors (mmdet); {cfg.filename} is of the scope {scope}")
    if "://" not in checkpoint:
        check_checkpoint_exists(checkpoint)
    import_adapters("mmdet", drop_in=drop_in)
    use_safe_loading()
    from mmdet.apis import init_detector

    with reading_named_files():
        return init_detector(cfg, checkpoint, device=device)


def prediction_pipeline(cfg: Config) -> Any:
    """The transforms of a detector's configuration from an image file to the network's input."""
    from mmcv.transforms import Compose
    from mmdet.utils import get_test_pipeline_cfg

    # Predicting needs no ground truth, and a folder of photos has none.
    return Compose([step for step in get_test_pipeline_cfg(cfg) if "LoadAnnotations" not in str(step.get("type"))])


def category_ids(cfg: Config, classes: Sequence[str]) -> list[int]:
    """The category id of every class: the test annotations' where they name all classes, else 1, 2, ..."""
    dataset = next(dataset_configs(cfg.test_dataloader.dataset))
    annotations = Path(dataset.get("data_root") or "", dataset.get("ann_file") or "")
    if annotations.suffix == ".json" and annotations.is_file():
        content = json.loads(annotations.read_text())
        categories = content.get("categories", []) if isinstance(content, dict) else []
        ids = {category["name"]: category["id"] for category in categories}
        if set(classes) <= set(ids):
            return [ids[name] for name in classes]
    return list(range(1, len(classes) + 1))


def to_coco(instances: Any, image_id: int, categories: Sequence[int]) -> list[dict]:
    """Mmdet's predictions for one image as COCO results. ``instances`` has bboxes (N, 4; x1, y1, x2, y2), scores,
    labels (N) and perhaps masks (N, H, W), ``categories`` the category id of every label.
    """
    from pycocotools import mask as coco_mask

    results = []
    for index, (x1, y1, x2, y2) in enumerate(instances.bboxes.tolist()):
        result: dict[str, Any] = dict(
            image_id=image_id,
            category_id=categories[int(instances.labels[index])],
            bbox=[round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)],
            score=round(float(instances.scores[index]), 5),
        )
        area = result["bbox"][2] * result["bbox"][3]
        if "masks" in instances:
            mask = np.asfortranarray(np.asarray(instances.masks[index]), dtype=np.uint8)
            rle = coco_mask.encode(mask)
            area = coco_mask.area(rle)
            result["segmentation"] = dict(size=list(rle["size"]), counts=rle["counts"].decode())
        results.append(result | dict(area=float(area), iscrowd=0))
    return results


def write_picture(path: Path, pixels: np.ndarray) -> None:
    """Write (H, W, 3) uint8 RGB pixels to ``path``, completely or not at all."""
    import cv2

    ending = path.suffix if path.suffix.lower() in IMAGE_ENDINGS else ".png"
    if ending.lower() == ".pgm":  # which holds no colours; readers go by the content
        ending = ".ppm"
    encodes, encoded = cv2.imencode(ending, np.ascontiguousarray(pixels[..., ::-1]))
    if not encodes:
        raise ValueError(f"OpenCV cannot encode a picture for {path}")
    AtomicLocalBackend().put(encoded.tobytes(), path)
