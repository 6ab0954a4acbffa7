"""The compiled libraries: whether they load, which devices they serve, which GPUs they have code for."""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
import warnings
from collections.abc import Sequence

import torch

_BACKEND_VARIABLE = "CARAFE_BACKEND"
serving: set[str] = set()  #: device types that the compiled operators serve


def is_compiled(device_type: str = "cpu") -> bool:
    """Whether the compiled operators serve a device type; elsewhere the PyTorch reference does.

    Args:
        device_type (str): 'cpu', 'cuda', or another of torch's.

    Example:
        >>> from carafe_plugin.ops import is_compiled
        >>> is_compiled("mps")
        False
    """
    return device_type in serving


def chosen_backend() -> str:
    """What the environment asks for: 'auto', 'compiled' or 'reference'."""
    backend = os.environ.get(_BACKEND_VARIABLE, "auto")
    if backend not in ("auto", "compiled", "reference"):
        raise ValueError(f"{_BACKEND_VARIABLE} must be 'auto', 'compiled' or 'reference', got {backend!r}")
    return backend


def load() -> None:
    """Load the libraries; what they serve is in :data:`serving` then."""
    backend = chosen_backend()
    if backend == "reference":
        return
    try:
        importlib.import_module("carafe_plugin._C")
    except ImportError as error:
        if backend == "compiled":
            raise ImportError(f"{_BACKEND_VARIABLE}=compiled, but carafe_plugin._C does not load: {error}") from error
        warnings.warn(
            "carafe_plugin: the compiled operators do not load, so the slower PyTorch reference serves "
            f"({error}). {_BACKEND_VARIABLE}=reference says that this is intended.",
            stacklevel=3,
        )
        return
    serving.add("cpu")
    try:
        importlib.import_module("carafe_plugin._C_cuda")
    except ImportError as error:
        if torch.cuda.is_available():
            warnings.warn(
                f"carafe_plugin: the CUDA operators do not load, so the PyTorch reference serves on CUDA ({error})",
                stacklevel=3,
            )
    else:
        serving.add("cuda")


def compiled_architectures() -> tuple[list[int], bool]:
    """What ``_C_cuda``, which is loaded, has code for.

    Returns:
        (list[int], bool): GPU architectures, ascending, 80 for sm_80; whether it has PTX of the last of them.
    """
    library = ctypes.CDLL(str(sys.modules["carafe_plugin._C_cuda"].__file__))
    architecture = library.carafe_cuda_architecture
    found: list[int] = []
    while number := architecture(len(found)):
        found.append(number // 10)
    return found, bool(library.carafe_cuda_has_ptx())


def has_code_for(capability: tuple[int, int], architectures: Sequence[int], ptx: bool = True) -> bool:
    """Whether code for ``architectures`` runs on a GPU: that of its own generation, or PTX of the newest architecture.

    Example:
        >>> [has_code_for(gpu, [80, 90]) for gpu in ((7, 5), (8, 6), (9, 0), (12, 0))]
        [False, True, True, True]
    """
    number = 10 * capability[0] + capability[1]
    same_generation = any(each // 10 == capability[0] and each <= number for each in architectures)
    return same_generation or (ptx and number >= architectures[-1])
