"""Trained models in the formats of other runtimes: written, compared with PyTorch, and described in a file beside."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from carafe_plugin import export
from carafe_plugin._require import require
from carafe_plugin.engine.deployable import Deployable
from carafe_plugin.engine.errors import UsageError
from carafe_plugin.engine.export_comparison import Run, compare, random_image, reason

INPUT = "image"


@dataclass(frozen=True)
class Format:
    """What ``--to`` chooses: how a model is written and run, what files there are, what must be installed."""

    ending: str
    write: Callable[..., Path]
    load: Callable[[Path], Run]
    needs: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()  # endings of other files


def _run_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: [torch.as_tensor(value) for value in session.run(None, {INPUT: image.numpy()})]


def _run_openvino(path: Path) -> Run:
    import openvino

    model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(image: Tensor) -> list[Tensor]:
        results = model(image.numpy())
        return [torch.as_tensor(results[port]) for port in model.outputs]

    return run


def _run_aoti(path: Path) -> Run:
    return torch._inductor.aoti_load_package(str(path))


def _run_program(path: Path) -> Run:
    return torch.export.load(path).module()


FORMATS = {
    "onnx": Format(".onnx", export.to_onnx, _run_onnx, ("onnx", "onnxscript", "onnxruntime"), (".onnx.data",)),
    "openvino": Format(".xml", export.to_openvino, _run_openvino, ("openvino",), (".bin",)),
    "aoti": Format(".pt2", export.to_aoti, _run_aoti),
    "torch-export": Format(".pt2", export.to_torch_export, _run_program),
}


def check_format(to: str, standalone: bool) -> None:
    """Raise a UsageError where a package that a format needs is not installed, or the format has no such choice."""
    if standalone and FORMATS[to].ending != ".pt2":
        raise UsageError(f"--standalone is for aoti and torch-export: {to} has standard operators alone in any case")
    for package in FORMATS[to].needs:
        try:
            require(package, f"--to {to}")
        except ImportError as error:
            raise UsageError(str(error)) from error


def check_destination(to: str, out: Path, force: bool) -> None:
    """Raise a UsageError where ``out`` cannot be written, or something is there and ``force`` is not given; make its
    folder.
    """
    if out.suffix != FORMATS[to].ending:
        raise UsageError(f"--out must end in {FORMATS[to].ending} with --to {to}, got {out}")
    for path in (out, description_path(out), *(out.with_suffix(ending) for ending in FORMATS[to].beside)):
        if path.is_dir():
            raise UsageError(f"--out must be a file, and {path} is a folder")
        if path.exists() and not force:
            raise UsageError(f"{path} is there already: choose another --out, or add --force to replace it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write --out {out}: {error.strerror or error}") from error


def description_path(out: Path) -> Path:
    """Where the description of an exported model lies.

    Example:
        >>> description_path(Path("model.onnx")).name
        'model.onnx.json'
    """
    return out.with_name(f"{out.name}.json")


def check_size(part: Deployable, size: tuple[int, int], dynamic: bool) -> None:
    """Raise a UsageError where images of a size (height, width) would have to be filled up."""
    unit, reason = part.pixels.divisor, "the data_preprocessor's pad_size_divisor"
    if dynamic:
        unit, reason = part.unit, "by which the sizes that a model exported with --dynamic takes are divisible"
    if any(length % unit for length in size):
        near = " ".join(str(math.ceil(length / unit) * unit) for length in size)
        raise UsageError(f"--size must be divisible by {unit}, {reason}: got {size[0]} {size[1]}, {near} is")


def write(
    part: Deployable,
    to: str,
    out: Path,
    size: tuple[int, int],
    images: Sequence[Tensor] = (),
    dynamic: bool = False,
    standalone: bool = False,
    facts: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a model, compare it with PyTorch's, and write its description beside it; return the description.

    Args:
        part (Deployable): the model.
        to (str): a key of FORMATS.
        out (Path): the file; nothing is left there or changed where anything fails.
        size (tuple[int, int]): height and width of the images, with ``dynamic`` the smallest.
        images (Sequence[Tensor]): batches (N, 3, *size) to compare on, beside random ones.
        dynamic (bool): whether the model is to take any number of images, and larger ones.
        standalone (bool): whether it is to run without this package, where the format has a choice.
        facts (dict[str, Any] | None): more for the description.

    Raises:
        TooDifferentError: it computes something else (:mod:`~carafe_plugin.engine.export_comparison`).
        UsageError: it cannot be exported, or its numbers are not finite.
    """
    random = random_image(size)
    batches = [("random pixels", random), *(("images", image) for image in images)]
    shapes = None
    example = random
    if dynamic:
        unit, (height, width) = part.unit, size
        rows, columns = (
            unit * torch.export.Dim(name, min=length // unit) for name, length in (("rows", height), ("columns", width))
        )
        shapes = {INPUT: {0: torch.export.Dim("batch"), 2: rows, 3: columns}}
        # Nothing is computed with it: sides that are not alike, and so long that no level of a pyramid is one pixel.
        example = torch.zeros(2, 3, height + 8 * unit, width + 11 * unit)
        # So much larger that every level of a pyramid is.
        batches.append(("random pixels, two larger images", random_image((height + 4 * unit, width + 5 * unit), 2)))
    kind = type(part.model).__name__
    with torch.no_grad(), _naming_errors(f"{kind} does not run on {size[0]} x {size[1]} pixels in PyTorch"):
        names = list(part.outputs(part.pixels(random)))
    options: dict[str, Any] = dict(input_names=[INPUT], output_names=names)
    if FORMATS[to].ending == ".pt2":
        options = dict(standalone=standalone)
    description = {
        **(facts or {}),
        "format": to,
        "dynamic": dynamic,
        "inputs": [_describe_input(part, size, dynamic)],
        "outputs": [],
        "preprocessing": part.pixels.settings(),
        "left to the caller": part.left,
        "versions": _versions(("carafe_plugin", "torch", *FORMATS[to].needs)),
    }

    def write_all(unfinished: Path) -> None:
        with _naming_errors(f"{kind} cannot be exported to {to}"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporters, about one another
            FORMATS[to].write(part, (example,), unfinished, shapes, **options)
            run = FORMATS[to].load(unfinished)
        description["outputs"] = [asdict(output) for output in compare(run, part, batches)]
        text = json.dumps(description, indent=2, default=str)
        description_path(unfinished).write_text(text + "\n", encoding="utf-8")

    export.write_beside(out, write_all)
    return description


@contextmanager
def _naming_errors(what: str) -> Iterator[None]:
    """Turn whatever the toolboxes and exporters raise into a UsageError that begins with ``what``."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{what}: {reason(error)}") from error


def _describe_input(part: Deployable, size: tuple[int, int], dynamic: bool) -> dict[str, Any]:
    described: dict[str, Any] = dict(name=INPUT, dtype="float32", shape=[1, 3, *size])
    if dynamic:
        described["shape"] = ["batch", 3, "height", "width"]
        described |= dict(smallest=list(size), divisible_by=part.unit)
    return described


def _versions(packages: Sequence[str]) -> dict[str, str]:
    return {name: str(getattr(importlib.import_module(name), "__version__", "unknown")) for name in packages}


def checkpoint_facts(path: str) -> dict[str, str]:
    """The name of a checkpoint's file and its SHA-256; one from a URL lies where torch keeps what it downloads."""
    file = Path(path).expanduser()
    if "://" in path:
        file = Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(path).path).name)
    return dict(name=file.name, sha256=hashlib.sha256(file.read_bytes()).hexdigest())
