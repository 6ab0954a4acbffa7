# MMSegmentation's UperNet, found by the toolbox's import name: MMEngine's "mmseg::" asks for a distribution that is
# called mmsegmentation, and the successor that imports under the same name is called otherwise.
_base_ = [
    __import__("mmseg").__path__[0] + "/.mim/configs/_base_/models/upernet_r50.py",
    __import__("mmseg").__path__[0] + "/.mim/configs/_base_/default_runtime.py",
]
