"""What tracers that run or read Python code see of this package's functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NoReturn, ParamSpec, TypeVar

import torch
from torch.fx import Proxy
from torch.overrides import handle_torch_function

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def refuse_scripting() -> NoReturn:
    """The ``__prepare_scriptable__`` of functions and modules, which torch.jit.script asks for before it reads one."""
    raise NotImplementedError(
        "torch.jit.script does not compile CARAFE++: use torch.jit.trace(model, example) or "
        "torch.export.export(model, (example,)) instead"
    )


#: Whether torch.export is at work; not before torch 2.7.
torch_exports = getattr(torch.compiler, "is_exporting", lambda: False)


def is_exporting() -> bool:
    """Whether a model is being exported, to run elsewhere at sizes that need not be known."""
    return torch_exports() or torch.onnx.is_in_onnx_export()


def as_one_node(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Make a function one node of torch.fx's graphs, as PyTorch's own functions are, whoever calls it.

    Inside, sizes and dtypes decide what is done, which have no values while a model is traced. (``torch.fx.wrap`` would
    hold in the module that says it alone, not in a user's that imports the function.) ``torch.jit.script`` ends with
    one sentence that says what to use instead.
    """

    @functools.wraps(function)
    def call(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        proxies = [value for value in (*args, *kwargs.values()) if isinstance(value, Proxy)]
        if proxies:
            return handle_torch_function(call, proxies, *args, **kwargs)
        return function(*args, **kwargs)

    call.__prepare_scriptable__ = refuse_scripting  # type: ignore[attr-defined]
    return call
