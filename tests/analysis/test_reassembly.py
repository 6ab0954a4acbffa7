"""carafe_plugin.analysis: recorded kernels and their composition against autograd, plain loops and known kernels."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from carafe_plugin import CARAFEDownsample, CARAFEUpsample
from carafe_plugin.analysis import Reassembly, Sources, chain_groups, check_chain, compose, record_reassemblies
from carafe_plugin.ops.reference import reassemble

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(site: nn.Module) -> nn.Module:
    """Kernels that depend on the content: with their initial values they are all nearly the same."""
    generator = torch.Generator().manual_seed(1)
    weight = site.content_encoder.weight
    weight.data = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return site.double()


def frozen(reassembly: Reassembly, features: torch.Tensor) -> torch.Tensor:
    """The operator with the recorded kernels."""
    kernels = reassembly.kernels
    masks = kernels.flatten(1, 3)
    return reassemble(features, masks, kernels.shape[2], reassembly.group_size, reassembly.up, reassembly.down)


def fit(features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Crop at the bottom and right, or repeat the last row and column."""
    height, width = features.shape[-2:]
    return F.pad(features, (0, size[1] - width, 0, size[0] - height), mode="replicate")


SITES = {
    "up": (lambda: CARAFEUpsample(8, compressed_channels=4), (5, 7)),
    "up 3/2, groups": (lambda: CARAFEUpsample(8, 1.5, up_kernel=3, up_group=2, compressed_channels=None), (5, 7)),
    "down": (lambda: CARAFEDownsample(8, compressed_channels=4), (9, 6)),
    "down 3/2, sigmoid": (lambda: CARAFEDownsample(8, 1.5, 3, normalizer="sigmoid", encoder_dilation=2), (7, 6)),
}


@pytest.mark.parametrize("options", [{}, {"output_size": None}, {"output_size": (4, 3)}, {"output_size": 3}], ids=str)
@pytest.mark.parametrize("name", SITES)
def test_recorded_kernels_are_those_that_ran(name: str, options: dict) -> None:
    make, size = SITES[name]
    site, features = trained(make()), torch.rand(2, 8, *size, dtype=torch.float64)
    model = nn.Sequential(nn.Identity(), site)
    with record_reassemblies(model) as found:
        output = model[1](features, **options)
    (reassembly,) = found
    assert (reassembly.name, reassembly.source_size) == ("1", size)
    assert reassembly.output_size == tuple(output.shape[2:])
    assert (reassembly.up, reassembly.down, reassembly.group_size) == (site.up, site.down, site.group_size)
    torch.testing.assert_close(frozen(reassembly, features), output)
    assert not reassembly.kernels.requires_grad


def test_recording_changes_nothing_and_ends() -> None:
    model = nn.ModuleDict(dict(a=CARAFEUpsample(4, compressed_channels=2), b=CARAFEDownsample(4))).train()
    features = torch.rand(1, 4, 4, 4)
    plain = model["b"](model["a"](features))
    with record_reassemblies(model) as found:
        recorded = model["b"](model["a"](features=features))
        model["a"](features)
    assert torch.equal(plain, recorded)
    recorded.sum().backward()
    assert model["a"].content_encoder.weight.grad is not None
    assert [reassembly.name for reassembly in found] == ["a", "b", "a"], "in the order in which they ran"
    model["a"](features)
    assert len(found) == 3, "nothing is recorded after the block"
    with pytest.raises(ValueError, match="features must have shape"), record_reassemblies(model) as found:
        model["a"](torch.rand(1, 3, 4, 4))
    model["a"](features)
    assert found == [], "nor after an error"


@pytest.mark.parametrize("name", SITES)
def test_sources_of_one_operator_are_its_gradient(name: str) -> None:
    make, size = SITES[name]
    with record_reassemblies(site := trained(make())) as found:
        site(torch.rand(2, 8, *size, dtype=torch.float64))
    features = torch.rand(2, 8, *size, dtype=torch.float64, requires_grad=True)
    output = frozen(found[0], features)
    for row, column in itertools.product(range(0, output.shape[2], 2), range(0, output.shape[3], 3)):
        for image, channel in ((0, 0), (1, 7)):
            (expected,) = torch.autograd.grad(output[image, channel, row, column], features, retain_graph=True)
            group = channel // (8 // site.group_size)
            sources = found[0].sources(row, column, group, image)
            torch.testing.assert_close(sources.to_map(), expected[image, channel])
        average = found[0].sources(row, column).to_map()
        groups = [found[0].sources(row, column, group).to_map() for group in range(site.group_size)]
        torch.testing.assert_close(average, sum(groups) / site.group_size)


