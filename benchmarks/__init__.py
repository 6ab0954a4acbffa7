"""Commands that measure this package (`op`, `module`, `model`) and check it on a GPU (`gpu_check`), and their parts."""

import logging

# torch.utils.benchmark imports it, and it would warn on every machine that has a CUDA compiler and no GPU.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
