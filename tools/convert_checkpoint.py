#!/usr/bin/env python
"""Convert CARAFE modules in a checkpoint between MMCV's parameter names and those of plain-PyTorch implementations.

Layouts (``X`` is the module's name, of any length or empty; norms and biases may be absent):

    mmcv              X.channel_compressor  X.content_encoder          mmcv.ops.CARAFEPack and this package; with an
                                                                       activation also X.compressor_norm, here alone
    conv-bn           X.comp.conv X.comp.bn  X.enc.conv X.enc.bn       blocks of convolution, BatchNorm, activation
    conv-bn-split     X.comp.conv X.comp.bn  X.enc X.bn                the encoder a convolution with BatchNorm
    sequential        X.comp.0 X.comp.1      X.enc.0 X.enc.1           nn.Sequential of the same
    sequential-conv   X.comp.0 X.comp.1      X.enc                     the encoder a convolution
    comp-enc          X.comp                 X.enc                     convolutions alone
    down-encoder      X.down                 X.encoder  X.out          the 1x1 convolution X.out follows the reassembly:
                                                                       it keeps its name

Names do not say everything: --act is the activation after that compressor (silu in YOLOv5 and later, relu in most
others), --eps its BatchNorms' eps (1e-3 in the YOLO family), --order how the encoder's channels are read ("taps": pixel
shuffle first; "positions": pixel shuffle last), --scale the factor. DST's ``meta`` records them for each module, and
the next conversion of that module takes from there what its command line leaves out. The command line overrides a
record; what was used, where it came from and which record it contradicts are printed. --act must be known where a
layout's compressor can have an activation, and for a module of MMCV's names with ``compressor_norm``. A module without
one is taken to be MMCV's own class, which has no activation: ``CARAFEUpsample(channels, norm=None, act=...)`` has the
same names, and is not for this tool.

BatchNorms are folded into their convolutions, except a compressor's that an activation follows: it becomes
``compressor_norm``, for ``CARAFEUpsample(channels, norm=nn.BatchNorm2d, act=nn.SiLU)``.

Both sides are run on the same random input, and the largest difference of outputs and kernels is printed. What matches
no layout is refused with the list of the keys, and nothing that exists is overwritten without --force. DST holds the
weights, the checkpoint's ``meta`` and, converted like the weights, mmengine's ``ema_state_dict``. It does not hold the
optimizer, whose parameters are in another order, or anything else; what is left out is printed.

Example:
    $ python tools/convert_checkpoint.py yolo_weights.pt carafe.pth --to mmcv --act silu --eps 1e-3
    $ python tools/convert_checkpoint.py carafe.pth plain.pth --to comp-enc --rename neck.upsample_modules.0=up1
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from carafe_plugin.engine import conversion
from carafe_plugin.engine.checkpoint_layouts import ACTIVATIONS, LAYOUTS, ORDERS, Fork, LayoutError
from carafe_plugin.engine.cli import command
from carafe_plugin.engine.errors import UsageError


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="the checkpoint: weights, or weights under state_dict or model")
    parser.add_argument("destination", metavar="DST", help="the file to write")
    parser.add_argument(
        "--to", choices=list(LAYOUTS), required=True, help="mmcv from any other layout; others from mmcv"
    )
    recorded = "default: as recorded in SRC"
    parser.add_argument(
        "--act", choices=list(ACTIVATIONS), help=f"activation after the other layout's compressor ({recorded})"
    )
    parser.add_argument("--eps", type=float, help=f"eps of the other layout's norms ({recorded}, else 1e-5)")
    parser.add_argument("--order", choices=ORDERS, help=f"of the other layout's encoder ({recorded}, else taps)")
    parser.add_argument("--scale", type=int, help=f"upsampling factor ({recorded}, else 2)")
    parser.add_argument("--below", nargs="+", default=[""], metavar="NAME", help="only modules whose names start so")
    parser.add_argument("--rename", nargs="+", default=[], metavar="OLD=NEW", help="new names of modules")
    parser.add_argument("--force", action="store_true", help="overwrite DST")


def convert_checkpoint(args: argparse.Namespace) -> None:
    source, destination = Path(args.source).absolute(), Path(args.destination).absolute()
    conversion.check_destination(source, destination)
    if destination.exists() and not args.force:
        raise UsageError(f"DST exists: {destination}; --force overwrites it")
    wrong = [pair for pair in args.rename if not all(pair.partition("="))]
    if wrong:
        raise UsageError(f"--rename takes OLD=NEW, got {wrong[0]}")
    content = conversion.read_content(source)
    given = {name: getattr(args, name) for name in vars(Fork())}
    try:
        rename = dict(pair.split("=", 1) for pair in args.rename)
        result = conversion.convert(content, args.to, given, args.below, rename)
    except LayoutError as error:
        raise UsageError(f"cannot convert {source}: {error}") from error
    except ValueError as error:  # of an option
        raise UsageError(f"--{error}") from error
    conversion.write_checkpoint(result.checkpoint, destination)

    table = Table("module", "written as", "from", "to", "channels", "k", "largest difference", box=None)
    for module in result.weights.modules:
        channels = f"{module.channels} > {module.compressed_channels}"
        names = (module.source or "(root)", module.destination or "(root)", module.layout, args.to)
        table.add_row(*names, channels, str(module.kernel_size), f"{module.difference:.1e}")
    Console(highlight=False, soft_wrap=True).print(table)
    print(result.origins)
    print(f"{destination}: {len(result.weights.modules)} modules, {len(result.weights.state_dict)} tensors")
    if result.ema is not None:
        worst = max(module.difference for module in result.ema.modules)
        print(f"{conversion.EMA}: {len(result.ema.modules)} modules likewise, largest difference {worst:.1e}")
    if content.left_out:
        print(f"left out: {', '.join(content.left_out)}")


main = command(convert_checkpoint, add_options, __doc__)

if __name__ == "__main__":
    sys.exit(main())
