"""Checkpoint files of ``tools/convert_checkpoint.py`` and ``tools/convert_backbone.py``.

:mod:`~carafe_plugin.engine.checkpoint_layouts` converts parameters; here is what surrounds them in a file: the ``meta``
that records what no name tells, mmengine's averaged weights, and what a conversion leaves out.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from carafe_plugin.engine.atomic import AtomicLocalBackend
from carafe_plugin.engine.checkpoint import read_checkpoint
from carafe_plugin.engine.checkpoint_layouts import (
    ACTIVATIONS,
    LAYOUTS,
    Conversion,
    Fork,
    LayoutError,
    convert_layout,
    find_sources,
    module_name,
    norm_of_mmcv,
)
from carafe_plugin.engine.errors import UsageError

RECORD = "carafe_layout"  # in a file's meta: module -> its layout there, and the options that it was written with
EMA = "ema_state_dict"  # what mmengine's EMAHook keeps beside state_dict, under the names of a wrapper
WRAPPED = "module."


def check_destination(source: Path, destination: Path) -> None:
    """Raise a :class:`UsageError` unless ``destination`` can be a file beside ``source``."""
    if destination.is_dir():
        raise UsageError(f"DST must be a file, and is a folder: {destination}")
    if destination.exists() and source.exists() and destination.samefile(source):
        raise UsageError(f"DST must be another file than SRC: {destination}")


def write_checkpoint(checkpoint: dict, destination: Path) -> None:
    """Write a checkpoint, completely or not at all. Raises UsageError where it cannot be written."""
    content = io.BytesIO()
    torch.save(checkpoint, content)
    try:
        AtomicLocalBackend().put(content.getvalue(), destination)
    except OSError as error:
        raise UsageError(f"cannot write {destination}: {error}") from error


class Content(NamedTuple):
    """What a checkpoint holds: weights by name, the entries :data:`EMA` and ``meta``, and the names of all else."""

    weights: dict[str, torch.Tensor]
    ema: dict[str, torch.Tensor] | None
    meta: dict
    left_out: list[str]


def read_content(path: Path) -> Content:
    """The content of a checkpoint. Raises UsageError where it holds a model instead of weights, CheckpointError where
    it is missing or cannot be read.
    """
    checkpoint = read_checkpoint(str(path))
    weights: Any = checkpoint
    for key in ("state_dict", "model"):
        if not isinstance(checkpoint.get(key, torch.zeros(())), torch.Tensor):
            weights = checkpoint[key]
            break
    if not isinstance(weights, dict):
        raise UsageError(
            f"{path} holds a whole model ({type(weights).__name__}), not its weights: "
            "in the project that it is from, save model.state_dict()"
        )
    tensors = {name: value for name, value in weights.items() if isinstance(value, torch.Tensor)}
    meta, ema = checkpoint.get("meta"), checkpoint.get(EMA)
    content = Content(tensors, ema if isinstance(ema, dict) else None, meta if isinstance(meta, dict) else {}, [])
    for name, value in {**checkpoint, **weights}.items():
        if name not in tensors and not any(value is taken for taken in (weights, content.ema, content.meta)):
            content.left_out.append(str(name))
    return content


class Result(NamedTuple):
    """A checkpoint to be written, the conversions of its weights and of :data:`EMA`, and ``origins``: a line to print
    with what the names do not tell and where each value is from.
    """

    checkpoint: dict
    weights: Conversion
    ema: Conversion | None
    origins: str


def convert(
    content: Content, to: str, given: Mapping[str, Any], below: Sequence[str], rename: Mapping[str, str]
) -> Result:
    """Convert a checkpoint and record in its ``meta`` what no name tells. ``given`` has fields of a ``Fork``, None
    where not given; the rest is as for :func:`~carafe_plugin.engine.checkpoint_layouts.convert_layout`.

    Raises UsageError where the activation is unclear or the modules' records differ, LayoutError as that function does,
    and ValueError, with a message that starts with the field's name, for an impossible value.
    """
    fork, origins = _choose_fork(content, to, given, below)
    apply = partial(convert_layout, to=to, fork=fork, below=below, rename=rename)
    weights = apply(content.weights)
    converted = {module.source for module in weights.modules}
    old = content.meta.get(RECORD)
    records = {name: old[name] for name in old if name not in converted} if isinstance(old, dict) else {}
    records |= {module.destination: dict(layout=to, **vars(fork)) for module in weights.modules}
    checkpoint = dict(meta={**content.meta, RECORD: records}, state_dict=weights.state_dict)
    if content.ema is None:
        return Result(checkpoint, weights, None, origins)
    ema = _convert_ema(content.ema, apply)
    return Result({**checkpoint, EMA: ema.state_dict}, weights, ema, origins)


def _choose_fork(content: Content, to: str, given: Mapping[str, Any], below: Sequence[str]) -> tuple[Fork, str]:
    """What the names do not tell: as given, else from the modules' records, else the defaults."""
    places = find_sources(content.weights, to, below)
    records = {prefix: _read_record(content.meta, prefix, layout) for prefix, layout in places.items()}
    for prefix, layout in places.items():
        recorded, normed = records[prefix].get("act"), layout == "mmcv" and norm_of_mmcv(content.weights, prefix)
        _check_activation(module_name(prefix), layout, to, given["act"], recorded, normed)
    values: dict[str, Any] = {}
    origins = []
    for option, default in vars(Fork()).items():
        by_module = {prefix.rstrip(".") or "(root)": record.get(option) for prefix, record in records.items()}
        known = {value for value in by_module.values() if value is not None}
        value = given[option]
        if value is not None:
            others = ", ".join(str(other) for other in known - {value})
            origin = f"given, where SRC records {others}" if others else "given"
        elif len({default if value is None else value for value in by_module.values()}) > 1:
            each = ", ".join(f"{name} {value or 'nothing'}" for name, value in by_module.items())
            raise UsageError(
                f"SRC records more than one {option} ({each}): give --{option}, or convert in turns with --below"
            )
        elif known:
            (value,), origin = known, "recorded in SRC"
        else:
            value, origin = default, "default"
        values[option] = value
        origins.append(f"{option} {value} ({origin})")
    return Fork(**values), f"the other side: {', '.join(origins)}"