class TopDown(nn.Module):
    """A top-down path with lateral maps of odd sizes, as an FPN has it; one kind of kernel for each step."""

    def __init__(self) -> None:
        super().__init__()
        options = (dict(up_group=2), dict(up_kernel=3), dict(up_group=4, up_kernel=3))
        self.ups = nn.ModuleList(trained(CARAFEUpsample(8, compressed_channels=None, **o)) for o in options)

    def forward(self, laterals: list[torch.Tensor], ups: list | None = None) -> torch.Tensor:
        features = laterals[0]
        for up, lateral in zip(ups or self.ups, laterals[1:], strict=True):
            features = lateral + fit(up(features), lateral.shape[2:])
        return features


# Twice (3, 4) is cropped to (5, 7), twice that is cropped in one axis; (21, 28) needs one row more than there is.
LATERALS = [(3, 4), (5, 7), (10, 13), (21, 26)]


@pytest.fixture
def pyramid() -> tuple[list[Reassembly], list[torch.Tensor], torch.Tensor]:
    """The recorded chain of a top-down path, its maps, and its output with the kernels held fixed."""
    torch.manual_seed(0)
    model = TopDown()
    laterals = [torch.rand(1, 8, *size, dtype=torch.float64, requires_grad=True) for size in LATERALS]
    with record_reassemblies(model) as chain:
        expected = model(laterals)
    ups = [lambda features, reassembly=reassembly: frozen(reassembly, features) for reassembly in chain]
    output = model(laterals, ups)
    torch.testing.assert_close(output, expected)
    return chain, laterals, output


