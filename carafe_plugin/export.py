"""Models with CARAFE++ for runtimes that do not have this package's library.

:func:`decompositions` goes into PyTorch's own export; the others are that export and the official converter behind it,
in one call. What runs where, and how fast, docs/export.md says.
"""

from __future__ import annotations

import ast
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._require import require
from .modules.carafe import KernelPrediction
from .ops import forms


def _check_torch() -> None:
    if not hasattr(torch.export, "default_decompositions"):
        raise RuntimeError(f"carafe_plugin.export needs torch >= 2.6, found {torch.__version__}")


def decompositions(dynamic: bool = False) -> dict[Any, Callable]:
    """The operator's decomposition into standard operators, beside PyTorch's own decompositions.

    Args:
        dynamic (bool): False, the fast form, whose matrices have the sizes that the model is exported with; True, one
            that takes any batch size, height and width that the exported program does.

    Returns:
        dict: what :meth:`torch.export.ExportedProgram.run_decompositions` takes.

    Raises:
        RuntimeError: torch is older than 2.6.

    Example:
        >>> import torch
        >>> from carafe_plugin import CARAFEUpsample
        >>> from carafe_plugin.export import decompositions
        >>> program = torch.export.export(CARAFEUpsample(8).eval(), (torch.rand(1, 8, 5, 6),))
        >>> program = program.run_decompositions(decompositions())
        >>> any("carafe" in str(node.target) for node in program.graph.nodes)
        False
    """
    _check_torch()
    table = torch.export.default_decompositions()
    table[torch.ops.carafe_plugin.carafe.default] = forms.multiply_add if dynamic else forms.banded
    return table


def standard_program(
    model: nn.Module, args: Sequence[Any], dynamic_shapes: Any = None, kwargs: Mapping[str, Any] | None = None
) -> torch.export.ExportedProgram:
    """``model`` exported, in standard operators alone.

    Args:
        model (nn.Module): in evaluation mode.
        args (Sequence[Any]): example inputs, positional.
        dynamic_shapes (Any): as for :func:`torch.export.export`; None fixes all sizes to those of the examples, which
            the fast form needs.
        kwargs (Mapping[str, Any] | None): example inputs by name.

    Returns:
        torch.export.ExportedProgram.

    Raises:
        ValueError: the model is in training mode.
        RuntimeError: torch is older than 2.6, or cannot export the model; its own words say where.

    Example:
        >>> import torch
        >>> from carafe_plugin import CARAFEUpsample
        >>> from carafe_plugin.export import standard_program
        >>> model, features = CARAFEUpsample(8).eval(), torch.rand(1, 8, 5, 6)
        >>> program = standard_program(model, (features,))
        >>> torch.allclose(program.module()(features), model(features), atol=1e-6)
        True
    """
    return _export(model, args, dynamic_shapes, kwargs).run_decompositions(decompositions(dynamic_shapes is not None))


def _export(model: nn.Module, args: Sequence[Any], dynamic_shapes: Any, kwargs: Mapping[str, Any] | None) -> Any:
    _check_torch()
    if isinstance(args, Tensor):
        raise TypeError("args must be a tuple of example inputs, got a Tensor: write (tensor,)")
    if model.training:
        raise ValueError("model must be in evaluation mode, which model.eval() gives, got one in training mode")
    for name, part in model.named_modules():
        if part.training and next(part.buffers(recurse=False), None) is not None:  # a norm, say
            raise ValueError(f"model must be in evaluation mode, which model.eval() gives, got {name} in training mode")
    with torch.no_grad():
        return torch.export.export(model, tuple(args), dict(kwargs or {}), dynamic_shapes=dynamic_shapes)


