# CARAFE++ in place of nearest interpolation in the FPN.
_base_ = "./mask-rcnn_r18_fpn_dsb2018.py"

model = dict(neck=dict(type="carafe_plugin.openmmlab.mmdet.CARAFEFPN"))
