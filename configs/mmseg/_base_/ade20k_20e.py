# ADE20k at the paper's settings (Sec. 5.1): 8 GPUs x 2 images; README.md says where each comes from.
_base_ = __import__("mmseg").__path__[0] + "/.mim/configs/_base_/datasets/ade20k.py"  # as in upernet_r50.py

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(
        type="RandomChoiceResize",
        scales=[300, 375, 450, 525, 600],
        resize_type="ResizeShortestEdge",
        max_size=1200,
    ),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="ResizeShortestEdge", scale=450, max_size=1200),
    dict(type="LoadAnnotations", reduce_zero_label=True),  # after resizing: scored at the image's own size
    dict(type="PackSegInputs"),
]
train_dataloader = dict(batch_size=2, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

epoch = 5000  # iterations
max_iters = 20 * epoch
optim_wrapper = dict(
    type="OptimWrapper", optimizer=dict(type="SGD", lr=0.02, momentum=0.9, weight_decay=1e-4), clip_grad=None
)
param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=0.0, begin=0, end=max_iters, by_epoch=False)]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=max_iters, val_interval=epoch)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=epoch),
    visualization=dict(type="SegVisualizationHook"),
)
