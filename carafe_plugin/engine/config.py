"""Configurations: read from a file, changed by options, completed by the adapters that they need."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.config.lazy import LazyObject
from mmengine.dataset import Compose
from mmengine.registry import MODELS, Registry, init_default_scope

from carafe_plugin.engine.checkpoint import use_safe_loading
from carafe_plugin.engine.errors import UsageError, read_json
from carafe_plugin.engine.processes import process_rank

#: The toolbox of a configuration's ``default_scope`` -> our adapter to it.
ADAPTERS = {scope: f"carafe_plugin.openmmlab.{scope}" for scope in ("mmdet", "mmseg", "mmpretrain")}


def load_config(path: str, options: Mapping[str, Any] | None = None, launcher: str = "none") -> Config:
    """Read a configuration and merge ``--cfg-options`` (keys with dots) into it. Raises UsageError where a file or
    module that it names is missing or unusable, or an option does not fit. Of several processes, the first alone prints
    warnings.

    Modules of the user's own that it names (``custom_imports``, or the ``type`` of a ``carafe_cfg`` as
    ``"my_upsample.MyUpsample"``) are found in the current folder too. A toolbox's own configuration is called
    ``mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py``.
    """
    file = _find_config(path)
    if str(Path.cwd()) not in sys.path:  # as with python -m, but last, so that it hides nothing
        sys.path.append(str(Path.cwd()))
    if file.suffix == ".json" and not isinstance(read_json(file), dict):
        raise UsageError(f"configuration {file} must be a JSON object of settings")
    try:
        cfg = Config.fromfile(file)
        _restore_classes(cfg._cfg_dict)
    except FileNotFoundError as error:
        raise UsageError(f"configuration {path} builds on a file that is missing: {error}") from error
    except ImportError as error:
        # mmengine lists sys.path instead of a reason: that is two errors down.
        reason = getattr(error.__cause__, "__context__", None) or error
        raise UsageError(f"configuration {path} needs a module that cannot be imported: {reason}") from error
    except Exception as error:  # of its own lines, or of whatever reads JSON and YAML
        kind = "" if isinstance(error, (SyntaxError, OSError)) else f"{type(error).__name__}: "
        raise UsageError(f"cannot read configuration {file}: {kind}{error}") from error
    try:
        cfg.merge_from_dict(dict(options or {}))
    except (KeyError, TypeError, IndexError) as error:
        raise UsageError(f"--cfg-options do not fit {path}: {error}") from error
    if process_rank(launcher) == 0:
        _report_failed_imports(cfg)
    if cfg.get("default_scope") is None and (scope := toolbox(cfg)):
        cfg.default_scope = scope  # for names in the place of classes, as --cfg-options give them
    _check_operators(cfg.get("model"), path)
    return cfg


def _find_config(path: str) -> Path:
    package, separator, name = path.partition("::")
    file = Path(path).absolute()
    if separator:
        spec = importlib.util.find_spec(package) if package in ADAPTERS else None
        if spec is None or spec.origin is None:
            raise UsageError(f"{path}: {package!r} is not one of {', '.join(ADAPTERS)}, or not installed")
        file = Path(spec.origin).parent / ".mim" / "configs" / name
    if not file.is_file():
        raise UsageError(f"no such configuration file: {file}")
    return file


def _restore_classes(part: Any) -> None:
    """Make classes of what mmengine writes into a run's folder for them (``mmcv.ops.roi_align.RoIAlign``).

    Not all of it is found again by name, and mmdet takes no such name for its layers on regions of interest. mmengine
    builds a LazyObject when it is looked at (here, those of a configuration in Python: raises ImportError where one has
    no module), and writes the name where it is dumped.
    """
    for value in part.values() if isinstance(part, Mapping) else part if isinstance(part, (list, tuple)) else ():
        _restore_classes(value)
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(kind, str) and kind.count(".") > 1 and not kind.startswith("carafe_plugin."):  # ours are found
        module, _, name = kind.rpartition(".")
        with suppress(Exception):  # what cannot be imported has its own message later
            (found := LazyObject(module, name)).build()
            part["type"] = found


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
            print(f"warning: custom_imports continues without {name}: {error}", file=sys.stderr)


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
    """The configuration that a command's common options ask for, with our adapters imported."""
    cfg = load_config(args.config, args.cfg_options, args.launcher)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get("work_dir") is None:
        cfg.work_dir = str(Path("work_dirs", Path(args.config).stem))
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    import_adapters(toolbox(cfg), drop_in=args.drop_in)
    use_safe_loading()
    if toolbox(cfg) == "mmpretrain":
        _complete_mmpretrain_dataloaders(cfg)
    return cfg


