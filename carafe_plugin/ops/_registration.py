"""Registration of the operators, and what serves them: the compiled libraries, mmcv's kernel or the reference.

The dispatcher chooses what computes them. Python registers the reference for every device; where the libraries
``_C`` (CPU, schemas) and ``_C_cuda`` load, their kernels take precedence on these devices. ``_C.abi3.so`` serves every
torch from 2.10 on; a file such as ``_C_torch2_1.abi3.so``, compiled for one torch, that torch alone.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter

from .._require import major_minor
from .._version import __version__
from ._derivatives import autograd_kernel
from ._operators import OPERATORS, Operator

_serving: set[str] = set()  # device types that the compiled operators serve
_KEEPS_REPLACED = hasattr(torch.library, "get_kernel")  # a kernel that another replaces can still be called
_library = torch.library.Library("carafe_plugin", "FRAGMENT")  # registrations last as long as it does


def is_compiled(device_type: str = "cpu") -> bool:
    """Whether the compiled operators serve a device type; elsewhere the PyTorch reference does.

    Args:
        device_type (str): 'cpu', 'cuda', or another of torch's.

    Example:
        >>> from carafe_plugin.ops import is_compiled
        >>> is_compiled("mps")
        False
    """
    return device_type in _serving


def _register() -> None:
    """Load the libraries and register all that they do not bring."""
    backend = os.environ.get("CARAFE_BACKEND", "auto")
    if backend not in ("auto", "compiled", "reference"):
        raise ValueError(f"CARAFE_BACKEND must be 'auto', 'compiled' or 'reference', got {backend!r}")
    if backend != "reference":
        _load(required=backend == "compiled")
    for operator in OPERATORS.values():
        if not is_compiled("cpu"):  # _C defines the schemas
            _library.define(operator.name + operator.schema)
        _library.impl(operator.name, operator.by_reference, "CompositeExplicitAutograd")
        _library.impl(operator.name, autograd_kernel(operator), "Autograd")
        _library.impl(operator.name, operator.fake, "Meta")  # torch.library.register_fake came with torch 2.4
        for device_type, key in _autocast_keys().items():
            _library.impl(operator.name, _autocast_kernel(operator, device_type), key)
        packet = getattr(torch.ops.carafe_plugin, operator.name)
        if hasattr(flop_counter, "register_flop_formula"):
            flop_counter.register_flop_formula(packet)(operator.flops)
            registry: dict = flop_counter.flop_registry
            registry.setdefault(packet, registry.get(packet.default))  # torch 2.4 files it under the overload, in vain
        else:  # torch 2.1 has the table alone
            vars(flop_counter)["flop_mapping"][packet] = operator.flops
        if (torch.version.cuda or torch.version.hip) and not is_compiled("cuda") and backend != "reference":
            _library.impl(operator.name, operator.by_mmcv, "CUDA")
    if is_compiled("cuda"):
        # Asking a GPU for its capability starts CUDA, which an import must not do: processes could not fork any more.
        torch.cuda._lazy_call(_check_gpus)


def _load(required: bool) -> None:
    for device_type, library, where in (("cpu", "_C", ""), ("cuda", "_C_cuda", " on CUDA")):
        try:
            _import_library(library)
        except ImportError as error:
            reason = f"carafe_plugin.{library} does not load: {error}"
            if device_type == "cpu" and required:
                raise ImportError(f"CARAFE_BACKEND=compiled, but {reason}") from error
            if device_type == "cpu" or torch.cuda.is_available():
                message = f"carafe_plugin: the slower PyTorch reference serves{where}, because {reason}"
                if device_type == "cpu":
                    message += f". {_remedy(error)}; CARAFE_BACKEND=reference says that the reference is intended."
                warnings.warn(message, stacklevel=4)
            return
        _serving.add(device_type)


def _import_library(library: str) -> None:
    """As a module of this package, whatever its file is called."""
    name, folder = f"carafe_plugin.{library}", Path(__file__).parents[1]
    major, minor = major_minor(torch.__version__)
    own = folder / f"{library}_torch{major}_{minor}.abi3.so"
    if name in sys.modules:
        importlib.import_module(name)  # raises where None keeps it out
    elif own.exists():
        spec = importlib.util.spec_from_file_location(name, own)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
        setattr(sys.modules["carafe_plugin"], library, module)
    else:
        found = [path.name for path in folder.glob("*.so") if re.match(rf"{library}(_torch\d+_\d+)?\.", path.name)]
        if found and ((major, minor) < (2, 10) or f"{library}.abi3.so" not in found):
            raise ImportError(f"built for another torch than {torch.__version__}: {', '.join(sorted(found))}")
        importlib.import_module(name)


def _remedy(error: ImportError) -> str:
    """What to do about ``_C``, which does not load."""
    options = "--no-build-isolation --no-deps --force-reinstall"
    sdist = f"pip install {options} carafe_plugin-{__version__}.tar.gz"
    if isinstance(error, ModuleNotFoundError):
        return f"It was not built; where there is a C++ compiler, {sdist} builds it"
    if "undefined symbol" in str(error):
        return f"It was built for another torch than {torch.__version__}; {sdist} builds it for this one"
    return f"{sdist} builds it {'for this one' if 'another torch' in str(error) else 'anew'}"


# ---------------------------------------------------------------------------------------------------------- autocast


def _autocast_keys() -> dict[str, str]:
    """The dispatch keys of autocast, by device type, that this torch has."""
    names = {device_type: f"Autocast{device_type.upper()}" for device_type in ("cpu", "cuda", "hpu", "mps", "xpu")}
    names[torch._C._get_privateuse1_backend_name()] = "AutocastPrivateUse1"  # npu, mlu and others
    return {device_type: key for device_type, key in names.items() if hasattr(torch._C.DispatchKey, key)}


def _autocast_kernel(operator: Operator, device_type: str) -> Callable[..., Tensor]:
    """Casts the tensors, then calls the operator below the autocast keys."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    for key in _autocast_keys().values():
        keys = keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(*arguments: Any) -> Tensor:
        tensors, rest = arguments[: len(operator.tensors)], arguments[len(operator.tensors) :]
        dtype = _autocast_dtype(device_type)
        if any(tensor.dtype == torch.float64 for tensor in tensors):  # which keeps all in float64, as in torch's rules
            dtype = torch.float64
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operator(*(tensor.to(dtype) for tensor in tensors), *rest)

    return cast


