"""The model that MMEngine's Runner trains and tests: a generator, a discriminator, and the losses between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.optim import OptimWrapperDict
from mmengine.registry import MODELS
from torch import Tensor

#: Liu et al. [26], eq. 7; Isola et al. [20] for the adversary.
LOSS_WEIGHTS = dict(hole=6.0, valid=1.0, adversarial=0.01)


@MODELS.register_module()
class InpaintingPreprocessor(BaseDataPreprocessor):
    """Stacks images and holes, moves them to the device, and scales images linearly to [-1, 1] (Sec. 5.1)."""

    def forward(self, data: dict, training: bool = False) -> dict[str, Any]:
        """Lists of uint8 images (3, H, W) and holes (1, H, W) -> float32 batches, with whatever else ``data`` has."""
        data = self.cast_data(data)
        inputs, holes = (torch.stack(list(data[name])).float() for name in ("inputs", "holes"))
        return {**data, "inputs": inputs / 127.5 - 1, "holes": holes}


@MODELS.register_module()
class InpaintingGAN(BaseModel):
    """An inpainting network and its adversary (Sec. 5.1).

    The completed image is y = (1 - M) x + M y_hat. In every step the discriminator learns to tell y from originals, on
    the inpainted region, with binary cross entropy; then the generator learns from

        6 L1(hole) + 1 L1(elsewhere) + 0.01 adversarial

    The paper names no weights. These are Partial Conv's ([26]) for the two L1 terms, taken of y_hat and each divided by
    the number of all values, and pix2pix's ([20]) proportion, 1 to 100, of the adversarial loss to L1. [26]'s
    perceptual and style terms need a pretrained VGG and are left out.

    Args:
        generator, discriminator (dict): their configurations.
        loss_weights (dict | None): other weights than these for ``hole``, ``valid`` or ``adversarial``.
        data_preprocessor (dict | None): :class:`InpaintingPreprocessor` by default.
        init_cfg (dict | None): MMEngine's.

    Raises:
        ValueError: ``loss_weights`` has another key, or a negative weight.
    """

    def __init__(
        self,
        generator: dict,
        discriminator: dict,
        loss_weights: Mapping[str, float] | None = None,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(data_preprocessor or dict(type="InpaintingPreprocessor"), init_cfg)
        weights = {**LOSS_WEIGHTS, **(loss_weights or {})}
        if weights.keys() != LOSS_WEIGHTS.keys() or min(weights.values()) < 0:
            raise ValueError(
                f"loss_weights must have non-negative values for {', '.join(LOSS_WEIGHTS)}, got {loss_weights}"
            )
        self.loss_weights = weights
        self.generator = MODELS.build(generator)
        self.discriminator = MODELS.build(discriminator)

    def forward(self, inputs: Tensor, holes: Tensor, mode: str = "tensor", **kwargs: Any) -> Any:
        """Complete images (N, 3, H, W) in [-1, 1], unknown in the holes (N, 1, H, W), which are 1 there.

        Mode 'tensor' gives y (Tensor[N, 3, H, W]); 'predict' gives for every image a dictionary with ``completed``,
        ``original`` (what came as ``inputs``), ``holes`` and, where the data has it, ``path``. Another mode is a
        ValueError: a step trains two networks, one after the other, see :meth:`train_step`.
        """
        if mode not in ("tensor", "predict"):
            raise ValueError(f"mode must be 'tensor' or 'predict', got {mode!r}; train_step computes the losses")
        completed = complete(inputs, self.generator(inputs, holes), holes)
        if mode == "tensor":
            return completed
        # Copies: who keeps a view keeps its whole batch, and writes it, too.
        found = [
            dict(completed=a.clone(), original=b.clone(), holes=m.clone())
            for a, b, m in zip(completed, inputs, holes, strict=True)
        ]
        for sample, path in zip(found, kwargs.get("paths") or (), strict=False):
            sample["path"] = path
        return found

    def train_step(self, data: Any, optim_wrapper: OptimWrapperDict) -> dict[str, Tensor]:
        """One step of the discriminator, then one of the generator; returns the losses, the parts unweighted."""
        data = self.data_preprocessor(data, True)
        originals, holes = data["inputs"], data["holes"]
        for_generator, for_discriminator = optim_wrapper["generator"], optim_wrapper["discriminator"]

        with for_generator.optim_context(self.generator):
            prediction = self.generator(originals, holes)
            completed = complete(originals, prediction, holes)

        with for_discriminator.optim_context(self.discriminator):
            real = adversarial_loss(self.discriminator(originals, holes), holes, real=True)
            fake = adversarial_loss(self.discriminator(completed.detach(), holes), holes, real=False)
            loss_discriminator = (real + fake) / 2
        for_discriminator.update_params(loss_discriminator)

        self.discriminator.requires_grad_(False)  # its own gradient is not asked for here
        with for_generator.optim_context(self.generator):
            hole, valid = reconstruction_losses(prediction, originals, holes)
            adversarial = adversarial_loss(self.discriminator(completed, holes), holes, real=True)
            parts = dict(hole=hole, valid=valid, adversarial=adversarial)
            loss = torch.stack([self.loss_weights[name] * part for name, part in parts.items()]).sum()
        self.discriminator.requires_grad_(True)
        for_generator.update_params(loss)

        logged = {f"loss_{name}": part.detach() for name, part in parts.items()}
        return dict(loss=loss.detach(), **logged, loss_discriminator=loss_discriminator.detach())


def complete(images: Tensor, prediction: Tensor, holes: Tensor) -> Tensor:
    """The combined image, y = (1 - M) x + M y_hat: exact where something is known, whatever lies in the holes."""
    return torch.where(holes > 0, prediction.to(images.dtype), images)


def reconstruction_losses(prediction: Tensor, target: Tensor, holes: Tensor) -> tuple[Tensor, Tensor]:
    """L1 in the holes and L1 elsewhere, each divided by the number of all values, as in Liu et al. [26], eq. 1."""
    error = (prediction - target).abs()
    return (error * holes).mean(), (error * (1 - holes)).mean()


def adversarial_loss(logits: Tensor, holes: Tensor, real: bool) -> Tensor:
    """Binary cross entropy of a discriminator's patches that look at the inpainted region; 0 where none does.

    A patch counts where its share of the image (the images' area is divided evenly among the logits) touches a hole;
    the paper's discriminator judges "the inpainted region", and free-form holes have no box to cut out.
    """
    counts = F.adaptive_max_pool2d(holes, logits.shape[-2:])
    target = logits.new_full(logits.shape, float(real))
    losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (losses * counts).sum() / counts.sum().clamp_min(1)
