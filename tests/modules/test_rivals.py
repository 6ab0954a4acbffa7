"""The upsamplers that came after CARAFE++ against their definitions, their published sizes and their first values."""

import pytest
import torch
import torch.nn.functional as F
from naive_rivals import naive_dlu, naive_dysample, naive_fade, naive_freqfusion, naive_sapa
from toolkit import needs_compile, needs_torch, skip_without_half_on_cpu
from torch import nn

from carafe_plugin import CARAFEUpsample
from carafe_plugin.modules import guided, rivals

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*(TracerWarning|torch.jit|might cause the trace|deprecated).*"),
]

DySample, DLU = rivals.RIVALS
FADE, SAPA, FreqFusion = guided.GUIDED
ALL = (*rivals.RIVALS, *guided.GUIDED)
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


CASES = {
    "DySample": (DySample, {}, naive_dysample),
    "DySample+": (DySample, dict(dynamic_scope=True), naive_dysample),
    "DySample-S": (DySample, dict(style="pl"), naive_dysample),
    "DySample-S+": (DySample, dict(style="pl", groups=2, dynamic_scope=True), naive_dysample),
    "DLU": (DLU, dict(compressed_channels=3), naive_dlu),
    "DLU, groups": (DLU, dict(up_kernel=3, up_group=2, compressed_channels=3), naive_dlu),
    "FADE": (FADE, dict(compressed_channels=3), naive_fade),
    "SAPA": (SAPA, dict(up_kernel=3, embedded_channels=4), naive_sapa),
    "FreqFusion": (FreqFusion, dict(compressed_channels=3, groups=2), naive_freqfusion),
}
# What several of them with 256 channels add to a network, as published: how many, parameters, the last digit's worth.
PUBLISHED = {
    "DySample+": [(3, 49.2e3, 1e2)],
    "DySample-S+": [(3, 6.2e3, 1e2)],
    "FADE": [(3, 0.1e6, 1e5), (6, 0.29e6, 1e4)],
    "SAPA": [(3, 0.1e6, 1e5)],
    "FreqFusion": [(3, 0.3e6, 1e5)],
}

every_case = pytest.mark.parametrize("case", CASES)


def of(case, scale_factor=2, **options):
    kind, settings, _ = CASES[case]
    if settings.get("style") == "pl" and scale_factor == 3:
        options.setdefault("channels", 18)
        settings = dict(settings, groups=2)
    return build(kind, scale_factor, **settings, **options)


def test_every_operator_has_a_definition():
    assert {kind for kind, _, _ in CASES.values()} == set(ALL)


