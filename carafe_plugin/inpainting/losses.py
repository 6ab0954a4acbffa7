"""What generator and discriminator are trained on."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def reconstruction_losses(prediction: Tensor, target: Tensor, holes: Tensor) -> tuple[Tensor, Tensor]:
    """L1 in the holes and L1 elsewhere, each divided by the number of all values, as in Liu et al. [26], eq. 1.

    Args:
        prediction (Tensor[N, 3, H, W]): the generator's y_hat.
        target (Tensor[N, 3, H, W]): the original.
        holes (Tensor[N, 1, H, W]): 1 in the holes.

    Returns:
        Two scalars.
    """
    error = (prediction - target).abs()
    return (error * holes).mean(), (error * (1 - holes)).mean()


def adversarial_loss(logits: Tensor, holes: Tensor, real: bool) -> Tensor:
    """Binary cross entropy of a discriminator's patches that look at the inpainted region.

    A patch counts where its share of the image (the images' area is divided evenly among the logits) touches a hole;
    the paper's discriminator judges "the inpainted region", and free-form holes have no box to cut out.

    Args:
        logits (Tensor[N, 1, h, w]): the discriminator's.
        holes (Tensor[N, 1, H, W]): 1 in the holes.
        real (bool): what the patches should be taken for.

    Returns:
        A scalar: the mean over the patches that count; 0 where none does.
    """
    counts = F.adaptive_max_pool2d(holes, logits.shape[-2:])
    target = logits.new_full(logits.shape, float(real))
    losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (losses * counts).sum() / counts.sum().clamp_min(1)
