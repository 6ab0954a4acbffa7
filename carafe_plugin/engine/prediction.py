"""Predicting for images of the user's own: detecting objects in them, and filling the holes of one."""

from __future__ import annotations

import io
import itertools
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.runner.checkpoint import CheckpointLoader, get_state_dict
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from carafe_plugin.engine.atomic import AtomicLocalBackend
from carafe_plugin.engine.bare_models import build_model
from carafe_plugin.engine.checkpoint import check_checkpoint_exists, find_mismatch, use_safe_loading
from carafe_plugin.engine.classes import checkpoint_meta, compare_classes, config_meta, head_fault
from carafe_plugin.engine.config import dataset_configs, import_adapters, toolbox, type_name
from carafe_plugin.engine.errors import UsageError, read_json, reading_named_files
from carafe_plugin.images import (
    IMAGE_ENDINGS,
    WRITTEN_ENDINGS,
    count_pages,
    decode,
    read_upright,
    shorten,
    to_eight_bits,
    upright,
)
from carafe_plugin.inpainting import InpaintingGAN
from carafe_plugin.inpainting.networks import STRIDE

T = TypeVar("T")
RESULTS, PICTURES = "results.json", "pictures"  #: what tools/infer.py writes into its folder
UNLIKE = "read as in tools/test.py, otherwise by Pillow"
ALIKE = 8  #: grey levels by which two readers of one file may differ on average: more is another picture


def find_images(path: Path, out_dir: Path) -> tuple[list[Path], list[str]]:
    """The image that ``path`` is, or those directly in the folder, by name; and what else the folder has, apart from
    hidden files and the results that a run wrote into ``out_dir``. Raises UsageError where there is no image.
    """
    written = {(out_dir / name).absolute() for name in ("", RESULTS, PICTURES)}
    images, others = [], []
    try:
        if path.is_file():
            return [path], []
        if not path.is_dir():
            raise UsageError(f"no such image or folder: {path.absolute()}")
        for file in sorted(path.iterdir()):
            if file.name.startswith(".") or file.absolute() in written:
                continue
            # A link that leads nowhere is an image that cannot be read; a pipe would never end.
            if file.suffix.lower() in IMAGE_ENDINGS and (file.is_file() or not file.exists()):
                images.append(file)
            else:
                others.append(file.name + "/" * file.is_dir())
    except OSError as error:
        raise UsageError(f"cannot read {path.absolute()}: {error.strerror or error}") from error
    if not images:
        raise UsageError(f"no images directly in folder {path.absolute()}, by their names; it has {shorten(others)}")
    return images, others


def picture_names(images: Sequence[Path]) -> list[str]:
    """What the drawn picture of each image is called: as the image, or as PNG where its format is none that pictures
    are written in; never two the same.

    Example:
        >>> picture_names([Path("a.jpg"), Path("b.pgm"), Path("c.pgm"), Path("c.png")])
        ['a.jpg', 'b.png', 'c.pgm.png', 'c.png']
    """
    taken = {path.name for path in images if path.suffix.lower() in WRITTEN_ENDINGS}
    names = []
    for path in images:
        name = path.name
        if path.suffix.lower() not in WRITTEN_ENDINGS:
            numbered = (f"{path.name}.{number}.png" for number in itertools.count(2))
            candidates = itertools.chain([f"{path.stem}.png", f"{path.name}.png"], numbered)
            name = next(candidate for candidate in candidates if candidate not in taken)
            taken.add(name)
        names.append(name)
    return names


def check_not_overwritten(images: Sequence[Path], outputs: Sequence[Path], option: str) -> None:
    """Raise a UsageError where a command would write one of ``outputs`` over one of the ``images`` that it reads."""
    read = {path.parent.resolve() / path.name for path in images}
    if over := [path for path in outputs if path.parent.resolve() / path.name in read]:
        raise UsageError(f"{option} would write over the image {over[0]}: choose another place")


def read_picture(path: Path, read: Callable[[Path], T]) -> T:
    """What ``read`` makes of an image file; says so where it has several pages, as the first alone is read. Raises
    UsageError where the file is missing or cannot be read.
    """
    try:
        if not path.is_file():
            raise UsageError(f"no such image: {path.absolute()}")
        made = read(path)
    except (OSError, ValueError) as error:  # is_file() takes no name that is too long
        raise UsageError(f"cannot read image {path.absolute()}: {error}") from error
    if (pages := count_pages(path)) > 1:
        print(f"{path}: the first of {pages} pages", file=sys.stderr)
    return made


@dataclass(frozen=True)
class Picture:
    """An image file as a model gets it in a test."""

    loaded: dict[str, Any]  # what the first step of the test pipeline, which reads the file, made of it
    pixels: np.ndarray  # the same to be drawn on: (H, W, 3) uint8 RGB
    alike: bool  # whether Pillow reads about the same, where it can say so


def load_picture(pipeline: Compose, path: Path) -> Picture:
    """Read an image file with the first step of a test pipeline, so that the model gets what it gets in a test; where
    that step does not know the format, with Pillow, of 16 bits the upper 8. Raises ValueError where it is missing,
    damaged or not an image.
    """
    stored = expected = None
    unknown = "Pillow does not know its format"
    try:
        stored = to_eight_bits(decode(path))  # OpenCV fills the missing part of a truncated file with grey
    except ValueError as error:
        if not isinstance(error.__cause__, UnidentifiedImageError):
            raise
        if path.stat().st_size == 0:
            raise ValueError("the file is empty") from error
    try:
        expected = np.asarray(upright(stored)) if stored else None
    except ValueError as error:
        unknown = str(error)
    try:
        loaded = _load(pipeline, path)
    except Exception as error:  # whatever the readers raise
        if expected is None:
            raise ValueError(f"{unknown}, and the test pipeline cannot read it: {error}") from error
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "picture.png")
            Image.fromarray(expected).save(file, compress_level=1)
            loaded = _load(pipeline, file) | dict(img_path=str(path))
    pixels = _to_rgb(loaded["img"])
    alike = expected is None or (
        pixels.shape == expected.shape and cv2.norm(pixels, expected, cv2.NORM_L1) <= ALIKE * pixels.size
    )
    return Picture(loaded, pixels, alike)


