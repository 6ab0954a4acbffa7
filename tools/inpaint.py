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
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from carafe_plugin.engine import hole_filling
from carafe_plugin.engine.cli import add_config_options, run_tool
from carafe_plugin.engine.config import load_config
from carafe_plugin.engine.processes import choose_device
from carafe_plugin.images import IMAGE_ENDINGS


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Fill the holes of a picture.")
    parser.add_argument("image", type=Path, help="the picture")
    parser.add_argument("mask", type=Path, help="an image of the same size: white is filled")
    parser.add_argument("--config", required=True, help="configuration file of an inpainting model")
    parser.add_argument("--checkpoint", required=True, help="its checkpoint")
    endings = ", ".join(IMAGE_ENDINGS)
    parser.add_argument("--out", type=Path, required=True, help=f"the filled picture ({endings})")
    parser.add_argument("--device", help="cpu, cuda:0, ... (default: the first GPU where there is one, else cpu)")
    add_config_options(parser, drop_in=False)
    return parser.parse_args(argv)


def inpaint(args: argparse.Namespace) -> None:
    """Fill as the command line says."""
    hole_filling.check_out(args.out)
    picture = hole_filling.read_picture(args.image)
    holes = hole_filling.read_holes(args.mask, (picture.height, picture.width))
    cfg = load_config(args.config, args.cfg_options)
    model = hole_filling.load_model(cfg, args.checkpoint, choose_device(args.device))
    filled = hole_filling.fill(model, np.array(picture), holes)
    hole_filling.write_picture(args.out, filled, picture.info.get("icc_profile"))
    print(f"{args.out}: {holes.sum():,} of {picture.width} x {picture.height} pixels filled")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_tool(inpaint, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
