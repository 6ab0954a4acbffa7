_base_ = "_base_/inpainting.py"

model = dict(generator=dict(partial=True))
