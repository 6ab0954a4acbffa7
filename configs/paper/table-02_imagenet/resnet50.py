_base_ = ["mmpretrain::_base_/models/resnet50.py", "../../mmpretrain/_base_/imagenet_90e.py"]
