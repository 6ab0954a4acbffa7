# CARAFE++ in all four places: the backbone, and in the head the pyramid pooling, the top-down path and the fusion.
_base_ = "./upernet_r18_scenes.py"

model = dict(
    backbone=dict(type="carafe_plugin.openmmlab.mmseg.CARAFEResNet"),
    decode_head=dict(type="carafe_plugin.openmmlab.mmseg.CARAFEUPerHead"),
)
