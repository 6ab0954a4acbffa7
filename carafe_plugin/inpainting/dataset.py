"""Any folder of images, with a free-form hole in each; and the order in which training draws them.

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

import numpy as np
import torch
from mmengine.dist import get_dist_info, sync_random_seed
from mmengine.logging import print_log
from mmengine.registry import DATA_SAMPLERS, DATASETS
from PIL import Image
from torch.utils.data import Dataset, Sampler

from carafe_plugin.images import IMAGE_ENDINGS, list_images, read_upright

from .free_form import free_form_mask


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
            self._leave_out_damaged()
        if not self.paths:
            raise FileNotFoundError(
                f"no image that can be read ({', '.join(IMAGE_ENDINGS)}) in folder {self.folder.absolute()}"
            )

    def _leave_out_damaged(self) -> None:
        with ThreadPoolExecutor() as pool:
            good = list(pool.map(lambda path: self._try_to_read(path) is not None, self.paths))
        self.paths = list(itertools.compress(self.paths, good))

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
        pixels = self._crop(image, rng)
        holes = free_form_mask(rng, (self.size, self.size), **self.masks)
        return dict(
            inputs=torch.from_numpy(pixels).permute(2, 0, 1).contiguous(),
            holes=torch.from_numpy(holes)[None],
            paths=path,
        )

    def _crop(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        scale = self.size / min(image.size)
        resized = np.array([max(round(edge * scale), self.size) for edge in image.size])
        room = resized - self.size
        corner = room // 2 if self.test_mode else rng.integers(0, room, endpoint=True)
        if scale == 1:
            image = image.crop((*corner, *(corner + self.size)))
        else:  # of the crop alone: the whole of a long strip would take gigabytes
            unit = np.array(image.size) / resized
            box = (*(corner * unit), *np.minimum((corner + self.size) * unit, image.size))
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        pixels = np.array(image)
        mirrored = not self.test_mode and rng.random() < self.flip
        return np.ascontiguousarray(pixels[:, ::-1] if mirrored else pixels)


@DATA_SAMPLERS.register_module()
class DrawSampler(Sampler):
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
        self.rank, self.world_size = get_dist_info()
        self.images = len(dataset)
        self.seed = sync_random_seed() if seed is None else seed
        self._skipped = 0

    def skip(self, draws: int) -> None:
        """Begin after this process's first ``draws`` draws."""
        self._skipped = draws

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """The draws of this process."""
        order: Any = ()
        passes = -1
        for draw in itertools.count(self.rank + self._skipped * self.world_size, self.world_size):
            if draw // self.images != passes:
                passes = draw // self.images
                order = np.random.default_rng([self.seed, passes]).permutation(self.images)
            yield int(order[draw % self.images]), draw

    def __len__(self) -> int:
        """Number of images; the draws have no end."""
        return self.images

    def set_epoch(self, epoch: int) -> None:
        """Nothing depends on the epoch; MMEngine calls it."""
