"""mmengine's runners: FlexibleRunner, which leaves the model to a strategy (DDP, FSDP, DeepSpeed), does as Runner does.

By itself it builds the model when the run begins, loads a checkpoint before hooks have prepared for one, counts an
epoch too many in some checkpoints, and does not read some settings that Runner reads. Sharding strategies write folders
in the place of checkpoint files, one file at a time.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine._strategy import DDPStrategy, SingleDeviceStrategy
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import barrier, is_main_process
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import MODELS, RUNNERS, STRATEGIES
from mmengine.runner import FlexibleRunner, Runner, get_state_dict, weights_to_cpu
from torch.nn.parallel import DistributedDataParallel

from carafe_plugin._require import major_minor
from carafe_plugin.engine.atomic import move_into_place
from carafe_plugin.engine.config import find_type, toolbox, type_name
from carafe_plugin.engine.errors import CheckpointError, UsageError, reading_named_files
from carafe_plugin.engine.processes import distributed_wrapper
from carafe_plugin.engine.writing import UNFINISHED

# What Runner reads and FlexibleRunner does not.
_RUNNER_SETTINGS = ("activation_checkpointing", "efficient_conv_bn_eval")
_PACKAGES = {"DeepSpeedStrategy": "deepspeed", "ColossalAIStrategy": "colossalai"}
# mmengine's 'full', but for the copy to the CPU, in which torch ends with a segmentation fault where all is there.
_FULL_ON_CPU = dict(
    state_dict_type="FULL_STATE_DICT",
    state_dict_config=dict(type="FullStateDictConfig", rank0_only=True),
    optim_state_dict_config=dict(type="FullOptimStateDictConfig", rank0_only=True),
)


class _AsRunnerDoes:
    """In front of a FlexibleRunner: everything in the order of mmengine's Runner, and checkpoints as a whole."""

    _hooks_are_ready = False

    @classmethod
    def from_cfg(cls, cfg: Any) -> Any:
        """Build the runner; its parent forgets ``compile``."""
        runner: Any = super().from_cfg(cfg)  # type: ignore[misc]
        runner._compile = cfg.get("compile") or False
        return runner

    @property
    def _log_dir(self: Any) -> str:  # LoggerHook's name for it
        return self.log_dir

    def load_or_resume(self: Any) -> None:
        """Load a checkpoint after ``before_run``: EMAHook needs its averaged model for it."""
        self.call_hook("before_run")
        self._hooks_are_ready = True
        super().load_or_resume()  # type: ignore[misc]

    def call_hook(self: Any, fn_name: str, **kwargs: Any) -> None:
        """Call a point of all hooks: ``before_run`` once; a checkpoint that is saved has the names of one process."""
        if fn_name == "before_run" and self._hooks_are_ready:
            self._hooks_are_ready = False
            return
        if fn_name == "before_save_checkpoint" and isinstance(self.model, DistributedDataParallel):
            kwargs["checkpoint"]["state_dict"] = weights_to_cpu(get_state_dict(self.model.module))
        super().call_hook(fn_name, **kwargs)  # type: ignore[misc]

    def test(self: Any) -> dict:
        """Test; what DeepSpeed cannot do without an optimiser is one line."""
        try:
            return super().test()  # type: ignore[misc]
        except AssertionError as error:
            if "requires an optimizer" not in str(error):
                raise
            converted = "what DeepSpeed's zero_to_fp32.py makes of its checkpoint"
            raise UsageError(f"DeepSpeed: {error}; test {converted} with --cfg-options strategy=None") from error

    def load_checkpoint(self: Any, filename: str, *args: Any, **kwargs: Any) -> None:
        """Load weights; DeepSpeed goes on without them where it does not find its own."""
        self._check_deepspeed(filename)
        super().load_checkpoint(filename, *args, **kwargs)  # type: ignore[misc]

    def _check_deepspeed(self: Any, filename: str) -> None:
        deepspeed = type(self.strategy).__name__ == "DeepSpeedStrategy"
        if deepspeed and not list(Path(filename).glob("*model_states.pt")):
            raise CheckpointError(
                f"{filename} is no folder that DeepSpeed has written; other checkpoints load with strategy=None"
            )

    def resume(self: Any, filename: str, *args: Any, **kwargs: Any) -> None:
        """Resume from a checkpoint, which must have all that a strategy looks for."""
        self._check_deepspeed(filename)
        try:
            super().resume(filename, *args, **kwargs)  # type: ignore[misc]
        except KeyError as error:
            raise CheckpointError(f"cannot resume from {filename}: it holds no {error}") from error

    def save_checkpoint(
        self: Any, out_dir: str, filename: str, *args: Any, meta: dict | None = None, **kwargs: Any
    ) -> None:
        """Save a checkpoint that gets its name when every process has written its part, with the epoch and iteration
        that ``meta`` says; the parent puts in its own, and an epoch would be left out on resuming.
        """
        kept, strategy = dict(meta or {}), self.strategy

        def save(*, extra_ckpt: dict, **options: Any) -> None:
            extra_ckpt["meta"].update(kept)
            type(strategy).save_checkpoint(strategy, extra_ckpt=extra_ckpt, **options)

        local = isinstance(get_file_backend(out_dir), LocalBackend)
        unfinished = Path(out_dir, f"{filename}{UNFINISHED}")
        strategy.save_checkpoint = save
        try:
            super().save_checkpoint(  # type: ignore[misc]
                out_dir, unfinished.name if local else filename, *args, meta=meta, **kwargs
            )
        finally:
            del strategy.save_checkpoint
        if not local:
            return
        # The second time for machines that do not share the folder.
        for moves in (is_main_process(), os.environ.get("LOCAL_RANK", "0") == "0"):
            barrier()
            if moves and unfinished.exists():
                move_into_place(unfinished, Path(out_dir, filename))
        barrier()


