"""Checkpoints: loaded with every mistake named, compared with a model, and found in a training run's folder."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner.checkpoint import CheckpointLoader, load_from_local

from carafe_plugin.engine.errors import CheckpointError
from carafe_plugin.openmmlab.resnet_checkpoints import CARAFE_KEY

POINTER = "last_checkpoint"  # mmengine's file that names the newest checkpoint
COUNTER = "num_batches_tracked"
_CARAFE_PART = re.compile(r"\b(channel_compressor|compressor_norm|content_encoder)\.")


@contextmanager
def checkpoint_types() -> Iterator[None]:
    """Let ``torch.load`` load what mmengine puts into a checkpoint beside the weights, in a ``with`` block.

    From torch 2.6 on, only tensors and plain types load by default. mmengine adds its log history (NumPy arrays in a
    ``HistoryBuffer``); without this its own checkpoints cannot be resumed where mmengine does not allow them itself.
    """
    if not hasattr(torch.serialization, "safe_globals"):  # torch before 2.5 loads everything by default
        yield
        return
    core = np._core if hasattr(np, "_core") else np.core
    multiarray: Any = core.multiarray
    # HistoryBuffer pickles its methods through getattr. Load checkpoints of people you trust, here as in mmengine.
    scalar_types = {type(np.dtype(name)) for name in ("bool", "int32", "int64", "uint8", "float32", "float64")}
    types = {HistoryBuffer, np.ndarray, np.dtype, multiarray._reconstruct, multiarray.scalar, getattr, *scalar_types}
    before = torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals(list(types.difference(before))):
        try:
            yield
        finally:  # mmengine uses torch's context manager too, which takes away all that it is given
            torch.serialization.add_safe_globals(before)


def use_safe_loading() -> None:
    """Let mmengine load local checkpoints by :func:`read_checkpoint`, in this process."""
    CheckpointLoader.register_scheme("", read_checkpoint, force=True)


def check_checkpoint_exists(path: str) -> Path:
    """Return the absolute path of a local checkpoint, or raise a :class:`CheckpointError` if there is no such file."""
    file = Path(path).expanduser().absolute()
    if not file.is_file():
        raise CheckpointError(f"no such checkpoint: {file}")
    return file


def read_checkpoint(path: str, map_location: Any = "cpu", training: bool = False) -> dict:
    """Read a local checkpoint; with ``training``, one that holds what resuming needs, not only weights. Raises
    CheckpointError where it is missing, truncated, damaged or no checkpoint. ``map_location`` is as for ``torch.load``.
    """
    file = check_checkpoint_exists(path)
    try:
        with checkpoint_types():
            checkpoint = load_from_local(str(file), map_location)
    except Exception as error:  # torch raises anything from EOFError to KeyError on a damaged file
        raise CheckpointError(f"cannot read checkpoint {file} {_why_unreadable(file, error)}") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict", checkpoint), dict):
        raise CheckpointError(f"{file} is not a checkpoint: it holds no dictionary of weights")
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
    beyond the model (an auxiliary head, a mask head) does no harm and is not a mismatch, except CARAFE++ alone: then
    the model resizes in another way than the one that was trained.

    The weights that fit are loaded into the model. Names may have the prefix ``"module."`` of a wrapped model.

    Example:
        >>> import torch
        >>> find_mismatch(torch.nn.Linear(2, 1), dict(weight=torch.zeros(1, 2)))
        'lacks 1 of the 2 parameters of Linear, the first: bias'
    """
    # A distributed model has "module." in its names: in front, or in front of each network of a GAN.
    names = {_unwrapped(key): key for key in model.state_dict()}
    weights = {names.get(_unwrapped(name), _unwrapped(name)): value for name, value in state_dict.items()}
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


def _unwrapped(name: str) -> str:
    return re.sub(r"(^|\.)module\.", r"\1", name)


def _stray_carafe(unexpected: Sequence[str], expected: Sequence[str]) -> str | None:
    """The first CARAFE++ among unexpected parameters that stands alone, not inside a part that the model lacks."""
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
    """The newest checkpoint in a training run's folder that can be read; None where there are none. Raises
    CheckpointError where there are some and none can be read.

    ``last_checkpoint`` names it, unless the run was killed just before that was brought up to date: a later step
    written after it goes first. Then the others follow, latest written first. A warning names each that is unreadable.
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
