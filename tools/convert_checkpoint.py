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
shuffle first; "positions": pixel shuffle last), --scale the factor. DST's ``meta`` records them for each module, and
the next conversion of that module takes from there what its command line leaves out. What is given goes before a
record; what was taken, from where, and which record it contradicts is printed. --act must be known where a layout's
compressor can have an activation: also for a module of MMCV's names with ``compressor_norm``. One without is taken for
MMCV's own class, which has no activation: ``CARAFEUpsample(channels, norm=None, act=...)`` has the same names, and is
not for this tool.

BatchNorms are folded into their convolutions, except a compressor's that an activation follows: it becomes
``compressor_norm``, for ``CARAFEUpsample(channels, norm=nn.BatchNorm2d, act=nn.SiLU)``.

Both sides are run on the same random input, and the largest difference of outputs and kernels is printed. What matches
no layout is refused with the list of the keys, and nothing that exists is overwritten without --force. DST holds the
weights, the checkpoint's ``meta`` and, converted like the weights, mmengine's ``ema_state_dict``. It does not hold the
optimizer, whose order of parameters is another one, or anything else; what is left out is printed.

Example:
    $ python tools/convert_checkpoint.py yolo_weights.pt carafe.pth --to mmcv --act silu --eps 1e-3
    $ python tools/convert_checkpoint.py carafe.pth plain.pth --to comp-enc --rename neck.upsample_modules.0=up1
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from carafe_plugin.engine import run as engine
from carafe_plugin.engine.checkpoint import AtomicLocalBackend, allow_checkpoint_types, read_checkpoint
from carafe_plugin.engine.checkpoint_layouts import (
    ACTIVATIONS,
    LAYOUTS,
    ORDERS,
    Conversion,
    Fork,
    LayoutError,
    convert_layout,
    find_sources,
    norm_of_mmcv,
)

RECORD = "carafe_layout"  # in a file's meta: module -> its layout there, and the options that it was written with
EMA = "ema_state_dict"  # what mmengine's EMAHook keeps beside state_dict, under the names of a wrapper
WRAPPED = "module."


