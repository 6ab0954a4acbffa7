_base_ = "global-local_places365-256x256.py"

model = dict(generator=dict(carafe_cfg=dict(down=True, up=True)))
