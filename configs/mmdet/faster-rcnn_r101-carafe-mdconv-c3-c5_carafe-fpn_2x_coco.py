_base_ = "./faster-rcnn_r101-carafe_carafe-fpn_2x_coco.py"

model = dict(
    backbone=dict(
        dcn=dict(type="DCNv2", deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, True, True, True),  # the paper's text to the letter: (True, True, True, False)
    )
)
