#!/usr/bin/env python
"""Turn an mmpretrain checkpoint of a CARAFE++ ResNet into the backbone file that mmdet and mmseg start from.

The result is what init_cfg=dict(type="Pretrained", checkpoint=...) of a CARAFE++ backbone expects: the backbone's
parameters alone, under mmdet's and mmseg's names (deep stems differ), and the checkpoint's meta.

Example:
    $ python tools/convert_backbone.py work_dirs/resnet50/epoch_90.pth resnet50-carafe.pth --to mmdet --depth 50
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from carafe_plugin.engine.checkpoint import read_checkpoint
from carafe_plugin.engine.cli import command
from carafe_plugin.engine.conversion import check_destination, write_checkpoint
from carafe_plugin.engine.errors import UsageError
from carafe_plugin.images import shorten
from carafe_plugin.openmmlab.resnet_checkpoints import (
    ARCHITECTURES,
    backbone_type,
    count_carafe,
    extract_backbone,
    matching_depths,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="mmpretrain's checkpoint")
    parser.add_argument("destination", metavar="DST", help="the file to write; an existing one is replaced")
    parser.add_argument(
        "--to",
        choices=["mmdet", "mmseg"],
        required=True,
        help="the toolbox whose configuration is printed; both take the same file",
    )
    parser.add_argument("--depth", type=int, choices=list(ARCHITECTURES), help="fail unless the ResNet has this depth")
    parser.add_argument("--stock", action="store_true", help="accept a ResNet without CARAFE++")


def convert_backbone(args: argparse.Namespace) -> None:
    source, destination = Path(args.source).absolute(), Path(args.destination).absolute()
    check_destination(source, destination)
    checkpoint = read_checkpoint(str(source))
    try:
        backbone = extract_backbone(checkpoint.get("state_dict", checkpoint))
    except ValueError as error:
        raise UsageError(f"cannot convert {source}: {error}") from error
    depths = matching_depths(backbone)
    if not depths:
        raise UsageError(f"cannot convert {source}: its blocks are of no ResNet of depth {shorten(ARCHITECTURES)}")
    if args.depth is not None and args.depth not in depths:
        raise UsageError(f"{source} holds a ResNet of depth {shorten(depths)}, expected --depth {args.depth}")
    modules = count_carafe(backbone)
    if not modules and not args.stock:
        raise UsageError(f"{source} holds a ResNet without CARAFE++; pass --stock where that is meant")
    write_checkpoint(dict(meta=checkpoint.get("meta") or {}, state_dict=backbone), destination)
    stem = "deep" if "stem.0.weight" in backbone else "plain"
    print(f"{destination}: ResNet-{shorten(depths)}, {stem} stem, {modules} CARAFE++, {len(backbone)} tensors")
    if modules:
        kind = f'type="carafe_plugin.openmmlab.{args.to}.{backbone_type(backbone)}", depth={args.depth or depths[0]}'
        initial = f'init_cfg=dict(type="Pretrained", checkpoint="{args.destination}")'
        print(f"in a configuration of {args.to}: backbone=dict({kind}, {initial})")


main = command(convert_backbone, add_options, __doc__)

if __name__ == "__main__":
    sys.exit(main())
