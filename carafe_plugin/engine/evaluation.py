"""What the options of ``tools/test.py`` do: outputs, pictures, test-time augmentation, a checkpoint that must fit."""

from __future__ import annotations

import copy
import inspect
import os
import sys
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.registry import METRICS
from mmengine.runner import Runner

from carafe_plugin.engine.checkpoint import find_mismatch
from carafe_plugin.engine.classes import checkpoint_meta, compare_classes, config_meta
from carafe_plugin.engine.config import dataset_configs, toolbox
from carafe_plugin.engine.errors import CheckpointError, UsageError


def check_out(out: str | None, item: str | None, scope: str | None) -> None:
    """Raise a UsageError for an ``--out`` that the toolbox could not write, or an ``--out-item`` (``item``) that does
    not go with it, before an hour of testing instead of after.
    """
    if item and not out:
        raise UsageError("--out-item says what --out writes: give --out as well")
    if item and scope != "mmpretrain":
        raise UsageError(f"--out-item is for mmpretrain configurations; the scope of this one is {scope}")
    if not out:
        return
    if scope == "mmseg":
        if Path(out).is_file():
            raise UsageError(f"--out of an mmseg configuration is a folder for label maps; {out} is a file")
        return
    endings = (".pkl", ".pickle") if item != "metrics" else (".json", ".pkl", ".pickle", ".yaml", ".yml")
    if not out.endswith(endings):
        raise UsageError(f"--out must end in {' or '.join(endings)}, got {out}")


def use_drawing(cfg: Config, show: bool, folder: str | None, wait_time: float, interval: int) -> None:
    """Let the toolbox's visualisation hook show predictions in a window, ``wait_time`` seconds each, or draw them into
    ``folder``; in mmpretrain every ``interval``-th image. Raises UsageError without a hook in ``cfg``, or a display.
    """
    hook = (cfg.get("default_hooks") or {}).get("visualization")
    if not hook:
        raise UsageError(f"--show and --show-dir need default_hooks.visualization, which {cfg.filename} lacks")
    if show and sys.platform.startswith("linux") and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
        raise UsageError("--show needs a display, and this machine has none: use --show-dir")
    if folder and Path(folder).is_file():
        raise UsageError(f"--show-dir is a folder for pictures; {folder} is a file")
    hook.update(show=show, wait_time=wait_time)
    scope = toolbox(cfg)
    hook.update(dict(enable=True, interval=interval) if scope == "mmpretrain" else dict(draw=True))
    setting = {"mmdet": "test_out_dir", "mmpretrain": "out_dir"}.get(scope or "")
    if folder and setting:
        hook[setting] = folder
    elif folder:
        cfg.visualizer.save_dir = folder


def use_tta(cfg: Config) -> None:
    """Wrap the model for test-time augmentation, as the configuration says or else with a horizontal flip. Raises
    UsageError where mmdet cannot merge what the model predicts, or only the configuration could say how.
    """
    scope = toolbox(cfg)
    datasets = list(dataset_configs(cfg.test_dataloader.dataset))
    if scope == "mmdet" and "tta_model" not in cfg and (cfg.model.get("roi_head") or cfg.model).get("mask_head"):
        raise UsageError(f"--tta: mmdet merges boxes, not masks, and the model of {cfg.filename} has a mask head")
    if "tta_model" not in cfg:
        defaults = {
            # MMDetection registers its own for all toolboxes.
            "mmdet": dict(type="DetTTAModel", tta_cfg=dict(nms=dict(type="nms", iou_threshold=0.5), max_per_img=100)),
            "mmpretrain": dict(type="mmpretrain.AverageClsScoreTTA"),
            "mmseg": dict(type="mmseg.SegTTAModel"),
        }
        if scope not in defaults:
            raise UsageError(f"--tta needs tta_model and tta_pipeline, which {cfg.filename} does not set")
        cfg.tta_model = defaults[scope]
    if "tta_pipeline" not in cfg:
        cfg.tta_pipeline = _flipped(datasets[0].pipeline, f"{scope}.RandomFlip")
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    for dataset in datasets:
        dataset.pipeline = cfg.tta_pipeline


def _flipped(pipeline: list, flip: str) -> list:
    *steps, pack = copy.deepcopy(pipeline)
    if "meta_keys" in pack:  # what the toolbox needs to flip predictions back
        pack.meta_keys = tuple(dict.fromkeys([*pack.meta_keys, "flip", "flip_direction"]))
    # Unflipped first: the merged sample takes its ground truth from the first one.
    flips = [dict(type=flip, prob=0.0), dict(type=flip, prob=1.0)]
    return [*steps, dict(type="TestTimeAug", transforms=[flips, [pack]])]


def write_label_maps(cfg: Config, folder: str) -> None:
    """Let an mmseg configuration's metrics write label maps into ``folder``. Raises UsageError where none can."""
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
        raise UsageError(f"--out: no metric of {cfg.filename} can write label maps")


def dump_predictions(runner: Runner, path: str) -> None:
    """Add the toolbox's metric that dumps the predictions to ``path``."""
    if toolbox(runner.cfg) == "mmdet":
        from mmdet.evaluation import DumpDetResults as DumpResults  # encodes masks as RLE: 100 times smaller
    else:
        from mmengine.evaluator import DumpResults
    runner.test_evaluator.metrics.append(DumpResults(out_file_path=path))


class CheckWeightsHook(Hook):
    """Raise a CheckpointError (or warn, with ``allow_mismatch``) for a checkpoint of another model: mmengine only
    warns, and tests what is left of the random weights. ``path`` is what messages call the checkpoint.

    So too for one whose classes are the test's in another order. Of other classes (where a checkpoint records none,
    those of the training in the configuration count) it warns.
    """

    priority = "VERY_LOW"

    def __init__(self, path: str, allow_mismatch: bool = False) -> None:
        self.path, self.allow_mismatch = path, allow_mismatch

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compare what mmengine has read with the model, before it goes into the model."""
        model = runner.model.module if hasattr(runner.model, "module") else runner.model
        model = getattr(model, "module", model)  # below test-time augmentation
        mismatch = find_mismatch(model, checkpoint.get("state_dict", checkpoint))
        if mismatch and self.allow_mismatch:
            runner.logger.warning(f"checkpoint {self.path} {mismatch}")
        elif mismatch:
            hint = "; --allow-mismatch tests it all the same" if "holds no param" not in mismatch else ""
            raise CheckpointError(f"checkpoint {self.path} {mismatch}{hint}")
        classes = (checkpoint_meta(checkpoint) or config_meta(runner.cfg, "train")).get("classes")
        tested = getattr(runner.test_dataloader.dataset, "metainfo", {}).get("classes")
        if difference := compare_classes((f"checkpoint {self.path}", classes), ("the test's dataset", tested)):
            message, reordered = difference
            if reordered and not self.allow_mismatch:
                raise CheckpointError(f"{message}: labels would be mixed up; --allow-mismatch tests it all the same")
            runner.logger.warning(message)
