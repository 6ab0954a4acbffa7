_base_ = "./r50-carafe_carafe-upernet_160k_ade20k-512x512.py"

model = dict(backbone=_base_.carafe_resnetv1c101)
