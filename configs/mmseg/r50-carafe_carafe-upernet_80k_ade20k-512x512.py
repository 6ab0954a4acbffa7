_base_ = [
    __import__("mmseg").__path__[0] + "/.mim/configs/upernet/upernet_r50_4xb4-80k_ade20k-512x512.py",
    "./_base_/backbones.py",
]

model = dict(
    pretrained=None,  # the backbone says it
    backbone=_base_.carafe_resnetv1c50,
    decode_head=dict(type="carafe_plugin.openmmlab.mmseg.CARAFEUPerHead"),
)
