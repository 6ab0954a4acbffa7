"""Checkpoints: loaded with every mistake named, compared with a model, and found in a training run's folder."""

from __future__ import annotations

import codecs
import datetime
import functools
import itertools
import logging
import os
import pickle
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import EnumMeta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dist import barrier, is_main_process
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner.checkpoint import CheckpointLoader

from carafe_plugin.engine.atomic import restore_superseded
from carafe_plugin.engine.errors import CheckpointError
from carafe_plugin.images import shorten
from carafe_plugin.openmmlab.resnet_checkpoints import CARAFE_KEY

POINTER = "last_checkpoint"  # mmengine's file that names the newest checkpoint
_TRUST = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # torch's own name for it
COUNTER = "num_batches_tracked"
_CARAFE_PART = re.compile(r"\b(channel_compressor|compressor_norm|content_encoder)\.")


def _attribute(owner: Any, name: str) -> Any:
    """Stands for ``getattr``, by which pickle reaches a HistoryBuffer's methods, an Enum's members and classes inside
    classes: of other objects it reached everything.
    """
    known = _allowed()
    inside = isinstance(owner, type) and f"{owner.__module__}.{owner.__qualname__}.{name}" in known
    member = isinstance(owner, EnumMeta) and owner in known.values() and name in owner.__members__
    if not (inside or member or (owner is HistoryBuffer and not name.startswith("_"))):
        raise pickle.UnpicklingError(f"Unsupported GLOBAL builtins.getattr of {owner!r}, {name}")
    return getattr(owner, name)


@functools.cache
def _allowed() -> dict[str, Any]:
    """What a checkpoint may name beside torch's own: mmengine's log history, NumPy's arrays and plain values."""
    plain = (bytearray, complex, dict, frozenset, list, range, set, slice, tuple)
    kinds = (Counter, Namespace, ConfigDict, HistoryBuffer, torch.device, torch.Size)
    times = (datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone)
    arrays = (np.ndarray, np.dtype, *{type(np.dtype(code)) for code in np.typecodes["All"]})
    sharded: tuple[type, ...] = ()
    if torch.distributed.is_available():  # what FSDP writes, each process its part
        from torch.distributed._shard import metadata, sharded_tensor, sharding_spec
        from torch.distributed._shard.sharded_tensor.metadata import MEM_FORMAT_ENCODING
        from torch.distributed.remote_device import _remote_device

        tensor = sharded_tensor.ShardedTensor
        sharded = (tensor, tensor.ProcessGroupState, sharded_tensor.Shard, sharded_tensor.ShardedTensorMetadata)
        sharded += (sharded_tensor.TensorProperties, metadata.ShardMetadata, MEM_FORMAT_ENCODING, _remote_device)
        sharded += (sharding_spec.ChunkShardingSpec, sharding_spec.EnumerableShardingSpec)
    types: dict[str, Any] = {"_codecs.encode": codecs.encode, "builtins.getattr": _attribute}  # the first makes bytes
    types |= {f"{kind.__module__}.{kind.__qualname__}": kind for kind in (*plain, *kinds, *times, *arrays, *sharded)}
    # What makes an array or a number of NumPy's again lies in numpy.core before NumPy 2.0, and in numpy._core since.
    for package, value in itertools.product(("numpy.core", "numpy._core"), (np.zeros(1), np.float64(0))):
        remake: Any = value.__reduce__()[0]
        types[f"{package}.multiarray.{remake.__name__}"] = remake
    return types


