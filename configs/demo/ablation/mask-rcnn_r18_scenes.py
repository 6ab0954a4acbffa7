# The recipe of studies.ablation for the tables with a mask head: the demo's Mask R-CNN on smaller scenes, for about
# three minutes on two CPU cores. studies.ablation puts each row's operators in, and the seed.
_base_ = "../mask-rcnn_r18_fpn_scenes.py"

data_root = "data/scenes-128/"
# Half the demo's batch and more steps: it learns more in the same time.
train_dataloader = dict(batch_size=4, dataset=dict(data_root=data_root))
test_dataloader = dict(dataset=dict(data_root=data_root))
test_evaluator = dict(ann_file=data_root + "annotations/instances_val.json")

max_iters = 320
train_cfg = dict(max_iters=max_iters)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=20, by_epoch=False),
    dict(type="CosineAnnealingLR", begin=20, end=max_iters, eta_min_ratio=0.01, by_epoch=False),
]
default_hooks = dict(checkpoint=dict(interval=40, max_keep_ckpts=1))
