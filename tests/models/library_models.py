"""Models of five libraries: built small and without weights, converted, and what is then done with them.

What a library's file in ``carafe_plugin/models`` says of its models is checked on these.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from library_model import (
    DOWNSAMPLING,
    SEVEN,
    LibraryModel,
    calls,
    classification,
    images,
    regression,
    scene,
    segmentation,
)
from torch import Tensor, nn
from transformers_models import TRANSFORMERS, beit, swin2sr

# torchvision


def pyramid() -> nn.Module:
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    norm = dict(norm_layer=nn.BatchNorm2d, trainable_layers=5)
    return resnet_fpn_backbone(backbone_name="resnet18", weights=None, **norm)


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
