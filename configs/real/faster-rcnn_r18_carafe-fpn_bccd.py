# CARAFE++ in place of nearest interpolation in the FPN.
_base_ = "./faster-rcnn_r18_fpn_bccd.py"

model = dict(neck=dict(type="carafe_plugin.openmmlab.mmdet.CARAFEFPN"))
