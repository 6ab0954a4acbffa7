# The ResNets with CARAFE++ of this folder, and the one place that says where their weights lie. README.md: how these
# files are made from what configs/mmpretrain trains, and how to start from MMDetection's own weights instead.
carafe_resnet50 = dict(
    type="carafe_plugin.openmmlab.mmdet.CARAFEResNet",
    carafe_cfg=dict(norm_eval=True),  # CARAFE++'s norms keep their statistics of ImageNet, as all norms here do
    init_cfg=dict(type="Pretrained", checkpoint="checkpoints/mmdet/resnet50-carafe.pth"),
)
carafe_resnet101 = dict(
    carafe_resnet50,
    depth=101,
    init_cfg=dict(type="Pretrained", checkpoint="checkpoints/mmdet/resnet101-carafe.pth"),
)
