"""Compiled for symbolic sizes, and exported: no adapter fixes a size that what it stands in for leaves open."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from toolkit import TORCH
from torch import Tensor, nn

if TORCH < (2, 4):
    reason = f"torch.compile and torch.export of these operators: from torch 2.4 on, this is {torch.__version__}"
    pytest.skip(reason, allow_module_level=True)
pytest.importorskip("mmdet", reason="MMDetection is not installed")
pytest.importorskip("mmseg", reason="MMSegmentation is not installed")

from mmdet.models.layers import PixelDecoder
from mmdet.models.necks import FPN, PAFPN
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmseg.models.decode_heads import FPNHead, UPerHead
from torch.export import Dim

from carafe_plugin.openmmlab import mmdet, mmseg

pytestmark = pytest.mark.usefixtures("one_thread")

MOST_COMPILATIONS = 3  # one for each axis that a first size has in a special form; beyond 8 there is no compilation
CHANNELS = (4, 6, 8, 10)
NECK = dict(in_channels=list(CHANNELS), out_channels=8, num_outs=4)
HEAD = dict(in_channels=list(CHANNELS), in_index=[0, 1, 2, 3], channels=8, num_classes=3)
DECODER = dict(in_channels=list(CHANNELS), feat_channels=8, out_channels=12, norm_cfg=dict(type="GN", num_groups=4))
MASK_HEAD = dict(num_convs=1, in_channels=4, conv_out_channels=4, num_classes=3)
PLACES = {
    "FPN": (mmdet.CARAFEFPN, FPN, NECK),
    "PAFPN": (mmdet.CARAFEPAFPN, PAFPN, NECK),
    "UPerHead": (mmseg.CARAFEUPerHead, UPerHead, HEAD),
    "FPNHead": (mmseg.CARAFEFPNHead, FPNHead, dict(HEAD, feature_strides=[4, 8, 16, 32])),
    "FCNMaskHead": (mmdet.CARAFEFCNMaskHead, FCNMaskHead, MASK_HEAD),
    "PixelDecoder": (mmdet.CARAFEPixelDecoder, PixelDecoder, DECODER),
}


class Model(nn.Module):
    """Convolutions of stride 2 and what takes the maps that they give."""

    def __init__(self, place: nn.Module) -> None:
        super().__init__()
        sizes = zip((3, *CHANNELS[:-1]), CHANNELS, strict=True)
        self.backbone = nn.ModuleList(nn.Conv2d(*channels, 3, stride=2, padding=1) for channels in sizes)
        self.place = place

    def forward(self, x: Tensor) -> Any:
        maps = []
        for conv in self.backbone:
            maps.append(conv(x if not maps else maps[-1]))
        if isinstance(self.place, FCNMaskHead):
            return self.place(maps[0])
        if isinstance(self.place, PixelDecoder):
            return self.place(maps, [])
        return self.place(maps)


def models(name: str) -> tuple[Model, Model]:
    """With CARAFE++, and the toolbox's own."""
    ours, own, cfg = PLACES[name]
    torch.manual_seed(0)
    return Model(ours(**cfg)).eval(), Model(own(**cfg)).eval()


def images(count: int, seed: int = 0) -> list[Tensor]:
    rng = random.Random(seed)
    return [torch.rand(2, 3, rng.randint(33, 130), rng.randint(33, 130)) for _ in range(count)]


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [tensor for each in result for tensor in flat(each)]


def assert_same(found: Any, expected: Any) -> None:
    for a, b in zip(flat(found), flat(expected), strict=True):
        assert torch.equal(a, b)


def compilations(model: Model) -> int:
    """In how many graphs 24 sizes of images result."""
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=count, dynamic=True)
    with torch.no_grad():
        for image in images(24):
            assert_same(compiled(image), model(image))
    torch._dynamo.reset()
    return len(graphs)


@pytest.mark.parametrize("name", PLACES)
def test_as_many_compilations_as_what_it_replaces(name):
    ours, own = models(name)
    assert compilations(ours) == compilations(own) <= MOST_COMPILATIONS


@pytest.mark.parametrize("at", [(65, 97), (64, 96)], ids=str)
@pytest.mark.parametrize("name", PLACES)
def test_exported_program_runs_at_other_sizes(name, at):
    model, _ = models(name)
    size = {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    with torch.no_grad():
        program = torch.export.export(model, (torch.rand(2, 3, *at),), dynamic_shapes=(size,)).module()
        for image in images(6, seed=1):
            assert_same(program(image), model(image))
