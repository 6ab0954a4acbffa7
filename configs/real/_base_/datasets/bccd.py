# BCCD as `tools/prepare_data.py bccd` lays it out: 205, 87 and 72 photographs of blood, 640 x 480, read at half size.
dataset_type = "CocoDataset"
data_root = "{{$CARAFE_DATA_ROOT:data}}/bccd/"
metainfo = dict(classes=("RBC", "WBC", "Platelets"), palette=[(213, 94, 0), (86, 180, 233), (240, 228, 66)])

resize = dict(type="Resize", scale=(320, 240), keep_ratio=True)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    resize,
    dict(type="RandomFlip", prob=0.5, direction=["horizontal", "vertical"]),  # no way is up
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    resize,
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]

train_dataloader = dict(
    batch_size=8,
    num_workers=0,  # both cores are busy with training
    persistent_workers=False,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type=dataset_type,
        metainfo=metainfo,
        data_root=data_root,
        ann_file="annotations/instances_train.json",
        data_prefix=dict(img="images/"),
        filter_cfg=dict(filter_empty_gt=False),  # what background looks like
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
        data_prefix=dict(img="images/"),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = dict(
    val_dataloader, dataset=dict(val_dataloader["dataset"], ann_file="annotations/instances_test.json")
)
val_evaluator = dict(type="CocoMetric", ann_file=data_root + "annotations/instances_val.json", metric="bbox")
test_evaluator = dict(type="CocoMetric", ann_file=data_root + "annotations/instances_test.json", metric="bbox")
