"""Models of five libraries: built small and without weights, converted, and what is then done with them.

What a library's file in ``carafe_plugin/models`` says of its models is checked on these.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def whole(model: nn.Module) -> nn.Module:
    return model


@dataclass(frozen=True)
class LibraryModel:
    """A row of docs/libraries.md.

    Attributes:
        library (str): the package that it is from.
        name (str): in the table.
        build (Callable[[], nn.Module]): without weights and network.
        places (tuple[str, ...]): of CARAFE++, with ``arguments``.
        loss (Callable[[nn.Module], Tensor]): of a model in training mode, on two images with targets.
        arguments (Mapping[str, Any] | None): of ``convert``, beside the model; None: it is built with CARAFE++.
        inputs (Callable[[int], Any]): of ``part``, that many; by name where it is a mapping.
        part (Callable[[nn.Module], nn.Module]): what is compared, compiled and exported.
        part_name (str): what that is, where it is not the whole model.
        unsaved (str): why the library's own model, once it has run, cannot be saved as a whole, which a test looks at.
        unexported (str): likewise, why it cannot be exported.
        breaks (bool): whether torch.compile needs more than one graph for it.
    """

    library: str
    name: str
    build: Callable[[], nn.Module]
    places: tuple[str, ...]
    loss: Callable[[nn.Module], Tensor]
    arguments: Mapping[str, Any] | None = field(default_factory=dict)
    inputs: Callable[[int], Any] = lambda number: torch.rand(number, 3, 64, 64)
    part: Callable[[nn.Module], nn.Module] = whole
    part_name: str = ""
    unsaved: str = ""
    unexported: str = ""
    breaks: bool = False

    def __str__(self) -> str:
        return f"{self.library} {self.name}"


DOWNSAMPLING = dict(upsample=False, downsample=True)
#: Where the paper's Fig. 4 and Sec. 4 have CARAFE++ in a ResNet with two or three convolutions a block.
SEVEN = {
    conv: ("maxpool", *(f"layer{n}.0.{where}" for n in (2, 3, 4) for where in (conv, "downsample.0")))
    for conv in ("conv1", "conv2")
}


def calls(module: str, *numbers: int) -> tuple[str, ...]:
    return tuple(f"{module}.carafe_upsamplers.{number}".lstrip(".") for number in numbers)


def images(size: int = 64) -> Tensor:
    return torch.rand(2, 3, size, size)


def scene(size: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Two objects in an image: boxes (x1, y1, x2, y2), labels and masks."""
    boxes = torch.tensor([[4.0, 6.0, 40.0, 44.0], [20.0, 10.0, 60.0, 58.0]]) * size / 64
    masks = torch.zeros(2, size, size)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    return boxes, torch.tensor([1, 2]), masks


def label_maps(size: int = 64) -> Tensor:
    return torch.randint(5, (2, size, size))


def classification(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(images()), torch.tensor([0, 1]))


def segmentation(model: nn.Module) -> Tensor:
    scores = model(images(128))  # which PAN needs
    return F.cross_entropy(scores if isinstance(scores, Tensor) else scores["out"], label_maps(128))


def regression(model: nn.Module) -> Tensor:
    features = model(images())
    return sum((each - torch.rand_like(each)).square().mean() for each in features)


# torchvision


def pyramid() -> nn.Module:
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    norm = dict(norm_layer=nn.BatchNorm2d, trainable_layers=5)
    try:
        return resnet_fpn_backbone(backbone_name="resnet18", weights=None, **norm)
    except TypeError:  # older than 0.13
        return resnet_fpn_backbone("resnet18", pretrained=False, **norm)


