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
from pathlib import Path

import numpy as np

from carafe_plugin.engine import prediction
from carafe_plugin.engine.cli import add_config_options, command
from carafe_plugin.engine.config import load_config
from carafe_plugin.engine.memory import add_memory_option, keep_memory
from carafe_plugin.engine.processes import choose_device
from carafe_plugin.images import WRITTEN_ENDINGS, read_upright


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, help="the picture")
    parser.add_argument("mask", type=Path, help="an image of the same size: white is filled")
    parser.add_argument("--config", required=True, help="configuration file of an inpainting model")
    parser.add_argument("--checkpoint", required=True, help="its checkpoint")
    endings = ", ".join(WRITTEN_ENDINGS)
    parser.add_argument("--out", type=Path, required=True, help=f"the filled picture ({endings})")
    parser.add_argument("--device", help="cpu, cuda:0, ... (default: the first GPU where there is one, else cpu)")
    add_config_options(parser, drop_in=False)
    add_memory_option(parser)


def inpaint(args: argparse.Namespace) -> None:
    prediction.check_out(args.out)
    prediction.check_not_overwritten([args.image, args.mask], [args.out], "--out")
    picture = prediction.read_picture(args.image, read_upright)
    holes = prediction.read_holes(args.mask, (picture.height, picture.width))
    cfg = load_config(args.config, args.cfg_options)
    device = choose_device(args.device)
    model = prediction.load_inpainting_model(cfg, args.checkpoint, device)
    keep_memory(args, device)
    filled = prediction.fill(model, np.array(picture), holes)
    prediction.write_picture(args.out, filled, picture.info.get("icc_profile"))
    print(f"{args.out}: {holes.sum():,} of {picture.width} x {picture.height} pixels filled")


main = command(inpaint, add_options, __doc__)

if __name__ == "__main__":
    sys.exit(main())
