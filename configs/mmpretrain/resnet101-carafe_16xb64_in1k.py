_base_ = "./resnet50-carafe_16xb64_in1k.py"

model = dict(backbone=dict(depth=101))