def detector(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision.models import detection

        return getattr(detection, name)(pyramid(), 5, min_size=64, max_size=64)

    return build


class Maps(nn.Module):
    """What a torchvision detector computes of an image before it looks for boxes: pyramid and maps of its heads."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(self, image: Tensor) -> list[Tensor]:
        model, features = self.model, self.model.backbone(image)
        maps = list(features.values())
        found = model.rpn.head(maps) if hasattr(model, "rpn") else model.head(maps)
        outputs = [*maps, *(found.values() if isinstance(found, Mapping) else found[0] + found[1])]
        if getattr(model, "roi_heads", None) is not None and model.roi_heads.has_mask():
            outputs.append(model.roi_heads.mask_predictor(model.roi_heads.mask_head(maps[0])))
        return outputs


def detection(model: nn.Module) -> Tensor:
    boxes, labels, masks = scene()
    targets = [dict(boxes=boxes, labels=labels, masks=masks.byte()) for _ in range(2)]
    return sum(model(list(images()), targets).values())


def torchvision_segmentor(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision.models import segmentation

        return getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=5)

    return build


def torchvision_resnet() -> nn.Module:
    from torchvision.models import resnet50

    return resnet50(weights=None, num_classes=5)


DETECTOR = dict(library="torchvision", loss=detection, part=Maps, part_name="pyramid and the heads' maps")
FPN = calls("backbone.fpn", 0, 1, 2)
MASK = "roi_heads.mask_predictor.conv5_mask"
TORCHVISION = [
    LibraryModel(name="FasterRCNN", build=detector("FasterRCNN"), places=FPN, **DETECTOR),
    LibraryModel(name="MaskRCNN", build=detector("MaskRCNN"), places=(*FPN, MASK), **DETECTOR),
    LibraryModel(name="RetinaNet", build=detector("RetinaNet"), places=FPN, **DETECTOR),
    LibraryModel("torchvision", "fcn_resnet50", torchvision_segmentor("fcn_resnet50"), calls("", 0), segmentation),
    LibraryModel(
        *("torchvision", "deeplabv3_mobilenet_v3_large"),
        *(torchvision_segmentor("deeplabv3_mobilenet_v3_large"), calls("", 0), segmentation),
    ),
    LibraryModel(
        *("torchvision", "lraspp_mobilenet_v3_large", torchvision_segmentor("lraspp_mobilenet_v3_large")),
        *((*calls("", 0), *calls("classifier", 0)), segmentation),
    ),
    LibraryModel("torchvision", "resnet50", torchvision_resnet, SEVEN["conv2"], classification, DOWNSAMPLING),
]


# timm


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, **options)

    return build


def resnets(name: str, **options: Any) -> Callable[[], nn.Module]:
    # Else their branches begin as zero, and so do the gradients of what is in them.
    return timm_model(name, zero_init_last=False, **options)


HRNET = ("2.0.0.1", "3.0.0.1", "3.0.0.2", "3.0.1.2", "4.0.0.1", "4.0.0.2", "4.0.0.3", "4.0.1.2", "4.0.1.3", "4.0.2.3")
TIMM = [
    *(
        LibraryModel(
            "timm", f"{name}, features_only", resnets(name, features_only=True), places, regression, DOWNSAMPLING
        )
        for name, places in (("resnet18", SEVEN["conv1"]), ("resnet50", SEVEN["conv2"]))
    ),
    LibraryModel(
        *("timm", "resnet18d", resnets("resnet18d", num_classes=5), SEVEN["conv1"], classification, DOWNSAMPLING)
    ),
    LibraryModel(
        *("timm", "hrnet_w18_small", timm_model("hrnet_w18_small", num_classes=5)),
        tuple(f"stage{s}.{m}.fuse_layers.{i}.{j}.2" for s, m, i, j in (each.split(".") for each in HRNET)),
        classification,
    ),
]


# transformers

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


# segmentation_models_pytorch


def smp_model(name: str, depth: int = 3) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import segmentation_models_pytorch as smp

        options = dict(decoder_channels=(32, 16, 8)) if name in ("Unet", "UnetPlusPlus", "MAnet") else {}
        return getattr(smp, name)("resnet18", encoder_depth=depth, encoder_weights=None, classes=5, **options)

    return build


BLOCKS = tuple(f"decoder.blocks.{n}.carafe_upsamplers.0" for n in range(3))
BILINEAR = dict(upsample=dict(init="bilinear"))
SMP = [
    LibraryModel(
        *("segmentation_models_pytorch", name, smp_model(name, depth), places, segmentation),
        arguments=BILINEAR if name in ("PAN", "DeepLabV3Plus", "PSPNet") else {},
        inputs=lambda number: torch.rand(number, 3, 128, 128),
    )
    for name, depth, places in (
        ("Unet", 3, BLOCKS),
        ("UnetPlusPlus", 3, tuple(f"decoder.blocks.x_{n}.carafe_upsamplers.0" for n in ("0_0", "0_1", "1_1", "0_2"))),
        ("MAnet", 3, BLOCKS),
        ("FPN", 5, tuple(f"decoder.p{n}.carafe_upsamplers.0" for n in (4, 3, 2))),
        (
            *("UPerNet", 4),
            (*calls("decoder", 0, 1), *(f"decoder.fpn_lateral_blocks.{n}.carafe_upsamplers.0" for n in range(2))),
        ),
        ("Segformer", 4, calls("decoder", 0, 1)),
        ("PAN", 5, (*calls("decoder.gau2", 0), *calls("decoder.gau1", 0), "segmentation_head.1")),
        ("DeepLabV3Plus", 5, ("decoder.up", "segmentation_head.1")),
        ("PSPNet", 3, ("segmentation_head.1",)),
    )
]


# ultralytics


def yolo(name: str, kind: str = "DetectionModel") -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from ultralytics.cfg import get_cfg
        from ultralytics.nn import tasks

        model = getattr(tasks, kind)(name, ch=3, nc=5, verbose=False)
        model.args, model.nc = get_cfg(), 5  # as the trainer does; losses read them
        return model

    return build


def yolo_from_yaml() -> nn.Module:
    from ultralytics.nn.tasks import yaml_model_load

    from carafe_plugin.models.ultralytics import register, with_carafe

    register()
    return yolo(with_carafe(yaml_model_load("yolo11n.yaml")))()


def yolo_loss(model: nn.Module) -> Tensor:
    boxes, labels, masks = scene()
    centres = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 128, (boxes[:, 2:] - boxes[:, :2]) / 64], 1)
    overlap = (masks * torch.tensor([1.0, 2.0])[:, None, None]).amax(0)[None, ::4, ::4].repeat(2, 1, 1)
    batch = dict(img=images(), batch_idx=torch.tensor([0, 0, 1, 1]), cls=labels.repeat(2)[:, None].float())
    loss, _ = model(dict(batch, bboxes=centres.repeat(2, 1), masks=overlap))
    return loss.sum()


class HeadInputs(nn.Module):
    """An ultralytics model without its head, which chooses the best of its queries: rounding may swap two of them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        *self.layers, self.head = model.model
        self.layers = nn.ModuleList(self.layers)
        self.train(model.training)

    def forward(self, image: Tensor) -> list[Tensor]:
        outputs = [image]
        for layer in self.layers:
            outputs.append(layer(self.given(layer, outputs)))
        return self.given(self.head, outputs)

    @staticmethod
    def given(layer: nn.Module, outputs: list[Tensor]) -> Any:
        *_, last = outputs
        sources = [layer.f] if isinstance(layer.f, int) else layer.f
        found = [last if source == -1 else outputs[source + 1] for source in sources]
        return found[0] if isinstance(layer.f, int) else found


ULTRALYTICS = [
    LibraryModel("ultralytics", "yolo11n", yolo("yolo11n.yaml"), ("model.11", "model.14"), yolo_loss),
    LibraryModel(
        *("ultralytics", "yolo11n-seg", yolo("yolo11n-seg.yaml", "SegmentationModel")),
        *(("model.11", "model.14", "model.23.proto.upsample"), yolo_loss),
    ),
    LibraryModel("ultralytics", "yolov8n", yolo("yolov8n.yaml"), ("model.10", "model.13"), yolo_loss),
    LibraryModel("ultralytics", "yolo11n, YAML", yolo_from_yaml, ("model.11", "model.14"), yolo_loss, arguments=None),
    LibraryModel(
        *("ultralytics", "yolov8n-rtdetr", yolo("yolov8n-rtdetr.yaml", "RTDETRDetectionModel")),
        *(("model.10", "model.13"), yolo_loss),
        part=HeadInputs,
        part_name="what the head is given",
    ),
]

MODELS = [*TORCHVISION, *TIMM, *TRANSFORMERS, *SMP, *ULTRALYTICS]


# Beside the table, for classes that none of its models has.


def coat() -> nn.Module:
    from timm.models.coat import CoaT

    widths = dict(embed_dims=(16, 32, 32, 32), serial_depths=(1, 1, 1, 1), num_heads=8, mlp_ratios=(2,) * 4)
    return CoaT(img_size=64, patch_size=4, parallel_depth=2, num_classes=5, **widths)


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


FUSED = [(16, n) for n in (1, 2, 3, 4)] + [(18, n) for n in (1, 2, 3)] + [(21, n) for n in (1, 2)] + [(24, 1)]
PROTO = calls("model.23.proto", 0, 1)
#: (library, model, side of an image, places), in which CARAFE++ starts as what was there.
OTHERS = [
    ("timm", coat, 64, calls("parallel_blocks.0", 0, 1, 2)),
    ("transformers", beit, 64, calls("decode_head", *range(6))),
    ("transformers", swin2sr, 32, calls("upsample", 0, 1)),
    ("ultralytics", yolo("yolov9e.yaml"), 64, tuple(f"model.{m}.carafe_upsamplers.{n}" for m, n in FUSED)),
    ("ultralytics", yolo("yolo26n-seg.yaml", "SegmentationModel"), 64, PROTO),
]