@every_case
@pytest.mark.parametrize("scale_factor", [2, 3])
def test_is_its_definition(case, scale_factor):
    module = of(case, scale_factor)
    inputs = maps(module)
    with torch.no_grad():
        torch.testing.assert_close(module(*inputs), CASES[case][2](module, *inputs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", [case for case, (kind, _, _) in CASES.items() if kind in guided.GUIDED])
@pytest.mark.parametrize(("scale_factor", "size"), [(2, (7, 6)), (2, (9, 5)), (2, (8, 7)), (3, (14, 7)), (1, (4, 3))])
def test_any_rounding_of_the_sizes(case, scale_factor, size):
    """The encoder's map of the features' 4 x 3 pixels, with rows and columns rounded up and down."""
    module = of(case, scale_factor)
    inputs = maps(module, 4, 3, size=size)
    with torch.no_grad():
        output = module(*inputs)
        torch.testing.assert_close(output, CASES[case][2](module, *inputs), rtol=1e-10, atol=1e-10)
    assert output.shape[2:] == size


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


@needs_torch(2, 7, "torch.export of sizes that a model does not fix")
@every_case
def test_exported(case):
    """For sizes that whoever runs it chooses; and traced by torch.jit for one."""
    module = of(case).float().eval()
    example = maps(module, 6, 7, size=(11, 14), dtype=torch.float32)
    sizes = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(module, tuple(example), dynamic_shapes=(sizes,) * len(example)).module()
    others = maps(module, 4, 5, size=(9, 10), dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(exported(*others), module(*others))
        traced = torch.jit.trace(module, tuple(example))
        torch.testing.assert_close(traced(*example), module(*example))


@pytest.mark.parametrize("case", PUBLISHED)
def test_parameters_are_as_published(case):
    kind, settings, _ = CASES[case]
    settings = {key: value for key, value in settings.items() if key in ("style", "dynamic_scope")}
    number = sum(p.numel() for p in kind(256, **settings).parameters())
    for places, published, digit in PUBLISHED[case]:
        assert abs(places * number - published) <= digit / 2


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


def test_dlu_starts_as_a_mean():
    module, x = DLU(CHANNELS), torch.randn(2, CHANNELS, 6, 5)
    mean = F.interpolate(F.avg_pool2d(x, 5, 1, 2), scale_factor=2.0)
    # Logits of about 0.001 times the square root of 64 * 9 and compressed features of about 2.
    torch.testing.assert_close(module(x), mean, rtol=0, atol=0.05)
    assert not module.guidance.weight.any()
    nn.init.zeros_(module.content_encoder.weight)
    torch.testing.assert_close(module(x), mean)


def test_dlu_lightens_carafe_as_published():
    """By 91% of its parameters at sigma = 16."""
    ours, others = (sum(p.numel() for p in kind(256, 16).parameters()) for kind in (DLU, CARAFEUpsample))
    assert round(100 * (1 - ours / others)) == 91


def test_fade_starts_as_a_mean_behind_a_gate():
    module, (x, encoder) = FADE(CHANNELS), maps(FADE(CHANNELS), dtype=torch.float32)
    mean = F.interpolate(F.avg_pool2d(x, 5, 1, 2), scale_factor=2.0)
    gate = F.interpolate(torch.sigmoid(module.gate(x)), scale_factor=2.0)
    # Logits of about 0.001 times the square root of 64 * 9 and compressed features of about 2.
    torch.testing.assert_close(module(x, encoder), gate * encoder + (1 - gate) * mean, rtol=0, atol=0.05)
    nn.init.zeros_(module.gate.weight)
    nn.init.zeros_(module.content_encoder.weight)
    torch.testing.assert_close(module(x, encoder), (encoder + mean) / 2)


def test_sapa_tells_clusters_apart():
    """A point goes to the points of its own kind around it, whose boundary is the encoder's."""
    module = SAPA(2, embedded_channels=2)
    for linear in (module.encoder_embedding, module.decoder_embedding):
        nn.init.eye_(linear.weight)
    nn.init.constant_(module.encoder_norm.weight, 20.0)
    x, encoder = torch.zeros(1, 2, 6, 6), torch.zeros(1, 2, 12, 12)
    for kind, (coarse, fine) in enumerate([(slice(0, 3), slice(0, 7)), (slice(3, 6), slice(7, 12))]):
        x[:, kind, :, coarse] = encoder[:, kind, :, fine] = 1
    inside = (slice(None), slice(None), slice(4, 8), slice(4, 8))  # whose windows do not reach beyond the map
    torch.testing.assert_close(module(x, encoder)[inside], encoder[inside], rtol=0, atol=1e-4)


def test_freqfusion_starts_as_a_mean_and_what_is_sharp():
    module = FreqFusion(CHANNELS)
    x, encoder = maps(module, 6, 5, dtype=torch.float32)
    mean = F.interpolate(F.avg_pool2d(x, 5, 1, 2), scale_factor=2.0)
    expected = mean + encoder - F.avg_pool2d(encoder, 3, 1, 1)
    # Logits and offsets of about 0.001 times the square root of 64 * 9 and compressed features of about 4.
    torch.testing.assert_close(module(x, encoder), expected, rtol=0, atol=0.15)
    for name in ("low_pass", "high_pass", "direction", "coarse_direction"):
        nn.init.zeros_(getattr(module, name).weight)
    torch.testing.assert_close(module(x, encoder), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("case", "layer"), [("DySample", "offset"), ("DLU", "guidance"), ("FreqFusion", "direction")])
def test_offsets_that_are_no_numbers(case, layer, value):
    """They neither read nor write outside the map: torch.nn.functional.grid_sample would end the process."""
    module = of(case)
    inputs = [x.requires_grad_() for x in maps(module)]
    bias = module.get_submodule(layer).bias
    nn.init.constant_(bias, value)
    output = module(*inputs)
    gradient = torch.autograd.grad(output.sum(), inputs)[0]
    assert output.isfinite().all()
    if case != "FreqFusion":  # where the scale's gradient is a product with them
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_freqfusion_of_zeros(dtype):
    """Which have no direction, and are similar to nothing: where an image is padded, for instance."""
    skip_without_half_on_cpu(dtype)
    module = of("FreqFusion").to(dtype)
    for compressor in (module.encoder_compressor, module.decoder_compressor):
        nn.init.zeros_(compressor.bias)
    inputs = [x.requires_grad_() for x in maps(module, dtype=dtype)]
    cut = [torch.cat([x[..., :2], 0 * x[..., 2:]], -1) for x in inputs]
    output = module(*cut)
    assert output.isfinite().all()
    gradients = torch.autograd.grad(output.float().sum(), inputs)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("kind", guided.GUIDED)
@pytest.mark.parametrize("shape", [(2, CHANNELS, 6, 6), (2, CHANNELS, 8, 8), (2, CHANNELS, 8, 4), (1, CHANNELS, 8, 6)])
def test_an_encoders_map_that_does_not_fit(kind, shape):
    x = torch.rand(2, CHANNELS, 4, 3)
    with pytest.raises(ValueError, match=r"encoder_features must be 2 times as large as features.* \(\d, 8, \d, \d\)"):
        kind(CHANNELS)(x, torch.rand(shape))


@pytest.mark.parametrize("kind", guided.GUIDED)
def test_an_encoders_map_of_other_channels(kind):
    with pytest.raises(ValueError, match=r"encoder_features must have shape \(N, 8, H, W\) as channels=8 says"):
        kind(CHANNELS)(torch.rand(2, CHANNELS, 4, 3), torch.rand(2, 4, 8, 6))


@pytest.mark.parametrize(
    ("kind", "argument", "value", "wanted"),
    [
        (DLU, "up_kernel", 4, "an odd positive int, got 4"),
        (DLU, "encoder_kernel", 2, "an odd positive int, got 2"),
        (DLU, "compressed_channels", 0, "a positive int, got 0"),
        (DLU, "up_group", 0, "a positive int, got 0"),
        (FADE, "up_kernel", 4, "an odd positive int, got 4"),
        (FADE, "encoder_kernel", 2, "an odd positive int, got 2"),
        (FADE, "compressed_channels", 0, "a positive int, got 0"),
        (SAPA, "up_kernel", 4, "an odd positive int, got 4"),
        (SAPA, "embedded_channels", 0, "a positive int, got 0"),
        (FreqFusion, "low_pass_kernel", 4, "an odd positive int, got 4"),
        (FreqFusion, "high_pass_kernel", 2, "an odd positive int, got 2"),
        (FreqFusion, "encoder_kernel", 2, "an odd positive int, got 2"),
        (FreqFusion, "compressed_channels", 0, "a positive int, got 0"),
        (FreqFusion, "groups", 0, "a positive int, got 0"),
    ],
)
def test_bad_options(kind, argument, value, wanted):
    with pytest.raises(ValueError, match=f"{argument} must be {wanted}"):
        kind(8, **{argument: value})


def test_bad_arguments_of_dysample():
    with pytest.raises(ValueError, match="style must be 'lp' or 'pl', got 'ps'"):
        DySample(8, style="ps")
    with pytest.raises(ValueError, match="channels must be a multiple of groups=4, got 6"):
        DySample(6)
    with pytest.raises(ValueError, match=r"channels must be a multiple of scale_factor\^2=9 for style='pl', got 8"):
        DySample(8, 3, style="pl")
    with pytest.raises(ValueError, match="groups must be a positive int, got 0"):
        DySample(8, groups=0)


def test_groups_that_do_not_divide_the_channels():
    with pytest.raises(ValueError, match="channels must be a multiple of up_group=3, got 8"):
        DLU(8, up_group=3)
    with pytest.raises(ValueError, match="channels must be a multiple of groups=3, got 8"):
        FreqFusion(8, groups=3)


@pytest.mark.parametrize("kind", ALL)
def test_bad_arguments(kind):
    with pytest.raises(ValueError, match="channels must be a positive int, got 0"):
        kind(0)
    with pytest.raises(ValueError, match=r"scale_factor must be a positive int, got 0\.5"):
        kind(8, 0.5)
    module = kind(8)
    with pytest.raises(ValueError, match=r"features must have shape \(N, 8, H, W\) as channels=8 says"):
        module(*[x[:, :4] for x in maps(module, dtype=torch.float32)])
