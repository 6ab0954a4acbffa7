"""What a row of library_models.py says of a model, and the losses that it is trained with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def whole(model: nn.Module) -> nn.Module:
    return model


@dataclass(frozen=True)
class LibraryModel:
    """A row of docs/libraries.md.

    Attributes:
        library (str): the package that it is from.
        name (str): in the table.
        build (Callable[[], nn.Module]): without weights and network.
        places (tuple[str, ...]): of CARAFE++, with ``arguments``.
        loss (Callable[[nn.Module], Tensor]): of a model in training mode, on two images with targets.
        arguments (Mapping[str, Any] | None): of ``convert``, beside the model; None: it is built with CARAFE++.
        inputs (Callable[[int], Any]): of ``part``, that many; by name where it is a mapping.
        part (Callable[[nn.Module], nn.Module]): what is compared, compiled and exported.
        part_name (str): what that is, where it is not the whole model.
        unsaved (str): why the library's own model, once it has run, cannot be saved as a whole, which a test looks at.
        unexported (str): likewise, why it cannot be exported.
        breaks (bool): whether torch.compile needs more than one graph for it.
    """

    library: str
    name: str
    build: Callable[[], nn.Module]
    places: tuple[str, ...]
    loss: Callable[[nn.Module], Tensor]
    arguments: Mapping[str, Any] | None = field(default_factory=dict)
    inputs: Callable[[int], Any] = lambda number: torch.rand(number, 3, 64, 64)
    part: Callable[[nn.Module], nn.Module] = whole
    part_name: str = ""
    unsaved: str = ""
    unexported: str = ""
    breaks: bool = False

    def __str__(self) -> str:
        return f"{self.library} {self.name}"


DOWNSAMPLING = dict(upsample=False, downsample=True)
#: Where the paper's Fig. 4 and Sec. 4 have CARAFE++ in a ResNet with two or three convolutions a block.
SEVEN = {
    conv: ("maxpool", *(f"layer{n}.0.{where}" for n in (2, 3, 4) for where in (conv, "downsample.0")))
    for conv in ("conv1", "conv2")
}


def calls(module: str, *numbers: int) -> tuple[str, ...]:
    return tuple(f"{module}.carafe_upsamplers.{number}".lstrip(".") for number in numbers)


def images(size: int = 64) -> Tensor:
    return torch.rand(2, 3, size, size)


def scene(size: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Two objects in an image: boxes (x1, y1, x2, y2), labels and masks."""
    boxes = torch.tensor([[4.0, 6.0, 40.0, 44.0], [20.0, 10.0, 60.0, 58.0]]) * size / 64
    masks = torch.zeros(2, size, size)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    return boxes, torch.tensor([1, 2]), masks


def label_maps(size: int = 64) -> Tensor:
    return torch.randint(5, (2, size, size))


def classification(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(images()), torch.tensor([0, 1]))


def segmentation(model: nn.Module) -> Tensor:
    scores = model(images(128))  # which PAN needs
    return F.cross_entropy(scores if isinstance(scores, Tensor) else scores["out"], label_maps(128))


def regression(model: nn.Module) -> Tensor:
    features = model(images())
    return sum((each - torch.rand_like(each)).square().mean() for each in features)
