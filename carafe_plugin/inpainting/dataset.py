"""Any folder of images, with a free-form hole of brush strokes in each; and the order in which training draws them.

All randomness is a function of the seed and of *which* draw it is, never of what was drawn before: any number of worker
processes, and a run resumed from a checkpoint, see the same crops and holes.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sized
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.logging import print_log
from mmengine.registry import DATA_SAMPLERS, DATASETS
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from carafe_plugin.images import list_images, read_upright


def free_form_mask(
    rng: np.random.Generator,
    size: tuple[int, int],
    strokes: tuple[int, int] = (1, 4),
    vertices: tuple[int, int] = (4, 12),
    width: tuple[float, float] = (12 / 256, 40 / 256),
    most: float = 0.6,
) -> np.ndarray:
    """Draw brush strokes as a hand would, to and fro.

    After Yu et al., Free-Form Image Inpainting with Gated Convolution, ICCV 2019 (the paper's reference [45]): a stroke
    starts anywhere and is a chain of straight lines of one width with round joints; every second line turns back; a
    line's direction deviates from 72 degrees by up to 24, its length is normal around an eighth of the image's diagonal
    (standard deviation a sixteenth, from nothing to a quarter); the whole is flipped at random. Widths are those of a
    256 x 256 image, in proportion.

    Args:
        rng (np.random.Generator): the only source of randomness.
        size (tuple[int, int]): height and width in pixels.
        strokes (tuple[int, int]): the fewest and the most strokes.
        vertices (tuple[int, int]): the fewest and the most lines of a stroke.
        width (tuple[float, float]): the least and the largest width of a stroke, in parts of the shorter edge.
        most (float): the largest share of the image that may be hole; a mask beyond it is redrawn.

    Returns:
        (H, W) uint8, 1 in the hole. There is always a hole, and always something left.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> mask = free_form_mask(np.random.default_rng(0), (64, 96))
        >>> mask.shape, bool(0 < mask.mean() <= 0.6)
        ((64, 96), True)
    """
    height, columns = size
    if min(size) < 4:
        raise ValueError(f"size must be at least 4 x 4, got {height} x {columns}")
    for name, (low, high) in (("strokes", strokes), ("vertices", vertices), ("width", width)):
        if low <= 0 or high < low:
            raise ValueError(f"{name} must be (least, most) with 0 < least <= most, got {(low, high)}")
    if not 0.2 <= most <= 1:  # below it, redrawing might never end
        raise ValueError(f"most must be from 0.2 to 1, got {most}")
    for _ in range(100):
        mask: np.ndarray = np.zeros(size, np.uint8)
        for _ in range(rng.integers(*strokes, endpoint=True)):
            _draw_stroke(mask, rng, int(rng.integers(*vertices, endpoint=True)), rng.uniform(*width) * min(size))
        if rng.random() < 0.5:
            mask = mask[::-1]
        if rng.random() < 0.5:
            mask = mask[:, ::-1]
        if mask.any() and mask.mean() <= most and not mask.all():
            return np.ascontiguousarray(mask)
    raise ValueError(f"no mask of {strokes} strokes of width {width} leaves {1 - most:.0%} of the image: ask for less")


def _draw_stroke(mask: np.ndarray, rng: np.random.Generator, vertices: int, width: float) -> None:
    limits = np.array(mask.shape[::-1]) - 1.0  # x, y
    unit = float(np.hypot(*mask.shape)) / 8
    points = [rng.uniform(0, 1, 2) * limits]
    for vertex in range(vertices):
        angle = np.deg2rad(72 + rng.uniform(-24, 24))
        if vertex % 2 == 0:
            angle = 2 * np.pi - angle
        length = float(np.clip(rng.normal(unit, unit / 2), 0, 2 * unit))
        points.append(np.clip(points[-1] + length * np.array([np.sin(angle), np.cos(angle)]), 0, limits))
    cv2.polylines(mask, [np.rint(points).astype(np.int32)], False, 1, max(round(width), 1))


@DATASETS.register_module()
class InpaintingFolder(Dataset):
    """The images of a folder and of all folders below it, by name; Places365's layout is one case.

    An image is turned as its EXIF data say, and its shorter edge is brought to ``size``; training takes a random crop,
    mirrored at random, and a new mask at every draw, testing the central crop and always the same mask. An image that
    cannot be read is reported by name and skipped: in testing it is left out from the start (all are read once), in
    training the next one takes its place.

    Args:
        data_root (str): where the data is.
        data_prefix (str): the folder of images below it.
        size (int): height and width of what the network gets.
        masks (dict | None): arguments of :func:`free_form_mask`.
        flip (float): probability that a training image is mirrored.
        seed (int): what crops and masks follow from.
        test_mode (bool): testing instead of training.

    Raises:
        FileNotFoundError: the folder is missing, or no image in it can be read.
        ValueError: an argument is out of its range.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> Image.new("RGB", (80, 100)).save(f"{folder.name}/grey.png")
        >>> sample = InpaintingFolder(folder.name, size=64)[0]
        >>> sample["inputs"].shape, sample["holes"].shape
        (torch.Size([3, 64, 64]), torch.Size([1, 64, 64]))
    """

    def __init__(
        self,
        data_root: str,
        data_prefix: str = "",
        size: int = 256,
        masks: Mapping[str, Any] | None = None,
        flip: float = 0.5,
        seed: int = 0,
        test_mode: bool = False,
    ) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 4 or size % 4:
            raise ValueError(f"size must be a positive multiple of 4, got {size!r}")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip must be a probability from 0 to 1, got {flip!r}")
        self.folder = Path(data_root, data_prefix)
        self.metainfo = dict(folder=str(self.folder))  # the Runner asks for it, and gives it to the metrics
        self.size, self.masks, self.flip = size, dict(masks or {}), flip
        self.seed, self.test_mode = seed, test_mode
        if not self.folder.is_dir():
            raise FileNotFoundError(f"no such folder of images: {self.folder.absolute()}")
        self.paths = [str(self.folder / name) for name in list_images(self.folder)]
        self._reported: set[str] = set()
        if test_mode:
            with ThreadPoolExecutor() as pool:
                good = list(pool.map(lambda path: self._try_to_read(path) is not None, self.paths))
            self.paths = list(itertools.compress(self.paths, good))
        if not self.paths:
            raise FileNotFoundError(f"no image that can be read in folder {self.folder.absolute()}")

    def _try_to_read(self, path: str) -> Image.Image | None:
        try:
            return read_upright(path)
        except ValueError as error:
            if path not in self._reported:
                self._reported.add(path)
                print_log(f"skipped, cannot be read: {path} ({error})", logger="current", level=logging.WARNING)
            return None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.paths)

    def __getitem__(self, draw: int | tuple[int, int]) -> dict[str, Any]:
        """One image and its hole, by its index, from :class:`DrawSampler` with the number of the draw.

        Returns:
            ``inputs`` (Tensor[3, size, size], uint8, RGB), ``holes`` (Tensor[1, size, size], uint8, 1 in the hole) and
            ``paths`` (str).
        """
        index, *key = draw if isinstance(draw, tuple) else (draw,)
        if not 0 <= index < len(self.paths):
            raise IndexError(f"expected an index from 0 to {len(self.paths) - 1}, got {index}")
        rng = np.random.default_rng([self.seed, index, *key])
        for following in range(len(self.paths)):
            path = self.paths[(index + following) % len(self.paths)]
            image = self._try_to_read(path)
            if image is not None:
                break
        else:
            raise FileNotFoundError(f"no image that can be read in folder {self.folder.absolute()}")
        inputs = torch.from_numpy(np.array(self._crop(image, rng))).permute(2, 0, 1).contiguous()
        holes = free_form_mask(rng, (self.size, self.size), **self.masks)
        return dict(inputs=inputs, holes=torch.from_numpy(holes)[None], paths=path)

    def _crop(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        scale = self.size / min(image.size)
        resized = np.array([max(round(edge * scale), self.size) for edge in image.size])
        room = resized - self.size
        corner = room // 2 if self.test_mode else rng.integers(0, room, endpoint=True)
        # Of the crop alone: the whole of a long strip would take gigabytes. At scale 1 it changes no pixel.
        unit = np.array(image.size) / resized
        box = (*(corner * unit), *np.minimum((corner + self.size) * unit, image.size))
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        return ImageOps.mirror(image) if not self.test_mode and rng.random() < self.flip else image


@DATA_SAMPLERS.register_module()
class DrawSampler(InfiniteSampler):
    """An endless sequence of draws, (index, number of the draw), every image once in each pass.

    The order of a pass follows from the seed and the number of the pass, and processes take turns. MMEngine's loop
    calls :meth:`skip` when it resumes; versions of it that do not know it draw again, and drop, what was drawn before,
    which takes longer and ends at the same draw. ``seed=None`` draws one, the same for all processes.

    Example:
        >>> from itertools import islice
        >>> sampler = DrawSampler(range(3), seed=0)
        >>> [number for index, number in islice(sampler, 5)]
        [0, 1, 2, 3, 4]
    """

    def __init__(self, dataset: Sized, seed: int | None = None) -> None:
        super().__init__(dataset, seed=seed)
        del self.indices  # a generator that has begun: it cannot be copied, and is not needed here
        self._skipped = 0

    def skip(self, draws: int) -> None:
        """Begin after this process's first ``draws`` draws."""
        self._skipped = draws

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """The draws of this process."""
        order: Any = ()
        passes = -1
        for draw in itertools.count(self.rank + self._skipped * self.world_size, self.world_size):
            if draw // self.size != passes:
                passes = draw // self.size
                order = np.random.default_rng([self.seed, passes]).permutation(self.size)
            yield int(order[draw % self.size]), draw
