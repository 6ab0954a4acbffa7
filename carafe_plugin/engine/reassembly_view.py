"""A model's reassemblies on one image: run it, find the chains, and know where every location lies in the image."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from torch import nn

from carafe_plugin.analysis import Reassembly, record_reassemblies
from carafe_plugin.engine.config import toolbox
from carafe_plugin.engine.errors import UsageError
from carafe_plugin.engine.prediction import Picture, load_picture, prepare
from carafe_plugin.modules.carafe import KernelPrediction

#: What ``--chain`` knows: the names of the modules of each. A shortcut's downsampler runs beside the main path's.
CHAINS = {
    "fpn": re.compile(r"(.*\.)?upsample_modules\.\d+"),
    "fuse": re.compile(r"(.*\.)?fuse_upsamplers\.\d+"),
    "backbone": re.compile(r"backbone\.(?!.*\.downsample\.).*"),
}


@dataclass(frozen=True)
class Axis:
    """Where pixels of the image lie on one axis of what the network sees: ``scale * x + shift``, edges of pixels."""

    scale: float
    shift: float


@dataclass(frozen=True)
class View:
    """What the network saw of an image, and what reassembled it. Sizes are height and width."""

    image_size: tuple[int, int]  # of the image file
    input_size: tuple[int, int]  # of the network's input, padding included
    seen_size: tuple[int, int]  # the same without padding
    x: Axis  # from columns of the image to columns of the input
    y: Axis
    reassemblies: list[Reassembly]  # of every CARAFE++ that ran on maps of the whole image, in the order they ran

    def cells(self, size: tuple[int, int], chain: Sequence[Reassembly]) -> tuple[float, float, float, float]:
        """How a map of a chain lies on the image, in pixels: left and top edge of location (0, 0), its width and
        height.

        With a stride of s, a location stands for s x s pixels. In a chain upwards these squares tile the image, so that
        a source covers the outputs whose centre it is; in a chain downwards they lie around their centre: location i of
        the output around location sigma * i of the source, as eq. 3 has both.
        """
        width, height = (_stride(self.input_size, size, axis) for axis in (1, 0))
        left = top = 0.0
        if chain[-1].output_size < chain[0].source_size:
            left = (_stride(self.input_size, chain[0].source_size, 1) - width) / 2
            top = (_stride(self.input_size, chain[0].source_size, 0) - height) / 2
        x, y = self.x, self.y
        return (left - x.shift) / x.scale, (top - y.shift) / y.scale, width / x.scale, height / y.scale

    def locate(self, x: float, y: float, chain: Sequence[Reassembly]) -> tuple[int, int]:
        """Row and column of the location on a chain's output that the pixel (x, y) of the image belongs to. Raises
        UsageError where the point is not in the image, or the pipeline cuts it away.
        """
        check_point(x, y, self.image_size)
        seen = self.x.scale * (x + 0.5) + self.x.shift, self.y.scale * (y + 0.5) + self.y.shift
        if not (0 <= seen[0] < self.seen_size[1] and 0 <= seen[1] < self.seen_size[0]):
            raise UsageError(f"point {x:g},{y:g} is in a part of the image that the test pipeline cuts away")
        size = chain[-1].output_size
        left, top, width, height = self.cells(size, chain)
        return min(int((y + 0.5 - top) / height), size[0] - 1), min(int((x + 0.5 - left) / width), size[1] - 1)


def check_point(x: float, y: float, size: tuple[int, int]) -> None:
    """Raise a UsageError for a point that is not in an image of ``size`` (height, width)."""
    height, width = size
    if not (0 <= x < width and 0 <= y < height):
        raise UsageError(f"point {x:g},{y:g} is outside the image, which is {width} x {height} pixels")


def _stride(input_size: tuple[int, int], size: tuple[int, int], axis: int) -> float:
    # Maps have ceil(H / stride) rows, floor(H / stride) in some backbones; the stride is mostly a power of two.
    for stride in (2**power for power in range(11)):
        if all(length // stride <= part <= -(-length // stride) for length, part in zip(input_size, size, strict=True)):
            return stride
    return input_size[axis] / size[axis]


def view_image(cfg: Config, model: nn.Module, pipeline: Compose, picture: Picture) -> View:
    """Run a model in evaluation mode on an image as in a test, with its pipeline, and record its reassemblies.
    Raises UsageError where the test pipeline does not keep a plain image of it (see :func:`_follow`).

    A segmentor sees the whole image at once, also where its configuration tests it in windows.
    """
    size = picture.pixels.shape[:2]
    batch = prepare(pipeline, picture)
    seen = tuple(batch["inputs"][0].shape[-2:])
    x, y = _follow(pipeline, size, 1), _follow(pipeline, size, 0)
    preprocessor: Any = model.data_preprocessor
    data = preprocessor(batch, False)
    with torch.no_grad(), record_reassemblies(model) as found:
        model(**data, mode="predict" if toolbox(cfg) == "mmdet" else "tensor")
    # Not of regions: one map, outside a head that looks at regions of interest.
    whole = [one for one in found if "roi_head" not in one.name.split(".") and len(one.kernels) == 1]
    return View(size, tuple(data["inputs"].shape[-2:]), seen, x, y, whole)


def _follow(pipeline: Compose, size: tuple[int, int], axis: int) -> Axis:
    """Where a pipeline puts an image's rows (axis 0) or columns (1), whatever its steps are: resize, crop, pad, flip.

    It runs on an image whose green says how far down or right each pixel is, and which is full in the other channels,
    as no padding is. Noise of one grey level before rounding makes the averages exact.
    """
    positions = 255 * (np.arange(size[axis]) + 0.5) / size[axis]
    noise = np.random.default_rng(0).random(size)
    ramp = np.full((*size, 3), 255, np.uint8)
    ramp[..., 1] = np.floor(noise + (positions[:, None] if axis == 0 else positions[None, :]))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "ramp.png")
        cv2.imwrite(str(file), ramp)
        channels = prepare(pipeline, load_picture(pipeline, file))["inputs"][0].double().numpy()
    inside = (channels[0] > 254) & (channels[2] > 254)
    places = np.flatnonzero(inside.any(1 - axis))
    if len(places) < 2:
        raise UsageError("the test pipeline does not keep the image: cannot tell where its pixels go")
    # Interpolation clamps at the borders.
    trim = len(places) // 10
    places = places[trim : len(places) - trim]
    values = np.average(channels[1], axis=1 - axis, weights=inside.clip(1e-9))[places]
    slope, start = np.polyfit(places + 0.5, values / 255 * size[axis], 1)
    return Axis(1 / slope, -start / slope)


def check_modules(model: nn.Module, modules: Sequence[str]) -> list[str]:
    """The names of a model's CARAFE++. Raises UsageError where it has none, or one of ``modules`` is not among them."""
    sites = [name for name, part in model.named_modules() if isinstance(part, KernelPrediction)]
    stock = [name for name, part in model.named_modules() if type(part).__module__.startswith("mmcv.ops.carafe")]
    if not sites:
        hint = f"; {', '.join(stock)} are mmcv's own layers: add --drop-in" if stock else ""
        raise UsageError(f"the model has no CARAFE++{hint}")
    for name in modules:
        if name not in sites:
            raise UsageError(f"--modules: {name} is not a CARAFE++ of the model, which has {', '.join(sites)}")
    return sites


def find_chains(
    model: nn.Module, view: View, wanted: str | None, modules: Sequence[str]
) -> dict[str, list[Reassembly]]:
    """The chains to draw, by their titles: ``modules`` as one chain, in any order, else the chain ``wanted`` of
    ``CHAINS``, or all that there are. Raises UsageError where the model lacks them.
    """
    sites = check_modules(model, modules)
    ran = {reassembly.name: reassembly for reassembly in view.reassemblies}
    for name in modules:
        if name not in ran:
            raise UsageError(f"--modules: {name} did not run on maps of the image; these did: {', '.join(ran)}")
    if modules:
        chains = {", ".join(modules): [reassembly for name, reassembly in ran.items() if name in modules]}
    else:
        patterns = {title: CHAINS[title] for title in ([wanted] if wanted else CHAINS)}
        chains = {title: [ran[name] for name in ran if pattern.fullmatch(name)] for title, pattern in patterns.items()}
        chains = {title: chain for title, chain in chains.items() if chain}
    if not chains:
        what = f"no chain {wanted}" if wanted else f"none of the chains {', '.join(CHAINS)}"
        raise UsageError(f"the model has {what}: name some of its CARAFE++ with --modules: {', '.join(sites)}")
    return chains
