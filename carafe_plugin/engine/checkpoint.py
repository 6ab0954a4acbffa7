"""Checkpoints that survive a kill at any moment.

mmengine's ``CheckpointHook`` deletes the old checkpoint before it writes the new one, and writes in place: a process
killed in between leaves neither. Here a file appears under its name only when it is complete and on the disk, what it
replaces is deleted afterwards, and resuming takes the newest checkpoint that can be read.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, get_file_backend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner.checkpoint import CheckpointLoader

from carafe_plugin.openmmlab.resnet_checkpoints import CARAFE_KEY

__all__ = [
    "AtomicCheckpointHook",
    "AtomicLocalBackend",
    "CheckpointError",
    "allow_checkpoint_types",
    "checkpoint_folder",
    "find_mismatch",
    "newest_checkpoint",
    "read_checkpoint",
    "use_atomic_checkpoints",
    "use_atomic_writes",
]

POINTER = "last_checkpoint"  # mmengine's file that names the newest checkpoint
UNFINISHED = ".tmp"
COUNTER = "num_batches_tracked"
_CARAFE_PART = re.compile(r"\b(channel_compressor|compressor_norm|content_encoder)\.")


class CheckpointError(Exception):
    """A checkpoint cannot be used; the message says which file and why."""


class AtomicLocalBackend(LocalBackend):
    """mmengine's local file backend with writes that happen completely or not at all.

    Example:
        >>> import tempfile, pathlib
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / 'number'
        ...     AtomicLocalBackend().put_text('42', path)
        ...     path.read_text(), [file.name for file in path.parent.iterdir()]
        ('42', ['number'])
    """

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write ``obj`` to ``filepath``; readers see the old content or the new, never a part.

        Args:
            obj: the content.
            filepath: where to; missing folders are made.

        Raises:
            OSError: the write failed (disk full, no permission); what was at ``filepath`` before is untouched.
        """
        path = Path(filepath)
        path.parent.mkdir(parents=True, exist_ok=True)
        # a name of its own: mmengine lets every process of a run write its metrics to one and the same file
        unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{UNFINISHED}")
        try:
            with unfinished.open("wb") as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())  # else a power cut could leave the new name on an empty file
            unfinished.replace(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        """Write the text ``obj`` to ``filepath`` as :meth:`put` does."""
        self.put(obj.encode(encoding), filepath)


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` last through a power cut, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def use_atomic_writes() -> None:
    """Let every local file that mmengine's ``fileio`` writes in this process (checkpoints, pickles) be atomic."""
    register_backend("local", AtomicLocalBackend, force=True, prefixes="")


class _LateRemoval:
    """A file backend whose removals wait for :meth:`remove_now`."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._paths: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        self._paths.append(path)

    rmtree = remove

    def remove_now(self, keep: set[str]) -> None:
        for path in self._paths:
            if path not in keep:
                _remove(self._backend, path)


def _remove(backend: Any, path: str) -> None:
    if backend.isfile(path):
        backend.remove(path)
    elif backend.isdir(path):  # DeepSpeed's checkpoints are folders
        backend.rmtree(path)


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """The ``CheckpointHook`` of mmengine in an order that a kill cannot hurt. It takes the same arguments.

    The new checkpoint is written under a temporary name, renamed, named in ``last_checkpoint`` (itself renamed into
    place), and only then are outdated checkpoints deleted. This holds for ``save_best`` and ``published_keys`` too.

    Example:
        >>> hook = AtomicCheckpointHook(interval=1, max_keep_ckpts=2, save_best='auto', rule='greater')
    """

    file_backend: Any

    def before_train(self, runner: Any) -> None:
        """Prepare the folder: see the parent; what a killed run left unfinished is deleted."""
        use_atomic_writes()
        super().before_train(runner)
        if is_main_process():
            for folder in {str(self.out_dir), runner.work_dir}:
                for pattern in ("*.pth", POINTER):
                    for leftover in Path(folder).glob(f"{pattern}.*{UNFINISHED}"):
                        leftover.unlink(missing_ok=True)

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict) -> None:
        outdated = []
        if self.max_keep_ckpts > 0 and (not self.keep_ckpt_ids or self.keep_ckpt_ids[-1] != step):
            steps = [*self.keep_ckpt_ids, step]
            outdated = steps[: -self.max_keep_ckpts]
            self.keep_ckpt_ids.append(step)
            # The file lists the outdated ones as well: a run killed before it deletes them deletes them on resuming.
            runner.message_hub.update_info("keep_ckpt_ids", steps)

        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            AtomicLocalBackend().put_text(str(self.last_ckpt), Path(runner.work_dir, POINTER))
            for old in outdated:
                _remove(self.file_backend, self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(old)))
        if outdated:
            runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))

    def _save_best_checkpoint(self, runner: Any, metrics: dict) -> None:
        # The parent removes the previous best before it saves the new one: hold the removal back until both are safe.
        backend = self.file_backend
        self.file_backend = late = _LateRemoval(backend)
        try:
            super()._save_best_checkpoint(runner, metrics)
        finally:
            self.file_backend = backend
        best = {getattr(self, "best_ckpt_path", None), *getattr(self, "best_ckpt_path_dict", {}).values()}
        late.remove_now(keep=best)


def use_atomic_checkpoints(cfg: Config) -> None:
    """Put :class:`AtomicCheckpointHook` in the place of mmengine's hook in ``cfg``, with the same settings.

    A hook of another type, and ``checkpoint=None`` (no checkpoints), are left alone.
    """
    hooks = cfg.get("default_hooks") or {}
    hook = hooks.get("checkpoint", dict(type="CheckpointHook", interval=1))
    if hook and hook.get("type") in ("CheckpointHook", "mmengine.CheckpointHook", CheckpointHook):
        cfg.default_hooks = {**hooks, "checkpoint": {**hook, "type": f"{__name__}.AtomicCheckpointHook"}}


def allow_checkpoint_types() -> None:
    """Let ``torch.load`` read what mmengine puts into a checkpoint beside the weights.

    From torch 2.6 on, only tensors and plain types load by default. mmengine adds its log history (NumPy arrays in a
    ``HistoryBuffer``); without this its own checkpoints cannot be resumed where mmengine does not allow them itself.
    """
    if not hasattr(torch.serialization, "add_safe_globals"):  # older torch loads everything
        return
    import numpy as np
    from mmengine.logging import HistoryBuffer

    core = np._core if hasattr(np, "_core") else np.core
    multiarray: Any = core.multiarray
    # HistoryBuffer pickles its methods through getattr. Load checkpoints of people you trust, here as in mmengine.
    scalar_types = {type(np.dtype(name)) for name in ("bool", "int32", "int64", "uint8", "float32", "float64")}
    torch.serialization.add_safe_globals(
        [HistoryBuffer, np.ndarray, np.dtype, multiarray._reconstruct, multiarray.scalar, getattr, *scalar_types]
    )


def read_checkpoint(path: str, training: bool = False) -> dict:
    """Read a local checkpoint, as testing or resuming will.

    Args:
        path: the file.
        training: whether it must hold what resuming needs (``meta`` with ``epoch`` and ``iter``), not only weights.

    Returns:
        The checkpoint, on the CPU.

    Raises:
        CheckpointError: there is no such file, it is truncated or damaged, or it is not a checkpoint.
    """
    file = Path(path).expanduser().absolute()
    if not file.is_file():
        raise CheckpointError(f"no such checkpoint: {file}")
    try:
        checkpoint = CheckpointLoader.load_checkpoint(str(file), map_location="cpu", logger="silent")
    except Exception as error:  # torch raises anything from EOFError to KeyError on a damaged file
        raise CheckpointError(f"cannot read checkpoint {file} {_why_unreadable(file, error)}") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict", checkpoint), dict):
        raise CheckpointError(f"{file} is no checkpoint: it holds no dictionary of weights")
    if training and not {"epoch", "iter"} <= set(checkpoint.get("meta") or ()):
        raise CheckpointError(f"cannot resume from {file}: it holds weights alone, not the state of a training run")
    return checkpoint


def _why_unreadable(file: Path, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, ModuleNotFoundError):
        return f"(it holds objects of a module that is not installed, not weights alone): {reason}"
    if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error):
        reason = next((line for line in str(error).splitlines() if "Unsupported" in line), reason).strip()
        return (
            f"(it holds more than weights and plain types; TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 in the environment loads "
            f"what you trust): {reason}"
        )
    return f"({file.stat().st_size} bytes; truncated or damaged): {reason}"


def find_mismatch(model: torch.nn.Module, state_dict: Mapping[str, torch.Tensor]) -> str | None:
    """How a checkpoint does not fit a model, as a message; None where it does.

    mmengine only warns, and a model of which a part kept its random weights is then evaluated. What a checkpoint has
    beyond the model (an auxiliary head, a mask head) does no harm and is no mismatch, except CARAFE++ alone: then the
    model resizes in another way than the one that was trained.

    Args:
        model: The model; the weights that fit are loaded into it.
        state_dict: Parameters by name, with or without the prefix ``"module."`` of a wrapped model.

    Example:
        >>> import torch
        >>> find_mismatch(torch.nn.Linear(2, 1), dict(weight=torch.zeros(1, 2)))
        'lacks 1 of the 2 parameters of Linear, the first: bias'
    """
    weights = {name.removeprefix("module."): value for name, value in state_dict.items()}
    # BatchNorm's counters came after 2017: older checkpoints lack them, and evaluation does not need them.
    name, expected = type(model).__name__, [key for key in model.state_dict() if not key.endswith(COUNTER)]
    if not any(isinstance(value, torch.Tensor) for value in weights.values()):
        return "holds no parameters"
    try:
        # Not a comparison of names: modules of the toolboxes rename what older versions wrote while they load.
        missing, unexpected = torch.nn.Module.load_state_dict(model, weights, strict=False)
    except RuntimeError as error:
        sizes = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        first = sizes[0].rstrip(".") if sizes else str(error).splitlines()[0]
        return f"fits {name} in name alone, {len(sizes)} parameters differ in shape: {first}"
    missing = [key for key in missing if not key.endswith(COUNTER)]
    if len(missing) == len(expected):
        return f"holds no parameter of {name} (its first: {next(iter(weights), 'none')})"
    if missing:
        return f"lacks {len(missing)} of the {len(expected)} parameters of {name}, the first: {missing[0]}"
    if stray := _stray_carafe(unexpected, expected):
        return f"holds CARAFE++ where {name} has none: {stray}"
    return None


def _stray_carafe(unexpected: Sequence[str], expected: Sequence[str]) -> str | None:
    """The first CARAFE++ among unexpected parameters that stands alone, not inside a part which the model lacks."""
    for key in unexpected:
        if not key.endswith(CARAFE_KEY):
            continue
        parts = key.split(".")
        prefixes = (".".join(parts[:n]) + "." for n in range(1, len(parts)))
        part = next((p for p in prefixes if not any(name.startswith(p) for name in expected)), None)
        if part and all(_CARAFE_PART.search(name) for name in unexpected if name.startswith(part)):
            return key
    return None


def newest_checkpoint(folder: str) -> str | None:
    """The newest checkpoint in a training run's folder that can be read.

    ``last_checkpoint`` says which one that is, unless the run was killed just before it was brought up to date: a
    later step written after it goes first. Then the others follow, latest written first. The unreadable ones are
    skipped with a warning that names them.

    Args:
        folder: where the run's checkpoints lie.

    Returns:
        The path, or None where the folder holds no checkpoint.

    Raises:
        CheckpointError: there are checkpoints, and none can be read.
    """
    order = _newest_first(Path(folder))
    for path in order:
        try:
            read_checkpoint(str(path), training=True)
        except CheckpointError as error:
            print_log(f"Skipped on resuming: {error}", logger="current", level=logging.WARNING)
        else:
            return str(path)
    if order:
        raise CheckpointError(f"cannot resume: none of the {len(order)} checkpoints in {folder} can be read")
    return None


def _newest_first(folder: Path) -> list[Path]:
    def step(path: Path) -> int:
        return int(re.findall(r"\d+", path.stem)[-1])

    # best_*.pth come without the optimizer; published files (-<8 hex digits>) without more
    paths = [p for p in folder.glob("*.pth") if re.search(r"\d$", p.stem) and not p.name.startswith("best_")]
    paths = [p for p in paths if not re.search(r"-[0-9a-f]{8}$", p.stem)]
    paths.sort(key=lambda path: (path.stat().st_mtime_ns, step(path)), reverse=True)
    pointer = folder / POINTER
    # The name alone counts: the folder may have been moved since.
    last = folder / Path(pointer.read_text().strip()).name if pointer.is_file() else None
    if last not in paths:
        return paths
    later = [p for p in paths if step(p) > step(last) and p.stat().st_mtime_ns >= last.stat().st_mtime_ns]
    return [*later, last, *(p for p in paths if p != last and p not in later)]


def checkpoint_folder(cfg: Config) -> str | None:
    """Where the run that ``cfg`` describes keeps its checkpoints; None when that is not a local folder."""
    hook = (cfg.get("default_hooks") or {}).get("checkpoint") or {}
    folder = hook.get("out_dir")
    if hook.get("backend_args") or not isinstance(get_file_backend(folder or cfg.work_dir), LocalBackend):
        return None
    # mmengine appends the run's name to an out_dir
    return str(Path(folder, Path(cfg.work_dir).name)) if folder else cfg.work_dir
