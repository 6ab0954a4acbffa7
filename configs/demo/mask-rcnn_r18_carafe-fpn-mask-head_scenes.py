# CARAFE++ in place of nearest interpolation in the FPN and of the deconvolution in the mask head.
_base_ = "./mask-rcnn_r18_fpn_scenes.py"

model = dict(
    neck=dict(type="carafe_plugin.openmmlab.mmdet.CARAFEFPN"),
    roi_head=dict(mask_head=dict(type="carafe_plugin.openmmlab.mmdet.CARAFEFCNMaskHead")),
)
