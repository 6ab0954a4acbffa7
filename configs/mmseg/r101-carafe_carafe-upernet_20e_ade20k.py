_base_ = "./r50-carafe_carafe-upernet_20e_ade20k.py"

model = dict(backbone=_base_.carafe_resnet101)
