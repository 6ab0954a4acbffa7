"""Predicting for images of the user's own: detecting objects in them, and filling the holes of one."""

from __future__ import annotations

import io
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.runner.checkpoint import CheckpointLoader, get_state_dict
from PIL import Image
from torch import Tensor, nn

from carafe_plugin.engine.atomic import AtomicLocalBackend
from carafe_plugin.engine.bare_models import build_model
from carafe_plugin.engine.checkpoint import check_checkpoint_exists, find_mismatch, use_safe_loading
from carafe_plugin.engine.classes import checkpoint_meta, compare_classes, config_meta, head_fault
from carafe_plugin.engine.config import dataset_configs, import_adapters, toolbox, type_name
from carafe_plugin.engine.errors import UsageError, reading_named_files
from carafe_plugin.images import IMAGE_ENDINGS, read_upright
from carafe_plugin.inpainting import InpaintingGAN
from carafe_plugin.inpainting.networks import STRIDE

T = TypeVar("T")


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


def read_picture(path: Path, read: Callable[[Path], T]) -> T:
    """What ``read`` makes of an image file. Raises UsageError where the file is missing or cannot be read."""
    try:
        if not path.is_file():
            raise UsageError(f"no such image: {path.absolute()}")
        return read(path)
    except (OSError, ValueError) as error:  # is_file() takes no name that is too long
        raise UsageError(f"cannot read image {path.absolute()}: {error}") from error


def write_picture(path: Path, pixels: np.ndarray, profile: bytes | None = None) -> None:
    """Write (H, W, 3) uint8 RGB pixels, with a colour profile, completely or not at all; as PNG where the name's ending
    is not one of IMAGE_ENDINGS. Raises UsageError where they cannot be written.
    """
    kind = Image.registered_extensions()[path.suffix.lower()] if path.suffix.lower() in IMAGE_ENDINGS else "PNG"
    options: dict[str, dict[str, Any]] = {"JPEG": dict(quality=95), "WEBP": dict(lossless=True)}
    encoded = io.BytesIO()
    try:
        Image.fromarray(pixels).save(encoded, format=kind, icc_profile=profile, **options.get(kind, {}))
        AtomicLocalBackend().put(encoded.getvalue(), path)
    except (OSError, ValueError) as error:  # WebP takes no more than 16383 pixels a side
        raise UsageError(f"cannot write {path}: {error}") from error


def load_weights(model: nn.Module, path: str) -> dict[str, Any]:
    """Load a checkpoint, a file or a URL, that must have every parameter of the model, and return all that it holds.
    What the model has no place for is ignored. Raises UsageError where it is of another model, CheckpointError where it
    is missing or cannot be read.
    """
    use_safe_loading()
    checkpoint = CheckpointLoader.load_checkpoint(path, "cpu")
    if mismatch := find_mismatch(model, checkpoint.get("state_dict", checkpoint)):
        raise UsageError(f"checkpoint {path} is of another model: it {mismatch}")
    return checkpoint


