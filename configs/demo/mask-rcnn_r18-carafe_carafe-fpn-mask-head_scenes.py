# CARAFE++ in the backbone too, in place of max pooling and of the strides: in all three places.
_base_ = "./mask-rcnn_r18_carafe-fpn-mask-head_scenes.py"

model = dict(backbone=dict(type="carafe_plugin.openmmlab.mmdet.CARAFEResNet"))
