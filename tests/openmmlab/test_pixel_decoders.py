"""The pixel decoders of MaskFormer and Mask2Former: the parents bit for bit, and CARAFE++ in their top-down path."""

import itertools

import pytest
import torch
from toolkit import needs_compile
from torch import nn

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmdet.models.layers import MSDeformAttnPixelDecoder, PixelDecoder, TransformerEncoderPixelDecoder
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope

from carafe_plugin.openmmlab.layers import CARAFEUpsample, fit_to_size
from carafe_plugin.openmmlab.mmdet import (
    CARAFEMSDeformAttnPixelDecoder,
    CARAFEPixelDecoder,
    CARAFETransformerEncoderPixelDecoder,
)

pytestmark = pytest.mark.usefixtures("one_thread")

IN_CHANNELS = [4, 6, 8, 10]
PARENTS = {
    CARAFEPixelDecoder: PixelDecoder,
    CARAFETransformerEncoderPixelDecoder: TransformerEncoderPixelDecoder,
    CARAFEMSDeformAttnPixelDecoder: MSDeformAttnPixelDecoder,
}
MODES = {
    CARAFEPixelDecoder: "nearest",
    CARAFETransformerEncoderPixelDecoder: "nearest",
    CARAFEMSDeformAttnPixelDecoder: "bilinear",
}
PYRAMIDS = {
    "even": [(32, 48), (16, 24), (8, 12), (4, 6)],
    "rounded up": [(25, 43), (13, 22), (7, 11), (4, 6)],
    "rounded down": [(27, 45), (13, 22), (6, 11), (3, 5)],
    "tiny": [(3, 5), (2, 3), (1, 2), (1, 1)],
}
FFN = dict(embed_dims=8, feedforward_channels=16, num_fcs=2, ffn_drop=0.0, act_cfg=dict(type="ReLU", inplace=True))
CARAFE_KEYS = {
    f"{conv}.{kind}" for conv, kind in itertools.product(("channel_compressor", "content_encoder"), ("weight", "bias"))
}


def options(decoder_type, levels=3, **changes):
    """A small decoder's arguments; of Mask2Former's, the attention serves the coarsest ``levels``."""
    cfg = dict(in_channels=IN_CHANNELS, feat_channels=8, out_channels=12, norm_cfg=dict(type="GN", num_groups=4))
    attention = dict(embed_dims=8, num_heads=2, dropout=0.0, batch_first=True)
    if decoder_type is CARAFEMSDeformAttnPixelDecoder:
        attention.update(num_levels=levels, num_points=2)
    if decoder_type is not CARAFEPixelDecoder:
        cfg.update(
            encoder=dict(num_layers=2, layer_cfg=dict(self_attn_cfg=attention, ffn_cfg=FFN)),
            positional_encoding=dict(num_feats=4, normalize=True),
        )
    return ConfigDict(cfg, **changes)


def pairs(decoder_type, carafe_cfg, **changes):
    decoders = []
    for make, extra in ((decoder_type, dict(carafe_cfg=carafe_cfg)), (PARENTS[decoder_type], {})):
        torch.manual_seed(0)
        decoder = make(**options(decoder_type, **changes), **extra)
        decoder.init_weights()
        decoders.append(decoder)
    return decoders


def maps(sizes, dtype=torch.float32, in_channels=IN_CHANNELS):
    return [
        torch.randn(2, c, *size, dtype=dtype, requires_grad=True) for c, size in zip(in_channels, sizes, strict=True)
    ]


def decode(decoder, inputs):
    """Mask features, then every other output, as one list."""
    if isinstance(decoder, MSDeformAttnPixelDecoder):
        mask_feature, features = decoder(inputs)
        return [mask_feature, *features]
    height, width = inputs[0].shape[2:]
    sizes = [(4 * height, 4 * width), (4 * height - 9, 2 * width)]  # the second image of the batch is padded
    metas = [dict(batch_input_shape=sizes[0], img_shape=size) for size in sizes]
    return list(decoder(inputs, metas))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pyramid", PYRAMIDS)
