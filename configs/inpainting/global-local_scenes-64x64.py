"""Global&Local at a size that two CPU cores train in minutes, on the scenes of ``make demo-inpaint``."""

_base_ = "_base_/inpainting.py"

model = dict(
    # The bottleneck is 16 x 16 here: with the 8 and 16 of the large network most taps would lie outside of it.
    generator=dict(base_channels=16, dilations=(1, 2, 4, 4)),
    discriminator=dict(base_channels=16, strided=2),
)

data_root = "data/scenes-images/"
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root=data_root, data_prefix="train", size=64),
)
val_dataloader = dict(batch_size=8, num_workers=0, dataset=dict(data_root=data_root, data_prefix="val", size=64))
test_dataloader = val_dataloader

# Ten times the paper's learning rate, for a few hundred steps instead of hundreds of thousands.
adam = dict(optimizer=dict(lr=1e-3))
optim_wrapper = dict(generator=adam, discriminator=adam)

train_cfg = dict(max_iters=700, val_interval=10_000)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=100))
log_processor = dict(window_size=10)
