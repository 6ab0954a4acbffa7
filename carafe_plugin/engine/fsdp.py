"""mmengine's FSDPStrategy as torch 2.1 and later need it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from mmengine._strategy.fsdp import FSDPStrategy
from mmengine.device import get_device
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType

from carafe_plugin.engine.errors import CheckpointError


class CurrentFSDPStrategy(FSDPStrategy):
    """mmengine's ``FSDPStrategy``, which resumes (torch 2.1 has changed the order of arguments), clips gradients by the
    norm of all of them, not of each process's part, and refuses a checkpoint of another number of processes.
    """

    def build_optim_wrapper(self, optim_wrapper: Any, model: Any = None) -> Any:
        """Build the optimiser of ``model``, an FSDP module."""
        wrapper = super().build_optim_wrapper(optim_wrapper, model)
        if getattr(wrapper, "clip_func", None) is torch.nn.utils.clip_grad_norm_:
            given = wrapper.clip_grad_kwargs
            settings = {name: given[name] for name in ("max_norm", "norm_type") if name in given}

            def clip() -> None:
                norm = float(model.clip_grad_norm_(**settings))
                wrapper.message_hub.update_scalar(f"train/{wrapper.grad_name}", norm)

            wrapper._clip_grad = clip
        return wrapper

    def load_checkpoint(self, filename: str, **kwargs: Any) -> dict:
        """Load a checkpoint: a file, or a folder with a file of each process."""
        if not self._is_full_state_dict():
            parts = len(list(Path(filename).glob("rank*.pth")))
            if parts != self.world_size:
                raise CheckpointError(
                    f"checkpoint {filename} holds the parts of {parts} processes, and this run has {self.world_size}"
                )
        return super().load_checkpoint(filename, **kwargs)

    def optim_state_dict(self) -> dict:
        """The optimiser's state. Without a GPU, FSDP's own function gives one and the same memory to all its parts."""
        if get_device() != "cpu" or not self._is_full_state_dict():
            return super().optim_state_dict()
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        whole = StateDictOptions(full_state_dict=True)
        return get_optimizer_state_dict(self.model, self.optim_wrapper.optimizer, options=whole)

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Load the optimiser's state, each process its part."""
        own = FullyShardedDataParallel.optim_state_dict_to_load(
            model=self.model, optim=self.optim_wrapper.optimizer, optim_state_dict=state_dict
        )
        self.optim_wrapper.load_state_dict(own)

    def whole_names(self) -> AbstractContextManager:
        """While it lasts, every process has all weights in the model's ``state_dict``, not the first alone."""
        if not self._is_full_state_dict():
            return nullcontext()
        everywhere = FullStateDictConfig(rank0_only=False)
        return FullyShardedDataParallel.state_dict_type(self.model, StateDictType.FULL_STATE_DICT, everywhere)
