#!/usr/bin/env python
"""Export a trained model for other runtimes, compare it with PyTorch's there, and describe it in a file beside it.

What is exported takes the raw pixels of an image, float32, (N, 3, H, W), RGB, 0 to 255: the configuration's
normalisation is inside. It gives
  MMPretrain, a classifier         scores (N, classes)
  MMSegmentation, a segmentor      logits (N, classes, H, W)
  MMDetection, one stage           what its head gives: cls_score_0, bbox_pred_0, ..., the finest level first
  MMDetection, two stages          its RPN's rpn_cls_score_0, rpn_bbox_pred_0, ..., and the pyramid's feature_0, ...
and what is left to the caller is printed. docs/export.md has more.

Example:
    $ python tools/export.py CONFIG CHECKPOINT --to onnx --size 800 1344 --images photo.jpg
    $ python tools/export.py CONFIG CHECKPOINT --to openvino --size 256 256 --dynamic --out segmentor.xml

OUT.json, beside the exported model, names its configuration, checkpoint, classes, inputs, outputs and preprocessing.

The exit code is 0; 1 where the exported model differs from PyTorch's, or does not run; 2 where nothing could be done.
In either case nothing is left at OUT.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from carafe_plugin.engine import export_comparison, exporting
from carafe_plugin.engine.bare_models import build_model, check_no_mmcv_layers, read_config
from carafe_plugin.engine.checkpoint import check_checkpoint_exists
from carafe_plugin.engine.classes import checkpoint_meta, config_meta, head_fault
from carafe_plugin.engine.cli import add_config_options, command
from carafe_plugin.engine.console import duration
from carafe_plugin.engine.deployable import deployable
from carafe_plugin.engine.errors import UsageError
from carafe_plugin.engine.prediction import load_weights

SETTINGS = ("head", "decode_head", "rpn_head", "bbox_head", "roi_head", "test_cfg")  # what decoding is read from


def length(text: str) -> int:
    """A side of an image from the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return value


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="configuration file of mmdet, mmseg or mmpretrain")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="its checkpoint (or a URL that mmengine loads)")
    parser.add_argument("--to", choices=list(exporting.FORMATS), required=True, help="the format")
    parser.add_argument(
        "--size",
        type=length,
        nargs=2,
        required=True,
        metavar=("H", "W"),
        help="of the images; with --dynamic, at least",
    )
    parser.add_argument(
        "--dynamic", action="store_true", help="let it take any number of images, and larger ones; slower than one size"
    )
    parser.add_argument("--out", help="the file (default: the configuration's name, with .onnx, .xml or .pt2, here)")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    parser.add_argument(
        "--images", nargs="+", default=[], metavar="FILE", help="also compare on these; random pixels are in any case"
    )
    parser.add_argument(
        "--standalone",
        action="store_true",
        help="aoti, torch-export: in standard operators, which run without carafe_plugin, slower",
    )
    add_config_options(parser)


def export(args: argparse.Namespace) -> int:
    """Export as the command line says; 1 where the result is not PyTorch's."""
    size = (args.size[0], args.size[1])
    exporting.check_format(args.to, args.standalone)
    out = Path(args.out or Path(args.config.rpartition("::")[2]).stem + exporting.FORMATS[args.to].ending).absolute()
    exporting.check_destination(args.to, out, args.force)
    cfg = read_config(args.config, args.cfg_options, args.drop_in)
    if "://" not in args.checkpoint:
        check_checkpoint_exists(args.checkpoint)
    model = build_model(cfg)
    check_no_mmcv_layers(cfg, model, "exported")
    part = deployable(cfg, model)
    exporting.check_size(part, size, args.dynamic)
    recorded, configured = checkpoint_meta(load_weights(model, args.checkpoint)), config_meta(cfg, "test")
    source = f"checkpoint {args.checkpoint}" if recorded else f"configuration {args.config}"
    if fault := head_fault(model, source, recorded or configured):
        raise UsageError(fault)
    model.requires_grad_(False)
    facts = dict(
        config=args.config,
        checkpoint=exporting.checkpoint_facts(args.checkpoint),
        model=type(model).__name__,
        classes=list((recorded or configured).get("classes") or ()),
        settings={name: cfg.model[name] for name in SETTINGS if name in cfg.model},
    )
    images = export_comparison.read_images(cfg, part, [Path(path) for path in args.images], size)
    start = time.monotonic()
    try:
        written = exporting.write(part, args.to, out, size, images, args.dynamic, args.standalone, facts)
    except export_comparison.TooDifferentError as error:
        print(f"error: {error}; nothing is written", file=sys.stderr)
        return 1
    print(f"{out}: {args.to}, written and compared in {duration(time.monotonic() - start)}")
    print("largest differences from PyTorch's, and of the output's largest value (or of 1):")
    for output in written["outputs"]:
        found = (f"{kind} {one['absolute']:.1e}, {one['relative']:.1e}" for kind, one in output["differences"].items())
        print(f"  {output['name']} {' x '.join(map(str, output['shape']))}: {'; '.join(found)}")
    print("left to the caller:")
    for line in written["left to the caller"]:
        print(f"  {line}")
    print(f"{exporting.description_path(out)}: its preprocessing, classes, inputs and outputs")
    return 0


main = command(export, add_options, __doc__)

if __name__ == "__main__":
    sys.exit(main())
