"""An exported model beside PyTorch's: the same images through both, and how far apart their outputs are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import torch
import torch.nn.functional as F
from mmengine.config import Config
from torch import Tensor

from carafe_plugin.engine.config import prediction_pipeline, toolbox
from carafe_plugin.engine.deployable import Deployable
from carafe_plugin.engine.errors import UsageError, note
from carafe_plugin.engine.prediction import load_picture, prepare, read_picture
from carafe_plugin.images import shorten

TOLERANCE = 1e-4  #: of an output's difference, in units of its largest value or, where that is less than 1, of 1
Run = Callable[[Tensor], Sequence[Tensor]]


class TooDifferentError(Exception):
    """An exported model computes something else than PyTorch's."""


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
    for name, by_kind in differences.items():
        for kind, difference in by_kind.items():
            if not difference.relative <= TOLERANCE:
                raise TooDifferentError(
                    f"{name} differs from PyTorch's by {difference.absolute:.1e} on {kind}, {difference.relative:.1e} "
                    f"of its largest value (or of 1); {TOLERANCE:.0e} is allowed"
                )
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
