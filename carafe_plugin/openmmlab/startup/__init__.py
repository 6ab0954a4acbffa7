"""What a process of a run with :mod:`carafe_plugin.openmmlab.mmcv_ops` starts with."""
