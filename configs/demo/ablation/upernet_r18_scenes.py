# The recipe of studies.ablation for the components of UperNet (Table 9): the demo's, shorter.
_base_ = "../upernet_r18_scenes.py"

max_iters = 200
train_cfg = dict(max_iters=max_iters)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=20, by_epoch=False),
    dict(type="CosineAnnealingLR", begin=20, end=max_iters, eta_min_ratio=0.01, by_epoch=False),
]
default_hooks = dict(checkpoint=dict(interval=40, max_keep_ckpts=1))
