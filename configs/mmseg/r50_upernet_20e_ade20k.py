# The paper's baseline at the paper's settings: every row of its Tables 8 and 9 starts from it.
_base_ = ["./_base_/upernet_r50.py", "./_base_/ade20k_20e.py"]

model = dict(
    # Images keep their shapes: a batch is padded to its own largest height and width, rounded up to 32; padding is
    # ignored in the labels.
    data_preprocessor=dict(size_divisor=32),
    pretrained=None,
    backbone=dict(type="ResNet", init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet50")),
    decode_head=dict(num_classes=150),
    auxiliary_head=None,  # the implementation that the paper follows has none
)

env_cfg = dict(cudnn_benchmark=False)  # hardly two batches have the same size
