"""The CUDA kernel of mmcv, where it is all there is: no compiled CUDA operators of this package, but mmcv's.

It reads raw NCHW memory, knows integer upsampling only, computes whole outputs, and sums in the dtype of its inputs;
each call here makes sure of the first three and hands it float32. The functions are those of :mod:`.reference`, where
:func:`serves`. Each of the two gradients is a call of its own, of which the kernel, which computes both, throws one
away.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Its backward kernel counts threads, 32 for each weight, in 32 bits; a pixel's weights must fit into shared memory.
_MAX_WEIGHTS = (2**31 - 1) // 32
_MAX_WEIGHTS_OF_PIXEL = 384


@functools.cache
def extension() -> Any:
    """Mmcv's compiled operators; None where they are absent or do not load. Asked for once in a process."""
    try:
        from mmcv import _ext
    except Exception:  # whatever keeps it from loading keeps it from serving
        return None
    # The stand-in of carafe_plugin.openmmlab.mmcv_ops has no kernel: it calls this package's operator.
    return None if hasattr(_ext, "is_stand_in") or not hasattr(_ext, "carafe_forward") else _ext


def serves(maps: Tensor, weights: int, kernel_size: int, group_size: int, down: int) -> bool:
    """Whether mmcv's kernel is right for a map (features or their gradient) on a GPU, and so many weights in all."""
    return (
        down == 1
        and group_size * kernel_size**2 <= _MAX_WEIGHTS_OF_PIXEL
        and 0 < weights <= _MAX_WEIGHTS
        and maps.numel() > 0
        and maps.dtype != torch.float64
        and extension() is not None
    )


def reassemble(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, up: int, down: int) -> Tensor:
    """Features (N, C, H, W), masks (N, G * k^2, up * H, up * W) -> (N, C, up * H, up * W)."""
    features32, masks32 = features.float().contiguous(), _whole(masks, features.shape[2:], up)
    output = features32.new_zeros(*features.shape[:2], *masks32.shape[2:])
    buffers = [torch.zeros_like(each) for each in (features32, output, masks32)]
    geometry = {"kernel_size": kernel_size, "group_size": group_size, "scale_factor": up}
    extension().carafe_forward(features32, masks32, *buffers, output, **geometry)
    return output[..., : masks.shape[2], : masks.shape[3]].to(features.dtype)


def grad_features(
    grad_output: Tensor, masks: Tensor, height: int, width: int, kernel_size: int, group_size: int, up: int, down: int
) -> Tensor:
    """The gradient to features of size ``height x width``."""
    features = grad_output.new_zeros(*grad_output.shape[:2], height, width)
    return _gradients(grad_output, features, masks, kernel_size=kernel_size, group_size=group_size, scale_factor=up)[0]


def grad_masks(grad_output: Tensor, features: Tensor, kernel_size: int, group_size: int, up: int, down: int) -> Tensor:
    """The gradient to the masks."""
    n, _, h_out, w_out = grad_output.shape
    masks = grad_output.new_zeros(n, group_size * kernel_size**2, h_out, w_out)
    geometry = {"kernel_size": kernel_size, "group_size": group_size, "scale_factor": up}
    return _gradients(grad_output, features, masks, **geometry)[1][..., :h_out, :w_out]


def _whole(maps: Tensor, features: Sequence[int], up: int) -> Tensor:
    """Masks, or a gradient of the output, with zeros for the outputs that are not wanted; float32 and contiguous."""
    rows, columns = (size * up - length for size, length in zip(features, maps.shape[2:], strict=True))
    return F.pad(maps.float(), (0, columns, 0, rows)).contiguous()


def _gradients(grad_output: Tensor, features: Tensor, masks: Tensor, **geometry: int) -> tuple[Tensor, Tensor]:
    grad32, masks32 = (_whole(maps, features.shape[2:], geometry["scale_factor"]) for maps in (grad_output, masks))
    # Its forward pass hands its backward pass the features as (N, H, W, C), in a buffer of the shape (N, C, H, W).
    by_pixel = features.float().permute(0, 2, 3, 1).contiguous().view(features.shape)
    buffers = [torch.zeros_like(each) for each in (grad32, grad32, by_pixel, masks32)]
    grads = torch.zeros_like(by_pixel), torch.zeros_like(masks32)
    extension().carafe_backward(grad32, by_pixel, masks32, *buffers, *grads, **geometry)
    return grads[0].to(features.dtype), grads[1].to(masks.dtype)
