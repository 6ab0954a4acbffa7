"""CARAFEFCNMaskHead: FCNMaskHead bit for bit when configured so, CARAFE++ in the deconvolution's place otherwise."""

import pytest
import torch

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.registry import DefaultScope

from carafe_plugin.openmmlab.layers import CARAFEUpsample
from carafe_plugin.openmmlab.mmdet import CARAFEFCNMaskHead

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = dict(num_convs=2, in_channels=8, conv_out_channels=12, num_classes=5)
VARIANTS = [
    dict(),
    dict(class_agnostic=True),
    dict(num_convs=0, conv_out_channels=8),
    dict(norm_cfg=dict(type="BN")),
    dict(predictor_cfg=dict(type="NormedConv2d")),
    dict(conv_kernel_size=1),
]


@pytest.fixture(autouse=True)
def mmdet_scope():
    with DefaultScope.overwrite_default_scope("mmdet"):  # NormedConv2d is MMDetection's
        yield


@pytest.mark.parametrize("method", ["deconv", "nearest", "bilinear"])
@pytest.mark.parametrize("scale_factor", [2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_parents_upsamplers_give_the_parent_bit_for_bit(variant, scale_factor, method):
    options = dict(SMALL, **variant)
    upsample_cfg = dict(type=method, scale_factor=scale_factor)
    heads = []
    for head_type, kwargs in ((CARAFEFCNMaskHead, dict(carafe_cfg=upsample_cfg)), (FCNMaskHead, {})):
        torch.manual_seed(0)
        head = head_type(**options, **(kwargs or dict(upsample_cfg=upsample_cfg)))
        head.init_weights()
        heads.append(head)
    head, parent = heads
    parameters = dict(parent.named_parameters())
    assert parameters.keys() == dict(head.named_parameters()).keys()
    assert all(torch.equal(p, parameters[name]) for name, p in head.named_parameters()), "initialisation differs"
    x = torch.randn(3, 8, 7, 7)
    for training in (True, False):
        out, expected = head.train(training)(x), parent.train(training)(x)
        assert torch.equal(out, expected)
        for a, b in zip(
            *(torch.autograd.grad(y.square().sum(), h.parameters()) for y, h in ((out, head), (expected, parent))),
            strict=True,
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize("variant", VARIANTS)
def test_type_alone_replaces_the_deconvolution(variant):
    """What a stock configuration passes, deconvolution by default, with the type changed."""
    options = dict(SMALL, **variant)
    head = MMDET_MODELS.build(dict(options, type="carafe_plugin.openmmlab.mmdet.CARAFEFCNMaskHead"))
    assert type(head) is CARAFEFCNMaskHead is type(MMDET_MODELS.build(dict(options, type="CARAFEFCNMaskHead")))
    head.init_weights()
    assert isinstance(head.upsample, CARAFEUpsample)
    channels = options["conv_out_channels"]
    assert head.upsample.channels == head.conv_logits.in_channels == channels
    assert head.upsample.compressed_channels == 64
    assert abs(head.upsample.content_encoder.weight.std().item() - 0.001) < 1e-4
    x = torch.randn(3, 8, 14, 14)
    masks = head(x)
    assert masks.shape == (3, 1 if options.get("class_agnostic") else 5, 28, 28)
    masks.square().sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    for conv in head.convs:
        x = conv(x)
    assert torch.equal(head(x) if not head.convs else head.conv_logits(head.upsample(x)), masks)


def test_no_relu_behind_carafe():
    """The paper replaces the deconvolution; the ReLU behind it belongs to the deconvolution."""
    head = CARAFEFCNMaskHead(**SMALL)
    seen = []
    head.conv_logits.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        head.convs[-1].conv.bias.fill_(-1)
        head.convs[-1].activate = torch.nn.Identity()
        head(torch.randn(1, 8, 14, 14))
    assert seen[0].min() < 0


def test_parents_checkpoint_loads_but_for_the_upsampler():
    parent, head = FCNMaskHead(**SMALL), CARAFEFCNMaskHead(**SMALL)
    missing, unexpected = head.load_state_dict(parent.state_dict(), strict=False)
    assert set(unexpected) == {"upsample.weight", "upsample.bias"}
    assert all(key.startswith("upsample.") for key in missing)
    assert len(missing) == 4


@pytest.mark.parametrize("class_agnostic", [False, True])
def test_no_regions(class_agnostic):
    head = CARAFEFCNMaskHead(**SMALL, class_agnostic=class_agnostic)
    regions = torch.randn(0, 8, 14, 14, requires_grad=True)
    masks = head(regions)
    assert masks.shape == (0, 1 if class_agnostic else 5, 28, 28)
    loss = head.loss_mask(masks, torch.zeros(0, 28, 28), torch.zeros(0, dtype=torch.long))
    (loss + masks.sum()).sum().backward()
    assert regions.grad.shape == regions.shape
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in head.parameters())


@pytest.mark.parametrize(
    ("upsample_cfg", "carafe_cfg", "scale_factor"),
    [
        (dict(type="deconv", scale_factor=4), None, 4),
        (dict(type="bilinear", scale_factor=3), dict(up_kernel=3), 3),
        (dict(type="deconv", scale_factor=2), dict(scale_factor=3), 3),
        (dict(type="deconv"), dict(), 2),
    ],
)
def test_scale_factor(upsample_cfg, carafe_cfg, scale_factor):
    head = CARAFEFCNMaskHead(**SMALL, upsample_cfg=upsample_cfg, carafe_cfg=carafe_cfg)
    assert head.scale_factor == scale_factor
    assert head(torch.randn(1, 8, 7, 7)).shape[2:] == (7 * scale_factor, 7 * scale_factor)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(upsample_cfg=dict(type=None)), ValueError, "upsample_cfg must name the upsampler that CARAFE"),
        (dict(carafe_cfg="carafe"), TypeError, "carafe_cfg must be a dictionary or None, got 'carafe'"),
        (dict(carafe_cfg=dict(type="CARAFEUpsampel")), KeyError, "carafe_cfg: the type 'CARAFEUpsampel'"),
        (dict(carafe_cfg=dict(up_kernal=3)), TypeError, "carafe_cfg=.*up_kernal"),
        (dict(carafe_cfg=dict(channels=3)), ValueError, "carafe_cfg must not set 'channels'"),
        (dict(carafe_cfg=dict(scale_factor=0)), ValueError, "scale_factor"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        CARAFEFCNMaskHead(**SMALL, **options)


def test_wrong_channels_are_named():
    with pytest.raises(ValueError, match=r"features must have shape \(N, 8, H, W\)"):
        CARAFEFCNMaskHead(num_convs=0, in_channels=8, conv_out_channels=8)(torch.randn(1, 6, 14, 14))
