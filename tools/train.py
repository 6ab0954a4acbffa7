#!/usr/bin/env python
"""Train a model from a configuration of mmdet, mmseg, mmpretrain or mmengine alone, with CARAFE++ registered.

Of mmengine alone are those of configs/inpainting.

Example:
    $ python tools/train.py configs/mmdet/mask-rcnn_r50_carafe-fpn_1x_coco.py --work-dir work_dirs/carafe
    $ bash tools/dist_train.sh CONFIG 8 --amp --resume
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmengine.config import Config
from mmengine.device import get_device

from carafe_plugin.engine.checkpoint import CheckpointPlace, check_checkpoint_exists, read_checkpoint
from carafe_plugin.engine.checkpoint_hook import use_atomic_checkpoints
from carafe_plugin.engine.classes import CheckClassesHook
from carafe_plugin.engine.cli import add_run_options, command
from carafe_plugin.engine.config import read_config, require_settings, type_name
from carafe_plugin.engine.dataset_checks import check_dataset_files, check_not_empty
from carafe_plugin.engine.errors import UsageError, reading_named_files
from carafe_plugin.engine.memory import keep_memory
from carafe_plugin.engine.processes import prepare_processes, require_gpu_for_amp
from carafe_plugin.engine.runners import build_runner, prepare_strategy


def add_options(parser: argparse.ArgumentParser) -> None:
    add_run_options(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="PATH",
        help="resume from this checkpoint; without PATH, or with 'auto', from the newest one in the work dir that can "
        "be read (and from the start where there is none)",
    )
    parser.add_argument("--amp", action="store_true", help="automatic mixed precision (needs a GPU)")
    parser.add_argument(
        "--auto-scale-lr", action="store_true", help="scale the learning rate to the real batch size (config's base)"
    )


def use_amp(cfg: Config) -> None:
    """Turn the optimizer wrapper of ``cfg`` into mmengine's AmpOptimWrapper."""
    wrapper = type_name({"type": "OptimWrapper", **cfg.optim_wrapper})
    if wrapper not in ("OptimWrapper", "AmpOptimWrapper"):
        raise UsageError(f"--amp works with the optimizer wrapper OptimWrapper, and {cfg.filename} has {wrapper}")
    cfg.optim_wrapper.type = "AmpOptimWrapper"
    cfg.optim_wrapper.setdefault("loss_scale", "dynamic")


def use_scaled_lr(cfg: Config) -> None:
    """Enable mmengine's scaling of the learning rate."""
    if "base_batch_size" not in (cfg.get("auto_scale_lr") or {}):
        raise UsageError(f"--auto-scale-lr needs auto_scale_lr.base_batch_size, which {cfg.filename} does not set")
    cfg.auto_scale_lr.enable = True


def choose_checkpoint(cfg: Config, resume: str | None) -> None:
    """Decide what the run continues from; without a checkpoint to resume it starts with the config's load_from."""
    if resume is None and cfg.get("resume"):
        resume = cfg.get("load_from") or "auto"
    if resume == "auto":
        place = CheckpointPlace.of(cfg)
        if place is None:  # a remote store: mmengine finds the checkpoint
            cfg.resume, cfg.load_from = True, None
            return
        resume = place.newest()
    elif resume and "://" not in resume and not Path(resume).is_dir():  # a folder is read by its strategy
        read_checkpoint(resume, training=True)
    cfg.resume = resume is not None
    if resume:
        cfg.load_from = resume


def train(args: argparse.Namespace) -> None:
    """Train as the command line says: the cheap checks first."""
    cfg = read_config(args)
    require_settings(cfg, "train_dataloader", "optim_wrapper")
    if args.amp:
        use_amp(cfg)
    if type_name(cfg.optim_wrapper) == "AmpOptimWrapper":
        require_gpu_for_amp("--amp" if args.amp else "AmpOptimWrapper in the configuration")
    if args.auto_scale_lr:
        use_scaled_lr(cfg)
    if args.resume not in (None, "auto") and "://" not in args.resume:
        check_checkpoint_exists(args.resume)
    prepare_strategy(cfg)
    use_atomic_checkpoints(cfg)
    prepare_processes(cfg)
    choose_checkpoint(cfg, args.resume)
    check_dataset_files(cfg, "train", "val")
    runner = build_runner(cfg)
    keep_memory(args, get_device())
    check_not_empty(runner, "train", "val")
    runner.register_hook(CheckClassesHook("train", "val"))
    with reading_named_files():
        runner.train()


main = command(train, add_options, __doc__)

if __name__ == "__main__":
    sys.exit(main())
