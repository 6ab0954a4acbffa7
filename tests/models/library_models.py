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
        arguments (Mapping[str, Any]): of ``convert``, beside the model.
        inputs (Callable[[], Any]): of ``part``, by name where it is a mapping.
        part (Callable[[nn.Module], nn.Module]): what is compared, compiled and exported.
        part_name (str): what that is, where it is not the whole model.
        uncompiled, unexported (str): why the library's own model cannot be, which a test looks at.
    """

    library: str
    name: str
    build: Callable[[], nn.Module]
    places: tuple[str, ...]
    loss: Callable[[nn.Module], Tensor]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[], Any] = lambda: torch.rand(1, 3, 64, 64)
    part: Callable[[nn.Module], nn.Module] = whole
    part_name: str = ""
    uncompiled: str = ""
    unexported: str = ""

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
    scores = model(images())
    return F.cross_entropy(scores if isinstance(scores, Tensor) else scores["out"], label_maps())


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


BOXES = "torch.export: sizes depend on what is found"
DETECTOR = dict(library="torchvision", loss=detection, part=Maps, part_name="pyramid and maps of the heads")
FPN = calls("backbone.fpn", 0, 1, 2)
MASK = "roi_heads.mask_predictor.conv5_mask"
TORCHVISION = [
    LibraryModel(name="FasterRCNN", build=detector("FasterRCNN"), places=FPN, unexported=BOXES, **DETECTOR),
    LibraryModel(name="MaskRCNN", build=detector("MaskRCNN"), places=(*FPN, MASK), unexported=BOXES, **DETECTOR),
    LibraryModel(name="RetinaNet", build=detector("RetinaNet"), places=FPN, unexported=BOXES, **DETECTOR),
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


HRNET = ("2.0.0.1", "3.0.0.1", "3.0.0.2", "3.0.1.2", "4.0.0.1", "4.0.0.2", "4.0.0.3", "4.0.1.2", "4.0.1.3", "4.0.2.3")
TIMM = [
    *(
        LibraryModel("timm", f"{name}, features_only", timm_model(name, features_only=True), places, regression, down)
        for name, places, down in (
            ("resnet18", SEVEN["conv1"], DOWNSAMPLING),
            ("resnet50", SEVEN["conv2"], DOWNSAMPLING),
        )
    ),
    LibraryModel(
        *("timm", "resnet18d", timm_model("resnet18d", num_classes=5), SEVEN["conv1"], classification, DOWNSAMPLING)
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


def upernet(backbone: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers as t

        convnext = t.ConvNextConfig(hidden_sizes=[16, 32, 64, 128], depths=[1] * 4, out_features=OUT)
        config, width = (swin(), 96) if backbone == "Swin" else (convnext, 64)
        return t.UperNetForSemanticSegmentation(
            t.UperNetConfig(backbone_config=config, hidden_size=32, num_labels=5, auxiliary_in_channels=width)
        )

    return build


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


def named() -> dict[str, Tensor]:
    return dict(pixel_values=torch.rand(1, 3, 64, 64))


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


TRANSFORMERS = [
    *(
        LibraryModel("transformers", f"UperNet ({name})", upernet(name), calls("decode_head", *range(6)), on_label_maps)
        for name in ("ConvNext", "Swin")
    ),
    LibraryModel(
        *("transformers", "Mask2Former", mask2former, calls("model.pixel_level_module.decoder", 0), on_masks),
    ),
    LibraryModel(
        *("transformers", "MaskFormer", maskformer),
        tuple(f"model.pixel_level_module.decoder.fpn.layers.{n}.carafe_upsamplers.0" for n in range(3)),
        on_masks,
    ),
    LibraryModel("transformers", "DetrForSegmentation", detr, (), on_boxes),
    LibraryModel("transformers", "SegFormer", segformer, calls("decode_head", 1, 2, 3), on_label_maps),
    LibraryModel("transformers", "RT-DETR", rt_detr, calls("model.encoder", 0, 1), on_boxes),
    LibraryModel("transformers", "D-FINE", d_fine, calls("model.encoder", 0, 1), on_boxes),
]


# segmentation_models_pytorch


def smp_model(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import segmentation_models_pytorch as smp

        return getattr(smp, name)("resnet18", encoder_weights=None, classes=5)

    return build


BLOCKS = tuple(f"decoder.blocks.{n}.carafe_upsamplers.0" for n in range(5))
NESTED = ("0_0", "0_1", "1_1", "0_2", "1_2", "2_2", "0_3", "1_3", "2_3", "3_3", "0_4")
BILINEAR = dict(upsample=dict(init="bilinear"))
SMP_PLACES = {
    "Unet": BLOCKS,
    "UnetPlusPlus": tuple(f"decoder.blocks.x_{n}.carafe_upsamplers.0" for n in NESTED),
    "MAnet": BLOCKS,
    "FPN": tuple(f"decoder.p{n}.carafe_upsamplers.0" for n in (4, 3, 2)),
    "UPerNet": (
        *calls("decoder", 0, 1, 2),
        *(f"decoder.fpn_lateral_blocks.{n}.carafe_upsamplers.0" for n in range(3)),
    ),
    "Segformer": calls("decoder", 0, 1, 2),
    "PAN": (*calls("decoder.gau2", 0), *calls("decoder.gau1", 0), "segmentation_head.1"),
    "DeepLabV3Plus": ("decoder.up", "segmentation_head.1"),
    "PSPNet": ("segmentation_head.1",),
}
#: Of which convert() asks for an ``init``.
ALIGNED = ("PAN", "DeepLabV3Plus", "PSPNet")
SMP = [
    LibraryModel(
        *("segmentation_models_pytorch", name, smp_model(name), places, segmentation),
        arguments=BILINEAR if name in ALIGNED else {},
    )
    for name, places in SMP_PLACES.items()
]


# ultralytics


def yolo(name: str, kind: str = "DetectionModel") -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from ultralytics.cfg import get_cfg
        from ultralytics.nn import tasks

        model = getattr(tasks, kind)(name, ch=3, nc=5, verbose=False)
        model.args = get_cfg()  # as the trainer does; the loss reads them
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


ULTRALYTICS = [
    LibraryModel("ultralytics", "yolo11n", yolo("yolo11n.yaml"), ("model.11", "model.14"), yolo_loss),
    LibraryModel(
        *("ultralytics", "yolo11n-seg", yolo("yolo11n-seg.yaml", "SegmentationModel")),
        *(("model.11", "model.14", "model.23.proto.upsample"), yolo_loss),
    ),
    LibraryModel("ultralytics", "yolov8n", yolo("yolov8n.yaml"), ("model.10", "model.13"), yolo_loss),
    LibraryModel(
        *("ultralytics", "yolo26n-seg", yolo("yolo26n-seg.yaml", "SegmentationModel")),
        *(("model.11", "model.14"), yolo_loss),
    ),
    LibraryModel("ultralytics", "rtdetr-l", yolo("rtdetr-l.yaml", "RTDETRDetectionModel"), (), yolo_loss),
]

MODELS = [*TORCHVISION, *TIMM, *TRANSFORMERS, *SMP, *ULTRALYTICS]