def load_detector(cfg: Config, checkpoint: str, device: str, drop_in: bool = False) -> Any:
    """Build mmdet's detector with the weights of a checkpoint, a file or a URL, and its classes, or the configuration's
    where it records none; a warning names both where they differ. Raises UsageError where the configuration is of
    another toolbox, the checkpoint is of another model or cannot be read, or the classes are not the model's in number.
    """
    scope = toolbox(cfg)
    if scope not in (None, "mmdet"):
        raise UsageError(f"tools/infer.py serves detectors (mmdet); {cfg.filename} is of the scope {scope}")
    if "://" not in checkpoint:
        check_checkpoint_exists(checkpoint)
    import_adapters("mmdet", drop_in=drop_in)
    use_safe_loading()
    from mmdet.apis import init_detector

    with reading_named_files(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of COCO's classes, which it takes without a checkpoint
        detector = init_detector(cfg, None, device=device)
    # MMDetection warns where weights are missing, and detects with random ones.
    recorded, configured = checkpoint_meta(load_weights(detector, checkpoint)), config_meta(cfg, "test")
    detector.dataset_meta = {**(recorded or configured), "palette": detector.dataset_meta["palette"]}
    if not detector.dataset_meta.get("classes"):
        raise UsageError(f"neither checkpoint {checkpoint} nor test_dataloader of {cfg.filename} names the classes")
    source = f"checkpoint {checkpoint}" if recorded else f"configuration {cfg.filename}"
    if fault := head_fault(detector, source, detector.dataset_meta):
        raise UsageError(fault)
    if difference := compare_classes((source, recorded.get("classes")), (str(cfg.filename), configured.get("classes"))):
        print(f"warning: {difference[0]}; the checkpoint's are written", file=sys.stderr)
    return detector


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


def read_holes(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Read a mask for a picture of ``size`` (height, width), as bool: True is filled. Raises UsageError where its size
    is another one, or it leaves nothing to fill or nothing to fill it from.
    """
    holes = np.array(read_picture(path, partial(read_upright, mode="L"))) >= 128
    if holes.shape != size:
        expected, got = (f"{width} x {height}" for height, width in (size, holes.shape))
        raise UsageError(f"the mask must have the size of the image, {expected}, got {got}: {path}")
    if holes.all() or not holes.any():
        state = "white everywhere: nothing is known" if holes.all() else "nowhere white: there is nothing to fill"
        raise UsageError(f"the mask is {state}: {path}")
    return holes


def check_out(out: Path) -> None:
    """Raise a UsageError for a path that cannot be written, before the network runs instead of after."""
    if out.suffix.lower() not in IMAGE_ENDINGS:
        raise UsageError(f"--out must end in one of {', '.join(IMAGE_ENDINGS)}, got {out}")
    try:
        if out.is_dir():
            raise IsADirectoryError("it is a folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise UsageError(f"cannot write --out {out}: {error.strerror or error}") from error


def load_inpainting_model(cfg: Config, path: str, device: str) -> InpaintingGAN:
    """Build the network of a configuration with a checkpoint's weights, ready to predict. Raises UsageError where the
    configuration describes another kind of model, or the checkpoint is of another one.
    """
    described = cfg.get("model")
    if not isinstance(described, dict) or type_name(described) != "InpaintingGAN":
        raise UsageError(f"{cfg.filename} describes no inpainting model (model.type must be InpaintingGAN)")
    check_checkpoint_exists(path)
    model: Any = build_model(cfg)
    checkpoint = load_weights(model, path)
    weights = checkpoint.get("state_dict", checkpoint)
    if extra := sorted(set(weights) - set(get_state_dict(model))):
        surplus = f"{len(extra)} parameters have no place in it (the first: {extra[0]})"
        raise UsageError(f"checkpoint {path} is of another model: {surplus}")
    return model.to(device)


def _to_batch(maps: np.ndarray, device: torch.device) -> Tensor:
    """Bring a (H, W, C) map to a size that the network takes: its last row and column repeated, (1, C, H', W')."""
    batch = torch.from_numpy(maps).permute(2, 0, 1)[None].float().to(device)
    height, width = maps.shape[:2]
    return F.pad(batch, (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate")


@torch.no_grad()
def fill(model: InpaintingGAN, pixels: np.ndarray, holes: np.ndarray) -> np.ndarray:
    """Fill the holes (H, W; bool) of a picture (H, W, 3; uint8 RGB); all other pixels stay the same. Raises UsageError
    where memory does not suffice. Where the picture is made larger for the network, its holes are too.
    """
    height, width = holes.shape
    device = next(model.parameters()).device
    batch = dict(inputs=_to_batch(pixels, device), holes=_to_batch(holes[..., None], device))
    try:
        completed = model(**model.data_preprocessor(batch), mode="tensor")
    except RuntimeError as error:
        if "alloc" not in str(error) and not isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        raise UsageError(f"out of memory: {width} x {height} pixels are too many for this network here") from error
    values = ((completed[0, :, :height, :width] + 1) * 127.5).round().clamp(0, 255)
    return np.where(holes[..., None], values.permute(1, 2, 0).byte().cpu().numpy(), pixels)