class _RestrictedPickle:
    """A ``pickle_module`` for torch before 2.6, whose ``weights_only`` cannot be told of other types."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            from torch._weights_only_unpickler import _get_allowed_globals  # torch < 2.6 does not change any more

            # torch.save writes Python 2's names.
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            dtypes = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
            known = {**_get_allowed_globals(), **dtypes, **_allowed()}
            if f"{module}.{name}" not in known:
                raise pickle.UnpicklingError(f"Unsupported GLOBAL {module}.{name}".replace(" builtins.", " "))
            return known[f"{module}.{name}"]

    @classmethod
    def load(cls, file: Any, **options: Any) -> Any:
        return cls.Unpickler(file, **options).load()


def _names_of_globals() -> bool:
    return hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint")  # since torch 2.6


@contextmanager
def checkpoint_types() -> Iterator[None]:
    """Let ``torch.load(..., weights_only=True)`` load what mmengine puts into a checkpoint beside the weights, in a
    ``with`` block; without it mmengine's own checkpoints cannot be resumed. Before torch 2.6 it does nothing.
    """
    if not _names_of_globals():
        yield
        return
    allowed = {(kind, name) for name, kind in _allowed().items()}
    with torch.serialization.safe_globals(list(allowed.difference(torch.serialization.get_safe_globals()))):
        yield


def use_safe_loading() -> None:
    """Let mmengine load local checkpoints, and those of URLs, by :func:`read_checkpoint`, in this process."""

    def load_from_local(filename: str, map_location: Any = None) -> dict:  # mmengine logs the end of the name
        return read_checkpoint(filename, map_location)

    def load_from_http(filename: str, map_location: Any = None) -> dict:
        return read_url(filename, map_location)

    CheckpointLoader.register_scheme("", load_from_local, force=True)
    CheckpointLoader.register_scheme(["http://", "https://"], load_from_http, force=True)


def check_checkpoint_exists(path: str) -> Path:
    """Return the absolute path of a local checkpoint, or raise a :class:`CheckpointError` if there is no such file or
    folder.
    """
    file = Path(path).expanduser().absolute()
    if not file.exists():
        raise CheckpointError(f"no such checkpoint: {file}")
    return file


def read_checkpoint(path: str, map_location: Any = "cpu", training: bool = False) -> dict:
    """Read a local checkpoint. With ``training`` it must hold what resuming needs, not only weights, and its tensors
    stay in the file (where torch's zip format lets them), as mmengine will read them. Raises CheckpointError where it
    is missing, truncated, damaged or no checkpoint. ``map_location`` is as for ``torch.load``.

    A pickle may run code as it is read: one that names more than weights and plain types is refused, except with
    TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 in the environment.
    """
    file = check_checkpoint_exists(path)
    if file.is_dir():
        raise CheckpointError(f"{file} is a folder; those of FSDP's and DeepSpeed's strategies load in such runs alone")
    options: dict[str, Any] = dict(weights_only=True)
    if os.environ.get(_TRUST, "").lower() in ("1", "y", "yes", "true"):
        options = dict(weights_only=False)
    elif not _names_of_globals():
        options = dict(weights_only=False, pickle_module=_RestrictedPickle)
    if training and zipfile.is_zipfile(file):
        options["mmap"] = True
    try:
        with checkpoint_types():
            checkpoint = torch.load(str(file), map_location=map_location, **options)
    except Exception as error:  # torch raises anything from EOFError to KeyError on a damaged file
        raise CheckpointError(f"cannot read checkpoint {file} {_why_unreadable(file, error)}") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict", checkpoint), dict):
        raise CheckpointError(f"{file} is not a checkpoint: it holds no dictionary of weights")
    if training and not {"epoch", "iter"} <= set(checkpoint.get("meta") or ()):
        raise CheckpointError(f"cannot resume from {file}: it holds weights alone, not the state of a training run")
    return checkpoint


def _why_unreadable(file: Path, error: Exception) -> str:
    told = str(error).rpartition("WeightsUnpickler error:")[2].strip()  # before it, torch advises
    reason = (told or type(error).__name__).splitlines()[0]
    if isinstance(error, ModuleNotFoundError):
        return f"(it holds objects of a module that is not installed, not weights alone): {reason}"
    remedy = f"{_TRUST}=1 in the environment loads it, and runs what it says: only where you trust who made it"
    if named := re.search(r"GLOBAL (\S+)", str(error)):
        whole = "of a whole model, save model.state_dict() in the project that it is from"
        return f"(it holds {named[1]}, and may run code: weights and plain types alone are loaded); {whole}; {remedy}"
    if isinstance(error, pickle.UnpicklingError) and ("Can only" in reason or zipfile.is_zipfile(file)):
        return f"(it holds more than weights and plain types); {remedy}"
    return f"({file.stat().st_size} bytes; truncated or damaged): {reason}"


def read_url(url: str, map_location: Any = "cpu", **_: Any) -> dict:
    """As :func:`read_checkpoint`, from a URL; the file stays where torch keeps what it downloads."""
    file = Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(url).path).name)
    for turn in (is_main_process(), not is_main_process()):  # the others find it, unless on another machine
        if turn and not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(url, str(file), progress=False)
            except OSError as error:
                raise CheckpointError(f"cannot download checkpoint {url}: {error}") from error
        barrier()
    return read_checkpoint(str(file), map_location)


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


@dataclass(frozen=True)
class CheckpointPlace:
    """Where and under which names a training run keeps its checkpoints, as mmengine's ``CheckpointHook`` does.

    Attributes:
        folder (Path): of the checkpoints; mmengine appends the run's name to the hook's ``out_dir``.
        template (str): of their names, with ``{}`` for the epoch or iteration.
        work_dir (Path): of the run; ``last_checkpoint`` is there, or beside the checkpoints.
    """

    folder: Path
    template: str = "epoch_{}.pth"
    work_dir: Path | None = None

    @classmethod
    def of(cls, cfg: Config) -> CheckpointPlace | None:
        """Of the run that ``cfg`` describes; None when that is not a local folder."""
        hook = (cfg.get("default_hooks") or {}).get("checkpoint") or {}
        out_dir, work_dir = hook.get("out_dir"), os.path.abspath(cfg.work_dir)  # noqa: PTH100, as mmengine does
        remote = hook.get("backend_args") or hook.get("file_client_args")
        if remote or not isinstance(get_file_backend(out_dir or work_dir), LocalBackend):
            return None
        # As the hook compares: the work dir itself, as an absolute path, is not an out_dir.
        folder = Path(work_dir)
        if out_dir is not None and out_dir != work_dir:
            folder = Path(out_dir, folder.name)
        return cls(folder, hook.get("filename_tmpl") or "epoch_{}.pth", Path(work_dir))

    def step(self, path: Path) -> int | None:
        """The epoch or iteration that a checkpoint's name tells; None for other files."""
        named = re.fullmatch(r"(\d+)".join(map(re.escape, re.split(r"\{[^}]*\}", self.template))), path.name)
        if named:
            return int(named[1]) if named.groups() else 0
        # best_*.pth come without the optimizer; published files (-<8 hex digits>) without more
        if path.suffix != ".pth" or path.name.startswith("best_") or re.search(r"-[0-9a-f]{8}$", path.stem):
            return None
        numbers = re.findall(r"\d+$", path.stem)  # of an earlier run with another template
        return int(numbers[0]) if numbers else None

    def pointer(self) -> str | None:
        """What ``last_checkpoint`` names, as a name alone: the folder may have been moved since."""
        places = [folder / POINTER for folder in (self.work_dir, self.folder) if folder]
        texts = (file.read_text().strip() for file in places if file.is_file())
        return next((Path(text).name for text in texts if text), None)

    def newest_first(self) -> list[Path]:
        """The checkpoints, the newest first; see :meth:`newest`."""
        restore_superseded(self.folder)
        found = [path for path in self.folder.glob("*") if self.step(path) is not None]
        paths = sorted(found, key=lambda path: (path.stat().st_mtime_ns, self.step(path)), reverse=True)
        name = self.pointer()
        if name is None or not (last := self.folder / name).exists():
            return paths
        others = [path for path in paths if path != last]
        reached, written = self.step(last), last.stat().st_mtime_ns
        later = [
            path
            for path in others
            if reached is not None and (self.step(path) or 0) > reached and path.stat().st_mtime_ns >= written
        ]
        return [*later, last, *(path for path in others if path not in later)]

    def newest(self) -> str | None:
        """The newest checkpoint that can be resumed from; None where no training has left one. Raises CheckpointError
        where one has, and none can be read: a run from the start would overwrite it.

        ``last_checkpoint`` names it, unless the run was killed just before that was brought up to date: a later step
        written after it goes first. Then the others follow, latest written first. A warning names each that is
        unreadable.
        """
        order = self.newest_first()
        for path in order:
            try:
                if path.is_file():  # FSDP's and DeepSpeed's may be folders
                    read_checkpoint(str(path), training=True)
            except CheckpointError as error:
                print_log(f"Skipped on resuming: {error}", logger="current", level=logging.WARNING)
            else:
                return str(path)
        remedy = "name one with --resume PATH, or start anew in another --work-dir"
        if order:
            raise CheckpointError(
                f"cannot resume: none of the {len(order)} checkpoints in {self.folder} can be read; {remedy}"
            )
        if name := self.pointer():
            raise CheckpointError(f"cannot resume: {POINTER} names {name}, which is not in {self.folder}; {remedy}")
        if others := sorted(path.name for path in self.folder.glob("*.pth")):
            raise CheckpointError(
                f"cannot resume: {self.folder} holds {shorten(others)}, and no state of a training; {remedy}"
            )
        return None