@pytest.mark.parametrize("decoder_type", PARENTS)
def test_interpolating_it_is_the_parent_bit_for_bit(decoder_type, pyramid, dtype):
    decoder, parent = (d.to(dtype) for d in pairs(decoder_type, dict(type=MODES[decoder_type])))
    assert decoder.state_dict().keys() == parent.state_dict().keys()
    assert all(torch.equal(p, decoder.get_parameter(name)) for name, p in parent.named_parameters())
    inputs, results = maps(PYRAMIDS[pyramid], dtype), []
    for d in (decoder, parent):
        outs = decode(d, inputs)
        loss = sum(out.square().sum() for out in outs)
        grads = torch.autograd.grad(loss, [*inputs, *d.parameters()], allow_unused=True)
        results.append([*outs, *grads])
    for a, b in zip(*results, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@needs_compile
def test_it_compiles_without_a_graph_break():
    decoder, _ = pairs(CARAFEPixelDecoder, None)
    inputs = [x.detach() for x in maps(next(iter(PYRAMIDS.values())))]
    compiled = torch.compile(decoder, fullgraph=True, backend="eager")
    for got, expected in zip(decode(compiled, inputs), decode(decoder, inputs), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("levels", "num_outs"), [(3, 4), (3, 2), (2, 3), (1, 1)])
def test_deformable_attention_on_fewer_levels(levels, num_outs):
    """More than one level below the attention's (which the parent admits for equal channels), and other outputs."""
    changes = dict(levels=levels, num_outs=num_outs, in_channels=[6] * 4)
    decoder, parent = pairs(CARAFEMSDeformAttnPixelDecoder, dict(type="bilinear", align_corners=False), **changes)
    inputs = maps(PYRAMIDS["rounded up"], in_channels=[6] * 4)
    outs = decode(decoder, inputs)
    assert len(outs) == 1 + num_outs
    assert all(torch.equal(a, b) for a, b in zip(outs, decode(parent, inputs), strict=True))
    upsamplers = CARAFEMSDeformAttnPixelDecoder(**options(CARAFEMSDeformAttnPixelDecoder, **changes)).upsample_modules
    assert len(upsamplers) == 4 - levels


@pytest.mark.parametrize("pyramid", PYRAMIDS)
@pytest.mark.parametrize("decoder_type", PARENTS)
def test_top_down_path_written_out(decoder_type, pyramid):
    decoder, parent = pairs(decoder_type, dict(compressed_channels=4))
    parent.load_state_dict({key: x for key, x in decoder.state_dict().items() if "upsample_modules" not in key})
    for upsampler in decoder.upsample_modules:
        nn.init.normal_(upsampler.content_encoder.weight)  # so that no two upsamplers can be confused
    sizes, inputs = PYRAMIDS[pyramid], maps(PYRAMIDS[pyramid])
    outs = decode(decoder, inputs)
    if decoder_type is CARAFEPixelDecoder:
        x = decoder.last_feat_conv(inputs[-1])
        assert outs[1] is inputs[-1]
    elif decoder_type is CARAFETransformerEncoderPixelDecoder:
        assert torch.equal(outs[1], decode(parent, inputs)[1])
        x = decoder.encoder_out_proj(outs[1])
    else:
        assert all(torch.equal(a, b) for a, b in zip(outs[1:], decode(parent, inputs)[1:], strict=True))
        x = outs[-1]
    for i in reversed(range(len(decoder.upsample_modules))):
        upsampled = fit_to_size(decoder.upsample_modules[i](x), sizes[i])
        x = decoder.output_convs[i](decoder.lateral_convs[i](inputs[i]) + upsampled)
    assert torch.equal(outs[0], decoder.mask_feature(x))


@pytest.mark.parametrize("decoder_type", PARENTS)
def test_modules_checkpoint_initialisation_and_gradients(decoder_type):
    decoder, parent = pairs(decoder_type, None)
    count = 1 if decoder_type is CARAFEMSDeformAttnPixelDecoder else 3
    upsamplers = {name: m for name, m in decoder.named_modules() if isinstance(m, CARAFEUpsample)}
    assert set(upsamplers) == {f"upsample_modules.{i}" for i in range(count)}
    for upsampler in upsamplers.values():
        assert (upsampler.channels, upsampler.compressed_channels, upsampler.kernel_size) == (8, 64, 5)
        assert abs(upsampler.content_encoder.weight.std().item() - 0.001) < 1e-4
    missing, unexpected = decoder.load_state_dict(parent.state_dict(), strict=False)
    assert not unexpected
    assert set(missing) == {f"{name}.{key}" for name, key in itertools.product(upsamplers, CARAFE_KEYS)}
    sum(out.square().sum() for out in decode(decoder, maps(PYRAMIDS["rounded up"]))).backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        if name.startswith("upsample_modules"):
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("scope", [None, "mmdet"])
@pytest.mark.parametrize("decoder_type", PARENTS)
def test_short_name_and_full_path(decoder_type, scope):
    with DefaultScope.overwrite_default_scope(scope):
        for prefix in ("", "carafe_plugin.openmmlab.mmdet."):
            cfg = dict(options(decoder_type), type=prefix + decoder_type.__name__)
            assert type(MMDET_MODELS.build(cfg)) is decoder_type


@pytest.mark.parametrize("decoder_type", PARENTS)
def test_bad_arguments_are_named(decoder_type):
    cfg = options(decoder_type)
    for carafe_cfg, error, message in (
        ("carafe", TypeError, "carafe_cfg must be a dictionary or None, got 'carafe'"),
        (dict(up_kernal=5), TypeError, "carafe_cfg=.*up_kernal"),
        (dict(channels=5), ValueError, "carafe_cfg must not set 'channels'"),
        (dict(type="CARAFEUpsampel"), KeyError, "the type 'CARAFEUpsampel' is not registered"),
    ):
        with pytest.raises(error, match=message):
            decoder_type(**cfg, carafe_cfg=carafe_cfg)
    nothing_below = dict(levels=4) if decoder_type is CARAFEMSDeformAttnPixelDecoder else dict(in_channels=[8])
    with pytest.raises(ValueError, match="in_channels leaves no level below the coarsest"):
        decoder_type(**options(decoder_type, **nothing_below))


@pytest.mark.cuda
@pytest.mark.parametrize("decoder_type", PARENTS)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device on this machine")
def test_cuda_agrees_with_cpu(decoder_type, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    decoder, inputs = decoder_type(**options(decoder_type)), maps(PYRAMIDS["rounded down"])
    expected = decode(decoder, inputs)
    for out, wanted in zip(decode(decoder.cuda(), [x.cuda() for x in inputs]), expected, strict=True):
        # The same float32 sums in another order, through the encoder's layers and four convolutions.
        torch.testing.assert_close(out.cpu(), wanted, atol=1e-4, rtol=1e-3)