def _load(pipeline: Compose, path: Path) -> dict[str, Any]:
    step = pipeline.transforms[0]
    loaded = step(dict(img_path=str(path), img_id=0, seg_fields=[], reduce_zero_label=False))
    if not loaded or loaded.get("img") is None:
        raise ValueError(f"its first step, {type(step).__name__}, gives no image")
    return loaded


def _to_rgb(image: np.ndarray) -> np.ndarray:
    """An array of MMCV's (H, W) or (H, W, C), blue first, of 8 or 16 bits or as floats, to be drawn on."""
    image = image.reshape(*image.shape[:2], -1)
    image = image >> 8 if image.dtype == np.uint16 else image.clip(0, 255)
    colours = image[..., 2::-1] if image.shape[2] > 2 else image[..., [0, 0, 0]]
    return np.ascontiguousarray(colours, dtype=np.uint8)


def prepare(pipeline: Compose, picture: Picture) -> dict[str, Any]:
    """What the other steps of a test pipeline make of a picture: a batch of one, for ``model.test_step``."""
    packed = Compose(pipeline.transforms[1:])(dict(picture.loaded))
    return dict(inputs=[packed["inputs"]], data_samples=[packed["data_samples"]])


@torch.no_grad()
def detect(model: Any, pipeline: Compose, picture: Picture) -> Any:
    """A detector's predictions for a picture, on the CPU. Raises UsageError where it is too large for the memory."""
    with naming_lack_of_memory(*picture.pixels.shape[:2]):
        return model.test_step(prepare(pipeline, picture))[0].cpu()


@contextmanager
def naming_lack_of_memory(height: int, width: int) -> Iterator[None]:
    """Turn an error of a network for which a picture is too large into a UsageError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if "alloc" not in str(error) and not isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
            raise
        raise UsageError(f"out of memory: {width} x {height} pixels are too many for this network here") from error


def write_picture(path: Path, pixels: np.ndarray, profile: bytes | None = None) -> None:
    """Write (H, W, 3) uint8 RGB pixels, with a colour profile, completely or not at all; as PNG where the name's ending
    is not one of WRITTEN_ENDINGS. Raises UsageError where they cannot be written.
    """
    ending = path.suffix.lower()
    kind = Image.EXTENSION[ending] if ending in WRITTEN_ENDINGS else "PNG"
    options: dict[str, dict[str, Any]] = {"JPEG": dict(quality=95), "WEBP": dict(lossless=True)}
    encoded = io.BytesIO()
    try:
        Image.fromarray(pixels).save(encoded, format=kind, icc_profile=profile, **options.get(kind, {}))
        AtomicLocalBackend().put(encoded.getvalue(), path)
    except (OSError, ValueError) as error:  # WebP takes no more than 16383 pixels a side
        raise UsageError(f"cannot write {path}: {error}") from error


class Results:
    """A file of COCO's format that grows picture by picture and is whole at every moment.

    All of it is written anew, at once where that takes less than a tenth of the time since it was last written: a kill
    loses the entries of no more than that time. Raises UsageError where it cannot be written, :meth:`write` too.
    """

    def __init__(self, path: Path, categories: Sequence[dict[str, Any]]) -> None:
        self.path = path
        self.content: dict[str, list] = dict(images=[], categories=list(categories), annotations=[])
        self.write()

    def add(self, image: dict[str, Any], annotations: Sequence[dict[str, Any]]) -> None:
        """Add an image and what was found in it; annotations get their ids."""
        self.content["images"].append(image)
        for number, annotation in enumerate(annotations, len(self.content["annotations"]) + 1):
            self.content["annotations"].append(annotation | dict(id=number))
        if time.monotonic() - self._written >= 10 * self._cost:
            self.write()

    def write(self) -> None:
        """Write all that there is."""
        start = time.monotonic()
        try:
            AtomicLocalBackend().put_text(json.dumps(self.content), self.path)
        except OSError as error:
            raise UsageError(f"cannot write {self.path}: {error.strerror or error}") from error
        self._written = time.monotonic()
        self._cost = self._written - start


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

    # Of COCO's classes, which it takes without a checkpoint, it warns whatever filters say: recorded, not shown.
    with reading_named_files(), warnings.catch_warnings(record=True):
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
        content = read_json(annotations)
        categories = content.get("categories", []) if isinstance(content, dict) else []
        try:
            ids = {category["name"]: category["id"] for category in categories}
        except (KeyError, TypeError) as error:
            raise UsageError(f"{annotations}: categories must be a list of dictionaries with id and name") from error
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
    if out.suffix.lower() not in WRITTEN_ENDINGS:
        raise UsageError(f"--out must end in one of {', '.join(WRITTEN_ENDINGS)}, got {out}")
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
    with naming_lack_of_memory(height, width):
        completed = model(**model.data_preprocessor(batch), mode="tensor")
    values = ((completed[0, :, :height, :width] + 1) * 127.5).round().clamp(0, 255)
    return np.where(holes[..., None], values.permute(1, 2, 0).byte().cpu().numpy(), pixels)
