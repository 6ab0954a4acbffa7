"""Autocast on every device and in every torch from 2.1 on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for a device type; the spelling changed in torch 2.4."""
    try:
        return torch.is_autocast_enabled(device_type)
    except RuntimeError:  # a device without autocast, such as meta
        return False
    except TypeError:
        return torch.is_autocast_cpu_enabled() if device_type == "cpu" else torch.is_autocast_enabled()


def autocast_dtype(device_type: str) -> torch.dtype:
    """The dtype that autocast computes in on a device type."""
    if hasattr(torch, "get_autocast_dtype"):
        return torch.get_autocast_dtype(device_type)
    return torch.get_autocast_cpu_dtype() if device_type == "cpu" else torch.get_autocast_gpu_dtype()


def cast_together(tensors: Sequence[Tensor], device_type: str) -> list[Tensor]:
    """The tensors in autocast's dtype; float64 in one of them keeps all in float64, as torch's own rules do."""
    dtype = autocast_dtype(device_type)
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        dtype = torch.float64
    return [tensor.to(dtype) for tensor in tensors]
