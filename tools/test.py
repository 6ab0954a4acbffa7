#!/usr/bin/env python
"""Test a checkpoint with a configuration of mmdet, mmseg, mmpretrain or mmengine alone, with CARAFE++ registered.

Of mmengine alone are those of configs/inpainting.

Example:
    $ python tools/test.py CONFIG CHECKPOINT --out predictions.pkl
    $ bash tools/dist_test.sh CONFIG CHECKPOINT 8 --tta
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import mmengine
from mmengine.device import get_device
from mmengine.dist import is_main_process

from carafe_plugin.engine import evaluation
from carafe_plugin.engine.atomic import use_atomic_writes
from carafe_plugin.engine.checkpoint import check_checkpoint_exists
from carafe_plugin.engine.classes import CheckClassesHook
from carafe_plugin.engine.cli import add_run_options, command
from carafe_plugin.engine.config import read_config, require_settings, toolbox
from carafe_plugin.engine.dataset_checks import check_dataset_files, check_not_empty
from carafe_plugin.engine.errors import UsageError, reading_named_files
from carafe_plugin.engine.memory import keep_memory
from carafe_plugin.engine.processes import prepare_processes
from carafe_plugin.engine.runners import build_runner, prepare_strategy


def add_options(parser: argparse.ArgumentParser) -> None:
    add_run_options(parser)
    parser.add_argument("checkpoint", help="checkpoint file (or a URL that mmengine loads)")
    parser.add_argument(
        "--out",
        help="mmdet, mmpretrain: write the predictions to this .pkl file; mmseg: write label maps into this folder",
    )
    parser.add_argument("--out-item", choices=["pred", "metrics"], help="mmpretrain: what --out writes (default: pred)")
    parser.add_argument("--show", action="store_true", help="show the predictions in a window")
    parser.add_argument("--show-dir", help="draw the predictions into files in this folder")
    parser.add_argument("--wait-time", type=float, default=2, help="seconds that --show shows each image (default: 2)")
    parser.add_argument("--interval", type=int, default=1, help="mmpretrain: draw every n-th image (default: 1)")
    parser.add_argument("--tta", action="store_true", help="test-time augmentation (the config's, else flips)")
    parser.add_argument(
        "--allow-mismatch",
        action="store_true",
        help="test although the checkpoint lacks parameters of the model, has CARAFE++'s where the model has none, or "
        "has its classes in another order",
    )


def test(args: argparse.Namespace) -> None:
    """Test as the command line says: the cheap checks first."""
    cfg = read_config(args)
    scope = toolbox(cfg)
    require_settings(cfg, "test_dataloader")
    evaluation.check_out(args.out, args.out_item, scope)
    if "://" not in args.checkpoint:
        check_checkpoint_exists(args.checkpoint)
    if args.show or args.show_dir:
        evaluation.use_drawing(cfg, args.show, args.show_dir, args.wait_time, args.interval)
    if args.tta:
        if scope == "mmpretrain" and (args.show or args.show_dir):
            raise UsageError("--show and --show-dir with --tta: mmpretrain draws one view of an image, not several")
        evaluation.use_tta(cfg)
    if args.out and scope == "mmseg":
        evaluation.write_label_maps(cfg, args.out)
    prepare_strategy(cfg)
    check_dataset_files(cfg, "test")
    cfg.load_from, cfg.resume = args.checkpoint, False
    use_atomic_writes()
    prepare_processes(cfg)
    runner = build_runner(cfg)
    keep_memory(args, get_device())
    runner.register_hook(evaluation.CheckWeightsHook(args.checkpoint, args.allow_mismatch))
    check_not_empty(runner, "test")
    runner.register_hook(CheckClassesHook("test"))
    if args.show_dir:
        evaluation.draw_into(runner, Path(args.show_dir))
    if scope == "mmdet":
        evaluation.keep_segments(runner)
    if args.out and scope != "mmseg" and args.out_item != "metrics":
        evaluation.dump_predictions(runner, args.out)
    with reading_named_files():
        metrics = runner.test()
    if args.out_item == "metrics" and is_main_process():
        mmengine.dump(metrics, args.out)


main = command(test, add_options, __doc__)

if __name__ == "__main__":
    sys.exit(main())
