"""The upsamplers that came after CARAFE++ against their papers' formulas, written as loops."""

import pytest
import torch
import torch.nn.functional as F
from test_peers import centre, conv, sampled
from toolkit import needs_compile, skip_without_half_on_cpu
from torch import nn

from carafe_plugin.modules import rivals

pytestmark = pytest.mark.usefixtures("one_thread")

DySample = rivals.DySample
CHANNELS = 8


def build(kind, scale_factor=2, channels=CHANNELS, **options):
    """An operator in float64 whose parameters are all drawn at random, so that none hides behind a zero or a one."""
    torch.manual_seed(0)
    module = kind(channels, scale_factor, **options).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def maps(module, height=4, width=3, batch=2, size=None, dtype=torch.float64):
    """What a module is called with: the map to upsample and, where it is guided, the encoder's, of ``size``."""
    draw = torch.Generator().manual_seed(1)
    sizes = [(height, width)]
    if getattr(module, "guided", False):
        sizes.append(size or (module.scale_factor * height, module.scale_factor * width))
    return [torch.randn(batch, module.channels, *each, dtype=torch.float64, generator=draw).to(dtype) for each in sizes]


def locations(x):
    """Every (n, i, j) of a batch of maps."""
    return torch.cartesian_prod(*map(torch.arange, (x.shape[0], *x.shape[2:]))).tolist()


def shuffled(x, sigma):
    """Pixel shuffle: channel c * sigma^2 + a * sigma + b becomes phase (a, b) of channel c."""
    out = x.new_zeros(x.shape[0], x.shape[1] // sigma**2, sigma * x.shape[2], sigma * x.shape[3])
    for c, i, j in torch.cartesian_prod(*map(torch.arange, out.shape[1:])).tolist():
        out[:, c, i, j] = x[:, c * sigma**2 + i % sigma * sigma + j % sigma, i // sigma, j // sigma]
    return out


def naive_dysample(module, x):
    sigma, groups = module.scale_factor, module.groups
    source = x if module.style == "lp" else shuffled(x, sigma)
    scope = 1 / 4 if module.scope is None else 1 / 2 / (1 + (-conv(module.scope, source)).exp())
    offsets = scope * conv(module.offset, source)
    if module.style == "lp":
        offsets = shuffled(offsets, sigma)
    out = x.new_zeros(*x.shape[:2], sigma * x.shape[2], sigma * x.shape[3])
    for n, i, j in locations(out):
        for group, channels in enumerate(torch.arange(x.shape[1]).chunk(groups)):
            right, down = offsets[n, group, i, j].item(), offsets[n, groups + group, i, j].item()
            out[n, channels, i, j] = sampled(x[n, channels], centre(module, i) + down, centre(module, j) + right)
    return out


CASES = {
    "DySample": (DySample, {}, naive_dysample),
    "DySample+": (DySample, dict(dynamic_scope=True), naive_dysample),
    "DySample-S": (DySample, dict(style="pl"), naive_dysample),
    "DySample-S+": (DySample, dict(style="pl", groups=2, dynamic_scope=True), naive_dysample),
}
# How many parameters three of them, of 256 channels, have in an FPN, as published; the last digit is rounded.
PUBLISHED = {"DySample+": (49.2e3, 100), "DySample-S+": (6.2e3, 100)}

every_case = pytest.mark.parametrize("case", CASES)


def of(case, scale_factor=2, **options):
    kind, settings, _ = CASES[case]
    if settings.get("style") == "pl" and scale_factor == 3:
        options.setdefault("channels", 18)
        settings = dict(settings, groups=2)
    return build(kind, scale_factor, **settings, **options)


def test_every_operator_has_a_definition():
    assert {kind for kind, _, _ in CASES.values()} == set(rivals.RIVALS)


@every_case
@pytest.mark.parametrize("scale_factor", [2, 3])
def test_is_its_definition(case, scale_factor):
    module = of(case, scale_factor)
    inputs = maps(module)
    with torch.no_grad():
        torch.testing.assert_close(module(*inputs), CASES[case][2](module, *inputs), rtol=1e-10, atol=1e-10)


@every_case
def test_gradients(case):
    """Of the inputs and of every parameter, against finite differences."""
    module = of(case)
    inputs = [x.requires_grad_() for x in maps(module, 2, 3, batch=1)]
    # Small changes of many parameters at once: a random direction each, as gradcheck's fast mode draws it.
    arguments = (*inputs, *module.parameters())
    assert torch.autograd.gradcheck(lambda *each: module(*each[: len(inputs)]), arguments, atol=1e-5, fast_mode=True)
    module(*inputs).square().sum().backward()
    assert all(x.grad.any() for x in arguments)


@every_case
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (7, 2), (5, 5)])
def test_sizes(case, size):
    for scale_factor in (1, 2, 3):
        module = of(case, scale_factor).float()
        inputs = maps(module, *size, dtype=torch.float32)
        expected = (scale_factor * size[0], scale_factor * size[1])
        with torch.no_grad():
            assert module(*inputs).shape == (2, module.channels, *expected)
            assert module(*[x[:0] for x in inputs]).shape == (0, module.channels, *expected)


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(case, dtype):
    skip_without_half_on_cpu(dtype)
    module = of(case)
    inputs = [x.to(dtype) for x in maps(module)]
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype).double() / 4
    expected = module(*[x.double() for x in inputs])
    output = module.to(dtype)(*inputs)
    assert output.dtype == dtype
    # Some rounded operations one after another; a kernel's or a position's error is multiplied by values of up to 3.
    tolerance = 30 * torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)


