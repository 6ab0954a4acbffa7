#!/usr/bin/env python
"""Test a checkpoint with a configuration of mmdet, mmseg, mmpretrain or mmengine alone, with CARAFE++ registered.

Of mmengine alone are those of configs/inpainting.

Example:
    $ python tools/test.py CONFIG CHECKPOINT --out predictions.pkl
    $ bash tools/dist_test.sh CONFIG CHECKPOINT 8 --tta
"""

from __future__ import annotations

import argparse
import copy
import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import mmengine
from mmengine.config import Config, ConfigDict
from mmengine.dist import is_main_process
from mmengine.registry import METRICS
from mmengine.runner import Runner

from carafe_plugin.engine import run as engine
from carafe_plugin.engine.checkpoint import find_mismatch, read_checkpoint, use_atomic_writes


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Test a model with CARAFE++ at hand.")
    engine.add_run_options(parser)
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
        help="test although the checkpoint lacks parameters of the model, or has CARAFE++'s where the model has none",
    )
    return parser.parse_args(argv)


def check_out(args: argparse.Namespace, scope: str | None) -> None:
    """Refuse an ``--out`` that the toolbox could not write, before an hour of testing instead of after."""
    if args.out_item and not args.out:
        raise engine.UsageError("--out-item says what --out writes: give --out as well")
    if args.out_item and scope != "mmpretrain":
        raise engine.UsageError(f"--out-item is for mmpretrain configurations; the scope of this one is {scope}")
    if not args.out:
        return
    if scope == "mmseg":
        if Path(args.out).is_file():
            raise engine.UsageError(f"--out of an mmseg configuration is a folder for label maps; {args.out} is a file")
        return
    endings = (".pkl", ".pickle") if args.out_item != "metrics" else (".json", ".pkl", ".pickle", ".yaml", ".yml")
    if not args.out.endswith(endings):
        raise engine.UsageError(f"--out must end in {' or '.join(endings)}, got {args.out}")


def use_drawing(cfg: Config, args: argparse.Namespace) -> None:
    """Switch the toolbox's visualisation hook on; each toolbox names the switches in its own way."""
    hook = (cfg.get("default_hooks") or {}).get("visualization")
    if not hook:
        raise engine.UsageError(f"--show and --show-dir need default_hooks.visualization, which {cfg.filename} lacks")
    if args.show and sys.platform.startswith("linux") and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
        raise engine.UsageError("--show needs a display, and this machine has none: use --show-dir")
    hook.update(show=args.show, wait_time=args.wait_time)
    scope = cfg.get("default_scope")
    if scope == "mmpretrain":
        hook.update(enable=True, interval=args.interval)
    else:
        hook.draw = True
    if args.show_dir:
        if scope == "mmdet":
            hook.test_out_dir = args.show_dir
        elif scope == "mmpretrain":
            hook.out_dir = args.show_dir
        else:
            cfg.visualizer.save_dir = args.show_dir


def use_tta(cfg: Config) -> None:
    """Wrap the model for test-time augmentation, as the configuration says or else with a horizontal flip."""
    scope = cfg.get("default_scope")
    datasets = list(engine.dataset_configs(cfg.test_dataloader.dataset))
    if scope == "mmdet" and "tta_model" not in cfg and (cfg.model.get("roi_head") or cfg.model).get("mask_head"):
        raise engine.UsageError(
            f"--tta: mmdet merges boxes, not masks, and the model of {cfg.filename} has a mask head"
        )
    if "tta_model" not in cfg:
        defaults = {
            "mmdet": dict(type="DetTTAModel", tta_cfg=dict(nms=dict(type="nms", iou_threshold=0.5), max_per_img=100)),
            "mmpretrain": dict(type="AverageClsScoreTTA"),
            "mmseg": dict(type="SegTTAModel"),
        }
        if scope not in defaults:
            raise engine.UsageError(f"--tta needs tta_model and tta_pipeline, which {cfg.filename} does not set")
        cfg.tta_model = defaults[scope]
    if "tta_pipeline" not in cfg:
        cfg.tta_pipeline = _flipped(datasets[0].pipeline)
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    for dataset in datasets:
        dataset.pipeline = cfg.tta_pipeline


