"""The operator in standard operators, for exports, against the definition."""

import itertools

import pytest
import torch

from carafe_plugin.ops import forms, reference

SCALES = ((2, 1), (3, 1), (4, 1), (1, 1), (1, 2), (1, 3), (1, 8), (3, 2), (2, 3))
FORMS = {"multiply_add": forms.multiply_add, "banded": forms.banded}


def arguments(k, g, up, down, size, normalizer, cropped):
    """A call's arguments, and what it should return."""
    whole = tuple(reference.output_size(length, up, down) for length in size)
    wanted = tuple(max(1, length - lost) for length, lost in zip(whole, (1, 2), strict=True)) if cropped else whole
    features = torch.randn(2, 4, *size, dtype=torch.float64)
    if normalizer == reference.NONE:
        kernels = masks = torch.randn(2, g * k * k, *wanted, dtype=torch.float64)
    else:
        coarse = size if up > 1 else wanted
        kernels = torch.randn(2, g * (k * up) ** 2, *coarse, dtype=torch.float64)
        masks = reference.masks_from_logits(kernels, k, g, up, down, reference.NORMALIZERS[normalizer - 1])
        masks = masks[..., : wanted[0], : wanted[1]]
    expected = reference.reassemble(features, masks, k, g, up, down)
    return (features, kernels, k, g, up, down, normalizer, *(wanted if cropped else ())), expected


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(("up", "down"), SCALES)
def test_forms_are_the_definition(form, up, down, one_thread):
    """Tiles of every length, whole and cut; kernels wider than the map; every normaliser."""
    torch.manual_seed(0)
    sizes = ((1, 1), (5, 7), (6, 25), (9, 30))
    normalizers = itertools.cycle(range(1 + len(reference.NORMALIZERS)))
    for size, k, g, cropped in itertools.product(sizes, (1, 3, 5, 11), (1, 2), (False, True, True)):
        call, expected = arguments(k, g, up, down, size, next(normalizers), cropped)
        torch.testing.assert_close(form(*call), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forms_of_no_images(form):
    for up, down in ((2, 1), (1, 2)):
        call, _ = arguments(5, 1, up, down, (5, 7), reference.NONE, False)
        assert form(call[0][:0], call[1][:0], *call[2:]).shape == (0, 4, *call[1].shape[2:])
