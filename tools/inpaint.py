#!/usr/bin/env python
"""Fill the holes of one picture, of any size.

The mask is an image of the picture's size: what is white in it (128 of 255 or more) is filled, everything else stays as
it is, to the bit where the output's format keeps bits (.png, .bmp, .tiff). A picture that says how it was held (EXIF)
is turned first; colours are RGB, without transparency.

Example:
    $ python tools/inpaint.py PHOTO.jpg MASK.png --config CONFIG --checkpoint CHECKPOINT --out FILLED.png

Exit code: 0, or 2 when something that was given does not fit.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner.checkpoint import get_state_dict, load_state_dict
from PIL import Image, ImageOps
from torch import Tensor, nn

from carafe_plugin.models.inpainting import InpaintingGAN
from carafe_plugin.models.inpainting.generator import STRIDE
from carafe_plugin.openmmlab import engine
from carafe_plugin.openmmlab.checkpoint import AtomicLocalBackend, allow_checkpoint_types, read_checkpoint

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


def read_image(path: Path, mode: str) -> np.ndarray:
    """Read a picture (mode 'RGB') or a mask ('L') upright, as uint8.

    Raises:
        UsageError: there is no such file, or it is no image that can be read.
    """
    if not path.is_file():
        raise engine.UsageError(f"no such file: {path.absolute()}")
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode in ("I", "F") or upright.mode.startswith("I;"):  # Pillow would cut these off at 255
                raise ValueError(f"its pixels have more than 8 bits (mode {upright.mode})")
            return np.array(upright.convert(mode))
    except Exception as error:  # Pillow's decoders raise anything, down to struct.error
        raise engine.UsageError(f"cannot read {path.absolute()}: {error or type(error).__name__}") from error


def read_holes(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Read a mask for a picture of ``size`` (height, width), as bool: True is filled.

    Raises:
        UsageError: its size is another one, or it leaves nothing to fill or nothing to fill it from.
    """
    holes = read_image(path, "L") >= 128
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
    if (cfg.get("model") or {}).get("type") != "InpaintingGAN":
        raise engine.UsageError(f"{args.config} describes no inpainting model (model.type must be InpaintingGAN)")
    device = args.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
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


def inpaint(args: argparse.Namespace) -> None:
    """Fill as the command line says."""
    if args.out.suffix.lower() not in ENDINGS:
        raise engine.UsageError(f"--out must end in one of {', '.join(ENDINGS)}, got {args.out}")
    pixels = read_image(args.image, "RGB")
    holes = read_holes(args.mask, pixels.shape[:2])
    filled = Image.fromarray(fill(load_model(args), pixels, holes))
    encoded = io.BytesIO()
    filled.save(encoded, format=Image.registered_extensions()[args.out.suffix.lower()])
    AtomicLocalBackend().put(encoded.getvalue(), args.out)
    print(f"{args.out}: {holes.mean():.1%} of {pixels.shape[1]} x {pixels.shape[0]} pixels filled")


if __name__ == "__main__":
    sys.exit(engine.run_tool(inpaint, parse_args()))
