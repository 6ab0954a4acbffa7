"""Training two networks with MMEngine: an optimiser for each, several processes, and resuming exactly."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.model import MMSeparateDistributedDataParallel, is_model_wrapper
from mmengine.optim import OptimWrapperDict, build_optim_wrapper
from mmengine.registry import HOOKS, MODEL_WRAPPERS, OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class PerNetworkOptimWrapperConstructor:
    """Builds an optimiser for each part of a model.

    Used through a configuration. What is not a part of the model holds for every optimiser, so that ``--amp`` works::

        optim_wrapper = dict(
            constructor="PerNetworkOptimWrapperConstructor",
            generator=dict(optimizer=dict(type="Adam", lr=1e-4)),
            discriminator=dict(optimizer=dict(type="Adam", lr=1e-4)),
        )

    Raises:
        ValueError: no part is named, or ``paramwise_cfg`` is given, which belongs in a part's own configuration.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        if paramwise_cfg is not None:
            raise ValueError("paramwise_cfg belongs in the configuration of each network's optimiser wrapper")
        self.parts: dict[str, Mapping] = {}
        self.common: dict[str, Any] = {}
        for name, value in optim_wrapper_cfg.items():
            # Parts have their optimiser inside; what else is a dictionary, such as clip_grad, is a common setting.
            is_part = isinstance(value, Mapping) and "optimizer" in value
            (self.parts if is_part else self.common)[name] = value
        if not self.parts:
            raise ValueError(f"optim_wrapper must name parts of the model with an 'optimizer', got {optim_wrapper_cfg}")

    def __call__(self, model: nn.Module) -> OptimWrapperDict:
        """An optimiser wrapper for every part of ``model``."""
        network: Any = model.module if is_model_wrapper(model) else model
        wrappers = {}
        for name, cfg in self.parts.items():
            part: Any = getattr(network, name, None)
            if not isinstance(part, nn.Module):
                raise ValueError(f"optim_wrapper names {name!r}, which is not a part of {type(network).__name__}")
            wrappers[name] = build_optim_wrapper(part, {**self.common, **cfg})
        return OptimWrapperDict(**wrappers)


@MODEL_WRAPPERS.register_module()
class PerNetworkDistributedDataParallel(MMSeparateDistributedDataParallel):
    """MMEngine's distributed wrapper of each part of a model, which also serves processes without a GPU."""

    def __init__(self, module: nn.Module, **kwargs: Any) -> None:
        if get_device() == "cpu":
            kwargs.update(device_ids=None)  # MMEngine passes the local rank, as if it were a GPU
        super().__init__(module=module, **kwargs)


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Lets a resumed run continue as if it had never stopped.

    MMEngine's checkpoints lack the random numbers' state (torch, CUDA, NumPy, Python; with several processes the first
    one's) and the seed of the order of the images, which this hook adds; with :class:`DrawSampler` and
    :class:`InpaintingFolder`, the data resumes at the next draw. What a validation draws is no part of it: the training
    goes on as without one. It also takes distributed modules within the model out of the names of weights, which
    MMEngine would not find again.
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] | None = None  # of a checkpoint, until the first step
        self._before_validation: dict[str, Any] = {}

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Put the state of all random numbers into the checkpoint; name the weights as without several processes."""
        if is_model_wrapper(runner.model):
            checkpoint["state_dict"] = _without_wrappers(runner.model.module, checkpoint["state_dict"])
        seed = getattr(runner.train_dataloader.sampler, "seed", None)
        checkpoint["random_state"] = self._state or dict(_random_state(), sampler_seed=seed)

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Keep the state for the first step: what comes before it (the data loader's start) draws numbers too."""
        self._state = checkpoint.get("random_state")

    def before_train_epoch(self, runner: Any) -> None:
        """Give the sampler its seed, before it is brought to its place."""
        if self._state is None or runner.iter == 0:  # weights were loaded for a new run
            self._state = None
        elif self._state["sampler_seed"] is not None:
            runner.train_dataloader.sampler.seed = self._state["sampler_seed"]

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Restore the random numbers, once."""
        if self._state is None:
            return
        state, self._state = self._state, None
        _set_random_state(state)

    def before_val_epoch(self, runner: Any) -> None:
        """Keep the random numbers' state."""
        self._before_validation = _random_state()

    def after_val_epoch(self, runner: Any, metrics: dict | None = None) -> None:
        """Restore it, before a best checkpoint is written."""
        _set_random_state(self._before_validation)


def _random_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    return dict(
        torch=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        numpy=[name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        python=random.getstate(),
    )


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu().to(torch.uint8))
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([value.cpu().to(torch.uint8) for value in state["cuda"]])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))


def _without_wrappers(model: nn.Module, weights: dict[str, Any]) -> dict[str, Any]:
    wrapped = [name for name, part in model.named_children() if is_model_wrapper(part)]

    def plain(key: str) -> str:
        name, _, rest = key.partition(".")
        return f"{name}.{rest.removeprefix('module.')}" if name in wrapped else key

    return type(weights)((plain(key), value) for key, value in weights.items())