def runner_class(cfg: Config) -> Any:
    """The class of a configuration's ``runner_type``, mmengine's Runner without one. Raises UsageError where it is
    unknown.
    """
    kind = cfg.get("runner_type") or Runner
    found = find_type(RUNNERS, dict(type=kind))
    if found is None:
        raise UsageError(f"runner_type of {cfg.filename} must be Runner, FlexibleRunner or one of your own, got {kind}")
    return type(found.__name__, (_AsRunnerDoes, found), {}) if issubclass(found, FlexibleRunner) else found


def prepare_strategy(cfg: Config) -> None:
    """Complete the strategy of a configuration whose runner is a FlexibleRunner with what mmengine's Runner does by
    itself, in place; other configurations stay the same. Raises UsageError where the strategy does not go with the
    launcher, this machine or another setting.
    """
    if not issubclass(runner_class(cfg), FlexibleRunner):
        return
    distributed = cfg.get("launcher", "none") != "none"
    strategy = dict(cfg.get("strategy") or dict(type="DDPStrategy" if distributed else "SingleDeviceStrategy"))
    found = find_type(STRATEGIES, strategy)
    if found is None:
        raise UsageError(
            f"strategy of {cfg.filename} must be one of {', '.join(STRATEGIES.module_dict)}, got {strategy.get('type')}"
        )
    name = found.__name__
    if package := _PACKAGES.get(name):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UsageError(f"strategy {name} needs the package {package}: {error}") from error
    if issubclass(found, DDPStrategy) and not distributed:
        raise UsageError(f"strategy {name} needs several processes: start with --launcher, as tools/dist_*.sh does")
    if distributed and issubclass(found, SingleDeviceStrategy) and not issubclass(found, DDPStrategy):
        raise UsageError(f"strategy {name} is for one process; --launcher {cfg.launcher} needs DDPStrategy or another")
    if ignored := [setting for setting in _RUNNER_SETTINGS if cfg.get(setting)]:
        raise UsageError(f"runner_type FlexibleRunner does not read {', '.join(ignored)}; runner_type Runner does")
    fsdp = STRATEGIES.get("FSDPStrategy") or ()  # it is not there without torch.distributed
    if name in _PACKAGES or issubclass(found, fsdp):
        _check_sharded(cfg, name)
    if issubclass(found, fsdp):
        _complete_fsdp(strategy)
        if major_minor(torch.__version__) < (2, 4) and get_device() == "cpu":
            raise UsageError(f"strategy {name} runs on a CPU from torch 2.4 on, this is torch {torch.__version__}")
        strategy["type"] = "carafe_plugin.engine.fsdp.CurrentFSDPStrategy" if found is fsdp else strategy["type"]
    elif issubclass(found, DDPStrategy):
        given = strategy.get("model_wrapper") or cfg.get("model_wrapper_cfg")
        strategy["model_wrapper"] = distributed_wrapper(cfg, given)
        strategy.setdefault("sync_bn", cfg.get("sync_bn"))
    cfg.strategy = strategy
    if cfg.get("env_cfg") is None:
        cfg.env_cfg = dict(dist_cfg=dict(backend="nccl"))
    # As Runner: a test needs none of the files that a training starts from.
    cfg.setdefault("init_weights_for_test_or_val", False)