class Content(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        weights: by name.
        ema: the same of :data:`EMA`, with all that stands there; None where there is none.
        meta: the checkpoint's, or nothing.
        left_out: names of all the rest.
    """

    weights: dict[str, torch.Tensor]
    ema: dict[str, torch.Tensor] | None
    meta: dict
    left_out: list[str]


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
    recorded = "default: as recorded in SRC"
    parser.add_argument(
        "--act", choices=list(ACTIVATIONS), help=f"activation behind the other layout's compressor ({recorded})"
    )
    parser.add_argument("--eps", type=float, help=f"eps of the other layout's norms ({recorded}, else 1e-5)")
    parser.add_argument("--order", choices=ORDERS, help=f"of the other layout's encoder ({recorded}, else taps)")
    parser.add_argument("--scale", type=int, help=f"upsampling factor ({recorded}, else 2)")
    parser.add_argument("--below", nargs="+", default=[""], metavar="NAME", help="only modules whose names start so")
    parser.add_argument("--rename", nargs="+", default=[], metavar="OLD=NEW", help="new names of modules")
    parser.add_argument("--force", action="store_true", help="overwrite DST")
    return parser.parse_args(argv)


def read_weights(path: Path) -> Content:
    """The weights in a checkpoint, its ``meta``, and what else there is."""
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
    meta, ema = checkpoint.get("meta"), checkpoint.get(EMA)
    content = Content(tensors, ema if isinstance(ema, dict) else None, meta if isinstance(meta, dict) else {}, [])
    for name, value in {**checkpoint, **weights}.items():
        if name not in tensors and not any(value is taken for taken in (weights, content.ema, content.meta)):
            content.left_out.append(str(name))
    return content


# --------------------------------------------------------------------------------- what the names do not tell


def read_records(meta: dict, places: dict[str, str]) -> dict[str, dict]:
    """The records of the modules to convert, by prefix: none of a module whose layout is not what its record says."""
    records = meta.get(RECORD)
    found = {}
    for prefix, layout in places.items():
        record = records.get(prefix.rstrip(".")) if isinstance(records, dict) else None
        if not isinstance(record, dict) or record.get("layout") != layout:
            record = {}
        found[prefix] = {name: value for name, value in record.items() if isinstance(value, str | int | float)}
    return found


def check_activation(
    args: argparse.Namespace, weights: dict[str, torch.Tensor], prefix: str, layout: str, recorded: str | None
) -> None:
    """Refuse a module whose activation nothing tells, and one that has none where ``--act`` says one."""
    module = prefix.rstrip(".") or "the module"
    normed = layout == "mmcv" and norm_of_mmcv(weights, prefix)
    other = layout if args.to == "mmcv" else args.to
    possible = LAYOUTS[other].compressor_norm is not None
    if (possible or normed) and args.act is None and recorded is None:
        raise engine.UsageError(
            f"{f'the layout {other}' if possible else f'{module}, with its compressor_norm,'} does not say which "
            f"activation follows its compressor: give --act ({', '.join(ACTIVATIONS)})"
        )
    none = layout == "mmcv" and not normed and recorded in (None, "identity")
    if none and args.act not in (None, "identity"):
        raise engine.UsageError(
            f"{module} is MMCV's, without an activation behind its compressor: "
            f"a module with --act {args.act} cannot compute the same"
        )


def choose_fork(args: argparse.Namespace, content: Content) -> tuple[Fork, str]:
    """What the names do not tell: from the command line, else from the modules' records, else the defaults.

    Returns:
        The values, and where each is from, as a line to print.

    Raises:
        UsageError: the activation is unclear, or the modules' records differ.
        ValueError: a value is not possible; the message starts with its name.
    """
    places = find_sources(content.weights, args.to, args.below)
    records = read_records(content.meta, places)
    for prefix, layout in places.items():
        check_activation(args, content.weights, prefix, layout, records[prefix].get("act"))
    values: dict[str, Any] = {}
    origins = []
    for option, default in vars(Fork()).items():
        by_module = {prefix.rstrip(".") or "(root)": record.get(option) for prefix, record in records.items()}
        recorded = {value for value in by_module.values() if value is not None}
        value = getattr(args, option)
        if value is not None:
            others = ", ".join(str(other) for other in recorded - {value})
            origin = f"given, where SRC records {others}" if others else "given"
        elif len({default if value is None else value for value in by_module.values()}) > 1:
            each = ", ".join(f"{name} {value or 'nothing'}" for name, value in by_module.items())
            raise engine.UsageError(
                f"SRC records more than one {option} ({each}): give --{option}, or convert in turns with --below"
            )
        elif recorded:
            (value,), origin = recorded, "recorded in SRC"
        else:
            value, origin = default, "default"
        values[option] = value
        origins.append(f"{option} {value} ({origin})")
    return Fork(**values), f"the other side: {', '.join(origins)}"


# ----------------------------------------------------------------------------------------------- the conversion


def convert_ema(ema: dict[str, Any], convert: Callable[[dict[str, torch.Tensor]], Conversion]) -> Conversion:
    """The same for :data:`EMA`, whose own entries, such as the number of its steps, stay."""
    prefix = WRAPPED if any(name.startswith(WRAPPED) for name in ema) else ""
    weights = {name.removeprefix(prefix): value for name, value in ema.items() if name.startswith(prefix)}
    try:
        conversion = convert(weights)
    except LayoutError as error:
        raise LayoutError(f"{EMA}: {error}") from error
    own = {name: value for name, value in ema.items() if not name.startswith(prefix)}
    converted = {prefix + name: value for name, value in conversion.state_dict.items()}
    return Conversion({**own, **converted}, conversion.modules)


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
    content = read_weights(source)
    ema = None
    try:
        fork, origins = choose_fork(args, content)
        rename = dict(pair.split("=", 1) for pair in args.rename)
        convert = partial(convert_layout, to=args.to, fork=fork, below=args.below, rename=rename)
        conversion = convert(content.weights)
        if content.ema is not None:
            ema = convert_ema(content.ema, convert)
    except LayoutError as error:
        raise engine.UsageError(f"cannot convert {source}: {error}") from error
    except ValueError as error:  # of an option
        raise engine.UsageError(f"--{error}") from error

    # No name says which activation belongs to the weights: the file does.
    old = content.meta.get(RECORD)
    records = dict(old) if isinstance(old, dict) else {}
    for module in conversion.modules:
        records.pop(module.source, None)
    records |= {module.destination: dict(layout=args.to, **vars(fork)) for module in conversion.modules}
    checkpoint = dict(meta={**content.meta, RECORD: records}, state_dict=conversion.state_dict)
    if ema is not None:
        checkpoint[EMA] = ema.state_dict
    file = io.BytesIO()
    torch.save(checkpoint, file)
    try:
        AtomicLocalBackend().put(file.getvalue(), destination)
    except OSError as error:
        raise engine.UsageError(f"cannot write {destination}: {error}") from error
    report(conversion, args.to, destination, origins)
    if ema is not None:
        worst = max(module.difference for module in ema.modules)
        print(f"{EMA}: {len(ema.modules)} modules likewise, largest difference {worst:.1e}")
    if content.left_out:
        print(f"left out: {', '.join(content.left_out)}")


def report(conversion: Conversion, to: str, destination: Path, origins: str) -> None:
    """Print what was converted, with what, and how well the two sides agree."""
    table = Table("module", "written as", "from", "to", "channels", "k", "largest difference", box=None)
    for module in conversion.modules:
        channels = f"{module.channels} > {module.compressed_channels}"
        names = (module.source or "(root)", module.destination or "(root)", module.layout, to)
        table.add_row(*names, channels, str(module.kernel_size), f"{module.difference:.1e}")
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(origins, markup=False)
    console.print(
        f"{destination}: {len(conversion.modules)} modules, {len(conversion.state_dict)} tensors", markup=False
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return engine.run_tool(convert_checkpoint, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
