"""Later upsamplers in the adapters' places, by the same one line."""

import pytest
import torch

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmengine.model import BaseModule

from carafe_plugin.modules import rivals
from carafe_plugin.openmmlab.mmdet import CARAFEFPN, CARAFEFCNMaskHead

pytestmark = pytest.mark.usefixtures("one_thread")

IN_CHANNELS = [8, 16, 32]
SIZES = {
    "even": [(32, 48), (16, 24), (8, 12)],
    "rounded up": [(25, 43), (13, 22), (7, 11)],
    "rounded down": [(27, 45), (13, 22), (6, 11)],
}


def pyramid(sizes):
    return [torch.randn(2, channels, *size) for channels, size in zip(IN_CHANNELS, sizes, strict=True)]


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kind", rivals.RIVALS)
def test_upsamples_in_a_neck(kind, sizes):
    neck = CARAFEFPN(in_channels=IN_CHANNELS, out_channels=16, num_outs=3, carafe_cfg=dict(type=kind.__name__))
    neck.init_weights()
    assert all(isinstance(module, kind) for module in neck.upsample_modules)
    outs = neck(pyramid(sizes))
    assert [out.shape[2:] for out in outs] == sizes
    sum(out.square().sum() for out in outs).backward()
    assert all(p.grad is not None for module in neck.upsample_modules for p in module.parameters())


@pytest.mark.parametrize("kind", rivals.RIVALS)
def test_upsamples_in_a_mask_head(kind):
    cfg = dict(type=kind.__name__)
    head = CARAFEFCNMaskHead(num_convs=1, in_channels=16, conv_out_channels=16, num_classes=3, carafe_cfg=cfg)
    head.init_weights()
    assert isinstance(head.upsample, kind)
    assert head(torch.rand(2, 16, 14, 14)).shape == (2, 3, 28, 28)


@pytest.mark.parametrize(("kind", "last"), [(rivals.DySample, "offset")])
def test_their_start_survives_in_plain_containers(kind, last):
    """Where init_weights does not arrive, while the enclosing module's init_cfg does."""
    network = BaseModule(init_cfg=dict(type="Kaiming", layer=["Conv2d", "Linear"]))
    network.layers = torch.nn.Sequential(kind(8), torch.nn.Conv2d(8, 8, 1))
    network.init_weights()
    assert network.layers[0].get_submodule(last).weight.std() < 0.002