def toolbox(cfg: Config) -> str | None:
    """The toolbox of a configuration: its ``default_scope``; in one written in Python, whose types are classes and
    which need not have one, that of the class of its model or dataset.
    """
    if scope := cfg.get("default_scope"):
        return scope
    loaders = (cfg.get(f"{split}_dataloader") or {} for split in ("train", "val", "test"))
    datasets = [dataset for loader in loaders for dataset in dataset_configs(loader.get("dataset"))]
    for settings in (cfg.get("model") or {}, *datasets):
        kind = settings.get("type")
        name = kind if isinstance(kind, str) else getattr(kind, "__module__", "")
        package = name.removeprefix("carafe_plugin.openmmlab.").partition(".")[0]
        if package in ADAPTERS:
            return package
    return None


def require_settings(cfg: Config, *names: str) -> None:
    """Raise a :class:`UsageError` where a configuration lacks one of its top-level settings."""
    for name in names:
        if not cfg.get(name):
            raise UsageError(f"configuration {cfg.filename} has no {name}")


def import_adapters(scope: str | None, drop_in: bool = False) -> None:
    """Register CARAFE++'s types for the toolbox ``scope``; one without an adapter gets the layers alone. ``drop_in``
    also makes the layer 'carafe' ours. Raises UsageError where the toolbox is not installed.
    """
    known = {None, "mmengine", *ADAPTERS, *MODELS.children}
    if scope not in known and not (isinstance(scope, str) and importlib.util.find_spec(scope.partition(".")[0])):
        raise UsageError(f"default_scope must be the name of a toolbox that is installed, got {scope!r}")
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

    What is not a configuration, such as a dataset that is built already, is passed over.
    """
    if not isinstance(dataset, Mapping):
        return
    inner = dataset.get("dataset") or dataset.get("datasets")
    if not inner:
        yield dataset
    for part in inner if isinstance(inner, (list, tuple)) else [inner] if inner else []:
        yield from dataset_configs(part)


def pipeline_steps(pipeline: Any) -> Iterator[Mapping[str, Any]]:
    """The configurations of a pipeline's transforms, and of those inside others (``TestTimeAug``, ``RandomChoice``)."""
    for step in pipeline if isinstance(pipeline, (list, tuple)) else ():
        if isinstance(step, Mapping):
            yield step
        yield from pipeline_steps(step.get("transforms") if isinstance(step, Mapping) else step)


def leaves(dataset: Any) -> Iterator[Any]:
    """The datasets inside the wrappers of a dataset that is built."""
    inner = getattr(dataset, "datasets", None) or [getattr(dataset, "dataset", None)]
    if inner == [None]:
        yield dataset
    else:
        for part in inner:
            yield from leaves(part)


def type_name(settings: Mapping[str, Any]) -> str:
    """The name of the class in a configuration's ``type``, without a module or scope before it."""
    kind = settings.get("type")
    return getattr(kind, "__name__", str(kind)).rpartition(".")[2]


def find_type(registry: Registry, settings: Mapping[str, Any], scope: str | None = None) -> Any:
    """The class in a configuration's ``type``: it, or what a registry has under that name in ``scope``; else None."""
    kind = settings.get("type")
    if not isinstance(kind, str):
        return kind
    with registry.switch_scope_and_registry(scope) as own:
        return own.get(kind)


def prediction_pipeline(cfg: Config, scale: tuple[int, int] | None = None) -> Compose:
    """The transforms of a configuration, without annotations, from ``dict(img_path=...)`` to a sample of its model's.
    Steps that resize images within a scale do so within ``scale`` (width, height) where that is given. Raises
    UsageError where it has none.
    """
    init_default_scope(toolbox(cfg) or "mmengine")
    dataset = next(dataset_configs(cfg.test_dataloader.dataset)) if cfg.get("test_dataloader") else cfg
    steps = dataset.get("pipeline") or cfg.get("test_pipeline")
    if not steps:
        raise UsageError(f"{cfg.filename} has no test pipeline: neither test_dataloader nor test_pipeline")
    if scale:
        within = {number for number, step in enumerate(steps) if step.get("keep_ratio") and step.get("scale")}
        steps = [dict(step, scale=scale) if number in within else step for number, step in enumerate(steps)]
    # An image alone has no annotations.
    return Compose([step for step in steps if "LoadAnnotations" not in str(step.get("type"))])
