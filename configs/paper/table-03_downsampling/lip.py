_base_ = "../../mmdet/faster-rcnn_r50-carafe_fpn_1x_coco.py"

model = dict(
    backbone=dict(
        carafe_cfg=dict(type="LIPDownsample", stem=dict(bottleneck=None), pointwise=True),
        init_cfg=dict(checkpoint="checkpoints/mmdet/resnet50-lip.pth"),  # from pretraining/lip.py
    )
)
