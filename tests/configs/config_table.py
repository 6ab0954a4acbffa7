"""Every configuration in configs/ and the names of the CARAFE++ modules that its model must have."""

from pathlib import Path

CONFIGS = Path(__file__).parents[2] / "configs"


def resnet(convolution):
    """The seven of a ResNet: the stem's, and in three stages that of the convolution and that of the shortcut."""
    places = [f"layer{i}.0.{layer}.downsampler" for i in (2, 3, 4) for layer in (convolution, "downsample.0")]
    return [f"backbone.{place}" for place in ("maxpool", *places)]


BOTTLENECKS, BASIC_BLOCKS = resnet("conv2"), resnet("conv1")
FPN = [f"neck.upsample_modules.{i}" for i in range(3)]
MASK_HEAD = ["roi_head.mask_head.upsample"]
PPM = [f"decode_head.ppm_upsamplers.{i}" for i in range(4)]
TOP_DOWN = [f"decode_head.upsample_modules.{i}" for i in range(3)]
FUSE = [f"decode_head.fuse_upsamplers.{i}" for i in range(3)]
UPERNET = PPM + TOP_DOWN + FUSE

MODULES = {
    "demo/mask-rcnn_r18_fpn_scenes": [],
    "demo/mask-rcnn_r18_carafe-fpn-mask-head_scenes": FPN + MASK_HEAD,
    "demo/mask-rcnn_r18-carafe_carafe-fpn-mask-head_scenes": BASIC_BLOCKS + FPN + MASK_HEAD,
    "demo/upernet_r18_scenes": [],
    "demo/upernet_r18-carafe_carafe-upernet_scenes": BASIC_BLOCKS + UPERNET,
    "mmdet/faster-rcnn_r50_carafe-fpn_1x_coco": FPN,
    "mmdet/faster-rcnn_r50-carafe_fpn_1x_coco": BOTTLENECKS,
    "mmdet/faster-rcnn_r50-carafe_carafe-fpn_1x_coco": BOTTLENECKS + FPN,
    "mmdet/faster-rcnn_r101-carafe_carafe-fpn_2x_coco": BOTTLENECKS + FPN,
    "mmdet/faster-rcnn_r101-carafe-mdconv-c3-c5_carafe-fpn_2x_coco": BOTTLENECKS + FPN,
    "mmdet/mask-rcnn_r50_carafe-fpn_1x_coco": FPN,
    "mmdet/mask-rcnn_r50_fpn_carafe-mask-head_1x_coco": MASK_HEAD,
    "mmdet/mask-rcnn_r50_carafe-fpn_carafe-mask-head_1x_coco": FPN + MASK_HEAD,
    "mmdet/mask-rcnn_r50-carafe_fpn_1x_coco": BOTTLENECKS,
    "mmdet/mask-rcnn_r50-carafe_carafe-fpn_carafe-mask-head_1x_coco": BOTTLENECKS + FPN + MASK_HEAD,
    "mmdet/mask-rcnn_r101-carafe_carafe-fpn_carafe-mask-head_2x_coco": BOTTLENECKS + FPN + MASK_HEAD,
    "mmdet/mask-rcnn_r101-carafe-mdconv-c3-c5_carafe-fpn_carafe-mask-head_2x_coco": BOTTLENECKS + FPN + MASK_HEAD,
    "mmpretrain/resnet50-carafe_16xb64_in1k": BOTTLENECKS,
    "mmpretrain/resnet101-carafe_16xb64_in1k": BOTTLENECKS,
    "mmpretrain/resnetv1c50-carafe_16xb64_in1k": BOTTLENECKS,
    "mmpretrain/resnetv1c101-carafe_16xb64_in1k": BOTTLENECKS,
    "mmseg/r50_upernet_20e_ade20k": [],
    "mmseg/r50_carafe-upernet-ppm_20e_ade20k": PPM,
    "mmseg/r50_carafe-upernet-fpn_20e_ade20k": TOP_DOWN,
    "mmseg/r50_carafe-upernet-fuse_20e_ade20k": FUSE,
    "mmseg/r50_carafe-upernet-ppm-fpn_20e_ade20k": PPM + TOP_DOWN,
    "mmseg/r50_carafe-upernet-ppm-fuse_20e_ade20k": PPM + FUSE,
    "mmseg/r50_carafe-upernet-fpn-fuse_20e_ade20k": TOP_DOWN + FUSE,
    "mmseg/r50_carafe-upernet_20e_ade20k": UPERNET,
    "mmseg/r50-carafe_upernet_20e_ade20k": BOTTLENECKS,
    "mmseg/r50-carafe_carafe-upernet_20e_ade20k": BOTTLENECKS + UPERNET,
    "mmseg/r50-carafe_carafe-upernet_80k_ade20k-512x512": BOTTLENECKS + UPERNET,
    "mmseg/r50-carafe_carafe-upernet_160k_ade20k-512x512": BOTTLENECKS + UPERNET,
    "mmseg/r101_upernet_20e_ade20k": [],
    "mmseg/r101-carafe_carafe-upernet_20e_ade20k": BOTTLENECKS + UPERNET,
    "mmseg/r101-carafe_carafe-upernet_80k_ade20k-512x512": BOTTLENECKS + UPERNET,
    "mmseg/r101-carafe_carafe-upernet_160k_ade20k-512x512": BOTTLENECKS + UPERNET,
    "real/upernet_mobilenetv2_camvid": [],
    "real/upernet_r18_camvid": [],
    "real/upernet_r18_carafe-upernet_camvid": UPERNET,
    "real/mask-rcnn_r18_fpn_dsb2018": [],
    "real/mask-rcnn_r18_carafe-fpn_dsb2018": FPN,
    "real/mask-rcnn_r18_carafe-fpn_carafe-mask-head_dsb2018": FPN + MASK_HEAD,
    "real/faster-rcnn_r18_fpn_bccd": [],
    "real/faster-rcnn_r18_carafe-fpn_bccd": FPN,
}


def in_folder(folder):
    """The configurations of one folder, without it: {name: modules}."""
    return {path.partition("/")[2]: modules for path, modules in MODULES.items() if path.startswith(f"{folder}/")}
