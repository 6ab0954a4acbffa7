"""Derivatives in reverse and forward mode, nested both ways, by torch.func: none of them is zero without a word."""

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from carafe_plugin import CARAFEUpsample
from carafe_plugin.ops import carafe, reference
from carafe_plugin.ops.fused import reassemble_logits

RATIOS = ((2, 1), (1, 2), (3, 2))
TRANSFORMS = {
    "reverse": lambda f, argument: grad(f, argument),
    "forward": lambda f, argument: jacfwd(f, argument),
    "reverse over reverse": lambda f, argument: jacrev(jacrev(f, argument), argument),
    "forward over reverse": lambda f, argument: hessian(f, argument),
    "reverse over forward": lambda f, argument: jacrev(jacfwd(f, argument), argument),
    "forward over forward": lambda f, argument: jacfwd(jacfwd(f, argument), argument),
    "third": lambda f, argument: grad(
        lambda *x: grad(lambda *y: grad(f, argument)(*y).pow(2).sum(), argument)(*x).pow(2).sum(), argument
    ),
}


def cubes(normalizer, ratio, device):
    """A scalar function of features and kernels by the operators, the same by the definition, and arguments."""
    up, down = ratio
    out = [-(-size * up // down) for size in (1, 2)]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(device)

    features = draw(1, 2, 1, 2)
    if normalizer is None:
        masks = draw(1, 9, *out)

        def by_masks(f):
            return lambda x, m: f(x, m, 3, 1, up, down).pow(3).sum()

        return by_masks(torch.ops.carafe_plugin.carafe), by_masks(reference.reassemble), (features, masks)
    coarse = out if up == 1 else (1, 2)
    logits = draw(1, 9 * up**2, *coarse)

    def ours(x, z):
        return reassemble_logits(x, z, 3, 1, up, down, normalizer).pow(3).sum()

    def expected(x, z):
        masks = reference.masks_from_logits(z, 3, 1, up, down, normalizer)
        return reference.reassemble(x, masks, 3, 1, up, down).pow(3).sum()

    return ours, expected, (features, logits)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("normalizer", [None, *reference.NORMALIZERS])
def test_every_mode_and_order(normalizer, name, device, one_thread):
    for ratio in RATIOS if name in ("reverse", "forward") else RATIOS[:1]:
        ours, expected, arguments = cubes(normalizer, ratio, device)
        for argument in (0, 1):
            found = TRANSFORMS[name](ours, argument)(*arguments)
            torch.testing.assert_close(found, TRANSFORMS[name](expected, argument)(*arguments), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_where_a_derivative_is_zero(name, device, one_thread):
    """A function that is linear in the masks, and a part that no_grad() hides from reverse mode, at every level."""
    features, masks, weight = (
        torch.randn(*shape, device=device) for shape in ((1, 2, 1, 2), (1, 9, 2, 4), (1, 2, 2, 4))
    )

    def linear(reassemble):
        return lambda m: (reassemble(features, m, 3, 1, 2, 1) * weight).sum()

    def hidden(reassemble):
        def function(x):
            with torch.no_grad():
                y = reassemble(x, masks, 3, 1, 2, 1)
            return (y * weight * x.sum()).sum()

        return function

    for function, argument in ((linear, masks), (hidden, features)):
        found = TRANSFORMS[name](function(torch.ops.carafe_plugin.carafe), 0)(argument)
        torch.testing.assert_close(found, TRANSFORMS[name](function(reference.reassemble), 0)(argument))


def test_tangents_outside_torch_func(device):
    forward_ad = torch.autograd.forward_ad
    module = CARAFEUpsample(4).double().to(device)
    torch.nn.init.normal_(module.content_encoder.weight)
    features, direction = torch.randn(2, 1, 4, 3, 2, dtype=torch.float64, device=device)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(module(forward_ad.make_dual(features, direction))).tangent
    step = 1e-6
    expected = (module(features + step * direction) - module(features - step * direction)) / (2 * step)
    torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-8)
    _, same = jvp(module, (features,), (direction,))
    torch.testing.assert_close(same, tangent)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_and_gradients_of_each_sample(device):
    features, masks = torch.randn(3, 1, 2, 2, 3, device=device), torch.rand(3, 1, 9, 4, 6, device=device)
    every = vmap(lambda x, m: carafe(x, m, 3))(features, masks)
    assert torch.equal(every[1], carafe(features[1], masks[1], 3))
    gradients = vmap(grad(lambda x, m: carafe(x, m, 3).pow(2).sum()))(features, masks)
    x = features[2].clone().requires_grad_()
    carafe(x, masks[2], 3).pow(2).sum().backward()
    torch.testing.assert_close(gradients[2], x.grad)
