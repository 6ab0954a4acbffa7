"""Transformers' rows of library_models.py."""

from collections.abc import Callable
from typing import Any

import torch
from library_model import LibraryModel, calls, images, label_maps, scene
from torch import Tensor, nn

OUT = ["stage1", "stage2", "stage3", "stage4"]


def swin() -> Any:
    from transformers import SwinConfig

    return SwinConfig(
        image_size=64, embed_dim=24, depths=[1] * 4, num_heads=[1, 2, 4, 8], window_size=4, out_features=OUT
    )


def resnet(*outputs: str) -> Any:
    from transformers import ResNetConfig

    widths = dict(embedding_size=16, hidden_sizes=[16, 32, 64, 128], depths=[1] * 4, layer_type="basic")
    return ResNetConfig(**widths, out_features=list(outputs))


def upernet() -> nn.Module:
    import transformers as t

    convnext = t.ConvNextConfig(hidden_sizes=[16, 32, 64, 128], depths=[1] * 4, out_features=OUT)
    widths = dict(hidden_size=32, pool_scales=[1, 2], auxiliary_in_channels=64)
    return t.UperNetForSemanticSegmentation(t.UperNetConfig(backbone_config=convnext, num_labels=5, **widths))


def mask2former() -> nn.Module:
    import transformers as t

    widths = dict(feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32, dim_feedforward=32)
    layers = dict(encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=5, num_labels=5)
    return t.Mask2FormerForUniversalSegmentation(
        t.Mask2FormerConfig(backbone_config=swin(), train_num_points=256, **widths, **layers)
    )


DETR = dict(encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=5, num_labels=5)


def maskformer() -> nn.Module:
    import transformers as t

    heads = dict(encoder_attention_heads=2, decoder_attention_heads=2)
    decoder = t.DetrConfig(d_model=32, backbone_config=resnet("stage4"), **DETR, **heads)
    widths = dict(fpn_feature_size=32, mask_feature_size=32)
    return t.MaskFormerForInstanceSegmentation(
        t.MaskFormerConfig(backbone_config=swin(), decoder_config=decoder, num_labels=5, **widths)
    )


def detr() -> nn.Module:
    import transformers as t

    heads = dict(encoder_attention_heads=8, decoder_attention_heads=8)
    return t.DetrForSegmentation(t.DetrConfig(d_model=64, backbone_config=resnet(*OUT), **DETR, **heads))


def segformer() -> nn.Module:
    import transformers as t

    widths = dict(hidden_sizes=[8, 16, 32, 64], depths=[1] * 4, decoder_hidden_size=32)
    return t.SegformerForSemanticSegmentation(t.SegformerConfig(**widths, num_labels=5))


REALTIME = dict(
    encoder_in_channels=[32, 64, 128],
    encoder_hidden_dim=32,
    encoder_ffn_dim=32,
    encoder_attention_heads=2,
    d_model=32,
    decoder_in_channels=[32, 32, 32],
    decoder_ffn_dim=32,
    decoder_attention_heads=2,
    decoder_layers=2,
    num_queries=10,
    num_labels=5,
    num_denoising=0,
)


def rt_detr() -> nn.Module:
    import transformers as t

    widths = dict(embedding_size=16, hidden_sizes=[16, 32, 64, 128], depths=[1] * 4, layer_type="basic")
    backbone = t.RTDetrResNetConfig(**widths, out_features=OUT[1:])
    return t.RTDetrForObjectDetection(t.RTDetrConfig(backbone_config=backbone, hidden_expansion=1.0, **REALTIME))


def d_fine() -> nn.Module:
    import transformers as t

    stages = dict(in_channels=[8, 16, 32, 64], mid_channels=[8, 8, 8, 16], out_channels=[16, 32, 64, 128])
    stages |= dict(num_blocks=[1] * 4, numb_of_layers=[1] * 4, kernel_size=[3] * 4)
    stages |= dict(downsample=[False, True, True, True], light_block=[False, False, True, True])
    backbone = t.HGNetV2Config(
        **{f"stage_{name}": value for name, value in stages.items()},
        **dict(stem_channels=[3, 8, 8], hidden_sizes=[16, 32, 64, 128], out_features=OUT[1:]),
    )
    return t.DFineForObjectDetection(t.DFineConfig(backbone_config=backbone, **REALTIME))


def named(number: int) -> dict[str, Tensor]:
    return dict(pixel_values=torch.rand(number, 3, 64, 64))


def on_label_maps(model: nn.Module) -> Tensor:
    return model(pixel_values=images(), labels=label_maps()).loss


def on_masks(model: nn.Module) -> Tensor:
    _, labels, masks = scene()
    return model(pixel_values=images(), mask_labels=[masks, masks], class_labels=[labels, labels]).loss


def on_boxes(model: nn.Module) -> Tensor:
    boxes, labels, masks = scene()
    corners, opposite = boxes[:, :2] / 64, boxes[:, 2:] / 64
    centres = torch.cat([(corners + opposite) / 2, opposite - corners], 1)
    target = dict(class_labels=labels, boxes=centres, masks=masks)
    return model(pixel_values=images(), labels=[target, target]).loss


def transformers_model(name: str, build: Callable, places: tuple, loss: Callable, **others: str) -> LibraryModel:
    return LibraryModel("transformers", name, build, places, loss, inputs=named, **others)


HOOKS = "it has run, and keeps hooks"
SIZES = "a size in it depends on values"
TRANSFORMERS = [
    transformers_model("UperNet", upernet, calls("decode_head", *range(6)), on_label_maps, unsaved=HOOKS),
    transformers_model(
        "Mask2Former", mask2former, calls("model.pixel_level_module.decoder", 0), on_masks, unsaved=HOOKS
    ),
    transformers_model(
        *("MaskFormer", maskformer),
        tuple(f"model.pixel_level_module.decoder.fpn.layers.{n}.carafe_upsamplers.0" for n in range(3)),
        on_masks,
    ),
    transformers_model(
        *("DetrForSegmentation", detr),
        tuple(f"mask_head.fpn_stages.{n}.carafe_upsamplers.0" for n in range(3)),
        on_boxes,
    ),
    transformers_model("SegFormer", segformer, calls("decode_head", 1, 2, 3), on_label_maps, unsaved=HOOKS),
    transformers_model("RT-DETR", rt_detr, calls("model.encoder", 0, 1), on_boxes),
    transformers_model("D-FINE", d_fine, calls("model.encoder", 0, 1), on_boxes, unexported=SIZES, breaks=True),
]


# Beside the table.


def beit() -> nn.Module:
    import transformers as t

    widths = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32)
    return t.BeitForSemanticSegmentation(
        t.BeitConfig(image_size=64, out_indices=[1, 2, 3, 4], pool_scales=[1, 2], num_labels=5, **widths)
    )


def swin2sr() -> nn.Module:
    import transformers as t

    widths = dict(embed_dim=16, depths=[1], num_heads=[2], window_size=4)
    return t.Swin2SRForImageSuperResolution(
        t.Swin2SRConfig(image_size=32, upscale=4, upsampler="nearest+conv", **widths)
    )
