"""Every place of CARAFE++ in the toolboxes: its first values, what MMEngine's log says of them, and torch.fx."""

import copy
import importlib
import re

import pytest
import torch

pytest.importorskip("mmengine", reason="MMEngine is not installed")

from mmengine.config import ConfigDict
from mmengine.model import BaseModule
from mmengine.registry import DefaultScope
from starts import wrong_starts
from torch import nn

from carafe_plugin.modules.carafe import KernelPrediction
from carafe_plugin.modules.starts import interpolation_logits

WIDTHS = [32, 64, 64]
NECK = dict(in_channels=WIDTHS, out_channels=8, num_outs=5)
HEAD = dict(in_channels=WIDTHS, in_index=[0, 1, 2], channels=8, num_classes=3)
DECODER = dict(in_channels=WIDTHS, feat_channels=32, out_channels=8)
LAYER = dict(self_attn_cfg=dict(embed_dims=32, num_heads=8), ffn_cfg=dict(embed_dims=32))
ENCODER = dict(
    encoder=ConfigDict(num_layers=1, layer_cfg=LAYER), positional_encoding=dict(num_feats=16, normalize=True)
)
DEFORMABLE = copy.deepcopy(ENCODER)
DEFORMABLE["encoder"].layer_cfg.self_attn_cfg.num_levels = 3

#: Toolbox, where its class is, the class, its arguments; CARAFE++'s is of that name in the toolbox's adapter.
PLACES = {
    "FPN": ("mmdet", "necks", "FPN", NECK),
    "FPN, extra levels": ("mmdet", "necks", "FPN", dict(NECK, add_extra_convs="on_input")),
    "PAFPN": ("mmdet", "necks", "PAFPN", NECK),
    "FCNMaskHead": ("mmdet", "roi_heads.mask_heads", "FCNMaskHead", dict(in_channels=32, num_convs=1)),
    "PixelDecoder": ("mmdet", "layers", "PixelDecoder", DECODER),
    "TransformerEncoderPixelDecoder": ("mmdet", "layers", "TransformerEncoderPixelDecoder", dict(DECODER, **ENCODER)),
    "MSDeformAttnPixelDecoder": (
        "mmdet",
        "layers",
        "MSDeformAttnPixelDecoder",
        dict(DECODER, **DEFORMABLE, in_channels=[16, *WIDTHS], strides=[4, 8, 16, 32], num_outs=3),
    ),
    "UPerHead": ("mmseg", "decode_heads", "UPerHead", dict(HEAD, pool_scales=(1, 2))),
    "FPNHead": ("mmseg", "decode_heads", "FPNHead", dict(HEAD, feature_strides=[4, 8, 16])),
    "InterpConv": ("mmseg", "backbones.unet", "InterpConv", dict(in_channels=32, out_channels=8)),
    **{
        f"{toolbox}'s {name}": (toolbox, "backbones", name, dict(depth=50, base_channels=8, stem_channels=8))
        for toolbox, name in (("mmdet", "ResNet"), ("mmseg", "ResNetV1d"), ("mmpretrain", "ResNetV1c"))
    },
}
#: Those whose parents torch.fx cannot trace for another reason than the interpolation.
UNTRACEABLE = ("TransformerEncoderPixelDecoder", "MSDeformAttnPixelDecoder")


def build(place, carafe=True, **carafe_arguments):
    toolbox, where, name, arguments = PLACES[place]
    pytest.importorskip(toolbox, reason=f"{toolbox} is not installed")
    stock = importlib.import_module(f"{toolbox}.models.{where}")  # first: it completes the toolbox's registry
    adapter = importlib.import_module(f"carafe_plugin.openmmlab.{toolbox}")
    with DefaultScope.overwrite_default_scope(toolbox):
        if not carafe:
            return getattr(stock, name)(**arguments)
        return getattr(adapter, f"CARAFE{name}")(**arguments, **carafe_arguments)


class Parent(BaseModule):
    """A model around a part."""

    def __init__(self, part, init_cfg=None):
        super().__init__(init_cfg)
        self.part = part


