_base_ = "../../mmdet/mask-rcnn_r50_fpn_carafe-mask-head_1x_coco.py"

model = dict(roi_head=dict(mask_head=dict(carafe_cfg=dict(type="SpatialAttentionUpsample"))))
