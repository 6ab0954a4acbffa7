_base_ = ["mmpretrain::_base_/models/resnetv1c50.py", "./_base_/imagenet_90e.py"]

model = dict(backbone=dict(type="carafe_plugin.openmmlab.mmpretrain.CARAFEResNetV1c"))
