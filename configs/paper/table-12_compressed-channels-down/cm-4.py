_base_ = "../../mmpretrain/resnet50-carafe_16xb64_in1k.py"

model = dict(backbone=dict(carafe_cfg=dict(compressed_channels=4)))
