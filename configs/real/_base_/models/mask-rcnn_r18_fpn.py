# Mask R-CNN small enough for two CPU cores: ResNet-18, a pyramid and heads of 64 channels. It starts from scratch; the
# backbone has no init_cfg, for an option to give one:
#     --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=resnet18.pth
_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "mmdet::_base_/default_runtime.py"]

channels = 64  # of the pyramid and of every head

model = dict(
    backbone=dict(
        _delete_=True,
        type="ResNet",
        depth=18,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        norm_cfg=dict(type="BN", requires_grad=True),
        norm_eval=False,  # from scratch, the batch statistics have to be learnt
        # A residual branch that starts at zero grows by a learning rate per step: too slow for a short schedule.
        zero_init_residual=False,
        style="pytorch",
    ),
    neck=dict(in_channels=[64, 128, 256, 512], out_channels=channels, norm_cfg=dict(type="BN")),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        anchor_generator=dict(scales=[4]),  # 16 pixels on the finest level: cells are small
    ),
    roi_head=dict(
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
        ),
        mask_roi_extractor=dict(out_channels=channels, finest_scale=20),
        mask_head=dict(in_channels=channels, conv_out_channels=channels, norm_cfg=dict(type="BN")),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=500, max_per_img=300),
        rcnn=dict(sampler=dict(num=64)),
    ),
)

# With thousands of inputs, the step that suits a convolution throws a fully connected layer about.
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.01),
    paramwise_cfg=dict(custom_keys=dict(shared_fcs=dict(lr_mult=0.1))),
    clip_grad=dict(max_norm=10.0),
)
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=100, by_epoch=False, max_keep_ckpts=2))
log_processor = dict(window_size=20, by_epoch=False)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
randomness = dict(seed=0)
