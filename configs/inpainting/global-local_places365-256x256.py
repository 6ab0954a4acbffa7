_base_ = "_base_/inpainting.py"
