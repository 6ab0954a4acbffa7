"""Generator, discriminator, losses: where CARAFE++ is, what holes cannot influence, and what is judged."""

import pytest
import torch

pytest.importorskip("mmengine", reason="mmengine is not installed")

import torch.nn.functional as F

from carafe_plugin import CARAFEDownsample, CARAFEUpsample
from carafe_plugin.inpainting import (
    InpaintingGAN,
    InpaintingGenerator,
    MaskedCARAFEDownsample,
    MaskedCARAFEUpsample,
    PartialConv2d,
    PatchDiscriminator,
)
from carafe_plugin.inpainting.model import adversarial_loss, reconstruction_losses
from carafe_plugin.modules.carafe import KernelPrediction

pytestmark = pytest.mark.usefixtures("one_thread")

BOTH = dict(down=True, up=True)


@pytest.fixture
def images():
    torch.manual_seed(0)
    images, holes = torch.rand(2, 3, 32, 40) * 2 - 1, torch.zeros(2, 1, 32, 40)
    holes[0, :, 4:28, 6:30] = 1  # wider than the encoder sees
    holes[1, :, :7, 33:] = 1
    return images, holes


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("switches", [{}, dict(down=True), dict(up=True), BOTH])
def test_carafe_is_where_the_switches_say(partial, switches, images):
    """Sec. 4.3: for a strided convolution CARAFE++ and the same convolution at stride 1; CARAFE++ for upsampling."""
    torch.manual_seed(0)
    generator = InpaintingGenerator(4, partial, carafe_cfg=switches)
    found = [type(module) for module in generator.modules() if isinstance(module, KernelPrediction)]
    down, up = (MaskedCARAFEDownsample, MaskedCARAFEUpsample) if partial else (CARAFEDownsample, CARAFEUpsample)
    assert found == [down] * 2 * switches.get("down", 0) + [up] * 2 * switches.get("up", 0)
    convolutions = [m for m in generator.modules() if type(m) is (PartialConv2d if partial else torch.nn.Conv2d)]
    inside = [m for c in generator.modules() if isinstance(c, KernelPrediction) for m in c.modules()]
    own = [m for m in convolutions if m not in inside]
    assert sum(m.stride == (2, 2) for m in own) == 2 * (not switches.get("down"))
    assert [m.dilation[0] for m in own if m.dilation[0] > 1] == [2, 4, 8, 16]
    deconvolutions = [m for m in generator.modules() if isinstance(m, torch.nn.ConvTranspose2d)]
    assert len(deconvolutions) == 2 * (not partial and not switches.get("up"))
    # six convolutions up to the bottleneck, its four, six behind it and the last one
    assert len(own) + len(deconvolutions) == 17
    assert len([m for m in generator.modules() if isinstance(m, torch.nn.BatchNorm2d)]) == 16

    prediction = generator(*images)
    assert prediction.shape == images[0].shape
    assert prediction.abs().max() <= 1
    prediction.square().sum().backward()
    for name, parameter in generator.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("carafe_cfg", [None, BOTH])
def test_holes_are_unknown(partial, carafe_cfg, images):
    torch.manual_seed(0)
    generator = InpaintingGenerator(4, partial, carafe_cfg=carafe_cfg).eval()
    pictures, holes = images
    with torch.no_grad():
        expected = generator(pictures, holes)
        assert torch.equal(generator(torch.where(holes > 0, float("nan"), pictures), holes), expected)
        assert not torch.equal(generator(pictures * 0.9, holes), expected)
        assert not torch.equal(generator(pictures.masked_fill(holes > 0, 0), torch.zeros_like(holes)), expected)


@pytest.mark.parametrize("partial", [False, True])
def test_mixed_precision(partial, images):
    """Under autocast, as AmpOptimWrapper has it: close to float32, and every gradient finite."""
    torch.manual_seed(0)
    generator = InpaintingGenerator(8, partial, carafe_cfg=BOTH)
    expected = generator(*images)
    with torch.autocast("cpu", torch.bfloat16):
        prediction = generator(*images)
    assert (prediction.float() - expected).abs().mean() < 0.05
    prediction.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in generator.parameters())


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("carafe_cfg", [None, BOTH])
def test_shapes_on_the_meta_device(partial, carafe_cfg, images):
    with torch.device("meta"):
        generator = InpaintingGenerator(4, partial, carafe_cfg=carafe_cfg)
    pictures, holes = images
    assert generator(pictures.to("meta"), holes.to("meta")).shape == pictures.shape


def test_masks_travel_through_the_partial_network():
    """The network propagates what the definition says, layer by layer: the hole shrinks and at last is gone."""
    generator = InpaintingGenerator(4, partial=True, carafe_cfg=BOTH)
    known, hooks = [], []
    for module in generator.modules():
        if isinstance(module, (PartialConv2d, KernelPrediction)):
            hooks.append(module.register_forward_hook(lambda _, __, out: known.append(out[1].mean().item())))
    holes = torch.zeros(1, 1, 64, 64)
    holes[..., 16:48, 16:48] = 1
    generator(torch.zeros(1, 3, 64, 64), holes)
    assert len(known) == len(hooks) == 17 + 4
    assert 0.75 < known[0] < known[1] < 1
    assert known[-1] == 1
    assert known == sorted(known)


