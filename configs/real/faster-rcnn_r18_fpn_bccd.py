# The baseline on photographs of blood: nearest interpolation in the FPN.
_base_ = ["./_base_/models/mask-rcnn_r18_fpn.py", "./_base_/datasets/bccd.py"]

model = dict(
    type="FasterRCNN",
    roi_head=dict(bbox_head=dict(num_classes=3), mask_roi_extractor=None, mask_head=None),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=300)),
)

max_iters = 800  # thirty times through 205 images
train_cfg = dict(type="IterBasedTrainLoop", max_iters=max_iters, val_interval=200)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=50, by_epoch=False),
    dict(type="CosineAnnealingLR", begin=50, end=max_iters, eta_min_ratio=0.01, by_epoch=False),
]
