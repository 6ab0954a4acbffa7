# ImageNet-1k at the paper's schedule: 90 epochs, batches of 1024 (16 GPUs x 64), top-1 and top-5 of a 224 centre crop.
_base_ = ["mmpretrain::_base_/datasets/imagenet_bs64.py", "mmpretrain::_base_/default_runtime.py"]

# What the paper leaves to its reference (README.md): the linear rule's 0.1 per 256 images, reached in five epochs.
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.4, momentum=0.9, weight_decay=1e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.25, by_epoch=True, begin=0, end=5, convert_to_iter_based=True),
    dict(type="MultiStepLR", by_epoch=True, milestones=[30, 60, 80], gamma=0.1),
]
train_cfg = dict(by_epoch=True, max_epochs=90, val_interval=1)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(base_batch_size=1024)
