#!/usr/bin/env python
"""Show every CARAFE++ of a configuration's model: where it is, its settings, its parameters and FLOPs.

One forward pass over an image of random pixels is counted, by mmengine's analyser: a multiply-add is one FLOP. Heads
run as in mmdet's own count (mode 'tensor'): no post-processing; the box head of a two-stage detector on as many random
boxes as its settings allow at most (1000), the mask head on the first 100 of them. No checkpoint is loaded.

    python tools/browse_model.py configs/mmdet/mask-rcnn_r50-carafe_carafe-fpn_carafe-mask-head_1x_coco.py
    python tools/browse_model.py mmdet::carafe/faster-rcnn_r50_fpn-carafe_1x_coco.py --drop-in --shape 800 1333
    python tools/browse_model.py configs/inpainting/partial-conv-carafe_places365-256x256.py

Exit code: 0, or 2 when something that was given does not fit.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from carafe_plugin.engine import bare_models
from carafe_plugin.engine.cli import add_config_options, command
from carafe_plugin.engine.console import table_console
from carafe_plugin.engine.errors import UsageError


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="configuration file, or mmdet::..., mmseg::..., mmpretrain::... for a toolbox's")
    parser.add_argument(
        "--shape",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="size of the image in pixels (default: the config's, or its toolbox's)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found")
    add_config_options(parser)


def show(report: dict[str, Any], console: Console) -> None:
    """Print the table, or that there is nothing to show in one."""
    model, carafe = report["model"], report["carafe"]
    whole = f"{model['type']} at {report['shape'][0]}x{report['shape'][1]}: {model['parameters']:,} parameters, "
    whole += f"{model['flops'] / 1e9:.4g} GFLOPs"
    uncounted = f" Not counted: {', '.join(report['uncounted'])}." if report["uncounted"] else ""
    if not report["sites"]:
        console.print(f"{whole}. CARAFE++: 0 modules, 0 parameters, 0 FLOPs.{uncounted}", highlight=False)
        return
    table = Table(title=whole, title_justify="left", caption_justify="left", show_footer=True)
    table.caption = f"One FLOP is one multiply-add, as mmengine counts.{uncounted}"
    footers = {
        "CARAFE++": f"{carafe['modules']} in all",
        "parameters": f"{carafe['parameters']:,}",
        "MFLOPs": f"{carafe['flops'] / 1e6:,.1f}",
        "share": f"{carafe['share']:.2%}",
    }
    for heading in ("CARAFE++", "scale", "C", "k", "k_enc", "G", "Cm", "normaliser", "parameters", "MFLOPs", "share"):
        justify: Any = "left" if heading in ("CARAFE++", "scale", "normaliser") else "right"
        table.add_column(heading, justify=justify, footer=footers.get(heading, ""), overflow="fold")
    for site in report["sites"]:
        table.add_row(
            site["name"],
            f"{site['direction']} {site['scale']}",
            *(str(site[key]) for key in ("channels", "kernel_size", "encoder_kernel", "group_size")),
            str(site["compressed_channels"] or "-"),
            site["normalizer"],
            f"{site['parameters']:,}",
            f"{site['flops'] / 1e6:,.1f}" if site["runs"] else "not run",
            f"{site['share']:.2%}" if site["runs"] else "",
        )
    console.print(table)


def browse_model(args: argparse.Namespace) -> None:
    if args.shape and min(args.shape) < 1:
        raise UsageError(f"--shape: expected two positive sizes, got {args.shape[0]} {args.shape[1]}")
    if args.json and not args.json.absolute().parent.is_dir():
        raise UsageError(f"--json: no folder {args.json.parent} to write {args.json.name} into")
    cfg = bare_models.read_config(args.config, args.cfg_options, args.drop_in)
    shape = tuple(args.shape) if args.shape else bare_models.image_shape(cfg)
    report = {"config": args.config, **bare_models.describe_model(cfg, bare_models.build_model(cfg), shape)}
    show(report, table_console())
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


main = command(browse_model, add_options, __doc__)

if __name__ == "__main__":
    sys.exit(main())
