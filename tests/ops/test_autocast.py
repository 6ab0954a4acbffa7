"""Autocast: mixed dtypes in, autocast's dtype out, gradients in the inputs' own."""

import pytest
import torch
from toolkit import skip_without_half_on_cpu

from carafe_plugin import CARAFEUpsample
from carafe_plugin.ops import carafe, reference
from carafe_plugin.testing import TOLERANCES, random_case, relative_error

DTYPES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masks_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_mixed_dtypes(dtype, features_dtype, masks_dtype, device):
    skip_without_half_on_cpu(dtype, device=device)
    features, masks, _ = random_case((4, 5), 4, 3, 2, 2, device=device)
    x = features.to(features_dtype).requires_grad_()
    m = masks.to(masks_dtype).requires_grad_()
    with torch.autocast(device, dtype=dtype):
        output = carafe(x, m, 3, 2)
    assert output.dtype == dtype
    expected = reference.reassemble(features, masks, 3, 2, 2, 1)
    # Rounding the inputs adds two roundings of the coarser dtype to that of the result.
    assert relative_error(output, expected) < 3 * TOLERANCES[torch.bfloat16]
    output.float().sum().backward()
    assert x.grad.dtype == features_dtype
    assert m.grad.dtype == masks_dtype


def test_float64_stays(device):
    features, masks, _ = random_case((4, 5), 4, 3, 2, 2, dtype=torch.float64, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        output = carafe(features, masks, 3, 2)
    assert torch.equal(output, carafe(features, masks, 3, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_module_trains_under_autocast(dtype, device):
    skip_without_half_on_cpu(dtype, device=device)
    module = CARAFEUpsample(8).to(device)
    features = torch.randn(2, 8, 5, 6, device=device, requires_grad=True)
    with torch.autocast(device, dtype=dtype):
        output = module(features)
    assert output.dtype == dtype
    output.float().pow(2).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_outside_autocast_mixed_dtypes_are_an_error(device):
    features, masks, _ = random_case((4, 5), 4, 3, 1, 2, device=device)
    with pytest.raises(TypeError, match=r"same dtype outside autocast, got torch\.float32 and torch\.bfloat16"):
        carafe(features, masks.bfloat16(), 3)
