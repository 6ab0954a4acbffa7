"""Filling the holes of a picture of any size with an inpainting network."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner.checkpoint import get_state_dict, load_state_dict
from PIL import Image
from torch import Tensor

from carafe_plugin.engine.atomic import AtomicLocalBackend
from carafe_plugin.engine.checkpoint import read_checkpoint
from carafe_plugin.engine.errors import UsageError
from carafe_plugin.images import IMAGE_ENDINGS, read_upright
from carafe_plugin.inpainting import InpaintingGAN
from carafe_plugin.inpainting.networks import STRIDE


def read_picture(path: Path, mode: str = "RGB") -> Image.Image:
    """Read a picture, or a mask (mode 'L'), upright. Raises UsageError where it is missing or cannot be read."""
    try:
        if not path.is_file():
            raise UsageError(f"no such file: {path.absolute()}")
        return read_upright(path, mode)
    except (OSError, ValueError) as error:  # is_file() takes no name that is too long
        raise UsageError(f"cannot read {path.absolute()}: {error}") from error


def read_holes(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Read a mask for a picture of ``size`` (height, width), as bool: True is filled. Raises UsageError where its size
    is another one, or it leaves nothing to fill or nothing to fill it from.
    """
    holes = np.array(read_picture(path, "L")) >= 128
    if holes.shape != size:
        shapes = [f"{width} x {height}" for height, width in (size, holes.shape)]
        raise UsageError(f"the mask must have the size of the image, {shapes[0]}, got {shapes[1]}: {path}")
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
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise UsageError(f"cannot write --out {out}: {error.strerror or error}") from error


def load_model(cfg: Config, path: str, device: str) -> InpaintingGAN:
    """Build the network of a configuration with a checkpoint's weights, ready to predict. Raises UsageError where the
    configuration describes another kind of model, or the checkpoint is of another one.
    """
    described = cfg.get("model")
    if not isinstance(described, dict) or str(described.get("type")).rpartition(".")[2] != "InpaintingGAN":
        raise UsageError(f"{cfg.filename} describes no inpainting model (model.type must be InpaintingGAN)")
    checkpoint = read_checkpoint(path)
    try:
        with DefaultScope.overwrite_default_scope("mmengine"):
            model = MODELS.build(cfg.model)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"cannot build the model of {cfg.filename}: {error}") from error
    weights, own = checkpoint.get("state_dict", checkpoint), get_state_dict(model)
    unlike = [
        name
        for name in {**own, **weights}
        if getattr(own.get(name), "shape", 0) != getattr(weights.get(name), "shape", 1)
    ]
    if unlike:
        raise UsageError(
            f"checkpoint {path} is of another model: {len(unlike)} parameters do not fit (the first: {unlike[0]})"
        )
    load_state_dict(model, weights, strict=True)
    return model.to(device).eval()


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


def write_picture(out: Path, pixels: np.ndarray, profile: bytes | None) -> None:
    """Write (H, W, 3) uint8 RGB pixels, with a colour profile, completely or not at all. Raises UsageError where they
    cannot be written.
    """
    encoded = io.BytesIO()
    kind = Image.registered_extensions()[out.suffix.lower()]
    quality = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    try:
        Image.fromarray(pixels).save(encoded, format=kind, icc_profile=profile, **quality)
        AtomicLocalBackend().put(encoded.getvalue(), out)
    except (OSError, ValueError) as error:  # WebP takes no more than 16383 pixels a side
        raise UsageError(f"cannot write --out {out}: {error}") from error
