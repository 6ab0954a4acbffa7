_base_ = ["./r50_upernet_20e_ade20k.py", "./_base_/backbones.py"]

model = dict(backbone=_base_.carafe_resnet50, decode_head=dict(type="carafe_plugin.openmmlab.mmseg.CARAFEUPerHead"))
