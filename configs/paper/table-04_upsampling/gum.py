_base_ = "../../mmdet/faster-rcnn_r50_carafe-fpn_1x_coco.py"

model = dict(neck=dict(carafe_cfg=dict(type="GUMUpsample")))
