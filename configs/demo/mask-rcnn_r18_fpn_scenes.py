# Mask R-CNN small enough to be trained from scratch on two CPU cores in about five minutes.
# The data come from studies.demo.generate_scenes (160 x 160 images, six categories).
_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "mmdet::_base_/default_runtime.py"]

channels = 64  # of the pyramid and of every head

model = dict(
    backbone=dict(
        depth=18,
        frozen_stages=-1,  # from scratch: nothing may stay at its initial value,
        norm_eval=False,  # and the batch statistics have to be learnt
        # A residual branch that starts at zero grows by a learning rate per step: too slow for a few hundred steps.
        zero_init_residual=False,
        init_cfg=None,
    ),
    neck=dict(in_channels=[64, 128, 256, 512], out_channels=channels, norm_cfg=dict(type="BN")),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        anchor_generator=dict(scales=[4]),  # 16 pixels on the finest level: the figures are small
    ),
    roi_head=dict(
        # finest_scale: figures of 40 pixels and more are read from the second level
        bbox_roi_extractor=dict(out_channels=channels, finest_scale=20),
        # From scratch, convolutions with a norm learn faster than the parent's two fully connected layers.
        bbox_head=dict(
            type="ConvFCBBoxHead",
            num_shared_convs=2,
            num_shared_fcs=1,
            in_channels=channels,
            conv_out_channels=channels,
            fc_out_channels=256,
            norm_cfg=dict(type="BN"),
            num_classes=6,
        ),
        mask_roi_extractor=dict(out_channels=channels, finest_scale=20),
        mask_head=dict(in_channels=channels, conv_out_channels=channels, norm_cfg=dict(type="BN"), num_classes=6),
    ),
    train_cfg=dict(
        # ignore_iof_thr: what lies in a crowd is neither an object nor background.
        rpn=dict(assigner=dict(ignore_iof_thr=0.5), sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=dict(assigner=dict(ignore_iof_thr=0.5), sampler=dict(num=64)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=400, max_per_img=100), rcnn=dict(max_per_img=50)),
)

dataset_type = "CocoDataset"
data_root = "data/scenes/"
metainfo = dict(
    classes=("star", "ring", "cross", "crescent", "gear", "key"),
    palette=[(230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167)],
)

# Resize by 1 changes nothing; it writes the scale factor that the heads ask for.
resize = dict(type="Resize", scale_factor=1.0, keep_ratio=True)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    resize,
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    resize,
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]

train_dataloader = dict(
    batch_size=8,
    num_workers=0,  # a batch loads in 20 ms, and both cores are busy with training anyway
    persistent_workers=False,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type=dataset_type,
        metainfo=metainfo,
        data_root=data_root,
        ann_file="annotations/instances_train.json",
        data_prefix=dict(img="train/"),
        filter_cfg=dict(filter_empty_gt=False),  # scenes without objects teach what background looks like
        pipeline=train_pipeline,
    ),
)
test_dataloader = dict(
    batch_size=1,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type=dataset_type,
        metainfo=metainfo,
        data_root=data_root,
        ann_file="annotations/instances_val.json",
        data_prefix=dict(img="val/"),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_evaluator = dict(type="CocoMetric", ann_file=data_root + "annotations/instances_val.json", metric=["bbox", "segm"])

max_iters = 280  # almost four times through 600 scenes
train_cfg = dict(type="IterBasedTrainLoop", max_iters=max_iters)
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.01),
    # With thousands of inputs, the step that suits a convolution throws a fully connected layer about.
    paramwise_cfg=dict(custom_keys=dict(shared_fcs=dict(lr_mult=0.1))),
    clip_grad=dict(max_norm=10.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=20, by_epoch=False),
    dict(type="CosineAnnealingLR", begin=20, end=max_iters, eta_min_ratio=0.01, by_epoch=False),
]

default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=50, by_epoch=False, max_keep_ckpts=2))
log_processor = dict(window_size=10, by_epoch=False)
randomness = dict(seed=0)