@every_case
def test_two_runs_give_the_same_bits(case):
    module = of(case).float()
    inputs = maps(module, dtype=torch.float32)
    runs = []
    for _ in range(2):
        output = module(*inputs)
        runs.append([output, *torch.autograd.grad(output.square().sum(), list(module.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@needs_compile
@every_case
def test_compiled(case):
    module = of(case).float()
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for size in ((4, 3), (5, 6)):
        inputs = maps(module, *size, dtype=torch.float32)
        results = []
        for forward in (module, compiled):
            output = forward(*inputs)
            results.append([output, *torch.autograd.grad(output.square().sum(), list(module.parameters()))])
        # The same operators, though some decompose into others that round otherwise.
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@every_case
def test_fx_traces_it(case):
    module = of(case).float()
    traced = torch.fx.symbolic_trace(module)
    for size in ((4, 3), (5, 6)):
        inputs = maps(module, *size, dtype=torch.float32)
        assert torch.equal(traced(*inputs), module(*inputs))


@pytest.mark.parametrize(("case", "published"), PUBLISHED.items())
def test_parameters_are_as_published(case, published):
    kind, settings, _ = CASES[case]
    settings = {key: value for key, value in settings.items() if key != "groups"}
    number, half_a_digit = published[0], published[1] / 2
    assert abs(3 * sum(p.numel() for p in kind(256, **settings).parameters()) - number) <= half_a_digit


@pytest.mark.parametrize("dynamic_scope", [False, True])
@pytest.mark.parametrize("style", ["lp", "pl"])
def test_dysample_starts_as_bilinear_interpolation(style, dynamic_scope):
    module, x = DySample(CHANNELS, style=style, dynamic_scope=dynamic_scope), torch.randn(2, CHANNELS, 6, 5)
    bilinear = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
    # Offsets of a quarter of about 0.001 * sqrt(8), times slopes of about 3 between neighbours.
    torch.testing.assert_close(module(x), bilinear, rtol=0, atol=0.02)
    assert module.offset.weight.std().item() == pytest.approx(0.001, rel=0.3)
    assert not module.offset.bias.any()
    nn.init.zeros_(module.offset.weight)
    torch.testing.assert_close(module(x), bilinear)


def test_bad_arguments_of_dysample():
    with pytest.raises(ValueError, match="style must be 'lp' or 'pl', got 'ps'"):
        DySample(8, style="ps")
    with pytest.raises(ValueError, match="channels must be a multiple of groups=4, got 6"):
        DySample(6)
    with pytest.raises(ValueError, match=r"channels must be a multiple of scale_factor\^2=9 for style='pl', got 8"):
        DySample(8, 3, style="pl")
    with pytest.raises(ValueError, match="groups must be a positive int, got 0"):
        DySample(8, groups=0)


@pytest.mark.parametrize("kind", rivals.RIVALS)
def test_bad_arguments(kind):
    with pytest.raises(ValueError, match="channels must be a positive int, got 0"):
        kind(0)
    with pytest.raises(ValueError, match=r"scale_factor must be a positive int, got 0\.5"):
        kind(8, 0.5)
    module = kind(8)
    with pytest.raises(ValueError, match=r"features must have shape \(N, 8, H, W\) as channels=8 says"):
        module(*[x[:, :4] for x in maps(module, dtype=torch.float32)])