def _flipped(pipeline: list) -> list:
    *steps, pack = copy.deepcopy(pipeline)
    if "meta_keys" in pack:  # what the toolbox needs to flip predictions back
        pack.meta_keys = tuple(dict.fromkeys([*pack.meta_keys, "flip", "flip_direction"]))
    # Unflipped first: the merged sample takes its ground truth from the first one.
    flips = [dict(type="RandomFlip", prob=0.0), dict(type="RandomFlip", prob=1.0)]
    return [*steps, dict(type="TestTimeAug", transforms=[flips, [pack]])]


def write_label_maps(cfg: Config, folder: str) -> None:
    """Let the metrics of an mmseg configuration write their label maps into ``folder``."""
    evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, (list, tuple)) else [cfg.test_evaluator]
    written = False
    for evaluator in evaluators:
        metric = METRICS.get(f"mmseg.{evaluator.type}") if isinstance(evaluator.type, str) else evaluator.type
        accepted = inspect.signature(metric).parameters
        if "output_dir" in accepted:
            evaluator.output_dir, written = folder, True
        if "keep_results" in accepted:
            evaluator.keep_results = True
    if not written:
        raise engine.UsageError(f"--out: no metric of {cfg.filename} can write label maps")


def dump_predictions(runner: Runner, scope: str | None, path: str) -> None:
    """Add the toolbox's metric that dumps the predictions to ``path``."""
    if scope == "mmdet":
        from mmdet.evaluation import DumpDetResults as DumpResults  # encodes masks as RLE: 100 times smaller
    else:
        from mmengine.evaluator import DumpResults
    runner.test_evaluator.metrics.append(DumpResults(out_file_path=path))


def check_weights(runner: Runner, weights: dict, args: argparse.Namespace) -> None:
    """Refuse a checkpoint of another model: mmengine would only warn, and test what is left of the random weights."""
    model = runner.model.module if hasattr(runner.model, "module") else runner.model
    model = getattr(model, "module", model)  # below test-time augmentation
    mismatch = find_mismatch(model, weights)
    if mismatch and args.allow_mismatch:
        runner.logger.warning(f"checkpoint {args.checkpoint} {mismatch}")
    elif mismatch:
        hint = "; --allow-mismatch tests it all the same" if "holds no param" not in mismatch else ""
        raise engine.UsageError(f"checkpoint {args.checkpoint} {mismatch}{hint}")


def test(args: argparse.Namespace) -> None:
    """Test as the command line says."""
    cfg = engine.read_config(args)
    scope = cfg.get("default_scope")
    check_out(args, scope)
    engine.check_dataset_files(cfg, "test")
    local = "://" not in args.checkpoint
    checkpoint = read_checkpoint(args.checkpoint) if local else {}
    weights = checkpoint.get("state_dict", checkpoint)
    del checkpoint  # without an optimizer's state
    cfg.load_from, cfg.resume = args.checkpoint, False
    use_atomic_writes()
    if args.show or args.show_dir:
        use_drawing(cfg, args)
    if args.tta:
        use_tta(cfg)
    if args.out and scope == "mmseg":
        write_label_maps(cfg, args.out)
    engine.prepare_processes(cfg)
    runner = engine.build_runner(cfg)
    if local:
        check_weights(runner, weights, args)
    del weights  # mmengine loads the file itself
    engine.check_not_empty(runner, "test")
    if args.out and scope != "mmseg" and args.out_item != "metrics":
        dump_predictions(runner, scope, args.out)
    metrics = runner.test()
    if args.out_item == "metrics" and is_main_process():
        mmengine.dump(metrics, args.out)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return engine.run_tool(test, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
