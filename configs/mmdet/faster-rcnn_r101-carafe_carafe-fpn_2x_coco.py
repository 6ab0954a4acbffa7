_base_ = ["mmdet::faster_rcnn/faster-rcnn_r101_fpn_2x_coco.py", "./_base_/backbones.py"]

model = dict(backbone=_base_.carafe_resnet101, neck=dict(type="carafe_plugin.openmmlab.mmdet.CARAFEFPN"))
