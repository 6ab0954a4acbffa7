"""Trained models in the formats of other runtimes: written, compared with PyTorch, and described in a file beside."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cv2
import torch
import torch.nn.functional as F
from mmengine.config import Config
from torch import Tensor

from carafe_plugin import export
from carafe_plugin._require import require
from carafe_plugin.engine.config import prediction_pipeline, toolbox
from carafe_plugin.engine.deployable import Deployable
from carafe_plugin.engine.errors import UsageError, note
from carafe_plugin.engine.prediction import load_picture, prepare, read_picture
from carafe_plugin.images import shorten

TOLERANCE = 1e-4  #: of an output's difference, in units of its largest value or, where that is less than 1, of 1
INPUT = "image"
Run = Callable[[Tensor], Sequence[Tensor]]


class TooDifferentError(Exception):
    """An exported model computes something else than PyTorch's."""


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
    """Raise a UsageError where a package is not installed with which a format is written or compared."""
    for package in FORMATS[to].needs:
        try:
            require(package, f"--to {to}")
        except ImportError as error:
            raise UsageError(str(error)) from error
    if standalone and FORMATS[to].ending != ".pt2":
        raise UsageError(f"--standalone is for aoti and torch-export: {to} has standard operators alone in any case")


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


@dataclass
class Difference:
    """The largest difference of one output from PyTorch's, among ``images`` images: ``absolute``, and ``relative`` to
    the output's largest value or, where that is less than 1, to 1.
    """

    images: int = 0
    absolute: float = 0.0
    relative: float = 0.0

    def include(self, got: Tensor, expected: Tensor) -> None:
        absolute = float((got - expected).abs().max())
        # Not max(), for which nan would be less than any number.
        self.absolute = absolute if not absolute <= self.absolute else self.absolute
        relative = absolute / max(1.0, float(expected.abs().max()))
        self.relative = relative if not relative <= self.relative else self.relative


@dataclass(frozen=True)
class Output:
    """An output of an exported model: its name, its shape, and how far it is from PyTorch's on each kind of images."""

    name: str
    shape: list[int | str]
    differences: dict[str, Difference]


@torch.no_grad()
def compare(run: Run, part: Deployable, batches: Iterable[tuple[str, Tensor]]) -> list[Output]:
    """Compare an exported model with PyTorch's on batches (N, 3, H, W), each of a kind that has a name. Raises
    TooDifferentError where an output has another shape or is further off than TOLERANCE, UsageError where the exported
    model does not run or PyTorch's gives no finite numbers.
    """
    shapes: list[list[torch.Size]] = []
    differences: dict[str, dict[str, Difference]] = {}
    for kind, image in batches:
        outputs = part.outputs(part.pixels(image))
        try:
            values = [value.detach() for value in run(image)]
        except Exception as error:  # whatever the runtimes raise
            size = " x ".join(map(str, image.shape))
            raise TooDifferentError(f"the exported model does not run on {size} values: {reason(error)}") from error
        shapes.append([image.shape, *(value.shape for value in outputs.values())])
        for (name, expected), got in zip(outputs.items(), values, strict=True):
            if not expected.isfinite().all():
                raise UsageError(f"{name} of the model in PyTorch is not finite on {kind}: its weights are of no use")
            if got.shape != expected.shape:
                raise TooDifferentError(f"{name} has the shape {tuple(got.shape)}, in PyTorch {tuple(expected.shape)}")
            found = differences.setdefault(name, {}).setdefault(kind, Difference())
            found.images += len(image)
            found.include(got, expected)
    images, *found_shapes = zip(*shapes, strict=True)
    return [
        Output(name, general_shape(images, of_output), by_kind)
        for (name, by_kind), of_output in zip(differences.items(), found_shapes, strict=True)
    ]


def general_shape(images: Sequence[torch.Size], shapes: Sequence[torch.Size]) -> list[int | str]:
    """The shape of an output for images of several sizes, in their batch, height and width.

    Example:
        >>> sizes = [torch.Size([1, 3, 64, 96]), torch.Size([2, 3, 128, 160])]
        >>> general_shape(sizes, [torch.Size([1, 9, 8, 1]), torch.Size([2, 9, 16, 2])])
        ['batch', 9, 'height / 8', 'ceil(width / 128)']
    """
    found: list[int | str] = []
    for axis, lengths in enumerate(zip(*shapes, strict=True)):
        name, given = ("batch", "channels", "height", "width")[axis], [image[axis] for image in images]
        if len(set(lengths)) == 1:
            found.append(lengths[0])
            continue
        strides = (2**power for power in range(12))
        stride = next((s for s in strides if [math.ceil(one / s) for one in given] == list(lengths)), None)
        whole = stride and not any(one % stride for one in given)
        found.append(name if stride == 1 else f"{name} / {stride}" if whole else f"ceil({name} / {stride})")
    return found


