"""What every command shares: the options about a configuration, and errors in one line."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import DictAction

from carafe_plugin.engine.errors import ProcessError, UsageError, construction_fault
from carafe_plugin.engine.memory import add_memory_option
from carafe_plugin.engine.processes import LAUNCHERS, process_rank
from carafe_plugin.openmmlab import mmcv_ops
from carafe_plugin.openmmlab.resnet_checkpoints import CheckpointMismatch


def run_tool(main: Callable[[argparse.Namespace], int | None], args: argparse.Namespace) -> int:
    """Run a command's main function and return the exit code. What the user can put right (a :class:`UsageError`, what
    cannot be built from a configuration, a file or folder that cannot be used, an MMCV whose operators do not load)
    becomes one line on stderr and the code 2.

    Where MMCV has no compiled operators, the command and its processes have torchvision's (see ``mmcv_ops``).
    """
    try:
        try:
            mmcv_ops.install()
        except ValueError as error:
            raise UsageError(str(error)) from error
        return main(args) or 0
    except Exception as error:
        if (line := _in_a_line(error, args)) is None:
            raise
        # Every process of a distributed run finds the same mistake: one of them says so.
        if line and (isinstance(error, ProcessError) or process_rank(getattr(args, "launcher", None)) == 0):
            print(f"error: {' '.join(line.split())}", file=sys.stderr)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
            # The runner is a cycle of references and holds the distributed model, which holds the group: left to the
            # interpreter's end, gloo's threads would outlive it, and a process that has done its work may abort.
            gc.collect()
    return 2


def _in_a_line(error: Exception, args: argparse.Namespace) -> str | None:
    """What the user is told, "" where that has been done; None for a bug."""
    if isinstance(error, (UsageError, CheckpointMismatch)):
        return str(error)
    if isinstance(error, ImportError):
        if error.name == mmcv_ops.EXTENSION:
            return ""  # mmcv_ops has said it
        if error.name is None:  # no import has failed: a toolbox says which package it wants
            return str(error)
    if isinstance(error, OSError) and error.filename and not isinstance(error, FileNotFoundError):
        return f"cannot use {Path(error.filename).absolute()}: {error.strerror}"
    if fault := construction_fault(error):
        return f"configuration {getattr(args, 'config', '')}: cannot build {fault}"
    return None


def command(
    run: Callable[[argparse.Namespace], int | None],
    add_options: Callable[[argparse.ArgumentParser], None],
    doc: str | None,
) -> Callable[..., int]:
    """The ``main`` of a command that parses its arguments and calls ``run``; ``doc``, its module's, is its help."""
    description, _, epilog = (doc or "").partition("\n\n")

    def main(argv: Sequence[str] | None = None) -> int:
        """Run the command; returns its exit code."""
        parser = argparse.ArgumentParser(
            description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        add_options(parser)
        return run_tool(run, parser.parse_args(argv))

    return main


class ConfigOptions(DictAction):
    """``--cfg-options`` whose mistakes are argparse's errors, not tracebacks."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        for value in values:
            if not value.partition("=")[1] or value.startswith("="):
                raise argparse.ArgumentError(self, f"expected key=value, got {value!r}")
        try:
            super().__call__(parser, namespace, values, option_string)
        except (ValueError, AssertionError, SyntaxError) as error:
            raise argparse.ArgumentError(self, f"cannot read {' '.join(values)!r}: {error}") from error


def add_config_options(parser: argparse.ArgumentParser, drop_in: bool = True) -> None:
    """Add the options about the configuration: ``--cfg-options`` and, unless told otherwise, ``--drop-in``."""
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=ConfigOptions,
        metavar="KEY=VALUE",
        help="change settings of the configuration, for example train_dataloader.batch_size=4 or "
        'model.neck.type=CARAFEFPN; lists as key=a,b or key="[a,b]" (quoted, no blanks)',
    )
    if drop_in:
        parser.add_argument(
            "--drop-in",
            action="store_true",
            help="run configurations that use mmcv's layer 'carafe' (FPN_CARAFE) on carafe_plugin's operator",
        )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command that is a run of mmengine's Runner."""
    parser.add_argument(
        "config", help="configuration file of mmdet, mmseg or mmpretrain, or of mmengine alone (configs/inpainting)"
    )
    parser.add_argument("--work-dir", help="folder for logs and results (default: work_dirs/<name of the config>)")
    add_config_options(parser)
    add_memory_option(parser)
    parser.add_argument(
        "--launcher", choices=["none", *LAUNCHERS], default="none", help="what started the processes (default: none)"
    )
    # torch.distributed.launch passes it, spelt by its version; torchrun sets LOCAL_RANK instead.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