def initialise(model, monkeypatch):
    """Call init_weights and return what MMEngine would log, by parameter."""
    found = {}

    def dump(self):
        found.update((name, self._params_init_info[p]["init_info"]) for name, p in self.named_parameters())

    monkeypatch.setattr(BaseModule, "_dump_init_info", dump)
    model.init_weights()
    return found


def sites_of(model):
    """Every CARAFE++ in a model, without values (7, as on the meta device anything), by name."""
    sites = {name: module for name, module in model.named_modules() if isinstance(module, KernelPrediction)}
    for module in sites.values():
        for convolution in (module.channel_compressor, module.content_encoder):
            for parameter in convolution.parameters():
                nn.init.constant_(parameter, 7)
    assert sites
    return sites


NORMAL = dict(type="Normal", layer="Conv2d", std=0.01, bias=0.5)
# InterpConv is no module of MMEngine's: alone, nothing reaches it.
CASES = [(place, cfg) for place in PLACES for cfg in (None, NORMAL) if cfg or place != "InterpConv"]


@pytest.mark.parametrize(("place", "init_cfg"), CASES, ids=lambda value: value and str(value)[:16])
def test_the_log_says_who_initialised(place, init_cfg, monkeypatch):
    """Parameters without values all get the paper's, and the log names CARAFE++."""
    model = Parent(build(place), init_cfg)
    sites = sites_of(model)
    found = initialise(model, monkeypatch)
    assert list(wrong_starts(model)) == []
    for name, module in sites.items():
        texts = {key: text for key, text in found.items() if key.startswith(f"{name}.c") and "norm" not in key}
        assert len(texts) == 4
        expected = f"Initialized by user-defined `init_weights` in {type(module).__name__} "
        assert set(texts.values()) == {expected}


@pytest.mark.parametrize(("place", "init_cfg"), CASES, ids=lambda value: value and str(value)[:16])
def test_starts_as_carafe_cfg_says(place, init_cfg, monkeypatch):
    """Whoever initialises the parameters, and in whatever order, once or twice."""
    carafe_cfg = dict(init="stride" if "ResNet" in place else "nearest", init_spread=0.01, up_group=2)
    if "ResNet" in place:
        carafe_cfg["down_group"] = carafe_cfg.pop("up_group")
    model = Parent(build(place, carafe_cfg=carafe_cfg), init_cfg)
    expected = {
        name: interpolation_logits(carafe_cfg["init"], 0.01, *module.settings).float()
        for name, module in sites_of(model).items()
    }
    initialise(model, monkeypatch)
    for name, biases in expected.items():
        encoder = model.get_submodule(name).content_encoder
        assert biases.unique().numel() == 2
        assert torch.equal(encoder.bias, biases)
        assert 0 < encoder.weight.abs().max() < 1e-6


ALIGNED = dict(mode="bilinear", align_corners=True)


@pytest.mark.parametrize(
    ("place", "option"),
    [
        ("FPN", dict(upsample_cfg=ALIGNED)),
        ("UPerHead", dict(align_corners=True)),
        ("FPNHead", dict(align_corners=True)),
        ("InterpConv", dict(upsample_cfg=dict(ALIGNED, scale_factor=2))),
    ],
)
def test_no_start_aligns_corners(place, option):
    """Where the parent's interpolation aligns them, bilinear is refused, and any other start taken."""
    build(place, carafe_cfg=dict(init="nearest"), **option)
    with pytest.raises(ValueError, match="carafe_cfg: init='bilinear' stands for align_corners=False"):
        build(place, carafe_cfg=dict(init="bilinear"), **option)


def test_the_log_names_others_for_what_is_theirs(monkeypatch):
    """A norm inside CARAFE++ is the enclosing model's, as every norm."""
    from carafe_plugin.openmmlab.layers import CARAFEDownsample

    part = nn.Sequential(CARAFEDownsample(8, norm_cfg=dict(type="BN")))
    found = initialise(Parent(part, dict(type="Constant", layer="BatchNorm2d", val=0.5)), monkeypatch)
    assert re.match("ConstantInit", found["part.0.compressor_norm.weight"])
    assert part[0].compressor_norm.weight.unique().item() == 0.5
    assert "in CARAFEDownsample" in found["part.0.content_encoder.weight"]


