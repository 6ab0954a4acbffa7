"""The processes of a run: which of them this is, and a process group with GPUs or without."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from mmengine.registry import MODEL_WRAPPERS

from carafe_plugin.engine.errors import ProcessError, UsageError

#: Per launcher: how it tells a process its rank, the number of processes and its rank on the machine; how to start it.
LAUNCHERS = {
    "pytorch": (("RANK", "WORLD_SIZE", "LOCAL_RANK"), "torchrun or tools/dist_*.sh"),
    "slurm": (("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"), "srun or tools/slurm_*.sh"),
    "mpi": (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"), "mpirun"),
}


def process_rank(launcher: str | None) -> int:
    """The rank of this process: of torch's process group, else as its launcher, a key of :data:`LAUNCHERS`, says;
    variables of other launchers are ignored.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    names = LAUNCHERS[launcher][0] if launcher in LAUNCHERS else ("",)
    rank = os.environ.get(names[0], "")
    return int(rank) if rank.isdigit() else 0


def require_gpu_for_amp(reason: str) -> None:
    """Raise a :class:`UsageError` on a machine without an accelerator: mmengine's mixed precision needs one."""
    if get_device() == "cpu":
        raise UsageError(f"{reason} needs a GPU (or NPU, MLU, MUSA), and none is available: train without it")


def choose_device(asked: str | None) -> str:
    """The device of a command that runs on one: what ``--device`` says, else the first GPU, else the CPU. Raises
    UsageError where torch cannot use it here.
    """
    device = asked or ("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


@MODEL_WRAPPERS.register_module()
class CPUDistributedDataParallel(MMDistributedDataParallel):
    """The distributed wrapper for processes without a GPU: no device ids, no SyncBN (it takes no CPU tensors)."""

    def __init__(self, module: torch.nn.Module, **kwargs: Any) -> None:
        kwargs.update(device_ids=None)  # mmengine passes the local rank, as if it were a GPU
        super().__init__(module=revert_sync_batchnorm(module), **kwargs)


def distributed_wrapper(cfg: Config, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The configuration of a distributed model's wrapper on this machine: as ``given``, else as mmengine's Runner."""
    wrapper = {
        "type": "MMDistributedDataParallel",
        "broadcast_buffers": False,
        "find_unused_parameters": cfg.get("find_unused_parameters", False),
        **(given or {}),
    }
    kind = wrapper["type"]
    found = MODEL_WRAPPERS.get(kind) if isinstance(kind, str) else kind
    if found is MMDistributedDataParallel and get_device() == "cpu":
        wrapper["type"] = "mmengine.CPUDistributedDataParallel"
    return wrapper


def prepare_processes(cfg: Config) -> None:
    """Make ``cfg.launcher`` work on this machine, with GPUs or without; ``cfg`` is changed in place. Raises UsageError
    where the launcher's variables are missing, or there are more processes than GPUs.

    mmengine initialises processes through CUDA alone; without a GPU the group is made here, on gloo, and the model
    wrapper is one that needs no device.
    """
    launcher = cfg.get("launcher", "none")
    if launcher == "none":
        return
    names, starter = LAUNCHERS[launcher]
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise UsageError(f"--launcher {launcher} needs {', '.join(missing)} in the environment: start with {starter}")
    rank, world_size, local_rank = (os.environ[name] for name in names)
    if get_device() == "cuda" and int(local_rank) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ProcessError(f"process {local_rank} of this machine has no GPU of its own ({found} found)")
    if get_device() != "cpu" or torch.distributed.is_initialized():
        return
    os.environ.update(RANK=rank, WORLD_SIZE=world_size, LOCAL_RANK=local_rank)
    os.environ.setdefault("MASTER_PORT", "29500")
    os.environ.setdefault("MASTER_ADDR", _first_slurm_node() if launcher == "slurm" else "127.0.0.1")
    torch.distributed.init_process_group("gloo")
    cfg.model_wrapper_cfg = distributed_wrapper(cfg, cfg.get("model_wrapper_cfg"))


def _first_slurm_node() -> str:
    nodes = os.environ.get("SLURM_NODELIST", "")
    if not nodes or shutil.which("scontrol") is None:
        return "127.0.0.1"
    listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return listed.stdout.split()[0]
