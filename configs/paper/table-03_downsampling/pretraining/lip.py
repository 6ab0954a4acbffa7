# As its paper places it: a network of one 3x3 convolution in the stem, bottlenecks in the stages, and a 1x1 convolution
# behind the pooling where there was a 3x3 with stride.
_base_ = "../../../mmpretrain/resnet50-carafe_16xb64_in1k.py"

model = dict(backbone=dict(carafe_cfg=dict(type="LIPDownsample", stem=dict(bottleneck=None), pointwise=True)))