def _autocast_dtype(device_type: str) -> torch.dtype:
    if hasattr(torch, "get_autocast_dtype"):  # from torch 2.4 on
        return torch.get_autocast_dtype(device_type)
    return torch.get_autocast_cpu_dtype() if device_type == "cpu" else torch.get_autocast_gpu_dtype()


# --------------------------------------------------------------------------------------- GPUs without compiled code


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


def _check_gpus() -> None:
    """Let the reference serve the GPUs of this process that the binary has no code for, after one warning."""
    try:
        compiled, ptx = compiled_architectures()
    except (AttributeError, OSError):  # a library of another build: no reason to keep CUDA from starting
        return
    gpus = {index: torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    versions = {index: f"{major}.{minor}" for index, (major, minor) in gpus.items()}
    lacking = [index for index, capability in gpus.items() if not has_code_for(capability, compiled, ptx)]
    if not lacking:
        return
    if not _KEEPS_REPLACED:
        lacking = list(gpus)
    named = ", ".join(f"{torch.cuda.get_device_name(index)} ({versions[index]})" for index in lacking)
    warnings.warn(
        f"carafe_plugin: the CUDA operators were compiled for sm_{', sm_'.join(map(str, compiled))}, so the slower "
        f"PyTorch reference serves on {named}; to use the compiled operators there, rebuild the package with "
        f"TORCH_CUDA_ARCH_LIST='{';'.join(sorted({versions[index] for index in lacking}))}'",
        stacklevel=2,
    )
    if len(lacking) == len(gpus):
        _serving.discard("cuda")
    serve_by_reference("cuda", set(lacking))


def serve_by_reference(device_type: str, indices: set[int] | None = None) -> None:
    """Let the reference take the place of compiled kernels.

    Args:
        device_type (str): 'cpu' or 'cuda'.
        indices (set[int], optional): of the devices; None means all, and before torch 2.9 nothing else is possible.
    """
    key = device_type.upper()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\s*(Warning only once|Overriding a previously)")
        for operator in OPERATORS.values():
            if _KEEPS_REPLACED:
                kernel = _by_device(operator, key, indices)
                _library.impl(operator.name, kernel, key, with_keyset=True, allow_override=True)
            else:
                _library.impl(operator.name, operator.by_reference, key)


def _by_device(operator: Operator, key: str, indices: set[int] | None) -> Callable[..., Tensor]:
    compiled = torch.library.get_kernel(f"carafe_plugin::{operator.name}", key)

    def choose(keys: Any, *arguments: Any) -> Tensor:
        if indices is None or arguments[0].device.index in indices:
            return operator.by_reference(*arguments)
        return compiled.call_boxed(keys, *arguments)

    return choose


_register()
