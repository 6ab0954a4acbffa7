# The baseline on microscopy: nearest interpolation in the FPN, a deconvolution in the mask head.
_base_ = ["./_base_/models/mask-rcnn_r18_fpn.py", "./_base_/datasets/dsb2018.py"]

model = dict(
    roi_head=dict(bbox_head=dict(num_classes=1), mask_head=dict(num_classes=1)),
    # An image has up to 375 nuclei.
    test_cfg=dict(rpn=dict(nms_pre=1000, max_per_img=1000), rcnn=dict(max_per_img=500)),
)

max_iters = 1200  # more than nine times through 505 images
train_cfg = dict(type="IterBasedTrainLoop", max_iters=max_iters, val_interval=600)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=50, by_epoch=False),
    dict(type="CosineAnnealingLR", begin=50, end=max_iters, eta_min_ratio=0.01, by_epoch=False),
]
