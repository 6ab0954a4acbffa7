"""Partial convolution and masked CARAFE++: features and their validity, against plain loops over the definitions."""

from fractions import Fraction

import pytest
import torch
from toolkit import skip_without_half_on_cpu

pytest.importorskip("mmengine", reason="mmengine is not installed")

from carafe_plugin import CARAFEDownsample, CARAFEUpsample
from carafe_plugin.analysis import record_reassemblies
from carafe_plugin.inpainting import MaskedCARAFEDownsample, MaskedCARAFEUpsample, PartialConv2d
from carafe_plugin.modules.carafe import KernelPrediction
from carafe_plugin.ops.reference import reassemble

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRS = {"up": (CARAFEUpsample, MaskedCARAFEUpsample), "down": (CARAFEDownsample, MaskedCARAFEDownsample)}


def trained_looking(module: KernelPrediction) -> KernelPrediction:
    """The module in float64 with kernels as different as training makes them, instead of all nearly equal."""
    torch.nn.init.normal_(module.content_encoder.weight, std=0.5)
    return module.double()


def some_validity(height: int, width: int) -> torch.Tensor:
    """Two masks: a hole wider than any window here; scattered holes, also at the border and in a corner."""
    generator = torch.Generator().manual_seed(0)
    validity = torch.ones(2, 1, height, width, dtype=torch.float64)
    validity[0, :, 1:-1, 2:] = 0
    validity[1] = (torch.rand(1, height, width, generator=generator) > 0.6).double()
    validity[1, :, 0, 0] = 0
    return validity


# -------------------------------------------------------------------------------------------- partial convolution