def test_inpainting_networks_keep_their_start(monkeypatch):
    """Within modules that MMEngine's init_weights does not enter."""
    from carafe_plugin.inpainting.networks import InpaintingGenerator

    for partial in (False, True):
        switches = dict(down=True, up=True)
        model = InpaintingGenerator(32, partial, carafe_cfg=switches, init_cfg=dict(type="Normal", layer="Conv2d"))
        found = initialise(model, monkeypatch)
        assert list(wrong_starts(model)) == []
        named = [text for name, text in found.items() if name.endswith("content_encoder.weight")]
        assert [re.search(r"in (Masked)?CARAFE(Down|Up)sample", text) is not None for text in named] == [True] * 4

        switches = dict(down=dict(init="stride"), up=dict(init="nearest"))
        model = InpaintingGenerator(32, partial, carafe_cfg=switches, init_cfg=dict(type="Normal", layer="Conv2d"))
        initialise(model, monkeypatch)
        biases = [value for name, value in model.named_parameters() if name.endswith("content_encoder.bias")]
        assert [value.unique().numel() for value in biases] == [2] * 4


def reset(model, parents_first):
    """Give values to a model from the meta device, module by module, as FSDP does."""
    model.to_empty(device="cpu")
    for value in (*model.parameters(), *model.buffers()):
        nn.init.constant_(value.data, 7)
    modules = list(model.modules())
    for module in modules if parents_first else reversed(modules):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


@pytest.mark.parametrize("parents_first", [True, False])
@pytest.mark.parametrize(
    "place", [place for place in PLACES if "mmpretrain" not in place]
)  # its ResNets ask for values
def test_from_the_meta_device(place, parents_first):
    with torch.device("meta"):
        model = build(place)
    reset(model, parents_first)
    assert list(wrong_starts(model)) == []


def test_inpainting_networks_from_the_meta_device():
    from carafe_plugin.inpainting.networks import InpaintingGenerator, PatchDiscriminator

    with torch.device("meta"):
        model = nn.ModuleList([InpaintingGenerator(32, carafe_cfg=dict(down=True, up=True)), PatchDiscriminator(16)])
    reset(model, parents_first=True)
    assert list(wrong_starts(model)) == []
    generator, discriminator = model
    for convolution, deviation in (
        (generator.encoder[0].convolution, (2 / (4 * 25)) ** 0.5),
        (generator.to_image, (2 / (9 * (16 + 3))) ** 0.5),
        (discriminator.layers[2], 0.02),
    ):
        assert convolution.weight.std().item() == pytest.approx(deviation, rel=0.1)


class Pyramid(nn.Module):
    """Maps of an image at the sizes and channels that a part expects, and the part."""

    def __init__(self, part, place):
        super().__init__()
        channels = getattr(part, "in_channels", 3 if "ResNet" in place else 32)
        self.listed = not isinstance(channels, int)
        widths = channels if self.listed else [channels]
        self.stages = nn.ModuleList(nn.Conv2d(3, width, 1, stride=2**i) for i, width in enumerate(widths))
        self.part = part
        self.more = ([],) if place == "PixelDecoder" else ()

    def forward(self, images):
        maps = [stage(images) for stage in self.stages]
        return self.part(maps if self.listed else maps[0], *self.more)


@pytest.mark.parametrize("place", [place for place in PLACES if place not in UNTRACEABLE])
def test_fx_traces_where_it_traces_the_parent(place):
    model = Pyramid(build(place), place).eval()
    traced = torch.fx.symbolic_trace(model)
    for size in ((24, 40), (25, 35)):
        images = torch.randn(1, 3, *size)
        flat = [torch.utils._pytree.tree_flatten(each(images))[0] for each in (traced, model)]
        assert all(torch.equal(a, b) for a, b in zip(*flat, strict=True))


@pytest.mark.parametrize("place", UNTRACEABLE)
def test_fx_does_not_trace_the_parents_of_the_others(place):
    with pytest.raises((torch.fx.proxy.TraceError, TypeError, AttributeError)):
        torch.fx.symbolic_trace(Pyramid(build(place, carafe=False), place))
