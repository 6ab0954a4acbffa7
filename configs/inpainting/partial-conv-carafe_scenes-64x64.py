_base_ = "partial-conv_scenes-64x64.py"

# Compressed to a quarter of the channels, as in the large network, or the kernel prediction would outweigh the rest.
model = dict(generator=dict(carafe_cfg=dict(down=True, up=dict(compressed_channels=16))))
