_base_ = ["mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", "./_base_/backbones.py"]

model = dict(backbone=_base_.carafe_resnet50, neck=dict(type="carafe_plugin.openmmlab.mmdet.CARAFEFPN"))
