_base_ = "./r50_upernet_20e_ade20k.py"

model = dict(
    decode_head=dict(
        type="carafe_plugin.openmmlab.mmseg.CARAFEUPerHead", carafe_cfg=dict(ppm=False, fpn=True, fuse=True)
    )
)
