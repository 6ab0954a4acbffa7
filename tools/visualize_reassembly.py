#!/usr/bin/env python
r"""Show which source locations a model's CARAFE++ reassembles: a picture, and a page to look around in (Fig. 1 and 9).

For points of an image, the weights with which source locations enter a location of the output, through one CARAFE++ or
through a chain of them: an FPN's levels (fpn), UperNet's (fpn, fuse), a backbone's main path (backbone). See
carafe_plugin.analysis for what composing a chain means. Configurations of mmdet, mmseg and mmpretrain.

    python tools/visualize_reassembly.py photo.jpg --config C --checkpoint K --points 120,80 300,210 --out seen
    python tools/visualize_reassembly.py photo.jpg --config C --checkpoint K --points 120,80 --out seen \
        --modules neck.upsample_modules.1 neck.upsample_modules.0 --html

Writes OUT/<image>.png and, with --html, OUT/<image>_<chain>.html, which holds all it needs: open it in a browser.
Exit code: 0, or 2 when something that was given does not fit.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from carafe_plugin.analysis import compose
from carafe_plugin.engine import bare_models, prediction, reassembly_view
from carafe_plugin.engine.cli import add_config_options, command
from carafe_plugin.engine.config import prediction_pipeline
from carafe_plugin.engine.errors import UsageError
from carafe_plugin.engine.memory import add_memory_option, keep_memory
from carafe_plugin.engine.reassembly_pictures import Shown, draw_reassembly, page_data, write_page
from carafe_plugin.engine.reassembly_view import CHAINS


def point(text: str) -> tuple[float, float]:
    """A point of the image from the command line."""
    x, separator, y = text.partition(",")
    try:
        if separator:
            return float(x), float(y)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected x,y in pixels of the image, such as 120,80; got {text.strip()}")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, metavar="IMAGE")
    parser.add_argument(
        "--config", required=True, help="configuration file, or mmdet::..., mmseg::..., mmpretrain::..."
    )
    parser.add_argument("--checkpoint", required=True, help="its checkpoint")
    parser.add_argument("--points", required=True, nargs="+", type=point, metavar="X,Y", help="in pixels of the image")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for what is drawn")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--chain", choices=list(CHAINS), help="draw this chain alone (default: all)")
    which.add_argument("--modules", nargs="+", default=[], metavar="NAME", help="draw one CARAFE++, or a chain of them")
    parser.add_argument("--group", type=int, help="group of channels, from 0 (default: their average)")
    parser.add_argument("--html", action="store_true", help="write a page for each chain as well")
    add_config_options(parser)
    add_memory_option(parser)


def visualize_reassembly(args: argparse.Namespace) -> None:
    if args.out.exists() and not args.out.is_dir():
        raise UsageError(f"--out is a folder; {args.out.absolute()} is a file")
    written = [args.out / f"{args.image.stem}.png"]
    prediction.check_not_overwritten([args.image], written, "--out")
    cfg = bare_models.read_config(args.config, args.cfg_options, args.drop_in)
    pipeline = prediction_pipeline(cfg)
    picture = prediction.read_picture(args.image, partial(prediction.load_picture, pipeline))
    for x, y in args.points:
        reassembly_view.check_point(x, y, picture.pixels.shape[:2])
    if not picture.alike:
        print(f"{args.image}: {prediction.UNLIKE}", file=sys.stderr)
    model = bare_models.build_model(cfg)
    reassembly_view.check_modules(model, args.modules)
    prediction.load_weights(model, args.checkpoint)
    keep_memory(args, "cpu")
    view = reassembly_view.view_image(cfg, model, pipeline, picture)
    chains = reassembly_view.find_chains(model, view, args.chain, args.modules)

    shown: dict[str, list[Shown]] = {}
    for title, chain in chains.items():
        places = [(pixel, *view.locate(pixel[0], pixel[1], chain)) for pixel in args.points]
        try:
            shown[title] = [Shown(pixel, row, col, compose(chain, row, col, args.group)) for pixel, row, col in places]
        except ValueError as error:
            raise UsageError(f"{'--modules' if args.modules else 'chain'} {title}: {error}") from error
    draw_reassembly(picture.pixels, view, chains, shown, written[0])
    for title, chain in chains.items() if args.html else ():
        first = shown[title][0]
        path = args.out / f"{args.image.stem}_{'modules' if args.modules else title}.html"
        start = (first.row, first.column)
        write_page(path, page_data(title, chain, view, picture.pixels, start, args.group))
        written.append(path)
    for path in written:
        print(f"{path} ({path.stat().st_size / 1e6:.2f} MB)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    # argparse takes -1,10 for an option, but nothing with a space in it; float() does not mind the space.
    given = sys.argv[1:] if argv is None else argv
    given = [f" {text}" if re.match(r"-[^-].*,", text) else text for text in given]
    return command(visualize_reassembly, add_options, __doc__)(given)


if __name__ == "__main__":
    sys.exit(main())