def test_settings_of_carafe_and_mistakes():
    cfg = dict(down=dict(down_kernel=3, compressed_channels=None), up=dict(up_group=2))
    generator = InpaintingGenerator(4, carafe_cfg=cfg, dilations=[1, 3])
    assert [layer.convolution.dilation for layer in generator.bottleneck] == [(1, 1), (3, 3)]
    down, *_, up = (m for m in generator.modules() if isinstance(m, KernelPrediction))
    assert (down.kernel_size, down.compressed_channels, up.group_size) == (3, None, 2)
    for settings, message in (
        (dict(base_channels=1), "base_channels must be an int of at least 2, got 1"),
        (dict(upsampling="bicubic"), "upsampling must be one of deconv, nearest, got 'bicubic'"),
        (dict(upsampling="deconv", partial=True), "a deconvolution has no partial form"),
        (dict(dilations=(2, 0)), r"dilations must be a sequence of positive ints, got \(2, 0\)"),
        (dict(dilations=4), "dilations must be a sequence of positive ints, got 4"),
        (dict(carafe_cfg=dict(downs=True)), "no keys but 'down' and 'up', got 'downs'"),
        (dict(carafe_cfg=dict(up=1.5)), r"carafe_cfg\['up'\] must be True, False or a dictionary"),
        (dict(carafe_cfg=dict(up=dict(channels=3))), "must not set channels"),
    ):
        with pytest.raises(ValueError, match=message):
            InpaintingGenerator(**settings)
    with pytest.raises(ValueError, match=r"multiples of 4, got shape \(1, 3, 30, 32\)"):
        generator(torch.zeros(1, 3, 30, 32), torch.zeros(1, 1, 30, 32))


def test_discriminator_judges_patches_of_70_pixels():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(2).eval()
    images = torch.rand(1, 3, 256, 256, requires_grad=True)
    logits = discriminator(images, torch.zeros(1, 1, 256, 256))
    assert logits.shape == (1, 1, 30, 30)
    logits[0, 0, 15, 15].backward()
    rows, columns = (images.grad[0].abs().sum((0, dim)).nonzero() for dim in (2, 1))
    assert len(rows) == len(columns) == 70
    with pytest.raises(ValueError, match="strided must be a positive int, got 0"):
        PatchDiscriminator(strided=0)


def test_adversarial_loss_is_of_the_inpainted_region():
    logits = torch.randn(2, 1, 4, 4, requires_grad=True)
    holes = torch.zeros(2, 1, 32, 32)
    holes[0, :, 9:18, 3] = 1  # touches the cells (1, 0) and (2, 0)
    holes[1, :, 31, 31] = 1
    chosen = torch.stack([logits[0, 0, 1, 0], logits[0, 0, 2, 0], logits[1, 0, 3, 3]])
    real, fake = (adversarial_loss(logits, holes, real) for real in (True, False))
    torch.testing.assert_close(real, F.softplus(-chosen).mean())
    torch.testing.assert_close(fake, F.softplus(chosen).mean())
    assert adversarial_loss(logits, torch.zeros_like(holes), True) == 0


def test_reconstruction_losses():
    holes = torch.zeros(1, 1, 4, 4)
    holes[..., 0] = 1
    hole, valid = reconstruction_losses(0.5 * holes + 0.1, torch.zeros(1, 3, 4, 4), holes)
    assert hole.item() == pytest.approx(0.6 / 4)
    assert valid.item() == pytest.approx(0.1 * 3 / 4)


def test_the_known_stays_exact(images):
    pictures, holes = images
    model = InpaintingGAN(
        dict(type="InpaintingGenerator", base_channels=2), dict(type="PatchDiscriminator", base_channels=2)
    ).eval()
    with torch.no_grad():
        completed = model(pictures, holes)
        found = model(pictures, holes, mode="predict", paths=["a", "b"])
        prediction = model.generator(pictures, holes)
    assert torch.equal(completed, torch.where(holes > 0, prediction, pictures))
    assert [sample["path"] for sample in found] == ["a", "b"]
    for index, sample in enumerate(found):
        assert torch.equal(sample["completed"], completed[index])
        assert torch.equal(sample["original"], pictures[index])
    with pytest.raises(ValueError, match="mode must be 'tensor' or 'predict', got 'loss'"):
        model(pictures, holes, mode="loss")
    with pytest.raises(ValueError, match="loss_weights must have non-negative values for hole, valid, adversarial"):
        InpaintingGAN(model.generator, model.discriminator, loss_weights=dict(perceptual=1))


def test_images_are_scaled_linearly():
    preprocess = InpaintingGAN(
        dict(type="InpaintingGenerator", base_channels=2), dict(type="PatchDiscriminator", base_channels=2)
    ).data_preprocessor
    image = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(3, 1, 3)
    data = preprocess(dict(inputs=[image], holes=[torch.ones(1, 1, 3, dtype=torch.uint8)], paths=["a"]))
    torch.testing.assert_close(data["inputs"], torch.tensor([-1.0, -0.6, 1.0]).expand(1, 3, 1, 3))
    assert data["holes"].dtype == torch.float32
    assert data["paths"] == ["a"]
