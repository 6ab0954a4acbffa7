_base_ = "global-local_scenes-64x64.py"

model = dict(generator=dict(partial=True))
