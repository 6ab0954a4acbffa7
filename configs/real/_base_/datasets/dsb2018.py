# The Data Science Bowl of 2018 as `tools/prepare_data.py dsb2018` lays it out: microscopy, 256 x 256 to 1388 x 1040,
# and one class. Kaggle's images for testing come without masks: val is tested on.
dataset_type = "CocoDataset"
data_root = "{{$CARAFE_DATA_ROOT:data}}/dsb2018/"
metainfo = dict(classes=("nucleus",), palette=[(230, 159, 0)])

# Resize by 1 changes nothing; it writes the scale factor that the heads ask for.
resize = dict(type="Resize", scale_factor=1.0, keep_ratio=True)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    resize,
    dict(type="RandomCrop", crop_size=(256, 256)),  # the smallest image
    dict(type="RandomFlip", prob=0.5, direction=["horizontal", "vertical"]),  # no way is up
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    resize,
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]

train_dataloader = dict(
    batch_size=4,
    num_workers=0,  # both cores are busy with training
    persistent_workers=False,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type=dataset_type,
        metainfo=metainfo,
        data_root=data_root,
        ann_file="annotations/instances_train.json",
        data_prefix=dict(img="train/"),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
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
test_dataloader = val_dataloader
val_evaluator = dict(type="CocoMetric", ann_file=data_root + "annotations/instances_val.json", metric=["bbox", "segm"])
test_evaluator = val_evaluator