def _read_record(meta: dict, prefix: str, layout: str) -> dict:
    """What is recorded of a module; nothing where its layout is not what its record says."""
    records = meta.get(RECORD)
    record = records.get(prefix.rstrip(".")) if isinstance(records, dict) else None
    if not isinstance(record, dict) or record.get("layout") != layout:
        return {}
    return {name: value for name, value in record.items() if isinstance(value, str | int | float)}


def _check_activation(module: str, layout: str, to: str, given: str | None, recorded: str | None, normed: bool) -> None:
    """Refuse a module whose activation nothing tells, and one that has none where ``--act`` says one."""
    other = layout if to == "mmcv" else to
    possible = LAYOUTS[other].compressor_norm is not None
    if (possible or normed) and given is None and recorded is None:
        raise UsageError(
            f"{f'the layout {other}' if possible else f'{module}, with its compressor_norm,'} does not say which "
            f"activation follows its compressor: give --act ({', '.join(ACTIVATIONS)})"
        )
    none = layout == "mmcv" and not normed and recorded in (None, "identity")
    if none and given not in (None, "identity"):
        raise UsageError(
            f"{module} is MMCV's, without an activation after its compressor: "
            f"a module with --act {given} cannot compute the same"
        )


def _convert_ema(ema: dict[str, Any], apply: partial[Conversion]) -> Conversion:
    """The same for :data:`EMA`, whose own entries, such as the number of its steps, stay."""
    prefix = WRAPPED if any(name.startswith(WRAPPED) for name in ema) else ""
    weights = {name.removeprefix(prefix): value for name, value in ema.items() if name.startswith(prefix)}
    try:
        conversion = apply(weights)
    except LayoutError as error:
        raise LayoutError(f"{EMA}: {error}") from error
    own = {name: value for name, value in ema.items() if not name.startswith(prefix)}
    converted = {prefix + name: value for name, value in conversion.state_dict.items()}
    return Conversion({**own, **converted}, conversion.modules)