def _check_sharded(cfg: Config, name: str) -> None:
    """Raise a UsageError for what needs whole weights, or a step of the model's own: shards are run by a wrapper."""
    hooks = [type_name(hook) for hook in cfg.get("custom_hooks") or () if isinstance(hook, Mapping)]
    if averaging := [hook for hook in hooks if hook.endswith("EMAHook")]:
        raise UsageError(f"{averaging[0]} averages whole weights, and strategy {name} has them in parts")
    if ((cfg.get("default_hooks") or {}).get("checkpoint") or {}).get("published_keys"):
        raise UsageError(f"published_keys of default_hooks.checkpoint needs files; strategy {name} may write folders")
    if name in _PACKAGES and (cfg.get("auto_scale_lr") or {}).get("enable"):
        raise UsageError(f"strategy {name} does not scale the learning rate: set it without --auto-scale-lr")
    model = find_type(MODELS, cfg.model, toolbox(cfg))
    own = [step for step in ("train_step", "test_step") if getattr(model, step, None) is not getattr(BaseModel, step)]
    if model and own:
        raise UsageError(f"strategy {name} runs models by their forward alone, and {model.__name__} has its {own[0]}")


def _complete_fsdp(strategy: dict[str, Any]) -> None:
    """Give mmengine's FSDPStrategy a form of checkpoints that loads again, and a device that is there."""
    wrapper = dict(strategy.get("model_wrapper") or {})
    state = strategy.setdefault("state_dict_cfg", "full")
    kind = str(state if isinstance(state, str) else state.get("state_dict_type", "local")).lower()
    if "local" in kind and wrapper.get("use_orig_params", True):
        raise UsageError(
            "FSDPStrategy with state_dict_cfg='local' and use_orig_params=True, its wrapper's default, writes "
            "checkpoints of which nothing can be loaded: set state_dict_cfg='full', or use_orig_params=False"
        )
    if get_device() == "cpu":
        strategy["model_wrapper"] = {"type": "MMFullyShardedDataParallel", "device_id": "cpu", **wrapper}
        if "full" in kind:
            strategy["state_dict_cfg"] = _FULL_ON_CPU


def build_runner(cfg: Config) -> Any:
    """Build mmengine's Runner (or the ``runner_type`` of ``cfg``), which says so where SyncBN had to become BN. Raises
    UsageError where a file that the configuration names is missing, or a strategy's package is too new for mmengine.
    """
    try:
        with reading_named_files():
            runner = runner_class(cfg).from_cfg(cfg)
    except ImportError as error:
        if (package := str(error.name).partition(".")[0]) not in _PACKAGES.values():
            raise
        raise UsageError(f"mmengine's strategy does not work with the version of {package} here: {error}") from error
    runner.register_hook(_SyncBNHook())
    return runner


class _SyncBNHook(Hook):
    """Warns of SyncBN that runs as BN; a FlexibleRunner has no model before the run."""

    def before_run(self, runner: Any) -> None:
        # The class that SyncBN layers become; mmengine has no public name for it.
        reverted = sum(type(module).__name__ == "_BatchNormXd" for module in runner.model.modules())
        if reverted and get_device() == "cpu":
            runner.logger.warning(
                f"SyncBN needs a GPU: {reverted} layers run as BN, each process with the statistics of its own images."
            )
