"""The module that stands in for ``mmcv._ext``."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any, NoReturn


def fill(module: ModuleType) -> None:
    """Make a module ``mmcv._ext``: the operators, ``is_stand_in``, and for any other name a function that raises."""
    try:
        import torchvision  # noqa: F401  (its operators are registered with torch.ops)
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"mmcv has no compiled operators, and torchvision, whose operators would take their place, cannot be "
            f"imported: {error}",
            name=module.__name__,
        ) from error
    from carafe_plugin.openmmlab import mmcv_operators

    for name, value in vars(mmcv_operators).items():
        if isinstance(value, FunctionType) and value.__module__ == mmcv_operators.__name__ and name[0] != "_":
            setattr(module, name, value)
    module.is_stand_in = True  # type: ignore[attr-defined]
    module.__dict__.pop("__file__", None)  # that of an extension which does not load

    def missing(name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        def call(*args: Any, **kwargs: Any) -> NoReturn:
            raise NotImplementedError(
                f"mmcv's operator {name} is compiled code, and torchvision has nothing in its place: install mmcv with "
                "its operators (pip install --no-build-isolation onedl-mmcv, or mmcv, for the torch that is "
                "installed; make env MMCV=compiled in a checkout of carafe_plugin)"
            )

        return call

    module.__getattr__ = missing  # type: ignore[method-assign]
