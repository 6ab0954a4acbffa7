"""What ``tools/train.py``, ``tools/test.py`` and ``tools/infer.py`` share, on top of mmengine's Runner.

A run is prepared in this order: :func:`read_config` (files, options, adapters), then what the tool's own options
change in the configuration, then :func:`check_dataset_files`, :func:`prepare_processes`, :func:`build_runner`.
What a user can get wrong ends in a :class:`UsageError`: :func:`run_tool` prints it as one line and returns 2.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from mmengine.registry import MODEL_WRAPPERS, MODELS, RUNNERS
from mmengine.runner import Runner

from carafe_plugin.engine.annotations import AnnotationError, check_annotations
from carafe_plugin.engine.checkpoint import CheckpointError, allow_checkpoint_types
from carafe_plugin.engine.errors import UsageError
from carafe_plugin.engine.label_maps import find_fault
from carafe_plugin.openmmlab import mmcv_ops
from carafe_plugin.openmmlab.resnet_checkpoints import CheckpointMismatch

__all__ = [
    "UsageError",
    "add_run_options",
    "build_runner",
    "check_dataset_files",
    "check_not_empty",
    "import_adapters",
    "prepare_processes",
    "read_config",
    "run_tool",
]

#: The toolbox of a configuration's ``default_scope`` -> our adapter to it.
ADAPTERS = {scope: f"carafe_plugin.openmmlab.{scope}" for scope in ("mmdet", "mmseg", "mmpretrain")}

#: Per launcher: how it tells a process its rank, the number of processes and its rank on the machine; how to start it.
LAUNCHERS = {
    "pytorch": (("RANK", "WORLD_SIZE", "LOCAL_RANK"), "torchrun or tools/dist_*.sh"),
    "slurm": (("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"), "srun or tools/slurm_*.sh"),
    "mpi": (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"), "mpirun"),
}


def run_tool(main: Callable[[argparse.Namespace], int | None], args: argparse.Namespace) -> int:
    """Run a tool's main function and turn what the user can put right into one line on stderr.

    Where MMCV has no compiled operators, the tool and its processes have torchvision's (see ``mmcv_ops``).

    Args:
        main: called with ``args``; returns the exit code, None for 0.
        args: the parsed command line.

    Returns:
        The exit code: 2 after a :class:`UsageError`, an unusable checkpoint, a missing file or an MMCV whose operators
        do not load.
    """
    try:
        _use_mmcv_ops()
        return main(args) or 0
    except (UsageError, CheckpointError, CheckpointMismatch) as error:
        # Every process of a distributed run finds the same mistake: one of them says so.
        message = str(error) if _rank() == 0 else ""
    except ImportError as error:
        if error.name != mmcv_ops.EXTENSION:
            raise
        message = ""  # mmcv_ops has said it
    except FileNotFoundError as error:
        if error.filename:
            message = f"no such file or folder: {Path(error.filename).absolute()}"
        else:  # from a data loader's worker, with the worker's traceback in its text: the last line is the error
            message = (str(error).strip() or "a file is missing").splitlines()[-1]
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
            # The runner is a cycle of references and holds the distributed model, which holds the group: left to the
            # interpreter's end, gloo's threads would outlive it, and a process that has done its work may abort.
            gc.collect()
    if message:
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _use_mmcv_ops() -> None:
    try:
        mmcv_ops.install()
    except ValueError as error:
        raise UsageError(str(error)) from error


def _rank() -> int:
    for (rank, _, _), _ in LAUNCHERS.values():
        if os.environ.get(rank, "").isdigit():
            return int(os.environ[rank])
    return 0


# ------------------------------------------------------------------------------------------------ the command line


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


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add the options about the configuration, common to all tools."""
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=ConfigOptions,
        metavar="KEY=VALUE",
        help="change settings of the configuration, for example train_dataloader.batch_size=4 or "
        'model.neck.type=CARAFEFPN; lists as key=a,b or key="[a,b]" (quoted, no blanks)',
    )
    parser.add_argument(
        "--drop-in",
        action="store_true",
        help="run configurations that use mmcv's layer 'carafe' (FPN_CARAFE) on carafe_plugin's operator",
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every tool that is a run of mmengine's Runner."""
    parser.add_argument(
        "config", help="configuration file of mmdet, mmseg or mmpretrain, or of mmengine alone (configs/inpainting)"
    )
    parser.add_argument("--work-dir", help="folder for logs and results (default: work_dirs/<name of the config>)")
    add_config_options(parser)
    parser.add_argument(
        "--launcher", choices=["none", *LAUNCHERS], default="none", help="what started the processes (default: none)"
    )
    # torch.distributed.launch passes it, spelt by its version; torchrun sets LOCAL_RANK instead.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


# ----------------------------------------------------------------------------------------------- the configuration


def load_config(path: str, options: Mapping[str, Any] | None = None) -> Config:
    """Read a configuration and merge ``--cfg-options`` into it.

    Modules of the user's own that it names (``custom_imports``, or the ``type`` of a ``carafe_cfg`` as
    ``"my_upsample.MyUpsample"``) are found in the current folder too.

    Raises:
        UsageError: the file, or one that it builds on, is missing or is no configuration; a module that it names
            cannot be imported; or an option does not fit.
    """
    file = Path(path).absolute()
    if not file.is_file():
        raise UsageError(f"no such configuration file: {file}")
    if str(Path.cwd()) not in sys.path:  # as with python -m, but last, so that it hides nothing
        sys.path.append(str(Path.cwd()))
    try:
        cfg = Config.fromfile(path)
    except FileNotFoundError as error:
        raise UsageError(f"configuration {path} builds on a file that is missing: {error}") from error
    except ImportError as error:
        # mmengine lists sys.path instead of a reason: that is two errors down.
        reason = getattr(error.__cause__, "__context__", None) or error
        raise UsageError(f"configuration {path} needs a module that cannot be imported: {reason}") from error
    except (SyntaxError, OSError) as error:
        raise UsageError(f"cannot read configuration {file}: {error}") from error
    try:
        cfg.merge_from_dict(dict(options or {}))
    except (KeyError, TypeError, IndexError) as error:
        raise UsageError(f"--cfg-options do not fit {path}: {error}") from error
    _report_failed_imports(cfg)
    _check_operators(cfg.get("model"), path)
    return cfg


def _report_failed_imports(cfg: Config) -> None:
    """Say why a module that ``custom_imports`` allows to fail did fail; mmengine says that it did."""
    custom = cfg.get("custom_imports") or {}
    if not custom.get("allow_failed_imports"):
        return
    names = custom.get("imports") or []
    for name in [names] if isinstance(names, str) else names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            if _rank() == 0:
                print(f"warning: custom_imports goes on without {name}: {error}", file=sys.stderr)


def _check_operators(part: Any, path: str, inside: bool = False) -> None:
    """Import the modules in which ``carafe_cfg`` says that operators are; the registry would call them unknown."""
    if isinstance(part, (list, tuple)):
        for value in part:
            _check_operators(value, path, inside)
    if not isinstance(part, Mapping):
        return
    kind = part.get("type")
    module = kind.rpartition(".")[0] if inside and isinstance(kind, str) else ""
    if module and module not in MODELS.children:  # a registry's scope, as in "mmdet.FPN"
        try:
            importlib.import_module(module)
        except (ImportError, SyntaxError) as error:
            raise UsageError(f"configuration {path}: cannot import {module} of carafe_cfg's {kind}: {error}") from error
    for key, value in part.items():
        _check_operators(value, path, inside or key == "carafe_cfg")


def read_config(args: argparse.Namespace) -> Config:
    """The configuration of a run, as the common options ask for it, with our adapters imported.

    Args:
        args: what :func:`add_run_options` parsed.

    Raises:
        UsageError: see :func:`load_config` and :func:`import_adapters`.
    """
    cfg = load_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get("work_dir") is None:
        cfg.work_dir = str(Path("work_dirs", Path(args.config).stem))
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    import_adapters(cfg.get("default_scope"), drop_in=args.drop_in)
    allow_checkpoint_types()
    if cfg.get("default_scope") == "mmpretrain":
        _complete_mmpretrain_dataloaders(cfg)
    return cfg


def import_adapters(scope: str | None, drop_in: bool = False) -> None:
    """Register CARAFE++'s types for the toolbox ``scope``.

    Args:
        scope: a configuration's ``default_scope``. A toolbox of which we know nothing gets the layers alone.
        drop_in: also make the layer 'carafe' ours.

    Raises:
        UsageError: the toolbox is not installed.
    """
    names = ["carafe_plugin.openmmlab.layers"]
    names += [ADAPTERS[scope]] if scope in ADAPTERS else []
    names += ["carafe_plugin.openmmlab.drop_in"] if drop_in else []
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            if error.name not in (scope, "mmcv"):  # a toolbox that fails by itself: its own error
                raise
            raise UsageError(str(error)) from error


def _complete_mmpretrain_dataloaders(cfg: Config) -> None:
    # mmpretrain's configurations leave these to its tools; without the collate function its models get lists.
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        if cfg.get(name):
            cfg[name].setdefault("pin_memory", True)
            cfg[name].setdefault("persistent_workers", cfg[name].get("num_workers", 0) > 0)
            cfg[name].setdefault("collate_fn", dict(type="default_collate"))


def dataset_configs(dataset: Any) -> Iterator[Any]:
    """The datasets inside wrappers (``RepeatDataset``, ``ConcatDataset``, ...) of a dataset's configuration.

    What is no configuration, as a dataset that is built already, is passed over.
    """
    if not isinstance(dataset, Mapping):
        return
    inner = dataset.get("dataset") or dataset.get("datasets")
    if not inner:
        yield dataset
    for part in inner if isinstance(inner, (list, tuple)) else [inner] if inner else []:
        yield from dataset_configs(part)


def check_dataset_files(cfg: Config, *splits: str) -> None:
    """Check that the annotation files and image folders that ``cfg`` names are there, before anything is built.

    In mmseg also that every image has its annotation, of the same size; in mmdet, what the annotations say, and that
    their images are there (:func:`~carafe_plugin.engine.annotations.check_annotations`).

    Args:
        cfg: the configuration.
        splits: which data loaders the run needs: 'train', 'val', 'test'. 'val' may be absent from ``cfg``.

    Raises:
        UsageError: a file or folder is missing, an annotation has another size than its image or is at fault itself,
            or a data loader is missing.
    """
    for split in splits:
        loader = cfg.get(f"{split}_dataloader")
        if not loader:
            if split == "val":
                continue
            raise UsageError(f"configuration {cfg.filename} has no {split}_dataloader")
        for dataset in dataset_configs(loader.dataset):
            if dataset.get("backend_args"):  # the files are not on this machine
                continue
            place = f"{split}_dataloader ({_name(dataset.get('type'))})"
            _check_dataset(dataset, place)
            # One process reads the headers of all images, or all annotations; where it ends, its launcher ends the
            # others.
            if cfg.get("default_scope") == "mmseg" and _rank() == 0 and (fault := find_fault(dataset)):
                raise UsageError(f"{place}: {fault}")
            if cfg.get("default_scope") == "mmdet" and _rank() == 0:
                try:
                    check_annotations(dataset, cfg.get(f"{split}_evaluator"), training=split == "train")
                except AnnotationError as error:
                    raise UsageError(f"{place}: {error}") from error


def _check_dataset(dataset: Any, place: str) -> None:
    annotations = dataset.get("ann_file")
    if isinstance(annotations, str) and annotations and not _source(dataset, annotations, Path.exists):
        raise UsageError(f"no such annotation file for {place}: {_path(dataset, annotations)}")
    prefix = dataset.get("data_prefix") or {}
    for key, folder in prefix.items() if isinstance(prefix, Mapping) else [("data_prefix", prefix)]:
        if isinstance(folder, str) and folder and not _source(dataset, folder, Path.is_dir):
            raise UsageError(f"no such folder for {place}, {key}: {_path(dataset, folder)}")


def _path(dataset: Any, part: str) -> Path:
    return Path(dataset.get("data_root") or "", part).absolute()


def _source(dataset: Any, part: str, exists: Callable[[Path], bool]) -> bool:
    """Whether ``part`` of a dataset is there, or on another machine."""
    return "://" in (dataset.get("data_root") or "") + part or exists(_path(dataset, part))


def _name(type_: Any) -> str:
    return type_ if isinstance(type_, str) else getattr(type_, "__name__", str(type_))


# -------------------------------------------------------------------------------------------------------- devices


def require_gpu_for_amp(reason: str) -> None:
    """Raise a :class:`UsageError` on a machine without an accelerator: mmengine's mixed precision needs one."""
    if get_device() == "cpu":
        raise UsageError(f"{reason} needs a GPU (or NPU, MLU, MUSA), and none is available: train without it")


@MODEL_WRAPPERS.register_module()
class CPUDistributedDataParallel(MMDistributedDataParallel):
    """The distributed wrapper for processes without a GPU: no device ids, no SyncBN (it takes no CPU tensors)."""

    def __init__(self, module: torch.nn.Module, **kwargs: Any) -> None:
        kwargs.update(device_ids=None)  # mmengine passes the local rank, as if it were a GPU
        super().__init__(module=revert_sync_batchnorm(module), **kwargs)


def prepare_processes(cfg: Config) -> None:
    """Make ``cfg.launcher`` work on this machine, with GPUs or without.

    mmengine initialises processes through CUDA alone; without a GPU the group is made here, on gloo, and the model
    wrapper is one that needs no device.

    Args:
        cfg: the configuration of the run; changed in place.

    Raises:
        UsageError: the launcher's variables are missing, or there are more processes than GPUs.
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
        raise UsageError(f"process {local_rank} of this machine has no GPU of its own ({found} found)")
    if get_device() != "cpu" or torch.distributed.is_initialized():
        return
    os.environ.update(RANK=rank, WORLD_SIZE=world_size, LOCAL_RANK=local_rank)
    os.environ.setdefault("MASTER_PORT", "29500")
    os.environ.setdefault("MASTER_ADDR", _first_slurm_node() if launcher == "slurm" else "127.0.0.1")
    torch.distributed.init_process_group("gloo")
    wrapper = {
        "broadcast_buffers": False,
        "find_unused_parameters": cfg.get("find_unused_parameters", False),
        **(cfg.get("model_wrapper_cfg") or {}),
    }
    if wrapper.get("type", "MMDistributedDataParallel") == "MMDistributedDataParallel":
        wrapper["type"] = "mmengine.CPUDistributedDataParallel"
    cfg.model_wrapper_cfg = wrapper


def _first_slurm_node() -> str:
    nodes = os.environ.get("SLURM_NODELIST", "")
    if not nodes or shutil.which("scontrol") is None:
        return "127.0.0.1"
    listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return listed.stdout.split()[0]


# --------------------------------------------------------------------------------------------------------- runner


def build_runner(cfg: Config) -> Runner:
    """Build mmengine's Runner (or the ``runner_type`` of ``cfg``), and say so where SyncBN had to become BN."""
    runner = Runner.from_cfg(cfg) if "runner_type" not in cfg else RUNNERS.build(cfg)
    # The class that SyncBN layers become; mmengine has no public name for it.
    reverted = sum(type(module).__name__ == "_BatchNormXd" for module in runner.model.modules())
    if reverted and get_device() == "cpu":
        runner.logger.warning(
            f"SyncBN needs a GPU: {reverted} layers run as BN, each process with the statistics of its own images."
        )
    return runner


def check_not_empty(runner: Runner, *splits: str) -> None:
    """Build the datasets of a run and raise a :class:`UsageError` where one holds no image.

    Args:
        runner: the run.
        splits: 'train', 'val', 'test'. 'val' may be absent from the configuration.
    """
    for split in splits:
        if not runner.cfg.get(f"{split}_dataloader"):
            continue
        try:
            images = len(getattr(runner, f"{split}_dataloader").dataset)
        except ValueError as error:
            if "need at least one array" not in str(error):  # what becomes of mmengine's packing of an empty list
                raise
            images = 0
        if images == 0:
            datasets = list(dataset_configs(runner.cfg[f"{split}_dataloader"].dataset))
            sources = ", ".join(str(_path(dataset, dataset.get("ann_file") or "")) for dataset in datasets)
            types = ", ".join(_name(dataset.get("type")) for dataset in datasets)
            raise UsageError(f"no images in {split}_dataloader ({types}): looked in {sources}")
