# The baseline with DCNv2 in the last three stages (configs/mmdet/README.md says why these).
_base_ = "mmdet::faster_rcnn/faster-rcnn_r101_fpn_2x_coco.py"

model = dict(
    backbone=dict(
        dcn=dict(type="DCNv2", deform_groups=1, fallback_on_stride=False), stage_with_dcn=(False, True, True, True)
    )
)
