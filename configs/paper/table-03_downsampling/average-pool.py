_base_ = "../../mmdet/faster-rcnn_r50-carafe_fpn_1x_coco.py"

model = dict(
    backbone=dict(
        carafe_cfg=dict(type="AveragePoolDownsample"),
        init_cfg=dict(checkpoint="checkpoints/mmdet/resnet50-average-pool.pth"),  # from pretraining/average-pool.py
    )
)
