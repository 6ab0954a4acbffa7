_base_ = "./r50_upernet_20e_ade20k.py"

model = dict(backbone=dict(depth=101, init_cfg=dict(checkpoint="torchvision://resnet101")))
