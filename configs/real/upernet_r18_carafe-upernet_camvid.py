# CARAFE++ in all three places of the head: pyramid pooling, top-down path and fusion.
_base_ = "./upernet_r18_camvid.py"

model = dict(decode_head=dict(type="carafe_plugin.openmmlab.mmseg.CARAFEUPerHead"))
