"""What the options of ``tools/test.py`` do: outputs, pictures, test-time augmentation, a checkpoint that must fit."""

from __future__ import annotations

import copy
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.registry import METRICS

from carafe_plugin.engine.checkpoint import find_mismatch
from carafe_plugin.engine.classes import checkpoint_meta, compare_classes, config_meta, dataset_meta
from carafe_plugin.engine.config import dataset_configs, find_type, leaves, toolbox
from carafe_plugin.engine.errors import CheckpointError, UsageError

_COLOURED = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")  # what the toolboxes can write colours to


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
    """Let the toolbox's visualisation hook show predictions in a window, ``wait_time`` seconds each, or draw them for
    :func:`draw_into`; in mmpretrain every ``interval``-th image. Raises UsageError without a hook in ``cfg``, or a
    display, or where the folder to draw into is a file.
    """
    hook = (cfg.get("default_hooks") or {}).get("visualization")
    if not hook:
        raise UsageError(f"--show and --show-dir need default_hooks.visualization, which {cfg.filename} lacks")
    if folder and Path(folder).exists() and not Path(folder).is_dir():
        raise UsageError(f"--show-dir is a folder for pictures; {folder} is a file")
    if show and sys.platform.startswith("linux") and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
        raise UsageError("--show needs a display, and this machine has none: use --show-dir")
    if folder and Path(folder).is_file():
        raise UsageError(f"--show-dir is a folder for pictures; {folder} is a file")
    hook.update(show=show, wait_time=wait_time)
    if toolbox(cfg) == "mmpretrain":
        hook.update(enable=True, interval=interval)
    else:
        hook.update(draw=True)
        if toolbox(cfg) == "mmseg":  # before onedl's, it skips images in tests too, 49 of 50 by default
            hook.update(interval=1)


def draw_into(runner: Any, folder: Path) -> None:
    """Let what the toolbox's hook draws go into ``folder``, each picture under its image's path below the dataset's own
    folders. The hooks themselves put it below the work dir, or the time, or under names that two images may share.
    """
    prefixes = [getattr(dataset, "data_prefix", {}) for dataset in leaves(runner.test_dataloader.dataset)]
    roots = [Path(part).absolute() for prefix in prefixes for part in prefix.values() if part]
    folder, written = folder.absolute(), set[Path]()
    method = "visualize_cls" if toolbox(runner.cfg) == "mmpretrain" else "add_datasample"
    draw = getattr(runner.visualizer, method)

    def draw_file(*args: Any, data_sample: Any, **kwargs: Any) -> Any:
        image = Path(data_sample.get("img_path") or kwargs.get("name", "")).absolute()  # or of no file, as in CIFAR
        name = next((image.relative_to(root) for root in roots if image.is_relative_to(root)), Path(image.name))
        if name.suffix.lower() not in _COLOURED:
            name = name.with_name(name.name + ".png")
        while name in written:  # of another dataset
            name = name.with_name("_" + name.name)
        written.add(name)
        sample = drawable(data_sample, runner.visualizer.dataset_meta)
        return draw(*args, data_sample=sample, **kwargs | dict(out_file=str(folder / name)))

    setattr(runner.visualizer, method, draw_file)


def drawable(sample: Any, metainfo: Any) -> Any:
    """A prediction as mmdet's visualizer takes it: it fails on a panoptic segmentation without any segment."""
    void = len(metainfo.get("classes") or ()) if isinstance(metainfo, Mapping) else 0
    if "pred_panoptic_seg" in sample and bool((sample.pred_panoptic_seg.sem_seg == void).all()):
        sample = sample.new()
        del sample.pred_panoptic_seg
    return sample


def keep_segments(runner: Any) -> None:
    """Give mmdet's panoptic metrics copies: on a CPU they write 0 over what belongs to no segment, in the prediction
    itself, and whatever draws or dumps it after them takes that for the first class.
    """
    for metric in runner.test_evaluator.metrics:
        if type(metric).__name__ == "CocoPanopticMetric":
            metric.process = partial(_process_copies, metric.process)


def _process_copies(process: Callable, data_batch: Any, data_samples: Sequence[dict]) -> None:
    key = "pred_panoptic_seg"
    process(data_batch, [{**sample, key: copy.deepcopy(sample[key])} for sample in data_samples])


def use_tta(cfg: Config) -> None:
    """Wrap the model for test-time augmentation, as the configuration says or else with a horizontal flip. Raises
    UsageError where mmdet cannot merge what the model predicts, or only the configuration could say how.
    """
    scope = toolbox(cfg)
    datasets = list(dataset_configs(cfg.test_dataloader.dataset))
    heads = {**cfg.model, **(cfg.model.get("roi_head") or {})} if scope == "mmdet" and "tta_model" not in cfg else {}
    if masks := next((name for name in ("mask_head", "panoptic_head") if heads.get(name)), None):
        kind = masks.replace("_", " ")
        raise UsageError(f"--tta: mmdet merges boxes, not masks, and the model of {cfg.filename} has a {kind}")
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
        accepted = inspect.signature(find_type(METRICS, evaluator, "mmseg")).parameters
        if "output_dir" in accepted:
            evaluator.output_dir, written = folder, True
        if "keep_results" in accepted:
            evaluator.keep_results = True
    if not written:
        raise UsageError(f"--out: no metric of {cfg.filename} can write label maps")


def dump_predictions(runner: Any, path: str) -> None:
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

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Compare what mmengine has read with the model, before it goes into the model."""
        model = runner.model
        sharded = getattr(getattr(runner, "strategy", None), "whole_names", None)
        if not sharded:
            model = getattr(model, "module", model)
            model = getattr(model, "module", model)  # below test-time augmentation
        with sharded() if sharded else nullcontext():
            mismatch = find_mismatch(model, checkpoint.get("state_dict", checkpoint))
        if mismatch and self.allow_mismatch:
            runner.logger.warning(f"checkpoint {self.path} {mismatch}")
        elif mismatch:
            hint = "; --allow-mismatch tests it all the same" if "holds no param" not in mismatch else ""
            raise CheckpointError(f"checkpoint {self.path} {mismatch}{hint}")
        classes = (checkpoint_meta(checkpoint) or config_meta(runner.cfg, "train")).get("classes")
        tested = dataset_meta(runner.test_dataloader.dataset).get("classes")
        if difference := compare_classes((f"checkpoint {self.path}", classes), ("the test's dataset", tested)):
            message, reordered = difference
            if reordered and not self.allow_mismatch:
                raise CheckpointError(f"{message}: labels would be mixed up; --allow-mismatch tests it all the same")
            runner.logger.warning(message)