def to_onnx(
    model: nn.Module,
    args: Sequence[Any],
    path: str | os.PathLike,
    dynamic_shapes: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Write ``model`` as ONNX.

    Args:
        model (nn.Module): as for :func:`standard_program`, and so are the other inputs.
        args (Sequence[Any]): example inputs, positional.
        path (str | os.PathLike): of the file; weights of more than 2 GB lie beside it.
        dynamic_shapes (Any): None fixes all sizes to those of the examples.
        kwargs (Mapping[str, Any] | None): example inputs by name.
        **options: of :func:`torch.onnx.export`: ``input_names``, ``output_names``, ``opset_version`` and so on.

    Returns:
        Path: ``path``. A failure leaves what was there.

    Raises:
        ImportError: onnxscript is not installed.
        ValueError, TypeError, RuntimeError: as for :func:`standard_program`.
    """
    require("onnxscript", "to_onnx")
    target = _target(path)
    if "dynamo" in options:
        raise ValueError(
            "options must not set dynamo: torch.onnx.export on the model itself is the way of dynamo=False"
        )
    program = standard_program(model, args, dynamic_shapes, kwargs)
    exported = torch.onnx.export(program, dynamo=True, **{"verbose": False, **options})
    assert exported is not None  # as it is without dynamo alone
    return write_beside(target, exported.save)


def to_openvino(
    model: nn.Module,
    args: Sequence[Any],
    path: str | os.PathLike,
    dynamic_shapes: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    input_names: Sequence[str] = (),
    output_names: Sequence[str] = (),
    **options: Any,
) -> Path:
    """Write ``model`` as OpenVINO's intermediate representation, ``path`` (.xml) and its weights (.bin) beside it.

    Args:
        model (nn.Module): as for :func:`standard_program`, and so are the other inputs.
        args (Sequence[Any]): example inputs, positional.
        path (str | os.PathLike): ends in .xml.
        dynamic_shapes (Any): None fixes all sizes to those of the examples.
        kwargs (Mapping[str, Any] | None): example inputs by name.
        input_names (Sequence[str]): what the inputs are called, in their order; OpenVINO numbers them otherwise.
        output_names (Sequence[str]): the same for the outputs.
        **options: of ``openvino.save_model``; its ``compress_to_fp16`` is False here, so that weights stay as they are.

    Returns:
        Path: ``path``. A failure leaves what was there.

    Raises:
        ImportError: openvino is not installed.
        ValueError, TypeError, RuntimeError: as for :func:`standard_program`, or ``path`` does not end in .xml.
    """
    require("openvino", "to_openvino")
    import openvino

    target = _target(path, ".xml")
    program = standard_program(model, args, dynamic_shapes, kwargs)
    converted = openvino.convert_model(program)
    for ports, names in ((converted.inputs, input_names), (converted.outputs, output_names)):
        for port, name in zip(ports, names, strict=False):
            port.get_tensor().add_names({name})
    options = {"compress_to_fp16": False, **options}
    return write_beside(target, lambda unfinished: openvino.save_model(converted, unfinished, **options))


def to_aoti(
    model: nn.Module,
    args: Sequence[Any],
    path: str | os.PathLike,
    dynamic_shapes: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    standalone: bool = False,
    **options: Any,
) -> Path:
    """Compile ``model`` ahead of time into a package (.pt2) that runs from Python and C++.

    Args:
        model (nn.Module): as for :func:`standard_program`, and so are the other inputs.
        args (Sequence[Any]): example inputs, positional.
        path (str | os.PathLike): ends in .pt2.
        dynamic_shapes (Any): None fixes all sizes to those of the examples.
        kwargs (Mapping[str, Any] | None): example inputs by name.
        standalone (bool): False keeps this package's operator, which is faster: who runs the package loads
            ``carafe_plugin`` (Python) or its library (C++) first. True compiles the standard operators.
        **options: of ``torch._inductor.aoti_compile_and_package``.

    Returns:
        Path: ``path``. A failure leaves what was there.

    Raises:
        ValueError, TypeError, RuntimeError: as for :func:`standard_program`, or ``path`` does not end in .pt2.
    """
    from torch._inductor import aoti_compile_and_package

    target = _target(path, ".pt2")
    export = standard_program if standalone else _export
    program = export(model, args, dynamic_shapes, kwargs)
    return write_beside(
        target, lambda unfinished: aoti_compile_and_package(program, package_path=str(unfinished), **options)
    )


def to_torch_export(
    model: nn.Module,
    args: Sequence[Any],
    path: str | os.PathLike,
    dynamic_shapes: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    standalone: bool = False,
) -> Path:
    """Write ``model`` as a program (.pt2) that :func:`torch.export.load` reads.

    Args:
        model (nn.Module): as for :func:`standard_program`, and so are the other inputs.
        args (Sequence[Any]): example inputs, positional.
        path (str | os.PathLike): ends in .pt2.
        dynamic_shapes (Any): None fixes all sizes to those of the examples.
        kwargs (Mapping[str, Any] | None): example inputs by name.
        standalone (bool): False keeps this package's operator: who loads the program imports ``carafe_plugin`` first.
            True writes standard operators.

    Returns:
        Path: ``path``. A failure leaves what was there.

    Raises:
        ValueError, TypeError, RuntimeError: as for :func:`standard_program`, or ``path`` does not end in .pt2.

    Example:
        >>> import tempfile, torch
        >>> from carafe_plugin import CARAFEUpsample
        >>> from carafe_plugin.export import to_torch_export
        >>> model, features = CARAFEUpsample(8).eval(), torch.rand(1, 8, 5, 6)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     program = torch.export.load(to_torch_export(model, (features,), f"{folder}/model.pt2"))
        >>> torch.equal(program.module()(features), model(features))
        True
    """
    target = _target(path, ".pt2")
    export = standard_program if standalone else _export
    program = export(model, args, dynamic_shapes, kwargs)
    return write_beside(target, lambda unfinished: torch.export.save(program, unfinished))


def _target(path: str | os.PathLike, ending: str = "") -> Path:
    target = Path(path)
    if ending and target.suffix != ending:
        raise ValueError(f"path must end in {ending}, got {os.fspath(path)!r}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path must be in a folder that exists, got {os.fspath(path)!r}")
    return target


def write_beside(target: Path, write: Callable[[Path], Any]) -> Path:
    """Move what ``write`` makes beside the path that it is given to the folder of ``target``, when all of it is there.

    Args:
        target (Path): the file that is to be; ``write`` gets a path of the same name elsewhere.
        write (Callable[[Path], Any]): writes that file, and what goes with it beside it.

    Returns:
        Path: ``target``. Where ``write`` fails, what was there is left.
    """
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        write(Path(folder) / target.name)
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == target.name):  # the named one last
            file.replace(target.parent / file.name)
    return target


def carafe_nodes(model: nn.Module, path: str | os.PathLike) -> list[str]:
    """The names of an ONNX file's nodes that belong to CARAFE++, its convolutions included.

    Tools that quantise or convert a file take such names as those of nodes to leave as they are.

    Args:
        model (nn.Module): that :func:`to_onnx` has written, or ``torch.onnx.export`` with ``dynamo=True``.
        path (str | os.PathLike): of the file as they have written it; tools that change it keep names, but not what
            says where a node comes from.

    Returns:
        list[str]: in the file's order.

    Raises:
        ImportError: onnx is not installed.
        ValueError: the model has no CARAFE++, or no node of the file says that it comes from it.

    Example:
        >>> import tempfile, torch
        >>> from carafe_plugin import CARAFEUpsample
        >>> from carafe_plugin.export import carafe_nodes, to_onnx
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), CARAFEUpsample(8)).eval()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     nodes = carafe_nodes(model, to_onnx(model, (torch.rand(1, 3, 5, 6),), f"{folder}/model.onnx"))
        >>> sum("conv" in name.lower() for name in nodes)
        2
    """
    require("onnx", "carafe_nodes")
    import onnx

    names = {name for name, module in model.named_modules() if isinstance(module, KernelPrediction)}
    if not names:
        raise ValueError(f"model must have modules of CARAFE++, got a {type(model).__name__} without")
    found = []
    for node in onnx.load(path, load_external_data=False).graph.node:
        notes = {note.key: note.value for note in node.metadata_props}
        # The names of the modules whose forward it is part of, from the outermost on, as a list in Python's words.
        if not names.isdisjoint(ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "[]"))):
            found.append(node.name)
    if not found:
        raise ValueError(f"path must be of a file that this model was exported to, got {os.fspath(path)!r}")
    return found
