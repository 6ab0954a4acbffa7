"""What fresh modules compute: ``init`` lets them start as the interpolation or pooling that they replace."""

import copy
import itertools
import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from carafe_plugin import CARAFEDownsample, CARAFEUpsample
from carafe_plugin.ops.reference import NORMALIZERS, source_index

pytestmark = pytest.mark.usefixtures("one_thread")

SPREAD = 0.05  # the default
STARTS = [(CARAFEUpsample, "nearest"), (CARAFEUpsample, "bilinear")]
STARTS += [(CARAFEDownsample, init) for init in ("stride", "average2", "average3")]


def at_sources(maps, module):
    """What ``maps`` hold at the source location of every output."""
    rows, columns = (
        source_index(-(-size * module.up // module.down), module.up, module.down, maps.device)
        for size in maps.shape[2:]
    )
    return maps[:, :, rows][..., columns]


def started(module, features):
    """The interpolation that a module should start as, over a map with zeros around it."""
    if module.init in ("nearest", "stride"):
        return at_sources(features, module)
    if module.init == "average2":
        return at_sources(F.avg_pool2d(F.pad(features, [0, 1, 0, 1]), 2, 1), module)
    if module.init == "average3":
        return at_sources(F.avg_pool2d(features, 3, 1, 1), module)
    # A margin of `down` rows is one of `up` rows in the output.
    padded = F.pad(features, [module.down] * 4)
    scale = module.up / module.down
    whole = F.interpolate(padded, scale_factor=scale, mode="bilinear", align_corners=False)
    height, width = at_sources(features, module).shape[2:]
    return whole[..., module.up : module.up + height, module.up : module.up + width]


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize(("kernel", "group"), [(3, 1), (5, 4), (7, 2)])
@pytest.mark.parametrize(("cls", "init"), STARTS)
def test_starts_as_it_says(cls, init, kernel, group, normalizer, device):
    """Its interpolation, but for the share that is spread, at every scale, borders included."""
    torch.manual_seed(0)
    features = torch.randn(2, 8, 7, 9, device=device)
    spreads = itertools.cycle([SPREAD, 1e-6])
    for scale, spread in zip((1, 2, 3, 4, Fraction(3, 2), Fraction(4, 3)), spreads, strict=False):
        module = cls(8, scale, kernel, group, normalizer=normalizer, init=init, init_spread=spread).to(device)
        average = at_sources(F.avg_pool2d(features, kernel, 1, kernel // 2), module)
        expected = (1 - spread) * started(module, features) + spread * average
        torch.testing.assert_close(module(features), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_equals_what_it_replaces(scale, device):
    """To a millionth, which is the smallest share; bilinear interpolation but for its outermost rows and columns."""
    torch.manual_seed(0)
    features = torch.randn(2, 8, 7, 9, device=device)

    def error(module, replaced, border=0):
        difference = (module.to(device)(features) - replaced).abs()
        height, width = (size - border for size in difference.shape[2:])
        return difference[..., border:height, border:width].max().item()

    options = dict(init_spread=1e-6)
    assert error(CARAFEUpsample(8, scale, init="nearest", **options), F.interpolate(features, None, scale)) < 1e-5
    bilinear = F.interpolate(features, scale_factor=scale, mode="bilinear", align_corners=False)
    module = CARAFEUpsample(8, scale, init="bilinear", **options)
    assert error(module, bilinear, border=scale // 2) < 1e-5
    assert error(module, bilinear) > 0.1  # where F.interpolate repeats the border, the window has zeros
    assert error(CARAFEDownsample(8, scale, init="stride", **options), features[..., ::scale, ::scale]) < 1e-5
    if scale == 2:
        module = CARAFEDownsample(8, init="average2", **options).to(device)
        even = features[..., :6, :8]
        torch.testing.assert_close(module(even), F.avg_pool2d(even, 2), rtol=0, atol=1e-5)
    assert error(CARAFEDownsample(8, scale, init="average3", **options), F.avg_pool2d(features, 3, scale, 1)) < 1e-5


@pytest.mark.parametrize(("cls", "init"), STARTS)
def test_default_stays_within_the_share(cls, init, device):
    """The stated bound: the share, of the difference between a window's interpolation and its average."""
    features = torch.randn(2, 8, 12, 14, device=device)
    module = cls(8, init=init).to(device)
    interpolated, average = started(module, features), at_sources(F.avg_pool2d(features, 5, 1, 2), module)
    assert ((module(features) - interpolated).abs() <= SPREAD * (average - interpolated).abs() + 1e-5).all()


@pytest.mark.parametrize("spread", [SPREAD, 1e-6])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize(("cls", "init"), STARTS)
def test_every_parameter_learns_from_the_first_step(cls, init, normalizer, spread, device):
    for options in ({}, dict(norm=nn.BatchNorm2d, act=nn.ReLU), dict(compressed_channels=None)):
        module = cls(8, normalizer=normalizer, init=init, init_spread=spread, **options).to(device)
        module(torch.randn(2, 8, 6, 7, device=device)).pow(2).sum().backward()
        idle = {"channel_compressor.bias"} if module.compressor_norm is not None else set()  # in front of a norm
        for name, parameter in module.named_parameters():
            assert name in idle or parameter.grad.abs().max() > 0, name


def test_normalised_sigmoids_learn_as_fast_as_a_softmax():
    """The largest weight's logit as well, though its sigmoid could be near 1."""
    features = torch.randn(2, 8, 6, 7)
    gradients = []
    for normalizer in ("softmax", "sigmoid_normalized"):
        module = CARAFEUpsample(8, normalizer=normalizer, init="nearest")
        module(features).pow(2).sum().backward()
        gradients.append(module.content_encoder.bias.grad.abs())
    assert (gradients[1] > gradients[0] / 3).all()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize(("cls", "init"), STARTS)
def test_fine_tuning_moves(cls, init, optimizer):
    """Towards the output of another module, whose kernels depend on the content."""
    torch.manual_seed(0)
    features = torch.randn(2, 8, 12, 12)
    teacher = cls(8)
    nn.init.normal_(teacher.content_encoder.weight, std=0.1)
    target = teacher(features).detach()
    module = cls(8, init=init)
    first = module(features).detach()
    before = copy.deepcopy(module.state_dict())
    descent = optimizer(module.parameters(), lr=1.0 if optimizer is torch.optim.SGD else 0.01)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(module(features), target)
        losses.append(loss.item())
        descent.zero_grad()
        loss.backward()
        descent.step()
    assert losses[0] > losses[5] > losses[10] > losses[-1]
    assert (module(features) - first).abs().max() > 1e-3
    assert all(not torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize(("cls", "init"), STARTS)
def test_state_dict_is_that_of_the_papers_start(cls, init):
    """The same keys, shapes and draws: a seed gives the same compressor."""
    states = []
    for start in ("average", init):
        torch.manual_seed(0)
        states.append(cls(8, norm=nn.BatchNorm2d, init=start).state_dict())
    paper, other = states
    assert list(paper) == list(other)
    for name, value in paper.items():
        assert torch.equal(value, other[name]) != name.startswith("content_encoder."), name
    plain = cls(8, norm=nn.BatchNorm2d)
    plain.load_state_dict(other, strict=True)
    features = torch.randn(1, 8, 5, 6)
    module = cls(8, norm=nn.BatchNorm2d, init=init)
    module.load_state_dict(other, strict=True)
    assert torch.equal(plain.eval()(features), module.eval()(features))


def test_the_papers_start_is_the_default():
    for cls in (CARAFEUpsample, CARAFEDownsample):
        torch.manual_seed(0)
        default = cls(8).state_dict()
        torch.manual_seed(0)
        named = cls(8, init="average").state_dict()
        assert all(torch.equal(value, named[name]) for name, value in default.items())
        assert not default["content_encoder.bias"].any()


@pytest.mark.parametrize(("cls", "init"), STARTS)
@pytest.mark.parametrize("how", ["reset_parameters", "init_weights", "each", "copy", "pickle", "meta"])
def test_initialising_again_keeps_the_start(cls, init, how, tmp_path):
    module = cls(8, 3, up_group=2, init=init) if cls is CARAFEUpsample else cls(8, 3, down_group=2, init=init)
    expected = module.content_encoder.bias.detach().clone()
    if how == "copy":
        module = copy.deepcopy(module)
    elif how == "pickle":
        torch.save(module, tmp_path / "module.pt")
        module = torch.load(tmp_path / "module.pt", weights_only=False)
    elif how == "meta":
        with torch.device("meta"):
            module = cls(8, 3, 5, 2, init=init)
        module.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(7)
    if how == "init_weights":
        module.init_weights()
    elif how == "reset_parameters":
        module.reset_parameters()
    else:
        for part in module.modules():
            if part is not module and hasattr(part, "reset_parameters"):
                part.reset_parameters()
    assert torch.equal(module.content_encoder.bias, expected)
    assert 0 < module.content_encoder.weight.abs().max() < 1e-6
    assert module.channel_compressor.weight.std() > 0.1


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (CARAFEUpsample, dict(init="stride"), "init must be one of average, nearest, bilinear, got 'stride'"),
        (CARAFEUpsample, dict(init=None), "init must be one of average, nearest, bilinear, got None"),
        (
            CARAFEDownsample,
            dict(init="nearest"),
            "init must be one of average, stride, average2, average3, got 'nearest'",
        ),
        (CARAFEUpsample, dict(init="bilinear", up_kernel=1), "up_kernel must be at least 3 for init='bilinear', got 1"),
        (CARAFEDownsample, dict(init="average3", down_kernel=1), "down_kernel must be at least 3 for"),
        (CARAFEUpsample, dict(init="nearest", init_spread=0), "init_spread must be a number from 1e-06 to 1, got 0"),
        (CARAFEUpsample, dict(init_spread=1.5), "init_spread must be a number from 1e-06 to 1, got 1.5"),
        (CARAFEUpsample, dict(init_spread=math.nan), "init_spread must be a number from 1e-06 to 1, got nan"),
        (CARAFEUpsample, dict(init_spread="0.1"), "init_spread must be a number from 1e-06 to 1, got '0.1'"),
        (CARAFEUpsample, dict(init_spread=True), "init_spread must be a number from 1e-06 to 1, got True"),
    ],
)
def test_starts_that_cannot_be(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls(8, **arguments)


def test_a_window_of_one_starts_as_nearest():
    features, module = torch.randn(1, 8, 5, 6), CARAFEUpsample(8, up_kernel=1, init="nearest")
    assert torch.equal(module(features), F.interpolate(features, scale_factor=2))
