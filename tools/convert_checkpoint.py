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

Names do not say everything: --act is the activation behind that compressor (silu in YOLOv5 and later, relu in most
others), --eps its BatchNorms' eps (1e-3 in the YOLO family), --order how the encoder's channels are read ("taps": pixel
shuffle first; "positions": pixel shuffle last), --scale the factor. BatchNorms are folded into their convolutions,
except a compressor's that an activation follows: it becomes ``compressor_norm``, for
``CARAFEUpsample(channels, norm=nn.BatchNorm2d, act=nn.SiLU)``.

Both sides are run on the same random input, and the largest difference of outputs and kernels is printed. What matches
no layout is refused with the list of the keys, and nothing that exists is overwritten without --force. DST holds the
weights and the checkpoint's ``meta``, not the optimizer, whose order of parameters is another one.

Example:
    $ python tools/convert_checkpoint.py yolo_weights.pt carafe.pth --to mmcv --act silu --eps 1e-3
    $ python tools/convert_checkpoint.py carafe.pth plain.pth --to comp-enc --rename neck.upsample_modules.0=up1
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from carafe_plugin.openmmlab import engine
from carafe_plugin.openmmlab.checkpoint import AtomicLocalBackend, allow_checkpoint_types, read_checkpoint
from carafe_plugin.openmmlab.layouts import (
    ACTIVATIONS,
    LAYOUTS,
    ORDERS,
    Conversion,
    Fork,
    LayoutError,
    convert_layout,
    find_modules,
)

RECORD = "carafe_layout"  # where the file's meta says how it was converted


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0], epilog="The layouts are described at the top of this file."
    )
    parser.add_argument("source", metavar="SRC", help="the checkpoint: weights, or weights under state_dict or model")
    parser.add_argument("destination", metavar="DST", help="the file to write")
    parser.add_argument(
        "--to", choices=list(LAYOUTS), required=True, help="mmcv from any other layout; others from mmcv"
    )
    parser.add_argument("--act", choices=list(ACTIVATIONS), help="activation behind the other layout's compressor")
    parser.add_argument("--eps", type=float, default=1e-5, help="eps of the other layout's norms (default: 1e-5)")
    parser.add_argument("--order", choices=ORDERS, default="taps", help="of the other layout's encoder (default: taps)")
    parser.add_argument("--scale", type=int, default=2, help="upsampling factor (default: 2)")
    parser.add_argument("--below", nargs="+", default=[""], metavar="NAME", help="only modules whose names start so")
    parser.add_argument("--rename", nargs="+", default=[], metavar="OLD=NEW", help="new names of modules")
    parser.add_argument("--force", action="store_true", help="overwrite DST")
    return parser.parse_args(argv)


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The weights in a checkpoint, by name, and its ``meta``."""
    allow_checkpoint_types()
    checkpoint = read_checkpoint(str(path))
    weights: Any = checkpoint
    for key in ("state_dict", "model"):
        if not isinstance(checkpoint.get(key, torch.zeros(())), torch.Tensor):
            weights = checkpoint[key]
            break
    if not isinstance(weights, dict):
        raise engine.UsageError(
            f"{path} holds a whole model ({type(weights).__name__}), not its weights: "
            "in the project that it is from, save model.state_dict()"
        )
    tensors = {name: value for name, value in weights.items() if isinstance(value, torch.Tensor)}
    return tensors, checkpoint.get("meta") or {}


def activation(args: argparse.Namespace, weights: dict[str, torch.Tensor], meta: dict) -> str:
    """The activation of the module: ``--act``, else what an earlier conversion wrote, else what the layouts imply."""
    recorded = (meta.get(RECORD) or {}).get("act")
    act = args.act or recorded
    if args.to == "mmcv":
        layouts = set(find_modules(weights, [name for name in LAYOUTS if name != "mmcv"]).values())
    else:
        layouts = {args.to}
    unclear = sorted(name for name in layouts if LAYOUTS[name].compressor_norm is not None)
    if act is None and unclear:
        raise engine.UsageError(
            f"the layout {unclear[0]} does not say which activation follows its compressor: "
            f"give --act ({', '.join(ACTIVATIONS)})"
        )
    if args.to != "mmcv" and act not in (None, "identity", recorded):
        for prefix in find_modules(weights, ["mmcv"]):
            if f"{prefix}compressor_norm.running_mean" not in weights:
                raise engine.UsageError(
                    f"{prefix.rstrip('.') or 'the module'} is MMCV's, without an activation behind its compressor: "
                    f"a module with --act {act} cannot compute the same"
                )
    return act or "identity"


def convert_checkpoint(args: argparse.Namespace) -> None:
    """Read, convert, check and write.

    Raises:
        UsageError: a layout is not known, the target cannot hold the source, DST exists, or an option does not fit.
        CheckpointError: the checkpoint is missing or cannot be read.
    """
    source, destination = Path(args.source).absolute(), Path(args.destination).absolute()
    if destination.is_dir():
        raise engine.UsageError(f"DST must be a file, and is a folder: {destination}")
    if destination.exists() and source.exists() and destination.samefile(source):
        raise engine.UsageError(f"DST must be another file than SRC: {destination}")
    if destination.exists() and not args.force:
        raise engine.UsageError(f"DST exists: {destination}; --force overwrites it")
    wrong = [pair for pair in args.rename if not all(pair.partition("="))]
    if wrong:
        raise engine.UsageError(f"--rename takes OLD=NEW, got {wrong[0]}")
    weights, meta = read_weights(source)
    try:
        fork = Fork(activation(args, weights, meta), args.eps, args.order, args.scale)
        rename = dict(pair.split("=", 1) for pair in args.rename)
        conversion = convert_layout(weights, args.to, fork, args.below, rename)
    except LayoutError as error:
        raise engine.UsageError(f"cannot convert {source}: {error}") from error
    except ValueError as error:  # of an option
        raise engine.UsageError(f"--{error}") from error

    # No name says which activation belongs to the weights: the file does.
    meta = {**meta, RECORD: dict(to=args.to, act=fork.act, eps=fork.eps, order=fork.order, scale=fork.scale)}
    content = io.BytesIO()
    torch.save(dict(meta=meta, state_dict=conversion.state_dict), content)
    try:
        AtomicLocalBackend().put(content.getvalue(), destination)
    except OSError as error:
        raise engine.UsageError(f"cannot write {destination}: {error}") from error
    report(conversion, args.to, destination)


def report(conversion: Conversion, to: str, destination: Path) -> None:
    """Print what was converted, and how well the two sides agree."""
    table = Table("module", "written as", "from", "to", "channels", "k", "largest difference", box=None)
    for module in conversion.modules:
        channels = f"{module.channels} > {module.compressed_channels}"
        names = (module.source or "(root)", module.destination or "(root)", module.layout, to)
        table.add_row(*names, channels, str(module.kernel_size), f"{module.difference:.1e}")
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(
        f"{destination}: {len(conversion.modules)} modules, {len(conversion.state_dict)} tensors", markup=False
    )


if __name__ == "__main__":
    sys.exit(engine.run_tool(convert_checkpoint, parse_args()))
