#!/usr/bin/env python
"""Fill the holes of one picture, of any size.

The mask is an image of the picture's size: what is white in it (128 of 255 or more) is filled, everything else stays as
it is, to the bit where the output's format keeps bits (.png, .bmp, .tiff). A picture that says how it was held (EXIF)
is turned first; colours are RGB, without transparency, with the picture's own colour profile. The network sees the
whole picture at once: at 12 megapixels the networks of Places365 need tens of gigabytes.

Example:
    $ python tools/inpaint.py PHOTO.jpg MASK.png --config CONFIG --checkpoint CHECKPOINT --out FILLED.png

Exit code: 0, or 2 when something that was given does not fit.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner.checkpoint import get_state_dict, load_state_dict
from PIL import Image
from torch import Tensor, nn

from carafe_plugin.engine import run as engine
from carafe_plugin.engine.checkpoint import AtomicLocalBackend, allow_checkpoint_types, read_checkpoint
from carafe_plugin.inpainting import InpaintingGAN
from carafe_plugin.inpainting.images import read_upright
from carafe_plugin.inpainting.networks import STRIDE

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Fill the holes of a picture.")
    parser.add_argument("image", type=Path, help="the picture")
    parser.add_argument("mask", type=Path, help="an image of the same size: white is filled")
    parser.add_argument("--config", required=True, help="configuration file of an inpainting model")
    parser.add_argument("--checkpoint", required=True, help="its checkpoint")
    parser.add_argument("--out", type=Path, required=True, help=f"the filled picture ({', '.join(ENDINGS)})")
    parser.add_argument("--device", help="cpu, cuda:0, ... (default: the first GPU where there is one, else cpu)")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=engine.ConfigOptions,
        metavar="KEY=VALUE",
        help="change settings of the config",
    )
    return parser.parse_args(argv)


def read_image(path: Path, mode: str) -> Image.Image:
    """Read a picture (mode 'RGB') or a mask ('L') upright.

    Raises:
        UsageError: there is no such file, or it is no image that can be read.
    """
    try:
        if not path.is_file():
            raise engine.UsageError(f"no such file: {path.absolute()}")
        return read_upright(path, mode)
    except (OSError, ValueError) as error:  # is_file() takes no name that is too long
        raise engine.UsageError(f"cannot read {path.absolute()}: {error}") from error


def read_holes(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Read a mask for a picture of ``size`` (height, width), as bool: True is filled.

    Raises:
        UsageError: its size is another one, or it leaves nothing to fill or nothing to fill it from.
    """
    holes = np.array(read_image(path, "L")) >= 128
    if holes.shape != size:
        shapes = [f"{width} x {height}" for height, width in (size, holes.shape)]
        raise engine.UsageError(f"the mask must have the size of the image, {shapes[0]}, got {shapes[1]}: {path}")
    if holes.all() or not holes.any():
        state = "white everywhere: nothing is known" if holes.all() else "nowhere white: there is nothing to fill"
        raise engine.UsageError(f"the mask is {state}: {path}")
    return holes


def load_model(args: argparse.Namespace) -> InpaintingGAN:
    """Build the model from the command line, with the checkpoint's weights, ready to predict."""
    cfg = engine.load_config(args.config, args.cfg_options)
    described = cfg.get("model")
    if not isinstance(described, dict) or str(described.get("type")).rpartition(".")[2] != "InpaintingGAN":
        raise engine.UsageError(f"{args.config} describes no inpainting model (model.type must be InpaintingGAN)")
    device = args.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise engine.UsageError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error
    allow_checkpoint_types()
    checkpoint = read_checkpoint(args.checkpoint)
    try:
        with DefaultScope.overwrite_default_scope("mmengine"):
            model = MODELS.build(cfg.model)
    except (KeyError, TypeError, ValueError) as error:
        raise engine.UsageError(f"cannot build the model of {args.config}: {error}") from error
    weights = checkpoint.get("state_dict", checkpoint)
    _check_weights(model, weights, args.checkpoint)
    load_state_dict(model, weights, strict=True)
    return model.to(device).eval()


def _check_weights(model: nn.Module, weights: dict, path: str) -> None:
    own = get_state_dict(model)
    unlike = [
        name
        for name in {**own, **weights}
        if getattr(own.get(name), "shape", 0) != getattr(weights.get(name), "shape", 1)
    ]
    if unlike:
        raise engine.UsageError(
            f"checkpoint {path} is of another model: {len(unlike)} parameters do not fit (the first: {unlike[0]})"
        )


def to_batch(maps: np.ndarray, device: torch.device) -> Tensor:
    """Bring a (H, W, C) map to a size that the network takes: its last row and column repeated, (1, C, H', W')."""
    batch = torch.from_numpy(maps).permute(2, 0, 1)[None].float().to(device)
    height, width = maps.shape[:2]
    return F.pad(batch, (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate")


@torch.no_grad()
def fill(model: InpaintingGAN, pixels: np.ndarray, holes: np.ndarray) -> np.ndarray:
    """Fill the holes of a picture.

    Args:
        model: the model.
        pixels: (H, W, 3) uint8 RGB.
        holes: (H, W) bool. Where the picture is made larger for the network, its holes are too.

    Returns:
        (H, W, 3) uint8 RGB, the same pixels wherever there is no hole.
    """
    device = next(model.parameters()).device
    batch = dict(inputs=to_batch(pixels, device), holes=to_batch(holes[..., None], device))
    completed = model(**model.data_preprocessor(batch), mode="tensor")
    height, width = holes.shape
    values = ((completed[0, :, :height, :width] + 1) * 127.5).round().clamp(0, 255)
    return np.where(holes[..., None], values.permute(1, 2, 0).byte().cpu().numpy(), pixels)


def check_out(out: Path) -> None:
    """Refuse what cannot be written, before the network runs instead of after.

    Raises:
        UsageError: another ending, a folder, or a place where nothing can be written.
    """
    if out.suffix.lower() not in ENDINGS:
        raise engine.UsageError(f"--out must end in one of {', '.join(ENDINGS)}, got {out}")
    try:
        if out.is_dir():
            raise IsADirectoryError("it is a folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise engine.UsageError(f"cannot write --out {out}: {error.strerror or error}") from error


def inpaint(args: argparse.Namespace) -> None:
    """Fill as the command line says."""
    check_out(args.out)
    picture = read_image(args.image, "RGB")
    pixels = np.array(picture)
    holes = read_holes(args.mask, (picture.height, picture.width))
    model = load_model(args)
    try:
        filled = Image.fromarray(fill(model, pixels, holes))
    except RuntimeError as error:
        if "alloc" not in str(error) and not isinstance(error, torch.OutOfMemoryError):
            raise
        size = f"{pixels.shape[1]} x {pixels.shape[0]}"
        raise engine.UsageError(f"out of memory: {size} pixels are too many for this network here") from error
    encoded = io.BytesIO()
    kind = Image.registered_extensions()[args.out.suffix.lower()]
    quality = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    try:
        filled.save(encoded, format=kind, icc_profile=picture.info.get("icc_profile"), **quality)
        AtomicLocalBackend().put(encoded.getvalue(), args.out)
    except (OSError, ValueError) as error:  # WebP takes no more than 16383 pixels a side
        raise engine.UsageError(f"cannot write --out {args.out}: {error}") from error
    print(f"{args.out}: {holes.sum():,} of {pixels.shape[1]} x {pixels.shape[0]} pixels filled")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return engine.run_tool(inpaint, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
