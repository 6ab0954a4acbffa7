"""Later upsamplers in the adapters' places, by the same one line."""

import pytest
import torch

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmengine.model import BaseModule

from carafe_plugin.modules import guided, rivals
from carafe_plugin.openmmlab import layers
from carafe_plugin.openmmlab.mmdet import CARAFEFPN, CARAFEPAFPN, CARAFEFCNMaskHead, CARAFEPixelDecoder

ALL = (*rivals.RIVALS, *guided.GUIDED)

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
@pytest.mark.parametrize("kind", ALL)
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


@pytest.mark.parametrize("neck", [CARAFEFPN, CARAFEPAFPN])
@pytest.mark.parametrize("kind", guided.GUIDED)
def test_the_lateral_map_is_the_guide(kind, neck):
    neck = neck(in_channels=IN_CHANNELS, out_channels=16, num_outs=3, carafe_cfg=dict(type=kind.__name__))
    neck.init_weights()
    inputs, seen = pyramid(SIZES["even"]), []
    for module in neck.upsample_modules:
        module.register_forward_hook(lambda _, maps, out: seen.append((*maps, out)))
    neck(inputs)
    laterals = [conv(x) for conv, x in zip(neck.lateral_convs, inputs, strict=True)]
    # From the coarsest down: what comes from above is the sum of a lateral map and what was made for it.
    above = laterals[2]
    for (features, guide, out), lateral in zip(seen, laterals[1::-1], strict=True):
        assert torch.equal(guide, lateral)
        assert torch.equal(features, above)
        above = lateral + out


@pytest.mark.parametrize("kind", [kind.__name__ for kind in guided.GUIDED])
def test_places_without_a_guide_refuse(kind):
    cfg = dict(type=kind)
    message = f"carafe_cfg: the type '{kind}' is guided by the encoder's map of the size to reach, and there is none"
    with pytest.raises(ValueError, match=message):
        CARAFEFCNMaskHead(carafe_cfg=cfg)
    with pytest.raises(ValueError, match=message):
        CARAFEPixelDecoder(in_channels=IN_CHANNELS, feat_channels=32, out_channels=12, carafe_cfg=cfg)
    with pytest.raises(ValueError, match=message):
        layers.build_upsampler(cfg, 16)


@pytest.mark.parametrize("kind", guided.GUIDED)
def test_guided_in_uper_head(kind):
    """In its top-down path; the other two places have no encoder's map."""
    pytest.importorskip("mmseg", reason="MMSegmentation is not installed")
    from carafe_plugin.openmmlab.mmseg import CARAFEUPerHead

    cfg = dict(type=kind.__name__, ppm=False, fuse=False)
    sizes = dict(in_channels=IN_CHANNELS, in_index=[0, 1, 2], channels=16, num_classes=5, norm_cfg=dict(type="BN"))
    head = CARAFEUPerHead(**sizes, carafe_cfg=cfg)
    assert head(pyramid(SIZES["rounded up"])).shape == (2, 5, 25, 43)
    assert all(isinstance(module, kind) for module in head.upsample_modules)
    for name in ("ppm", "fuse"):
        with pytest.raises(ValueError, match="is guided by the encoder's map"):
            CARAFEUPerHead(**sizes, carafe_cfg={**cfg, name: True})


@pytest.mark.parametrize(
    ("kind", "last", "deviation"),
    [
        (rivals.DySample, "offset", 0.001),
        (rivals.DLU, "content_encoder", 0.001),
        (rivals.DLU, "guidance", 0),
        (guided.FADE, "content_encoder", 0.001),
        (guided.SAPA, "encoder_embedding", 0.02),
        (guided.FreqFusion, "coarse_direction", 0.001),
    ],
)
def test_their_start_survives_in_plain_containers(kind, last, deviation):
    """Where init_weights does not arrive, while the enclosing module's init_cfg does."""
    network = BaseModule(init_cfg=dict(type="Kaiming", layer=["Conv2d", "Linear"]))
    network.layers = torch.nn.Sequential(kind(8), torch.nn.Conv2d(8, 8, 1))
    network.init_weights()
    assert network.layers[0].get_submodule(last).weight.std().item() == pytest.approx(deviation, rel=0.3)
