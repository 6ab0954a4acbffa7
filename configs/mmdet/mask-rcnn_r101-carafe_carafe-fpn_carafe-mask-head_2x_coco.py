_base_ = ["mmdet::mask_rcnn/mask-rcnn_r101_fpn_2x_coco.py", "./_base_/backbones.py"]

model = dict(
    backbone=_base_.carafe_resnet101,
    neck=dict(type="carafe_plugin.openmmlab.mmdet.CARAFEFPN"),
    roi_head=dict(mask_head=dict(type="carafe_plugin.openmmlab.mmdet.CARAFEFCNMaskHead")),
)
