"""What is known of other libraries' models: a module each, of which none imports its library.

Each has ``FEATURES``, patterns of the names of classes whose forward calls ``F.interpolate`` to upsample features, and
``example_inputs(model)``; ``adopt(new, old)`` where new modules need attributes of the old.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any

from torch import nn

KNOWN = ("segmentation_models_pytorch", "timm", "torchvision", "transformers", "ultralytics")


def _origins(module: nn.Module) -> Iterator[tuple[str, str]]:
    """The package and the name of a module's class and of those that it inherits from."""
    for cls in type(module).__mro__:
        yield cls.__module__.partition(".")[0], cls.__name__


def _library(package: str) -> ModuleType:
    return importlib.import_module(f".{package}", __package__)


def reason_to_keep(module: nn.Module) -> str | None:
    """Why calls of ``F.interpolate`` in a module's forward are left alone, unless they are asked for; None if not.

    A forward that a user has written, in a subclass of a library's, is the user's.
    """
    owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    package = owner.__module__.partition(".")[0]
    if package not in KNOWN:
        return None
    patterns = _library(package).FEATURES
    if any(
        fnmatchcase(name, pattern) for origin, name in _origins(module) if origin == package for pattern in patterns
    ):
        return None
    return f"not known in {package} as upsampling of features; names=[...] with this name converts it"


def example_inputs(model: nn.Module) -> Any:
    """What a known library's model takes, None for others."""
    for package, _ in _origins(model):
        if package in KNOWN:
            return _library(package).example_inputs(model)
    return None


def adopt(new: nn.Module, old: nn.Module, model: nn.Module) -> None:
    """Give a module in the place of another the attributes that its model's library reads."""
    for package, _ in _origins(model):
        if hasattr(library := _library(package) if package in KNOWN else None, "adopt"):
            library.adopt(new, old)  # type: ignore[union-attr]
            return