def test_a_composed_pyramid_is_its_gradient(pyramid: tuple) -> None:
    chain, laterals, output = pyramid
    for (row, column), channel in itertools.product(((0, 0), (9, 12), (19, 25)), (0, 3, 7)):
        *expected, _ = torch.autograd.grad(output[0, channel, row, column], laterals, retain_graph=True)
        levels = compose(chain, row, column, group=channel // 2)
        assert [level.size for level in levels] == LATERALS[2::-1]
        for level, gradient in zip(levels, reversed(expected), strict=True):
            torch.testing.assert_close(level.to_map(), gradient[0, channel])
    everything = [compose(chain, 9, 12, group)[-1].to_map() for group in range(4)]
    torch.testing.assert_close(compose(chain, 9, 12)[-1].to_map(), sum(everything) / 4)
    channels = torch.autograd.grad(output[0, :, 9, 12].sum(), laterals[0], retain_graph=True)[0]
    torch.testing.assert_close(compose(chain, 9, 12)[-1].to_map(), channels[0].mean(0))


def test_groups_of_operators_with_different_numbers_of_them(pyramid: tuple) -> None:
    chain, _, _ = pyramid
    assert chain_groups(chain) == [(0, 0, 0), (0, 0, 1), (1, 0, 2), (1, 0, 3)], "of 2, 1 and 4"
    two, three = (delta((4, 4), 1, 1, (1, 1), groups=groups) for groups in (2, 3))
    assert chain_groups([two, three]) == [(0, 0), (0, 0), (0, 1), (1, 1), (1, 2), (1, 2)]


def test_a_completed_row_has_the_sources_of_the_last_one(pyramid: tuple) -> None:
    chain, _, _ = pyramid
    kernels = chain[-1].kernels
    shorter = Reassembly("coarse", kernels[..., :20, :26], chain[-1].source_size, 2, 1)
    ahead = Reassembly("fine", torch.ones(1, 1, 1, 1, 42, 52), (21, 26), 2, 1)  # takes the location itself
    (_, last), (_, repeated) = compose([shorter, ahead], 39, 10), compose([shorter, ahead], 41, 10)
    assert torch.equal(last.to_map(), repeated.to_map())
    assert last.total > 0


def test_composed_downsampling_is_its_gradient() -> None:
    torch.manual_seed(0)
    factors = ((2, 5), (2, 3), (1.5, 5))
    model = nn.Sequential(*(trained(CARAFEDownsample(4, factor, kernel)) for factor, kernel in factors))
    features = torch.rand(1, 4, 31, 26, dtype=torch.float64, requires_grad=True)
    with record_reassemblies(model) as chain:
        model(features)
    output = features
    for reassembly in chain:
        output = frozen(reassembly, output)
    assert output.shape[2:] == (6, 5)
    for row, column in ((0, 0), (3, 2), (5, 4)):
        (expected,) = torch.autograd.grad(output[0, 0, row, column], features, retain_graph=True)
        torch.testing.assert_close(compose(chain, row, column)[-1].to_map(), expected[0, 0])


def test_weights_add_up_to_one_within_the_map() -> None:
    """With softmax; what falls outside the map is missing, no more and no less."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(trained(CARAFEUpsample(4, up_kernel=3)) for _ in range(2)), trained(CARAFEDownsample(4, 2, 3))
    )
    with record_reassemblies(model) as chain:
        model(torch.rand(1, 4, 8, 8, dtype=torch.float64))
    inside = [compose(chain, row, column) for row in range(4, 12) for column in range(4, 12)]
    assert all(abs(level.total - 1) < 1e-12 for levels in inside for level in levels)
    assert all((level.weights > 0).all() for levels in inside for level in levels)
    first, second, third = compose(chain, 0, 0)
    lost = chain[-1].kernels[0, 0, :, :, 0, 0]
    assert first.total == pytest.approx(float(lost[1:, 1:].sum()), abs=1e-12)
    assert 0 < third.total < second.total < first.total < 1


def delta(size: tuple[int, int], up: int, down: int, tap: tuple[int, int], k: int = 3, groups: int = 1) -> Reassembly:
    """A CARAFE++ all of whose kernels have one weight, 1 at ``tap``."""
    out = [-(-length * up // down) for length in size]
    kernels = torch.zeros(1, groups, k, k, *out)
    kernels[:, :, tap[0], tap[1]] = 1
    return Reassembly("delta", kernels, size, up, down)


def test_delta_kernels_only_move_locations() -> None:
    identity = delta((6, 7), 1, 1, (1, 1))
    chain = [identity, delta((6, 7), 1, 1, (2, 2), k=5, groups=2), identity]
    for row, column in itertools.product(range(6), range(7)):
        for level in compose(chain, row, column):
            assert (level.rows.tolist(), level.columns.tolist(), level.weights.tolist()) == ([row], [column], [1.0])
    # Up by 3/2, then down by 2, each from its centre: floor(2 i / 3) after 2 i.
    rescaled = [delta((6, 8), 3, 2, (1, 1)), delta((9, 12), 1, 2, (1, 1))]
    for row, column in itertools.product(range(5), range(6)):
        (source,) = compose(rescaled, row, column)[-1].to_map().nonzero().tolist()
        assert source == [row * 2 * 2 // 3, column * 2 * 2 // 3]
    # One tap up and to the right at each step; off the map nothing is left.
    shifted = [delta((6, 7), 1, 1, (0, 2))] * 2
    assert compose(shifted, 4, 2)[-1].to_map().nonzero().tolist() == [[2, 4]]
    assert [level.total for level in compose(shifted, 1, 2)] == [1, 0]


def test_equal_locations_are_added_and_zeros_dropped() -> None:
    places = torch.tensor([[1, 1, 0], [2, -1, 0]]), torch.tensor([[3, 3, 0], [0, 0, 4]])
    weights = torch.tensor([[0.25, 0.5, 0.0], [1.0, 1.0, 2.0]], dtype=torch.float64)
    found = Sources.collect(*places, weights, (3, 4))
    assert list(zip(found.rows.tolist(), found.columns.tolist(), found.weights.tolist(), strict=True)) == [
        (1, 3, 0.75),
        (2, 0, 1.0),
    ]


def test_mistakes_are_named() -> None:
    coarse, fine = delta((5, 7), 2, 1, (1, 1)), delta((10, 13), 2, 1, (1, 1), groups=2)
    check_chain([coarse, fine])
    for chain, message in (
        ([], "at least one reassembly"),
        ([fine, coarse], "a map of 20 x 26, the second takes one of 5 x 7"),
        ([coarse, delta((12, 14), 2, 1, (1, 1))], "delta and delta do not follow one another"),
        ([delta((6, 6), 1, 2, (1, 1)), delta((4, 3), 1, 2, (1, 1))], "a map of 3 x 3, the second takes one of 4 x 3"),
    ):
        with pytest.raises(ValueError, match=message):
            compose(chain, 0, 0)
    for arguments, message in (
        ((20, 0), "row must be from 0 to 19 on a map of 20 x 26, got 20"),
        ((0, -1), "column must be from 0 to 25 on a map of 20 x 26, got -1"),
        ((0, 0, 2), "group must be from 0 to 1, got 2"),
        ((0, 0, 0, 1), "image must be from 0 to 0 in delta, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            compose([coarse, fine], *arguments)
