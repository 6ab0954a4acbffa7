"""How ``mmcv._ext`` is found where :mod:`carafe_plugin.openmmlab.mmcv_ops` was asked to stand in for it.

Python imports a module of this name when it starts. ``mmcv_ops.install`` puts this folder on ``PYTHONPATH``, so that
every process that a run starts (a data worker by spawn, torchrun and its ranks) finds ``mmcv._ext`` as the run itself
does. Nothing is imported before a process asks for that module; a ``sitecustomize`` that this one hides runs as well.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader
from importlib.machinery import ExtensionFileLoader, ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

EXTENSION = "mmcv._ext"
VARIABLE = "CARAFE_MMCV_OPS"
FOLDER = Path(__file__).resolve().parent


class ExtensionFinder:
    """Finds MMCV's extension where it is; where it is not, the stand-in."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != EXTENSION:
            return None
        for finder in sys.meta_path:
            if is_ours(finder):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = ExtensionLoader(spec.loader)
                return spec
        foreign = [str(file) for folder in path or () for file in Path(folder).glob("_ext.*.so")]  # for another Python
        compiled = ExtensionFileLoader(name, foreign[0]) if foreign else None
        return ModuleSpec(name, ExtensionLoader(compiled), origin=foreign[0] if foreign else None)


def is_ours(finder: object) -> bool:
    """Whether a finder is the one above; this module is imported under two names."""
    return getattr(finder, "__name__", None) == ExtensionFinder.__name__


class ExtensionLoader(Loader):
    """Loads MMCV's compiled extension; where there is none, torchvision's operators, and says so."""

    def __init__(self, compiled: Loader | None) -> None:
        self.compiled = compiled
        self.reason = "mmcv has no compiled operators here"

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        if self.compiled is None:
            return None
        try:
            return self.compiled.create_module(spec)
        except ImportError as error:
            self.reason = f"mmcv's compiled operators do not load here ({error})"
            if os.environ.get(VARIABLE) == "torchvision":
                self.compiled = None
                self.reason += f", and {VARIABLE} asks for it"
                return None
            remedy = f"install an mmcv built for this torch, or set {VARIABLE}=torchvision to run on torchvision's"
            message = f"{self.reason}: {remedy}"
            _say(f"error: {message}", always=True)  # toolboxes catch an ImportError and continue without operators
            raise ImportError(message, name=EXTENSION) from error

    def exec_module(self, module: ModuleType) -> None:
        if self.compiled is not None:
            self.compiled.exec_module(module)
            return
        if importlib.util.find_spec("carafe_plugin") is None:
            sys.path.append(str(FOLDER.parents[2]))  # a checkout that is not installed, in a process of another folder
        try:
            importlib.import_module("carafe_plugin.openmmlab.mmcv_operators").fill(module)
        except ImportError as error:
            _say(f"error: {error}", always=True)
            raise
        _say(f"{self.reason}: torchvision's take their place (carafe_plugin.openmmlab.mmcv_ops)")


@functools.lru_cache(None)  # older Pythons that a run may start read this file too
def _say(line: str, always: bool = False) -> None:
    """Print a line, once for a run: not at every import, in its data workers or, unless ``always``, its other ranks."""
    ranks = (os.environ.get(name, "0") for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"))
    spawned = any(argument.startswith("from multiprocessing") for argument in sys.orig_argv)
    if not spawned and (always or set(ranks) == {"0"}):
        print(line, file=sys.stderr)


def _run_hidden() -> None:
    """Run the ``sitecustomize`` that Python would have imported without this folder."""
    folders = [folder for folder in sys.path if Path(folder or ".").resolve() != FOLDER]
    spec = PathFinder.find_spec("sitecustomize", folders)
    if spec is not None and spec.loader is not None:
        sys.modules["sitecustomize"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["sitecustomize"])


if __name__ == "sitecustomize" and not any(map(is_ours, sys.meta_path)):  # else another copy of this folder's
    sys.meta_path.insert(0, ExtensionFinder)
    _run_hidden()
