# The ResNets with CARAFE++ of this folder, and the one place that says where their weights lie. README.md: how these
# files are made from what configs/mmpretrain trains, and how to start from stock weights instead.
carafe_resnet50 = dict(
    type="carafe_plugin.openmmlab.mmseg.CARAFEResNet",
    init_cfg=dict(type="Pretrained", checkpoint="checkpoints/mmseg/resnet50-carafe.pth"),
)
carafe_resnet101 = dict(
    type="carafe_plugin.openmmlab.mmseg.CARAFEResNet",
    depth=101,
    init_cfg=dict(type="Pretrained", checkpoint="checkpoints/mmseg/resnet101-carafe.pth"),
)
# MMSegmentation's own settings go with a deep stem.
carafe_resnetv1c50 = dict(
    type="carafe_plugin.openmmlab.mmseg.CARAFEResNetV1c",
    init_cfg=dict(type="Pretrained", checkpoint="checkpoints/mmseg/resnetv1c50-carafe.pth"),
)
carafe_resnetv1c101 = dict(
    type="carafe_plugin.openmmlab.mmseg.CARAFEResNetV1c",
    depth=101,
    init_cfg=dict(type="Pretrained", checkpoint="checkpoints/mmseg/resnetv1c101-carafe.pth"),
)
