# CARAFE++ in the mask head too, in place of its deconvolution.
_base_ = "./mask-rcnn_r18_carafe-fpn_dsb2018.py"

model = dict(roi_head=dict(mask_head=dict(type="carafe_plugin.openmmlab.mmdet.CARAFEFCNMaskHead")))
