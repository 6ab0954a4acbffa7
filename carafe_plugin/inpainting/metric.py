"""How good a completion is: L1 and PSNR (Table 10) of the whole image and of the hole alone, and SSIM."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS
from PIL import Image

from carafe_plugin._require import require

#: Of an image without an error, whose PSNR would be infinite.
HIGHEST_PSNR = 100.0
SSIM_WINDOW = 11
WANG_2004: dict[str, Any] = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)


def psnr(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB of an error on values of range 1; at most :data:`HIGHEST_PSNR`."""
    return float(min(-10 * np.log10(max(mean_squared_error, 1e-30)), HIGHEST_PSNR))


@METRICS.register_module()
class InpaintingMetric(BaseMetric):
    """Compares completed images with the originals, as means over images.

    - ``l1`` (%) and ``psnr`` (dB) of the whole image, where all that is known is exact: Table 10's, as we read it;
    - ``l1_hole`` (%) and ``psnr_hole`` (dB) of the hole's pixels alone: they do not depend on how large the hole is;
    - ``ssim`` of the whole image: scikit-image's, with the Gaussian window of 11 x 11 (sigma 1.5) of Wang et al. 2004;
      smaller images have none.

    L1 is the mean absolute difference of values in parts of their range. Nothing is rounded to 8 bits.

    Args:
        folder (str | None): where to write the completed images too: with their paths below the dataset's folder,
            each as a PNG file with ``.png`` appended to its whole name.
        **kwargs: those of MMEngine's ``BaseMetric``.

    Raises:
        ImportError: scikit-image is not installed.

    Example:
        >>> import torch
        >>> metric, hole = InpaintingMetric(), torch.zeros(1, 16, 16)
        >>> hole[:, :8, :8] = 1
        >>> original = torch.zeros(3, 16, 16)
        >>> metric.process({}, [dict(completed=original + 0.2 * hole, original=original, holes=hole)])
        >>> found = metric.compute_metrics(metric.results)
        >>> round(found["l1"], 3), round(found["l1_hole"], 3), round(found["psnr_hole"], 3)
        (2.5, 10.0, 20.0)
    """

    default_prefix = "inpainting"

    def __init__(self, folder: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.folder = folder
        require("skimage", "the SSIM of InpaintingMetric")
        from skimage.metrics import structural_similarity

        self._ssim = structural_similarity

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Measure a batch: of every image ``completed`` and ``original`` (Tensor[3, H, W], in [-1, 1]) and ``holes``.

        Holes are Tensor[1, H, W], 1 in the hole; with ``folder``, images have a ``path`` too.
        """
        for sample in data_samples:
            images = [sample[name].detach().cpu().double().numpy() for name in ("completed", "original")]
            completed, original = ((image + 1) / 2 for image in images)
            if self.folder:
                self._write(completed, sample["path"])
            error = completed - original
            found = dict(l1=100 * float(np.abs(error).mean()), psnr=psnr(float((error**2).mean())))
            if min(error.shape[1:]) >= SSIM_WINDOW:
                found["ssim"] = float(self._ssim(completed, original, channel_axis=0, data_range=1.0, **WANG_2004))
            hole = sample["holes"][0].cpu().numpy() > 0
            if hole.any():
                found["l1_hole"] = 100 * float(np.abs(error[:, hole]).mean())
                found["psnr_hole"] = psnr(float((error[:, hole] ** 2).mean()))
            self.results.append(found)

    def _write(self, image: np.ndarray, path: str) -> None:
        root = (self.dataset_meta or {}).get("folder")
        target = Path(self.folder or "", f"{os.path.relpath(path, root) if root else Path(path).name}.png")
        target.parent.mkdir(parents=True, exist_ok=True)
        pixels = (255 * image).round().clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(target)

    def compute_metrics(self, results: list) -> dict[str, float]:
        """The mean of every number over the images that have it."""
        names = ("l1", "psnr", "l1_hole", "psnr_hole", "ssim")
        values = {name: [found[name] for found in results if name in found] for name in names}
        return {name: float(np.mean(found)) for name, found in values.items() if found}
