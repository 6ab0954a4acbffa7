"""What all four rows of Table 10 share: data, optimisers and schedule (Sec. 5.1)."""

default_scope = "mmengine"
custom_imports = dict(imports=["carafe_plugin.inpainting"], allow_failed_imports=False)

model = dict(
    type="InpaintingGAN",
    data_preprocessor=dict(type="InpaintingPreprocessor"),
    generator=dict(type="InpaintingGenerator", base_channels=64, norm=True),
    discriminator=dict(type="PatchDiscriminator", base_channels=64, strided=3),
)

# Places365-Standard: data_large/ has the training images in folders by scene, val_256/ the 36,500 of val.
data_root = "data/places365/"
train_dataloader = dict(
    batch_size=32,
    num_workers=8,
    persistent_workers=True,
    sampler=dict(type="DrawSampler"),
    dataset=dict(type="InpaintingFolder", data_root=data_root, data_prefix="data_large", size=256),
)
val_dataloader = dict(
    batch_size=32,
    num_workers=8,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="InpaintingFolder", data_root=data_root, data_prefix="val_256", size=256, test_mode=True),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="InpaintingMetric")
test_evaluator = val_evaluator

adam = dict(optimizer=dict(type="Adam", lr=1e-4, betas=(0.5, 0.9)))
optim_wrapper = dict(constructor="PerNetworkOptimWrapperConstructor", generator=adam, discriminator=adam)

max_iters = 500_000
train_cfg = dict(type="IterBasedTrainLoop", max_iters=max_iters, val_interval=50_000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

# Each network is a distributed module of its own where there are several processes.
model_wrapper_cfg = dict(type="PerNetworkDistributedDataParallel", broadcast_buffers=False)
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=100),
    checkpoint=dict(type="CheckpointHook", interval=10_000, by_epoch=False, max_keep_ckpts=2),
)
custom_hooks = [dict(type="ExactResumeHook")]
log_processor = dict(window_size=100, by_epoch=False)
randomness = dict(seed=0)
