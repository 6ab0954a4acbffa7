"""The operators beside CARAFE++ against their definitions, written as loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from toolkit import skip_without_half_on_cpu
from torch import nn

from carafe_plugin.modules import peers

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = (*peers.DOWNSAMPLERS, *peers.UPSAMPLERS)
CHANNELS = 3


def build(kind, scale_factor=2, **options):
    """An operator in float64 whose parameters are all drawn at random, so that none hides behind a zero or a one."""
    torch.manual_seed(0)
    module = kind(CHANNELS, scale_factor, **options).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module


def features(height=5, width=6):
    return torch.randn(2, CHANNELS, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def conv(layer, x):
    """A convolution of stride 1 with "same" padding, tap by tap."""
    reach, out = layer.kernel_size[0] // 2, 0
    padded = F.pad(x, [reach] * 4)
    for u in range(layer.kernel_size[0]):
        for v in range(layer.kernel_size[1]):
            window = padded[:, :, u : u + x.shape[2], v : v + x.shape[3]]
            out = out + torch.einsum("oc,nchw->nohw", layer.weight[:, :, u, v], window)
    return out if layer.bias is None else out + layer.bias[:, None, None]


def instance_norm(layer, x):
    mean, variance = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True, unbiased=False)
    scale, shift = layer.weight[:, None, None], layer.bias[:, None, None]
    return (x - mean) / (variance + layer.eps).sqrt() * scale + shift


def pooled(module, x, reduce, weights=None):
    """``reduce(values, weights)`` over the pixels of each 3x3 window around sigma * (i', j') that lie in the map."""
    sigma, (batch, channels, height, width) = module.scale_factor, x.shape
    out = x.new_zeros(batch, channels, math.ceil(height / sigma), math.ceil(width / sigma))
    for n, c, i, j in torch.cartesian_prod(*map(torch.arange, out.shape)).tolist():
        inside = [
            (p, q)
            for p in range(sigma * i - 1, sigma * i + 2)
            for q in range(sigma * j - 1, sigma * j + 2)
            if 0 <= p < height and 0 <= q < width
        ]
        values = torch.stack([x[n, c, p, q] for p, q in inside])
        given = torch.ones_like(values) if weights is None else torch.stack([weights[n, c, p, q] for p, q in inside])
        out[n, c, i, j] = reduce(values, given)
    return out


def weighted_mean(values, weights):
    return (values * weights).sum() / weights.sum()


def naive_max(module, x):
    return pooled(module, x, lambda values, _: values.max())


def naive_average(module, x):
    return pooled(module, x, weighted_mean)


def naive_strided(module, x):
    return conv(module.conv, x)[:, :, :: module.scale_factor, :: module.scale_factor]


def naive_dpp(module, x):
    sigma, (batch, channels, height, width) = module.scale_factor, x.shape
    out = x.new_zeros(batch, channels, math.ceil(height / sigma), math.ceil(width / sigma))
    for n, c, i, j in torch.cartesian_prod(*map(torch.arange, out.shape)).tolist():
        window = x[n, c, sigma * i : sigma * (i + 1), sigma * j : sigma * (j + 1)].flatten()
        distances = ((window - window.mean()) ** 2 + 1e-6).sqrt()
        weights = module.log_alpha[c].exp() + distances ** module.log_lambda[c].exp()
        out[n, c, i, j] = weighted_mean(window, weights.flatten())
    return out


def naive_lip(module, x):
    logits = x
    for layer in module.logits:
        if isinstance(layer, torch.nn.Conv2d):
            logits = conv(layer, logits)
        elif isinstance(layer, torch.nn.ReLU):
            logits = logits.clamp(min=0)
        else:
            logits = instance_norm(layer, logits)
    return pooled(module, x, weighted_mean, (12 / (1 + (-logits).exp())).exp())


def sampled(x, row, column):
    """Bilinear: the map at a fractional position, which is moved to the border where it lies outside."""
    row, column = min(max(row, 0.0), x.shape[-2] - 1), min(max(column, 0.0), x.shape[-1] - 1)
    top, left = math.floor(row), math.floor(column)
    value = 0
    for p, a in ((top, 1 - (row - top)), (top + 1, row - top)):
        for q, b in ((left, 1 - (column - left)), (left + 1, column - left)):
            if a * b:
                value = value + a * b * x[..., p, q]
    return value


def upsampled(module, x, position):
    """Every output sampled where ``position(n, i', j')`` says."""
    sigma, (batch, channels, height, width) = module.scale_factor, x.shape
    out = x.new_zeros(batch, channels, sigma * height, sigma * width)
    for n, i, j in torch.cartesian_prod(*map(torch.arange, (batch, *out.shape[2:]))).tolist():
        out[n, :, i, j] = sampled(x[n], *position(n, i, j))
    return out


def nearest(module, x):
    sigma = module.scale_factor
    return upsampled(module, x, lambda n, i, j: (i // sigma, j // sigma))


def centre(module, index):
    return (index + 0.5) / module.scale_factor - 0.5


def naive_nearest_conv(module, x):
    return conv(module.conv, nearest(module, x))


def naive_bilinear_conv(module, x):
    return conv(module.conv, upsampled(module, x, lambda n, i, j: (centre(module, i), centre(module, j))))


def naive_deconv(module, x):
    """Every input pixel adds its kernel to the output around sigma * (i, j); 3x3 kernels have their centre there."""
    sigma, weight = module.scale_factor, module.deconv.weight
    out = x.new_zeros(x.shape[0], CHANNELS, sigma * x.shape[2], sigma * x.shape[3]) + module.deconv.bias[:, None, None]
    shift = module.deconv.padding[0]
    for i, j, u, v in torch.cartesian_prod(*map(torch.arange, (*x.shape[2:], *weight.shape[2:]))).tolist():
        p, q = sigma * i + u - shift, sigma * j + v - shift
        if 0 <= p < out.shape[2] and 0 <= q < out.shape[3]:
            out[:, :, p, q] += x[:, :, i, j] @ weight[:, :, u, v]
    return out


def naive_pixel_shuffle(module, x):
    sigma, maps = module.scale_factor, conv(module.conv, x)
    out = x.new_zeros(x.shape[0], CHANNELS, sigma * x.shape[2], sigma * x.shape[3])
    for c, i, j in torch.cartesian_prod(*map(torch.arange, out.shape[1:])).tolist():
        channel = (c * sigma + i % sigma) * sigma + j % sigma
        out[:, c, i, j] = maps[:, channel, i // sigma, j // sigma]
    return out


def naive_gum(module, x):
    sigma, maps = module.scale_factor, conv(module.guidance, x)

    def position(n, i, j):
        phase = (i % sigma) * sigma + j % sigma
        right, down = (maps[n, axis * sigma**2 + phase, i // sigma, j // sigma].item() for axis in (0, 1))
        return centre(module, i) + down, centre(module, j) + right

    return upsampled(module, x, position)


def naive_spatial_attention(module, x):
    return nearest(module, x) * nearest(module, 1 / (1 + (-conv(module.attention, x)).exp()))


NAIVE = {
    peers.StridedConvDownsample: naive_strided,
    peers.MaxPoolDownsample: naive_max,
    peers.AveragePoolDownsample: naive_average,
    peers.DPPDownsample: naive_dpp,
    peers.LIPDownsample: naive_lip,
    peers.NearestConvUpsample: naive_nearest_conv,
    peers.BilinearConvUpsample: naive_bilinear_conv,
    peers.DeconvUpsample: naive_deconv,
    peers.PixelShuffleUpsample: naive_pixel_shuffle,
    peers.GUMUpsample: naive_gum,
    peers.SpatialAttentionUpsample: naive_spatial_attention,
}
CASES = [(kind, {}) for kind in ALL] + [
    (peers.LIPDownsample, dict(bottleneck=None)),
    (peers.DeconvUpsample, dict(kernel_size=4)),
]


def test_every_operator_has_a_definition():
    assert set(NAIVE) == set(ALL) == {value for name, value in vars(peers).items() if name.endswith("sample")}


@pytest.mark.parametrize("scale_factor", [2, 3])
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_is_its_definition(kind, options, scale_factor):
    module, x = build(kind, scale_factor, **options), features()
    with torch.no_grad():
        torch.testing.assert_close(module(x), NAIVE[kind](module, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_gradients(kind, options):
    """Of the input and of every parameter."""
    if kind is peers.LIPDownsample and not options:
        options = dict(bottleneck=2)
    module, x = build(kind, **options), features(4, 3)[:1].requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: module(x), (x, *module.parameters()), atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (7, 2), (8, 8)])
@pytest.mark.parametrize("scale_factor", [1, 2, 3])
def test_sizes(size, scale_factor):
    height, width = size
    for kind in ALL:
        module = build(kind, scale_factor).float().eval()
        if height * width == 1 and kind is peers.LIPDownsample:
            continue  # an instance norm has no statistics of one pixel
        smaller = (math.ceil(height / scale_factor), math.ceil(width / scale_factor))
        expected = smaller if kind in peers.DOWNSAMPLERS else (scale_factor * height, scale_factor * width)
        with torch.no_grad():
            assert module(torch.rand(1, CHANNELS, height, width)).shape[2:] == expected, kind.__name__
            if kind is not peers.LIPDownsample:  # nor of none
                assert module(torch.rand(0, CHANNELS, 4, 4)).shape[0] == 0, kind.__name__


def test_where_they_start():
    """GUM as bilinear interpolation, LIP as an average, DPP with both exponentials at one."""
    x = features().float()
    bilinear = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
    torch.testing.assert_close(peers.GUMUpsample(CHANNELS)(x), bilinear)
    average = peers.AveragePoolDownsample(CHANNELS)(x)
    for bottleneck in (128, None):
        torch.testing.assert_close(peers.LIPDownsample(CHANNELS, bottleneck=bottleneck)(x), average)
    dpp = peers.DPPDownsample(CHANNELS)
    assert dpp.log_alpha.shape == dpp.log_lambda.shape == (CHANNELS, 1, 1)
    assert not dpp.log_alpha.any()
    assert not dpp.log_lambda.any()


def test_lip_is_finite_in_half_precision():
    """The exponential of the largest logit, e^12, is not."""
    skip_without_half_on_cpu(torch.float16)
    module = peers.LIPDownsample(CHANNELS).half()
    torch.nn.init.constant_(module.logits[-1].bias, 50.0)
    assert module(features().half()).isfinite().all()


def test_gum_aims_in_single_precision():
    """In bfloat16 the positions of a wide map are no better than a pixel."""
    x = torch.arange(600.0).repeat(1, 1, 2, 1) / 600
    module = peers.GUMUpsample(1)
    torch.testing.assert_close(module.bfloat16()(x.bfloat16()).float(), module.float()(x), rtol=0, atol=0.008)


@pytest.mark.parametrize("kind", ALL)
def test_bad_arguments(kind):
    with pytest.raises(ValueError, match="channels must be a positive int, got 0"):
        kind(0)
    with pytest.raises(ValueError, match=r"scale_factor must be a positive int, got 0\.5"):
        kind(4, 0.5)
    with pytest.raises(
        ValueError, match=r"features must have shape \(N, 4, H, W\) as channels=4 says, got \(1, 3, 2, 2\)"
    ):
        kind(4)(torch.rand(1, 3, 2, 2))
    if kind is not peers.DPPDownsample:
        wanted = "at least the scale factor 2, got 1" if kind is peers.DeconvUpsample else "an odd positive int, got 2"
        with pytest.raises(ValueError, match=f"kernel_size must be {wanted}"):
            kind(4, kernel_size=1 if kind is peers.DeconvUpsample else 2)


def test_bad_bottleneck():
    with pytest.raises(ValueError, match="bottleneck must be a positive int, got 0"):
        peers.LIPDownsample(4, bottleneck=0)


def test_an_offset_that_is_no_number_moves_nothing():
    """As in a training that has diverged; PyTorch's own sampling would read beyond the map in the backward pass."""
    module = peers.GUMUpsample(8).double()
    features = torch.randn(1, 8, 5, 6, dtype=torch.float64, requires_grad=True)
    still = module(features)
    nn.init.constant_(module.guidance.weight, torch.nan)
    moved = module(features)
    torch.testing.assert_close(moved, still)
    moved.sum().backward()