def naive_partial_convolution(layer, features, validity):
    n, _, h, w = features.shape
    k, s, p, d = layer.kernel_size[0], layer.stride[0], layer.padding[0], layer.dilation[0]
    size = [(edge + 2 * p - d * (k - 1) - 1) // s + 1 for edge in (h, w)]
    output, valid = torch.zeros(n, layer.out_channels, *size).double(), torch.zeros(n, 1, *size).double()
    for b in range(n):
        for i in range(size[0]):
            for j in range(size[1]):
                total, seen = torch.zeros(layer.out_channels).double(), 0
                for u in range(k):
                    for v in range(k):
                        y, x = i * s - p + u * d, j * s - p + v * d
                        if 0 <= y < h and 0 <= x < w and validity[b, 0, y, x]:
                            seen += 1
                            total += layer.weight[:, :, u, v] @ features[b, :, y, x]
                if seen:
                    output[b, :, i, j] = total * k * k / seen + (0 if layer.bias is None else layer.bias)
                    valid[b, 0, i, j] = 1
    return output, valid


@pytest.mark.parametrize(
    "settings",
    [
        dict(padding=1),
        dict(stride=2, padding=1, bias=False),
        dict(padding=2, dilation=2),
        dict(kernel_size=5, stride=2),
    ],
)
def test_partial_convolution_is_the_naive_one(settings):
    torch.manual_seed(0)
    layer = PartialConv2d(3, 4, **{"kernel_size": 3, **settings}).double()
    features, validity = torch.randn(2, 3, 9, 10).double(), some_validity(9, 10)
    output, valid = layer(features, validity)
    expected, expected_valid = naive_partial_convolution(layer, features, validity)
    assert torch.equal(valid, expected_valid)
    assert 0 < valid.mean() < 1
    torch.testing.assert_close(output, expected)


def test_partial_convolution_of_a_whole_map_is_plain_inside():
    layer = PartialConv2d(3, 4, 3, padding=1)
    features = torch.rand(1, 3, 6, 7)
    output, valid = layer(features, torch.ones(1, 1, 6, 7))
    plain = torch.nn.functional.conv2d(features, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(output[..., 1:-1, 1:-1], plain[..., 1:-1, 1:-1])
    assert not torch.allclose(output[..., 0, 0], plain[..., 0, 0])  # what lies outside is invalid
    assert valid.all()


# ----------------------------------------------------------------------------------------------- masked CARAFE++


def naive_propagation(module, features, validity):
    """The definition, from kernels predicted from M X."""
    k, groups, up, down = module.kernel_size, module.group_size, module.up, module.down
    kernels = module.predict_kernels(features * validity)
    (n, c, h, w), (rows, columns) = features.shape, kernels.shape[2:]
    output, valid = torch.zeros(n, c, rows, columns).double(), torch.ones(n, 1, rows, columns).double()
    for b in range(n):
        for i in range(rows):
            for j in range(columns):
                for g in range(groups):
                    channels = slice(g * c // groups, (g + 1) * c // groups)
                    total, weight_of_valid, weight = 0, 0.0, 0.0
                    for u in range(k):
                        for v in range(k):
                            y, x = i * down // up + u - k // 2, j * down // up + v - k // 2
                            tap = kernels[b, g * k * k + u * k + v, i, j]
                            weight += tap
                            if not (0 <= y < h and 0 <= x < w):
                                weight_of_valid += tap  # and the value there is 0
                            elif validity[b, 0, y, x]:
                                weight_of_valid += tap
                                total = total + tap * features[b, channels, y, x]
                    if weight_of_valid > 0:
                        output[b, channels, i, j] = total / weight_of_valid * weight
                    else:
                        valid[b, 0, i, j] = 0
    return output, valid


CASES = [
    ("up", (7, 8), dict(up_kernel=3)),
    ("up", (8, 9), dict(up_kernel=5, up_group=2, normalizer="sigmoid_normalized")),
    ("up", (8, 7), dict(up_kernel=3, scale_factor=Fraction(3, 2))),
    ("down", (7, 8), dict(down_kernel=3)),
    ("down", (9, 9), dict(down_kernel=5, scale_factor=3)),
    ("down", (8, 8), dict(down_kernel=3, down_group=2, normalizer="sigmoid", compressed_channels=None)),
]


@pytest.mark.parametrize(("direction", "size", "settings"), CASES)
def test_propagation_is_the_naive_one(direction, size, settings):
    torch.manual_seed(0)
    module = trained_looking(PAIRS[direction][1](4, **settings))
    features, validity = torch.randn(2, 4, *size).double(), some_validity(*size)
    with torch.no_grad():
        output, valid = module(features, validity)
        expected, expected_valid = naive_propagation(module, features, validity)
    assert torch.equal(valid, expected_valid)
    if 5 not in settings.values():
        assert 0 < valid[0].mean() < 1
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("direction", "size", "settings"), [*CASES, ("up", (33, 40), {}), ("down", (33, 40), {})])
def test_all_valid_is_plain_bit_for_bit(direction, size, settings, dtype, memory_format):
    torch.manual_seed(0)
    masked = trained_looking(PAIRS[direction][1](4, **settings)).to(dtype)
    plain = PAIRS[direction][0](4, **settings).to(dtype)
    plain.load_state_dict(masked.state_dict())  # the same parameters
    features = torch.randn(2, 4, *size, dtype=dtype).to(memory_format=memory_format)
    output, valid = masked(features, torch.ones(2, 1, *size, dtype=dtype))
    expected = plain(features)
    assert torch.equal(output, expected)
    assert output.dtype == expected.dtype == dtype
    assert output.is_contiguous(memory_format=memory_format) == expected.is_contiguous(memory_format=memory_format)
    assert valid.dtype == dtype
    assert bool((valid == 1).all())


@pytest.mark.parametrize("direction", ["up", "down"])
def test_what_lies_under_the_hole_changes_nothing(direction):
    """Not the outputs, not the kernels, not a gradient; even where it is no number."""
    torch.manual_seed(0)
    module = trained_looking(PAIRS[direction][1](4))
    seen = []
    module.content_encoder.register_forward_hook(lambda _, __, logits: seen.append(logits.detach()))
    validity = some_validity(8, 9)
    features = torch.randn(2, 4, 8, 9).double()
    results = []
    for filling in (0.0, -7.5, float("nan")):
        filled = torch.where(validity > 0, features, filling).requires_grad_()
        output, valid = module(filled, validity)
        (gradient,) = torch.autograd.grad(output.square().sum(), filled)
        results.append((output, valid, gradient))
    for logits in seen:
        assert torch.equal(logits, seen[0])
    for output, valid, gradient in results:
        assert torch.equal(output, results[0][0])
        assert torch.equal(valid, results[0][1])
        assert torch.equal(gradient, results[0][2])
        assert not (gradient * (1 - validity)).any()
        assert (gradient * validity).any()


@pytest.mark.parametrize("direction", ["up", "down"])
def test_gradients(direction):
    torch.manual_seed(0)
    settings = dict(up_kernel=3, up_group=2) if direction == "up" else dict(down_kernel=3, down_group=2)
    module = trained_looking(PAIRS[direction][1](2, compressed_channels=1, **settings))
    names, parameters = zip(*module.named_parameters(), strict=True)
    validity = torch.ones(1, 1, 3, 4).double()
    validity[..., 1:, 1:3] = 0

    def run(features, *values):
        found = torch.func.functional_call(module, dict(zip(names, values, strict=True)), (features, validity))
        return found[0]

    assert torch.autograd.gradcheck(run, (torch.randn(1, 2, 3, 4).double().requires_grad_(), *parameters))


def test_kernels_without_weight_on_what_is_valid():
    """A softmax can underflow: what then has no valid weight is invalid and 0, never NaN."""
    module = MaskedCARAFEUpsample(1, up_kernel=3, compressed_channels=None)
    torch.nn.init.zeros_(module.content_encoder.weight)
    with torch.no_grad():
        module.content_encoder.bias.view(9, 4)[4] = 500.0  # all weight on the centre
    validity = torch.ones(1, 1, 5, 5)
    validity[..., 2, 2] = 0
    features = torch.rand(1, 1, 5, 5, requires_grad=True)
    output, valid = module(features, validity)
    hole = torch.zeros(10, 10, dtype=torch.bool)
    hole[4:6, 4:6] = True
    assert torch.equal(valid[0, 0] == 0, hole)
    assert not output[0, 0][hole].any()
    output.sum().backward()
    assert features.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_constant_features_stay_constant():
    """A hole's rim is neither darker nor brighter: the weights of what is valid are brought to a sum of 1."""
    module = trained_looking(MaskedCARAFEDownsample(3, down_kernel=3))
    validity = some_validity(12, 12)[:1]
    output, valid = module(torch.full((1, 3, 12, 12), 5.0).double(), validity)
    inside = valid[..., 1:-1, 1:-1] > 0
    assert inside.any()
    torch.testing.assert_close(output[..., 1:-1, 1:-1], 5.0 * inside.double().expand(-1, 3, -1, -1))


@pytest.mark.parametrize("layer", [PartialConv2d(3, 4, 3), MaskedCARAFEUpsample(3)])
def test_validity_of_another_shape(layer):
    with pytest.raises(ValueError, match=r"validity must have shape \(2, 1, 8, 8\).* got \(2, 3, 8, 8\)"):
        layer(torch.rand(2, 3, 8, 8), torch.ones(2, 3, 8, 8))


def test_bfloat16_knows_the_same_locations():
    torch.manual_seed(0)
    module = MaskedCARAFEUpsample(4)
    features, validity = torch.randn(1, 4, 8, 8), torch.ones(1, 1, 8, 8)
    validity[..., 2:7, 2:7] = 0
    expected, expected_valid = module(features, validity)
    output, valid = module.bfloat16()(features.bfloat16(), validity.bfloat16())
    assert output.dtype == valid.dtype == torch.bfloat16
    assert torch.equal(valid.float(), expected_valid)
    torch.testing.assert_close(output.float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_float16_knows_the_same_locations(direction):
    """Under autocast as in float32: what is valid by little weight stays valid, and its value right."""
    skip_without_half_on_cpu(torch.float16)
    torch.manual_seed(0)
    module = trained_looking(PAIRS[direction][1](16)).float()
    plain = PAIRS[direction][0](16)
    plain.load_state_dict(module.state_dict())
    features, validity = torch.randn(1, 16, 32, 32), torch.ones(1, 1, 32, 32)
    validity[..., 8:24, 8:24] = 0
    with torch.no_grad():
        expected, expected_valid = module(features, validity)
        with torch.autocast("cpu", torch.float16):
            output, valid = module(features, validity)
            assert torch.equal(module(features, torch.ones_like(validity))[0], plain(features))
    assert output.dtype == torch.float16
    assert torch.equal(valid, expected_valid)
    assert 0 < expected_valid.mean() < 1
    # The kernels' logits have half precision: most of what differs.
    torch.testing.assert_close(output.float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize(("direction", "size", "settings"), CASES)
def test_recorded_kernels_are_those_that_ran(direction, size, settings, by_name):
    """The features reassembled by what is recorded are the output: the holes have no weight, the rest theirs."""
    torch.manual_seed(0)
    module = trained_looking(PAIRS[direction][1](4, **settings))
    features, validity = torch.randn(2, 4, *size).double(), some_validity(*size)
    with torch.no_grad(), record_reassemblies(module) as found:
        output, valid = module(validity=validity, features=features) if by_name else module(features, validity)
    (one,) = found
    again = reassemble(features, one.kernels.flatten(1, 3), module.kernel_size, one.group_size, one.up, one.down)
    torch.testing.assert_close(again, output)
    assert one.source_size == size
    for image, row, column in ((0, 0, 1), (0, 2, 2), (1, 2, 2)):
        sources = one.sources(row, column, image=image)
        assert bool((validity[image, 0, sources.rows, sources.columns] == 1).all())
        assert len(sources.weights) == 0 or valid[image, 0, row, column]


@pytest.mark.parametrize("direction", ["up", "down"])
def test_shapes_on_the_meta_device(direction):
    """A device without autocast, as tools that build a model for its shapes alone use it."""
    module = PAIRS[direction][1](4)
    features, validity = torch.rand(2, 4, 7, 8), torch.ones(2, 1, 7, 8)
    expected = module(features, validity)
    found = module.to("meta")(features.to("meta"), validity.to("meta"))
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in expected]
    assert {tensor.device.type for tensor in found} == {"meta"}


@pytest.mark.parametrize("setting", [dict(groups=3), dict(padding_mode="reflect")])
def test_partial_convolutions_have_one_group_and_zeros_outside(setting):
    with pytest.raises(ValueError, match="groups must be 1 and padding_mode 'zeros', got"):
        PartialConv2d(3, 3, 3, **setting)


@pytest.mark.parametrize(
    ("direction", "init"), [("up", "nearest"), ("up", "bilinear"), ("down", "stride"), ("down", "average3")]
)
def test_with_everything_known_fresh_modules_start_alike(direction, init):
    torch.manual_seed(0)
    module, masked = (cls(8, init=init) for cls in PAIRS[direction])
    masked.load_state_dict(module.state_dict())
    features = torch.randn(2, 8, 6, 8)
    output, validity = masked(features, torch.ones(2, 1, 6, 8))
    assert torch.equal(output, module(features))
    assert validity.all()