def reason(error: BaseException) -> str:
    """What is wrong at bottom, in a line; exporters put pages around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'without a message'}"


def random_image(size: Sequence[int], number: int = 1) -> Tensor:
    """Random pixels (number, 3, *size), the same with every call."""
    return torch.randint(256, (number, 3, *size), generator=torch.Generator().manual_seed(0)).float()


def read_images(cfg: Config, part: Deployable, paths: Sequence[Path], size: tuple[int, int]) -> list[Tensor]:
    """Image files as an exported model takes them: (1, 3, *size), RGB. As far as the configuration's test pipeline
    gives that size, or a smaller one that may be filled up, they are its; the others are resized, and a note says so.
    """
    scope = toolbox(cfg)
    try:
        pipeline = prediction_pipeline(cfg, scale=(size[1], size[0]))
    except UsageError:
        raise UsageError(f"--images: {cfg.filename} has no test pipeline to read them with") from None
    batches, resized = [], []
    for path in paths:
        picture = read_picture(path, partial(load_picture, pipeline))
        try:
            pixels = prepare(pipeline, picture)["inputs"][0].flip(0)  # the toolboxes have blue first
        except Exception as error:  # of the toolboxes' transforms, or the user's own
            raise UsageError(f"--images: the test pipeline fails for {path}: {reason(error)}") from error
        missing = [want - have for want, have in zip(size, pixels.shape[1:], strict=True)]
        if min(missing) < 0 or (max(missing) > 0 and scope == "mmpretrain"):
            resized.append(f"{path.name} ({pixels.shape[1]} x {pixels.shape[2]})")
            image = cv2.resize(picture.pixels, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
            pixels, missing = torch.from_numpy(image).permute(2, 0, 1), [0, 0]
        value = torch.tensor(part.pixels.settings()["pad_value"]).reshape(3, 1, 1)
        filled = F.pad(pixels.float() - value, (0, missing[1], 0, missing[0])) + value
        batches.append(filled[None])
    if resized:
        note(f"resized to {size[0]} x {size[1]}, as the test pipeline gives another size: {shorten(resized)}")
    return batches


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
        TooDifferentError: it computes something else.
        UsageError: it cannot be exported, or its numbers are not finite.
    """
    random = random_image(size)
    batches = [("random pixels", random), *(("images", image) for image in images)]
    shapes = None
    example = random
    if dynamic:
        unit, (height, width) = part.unit, size
        dims = [unit * torch.export.Dim(name, min=length // unit) for name, length in (("rows", height), ("columns", width))]
        shapes = {INPUT: {0: torch.export.Dim("batch"), 2: dims[0], 3: dims[1]}}
        # Nothing is computed with it: sides that are not alike, and so long that no level of a pyramid is one pixel.
        example = torch.zeros(2, 3, height + 8 * unit, width + 11 * unit)
        batches.append(("random pixels, two larger images", random_image((height + unit, width + 2 * unit), 2)))
    with torch.no_grad():
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
        with _naming_exporters_errors(part, to), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporters, about one another
            FORMATS[to].write(part, (example,), unfinished, shapes, **options)
            run = FORMATS[to].load(unfinished)
        outputs = compare(run, part, batches)
        description["outputs"] = [asdict(output) for output in outputs]
        for output in outputs:
            for kind, difference in output.differences.items():
                if not difference.relative <= TOLERANCE:
                    raise TooDifferentError(
                        f"{output.name} differs from PyTorch's by {difference.absolute:.1e} on {kind}, "
                        f"{difference.relative:.1e} of its largest value (or of 1); {TOLERANCE:.0e} is allowed"
                    )
        text = json.dumps(description, indent=2, default=str)
        description_path(unfinished).write_text(text + "\n", encoding="utf-8")

    export.write_beside(out, write_all)
    return description


@contextmanager
def _naming_exporters_errors(part: Deployable, to: str) -> Any:
    try:
        yield
    except Exception as error:  # anything, from three libraries
        raise UsageError(f"{type(part.model).__name__} cannot be exported to {to}: {reason(error)}") from error


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
