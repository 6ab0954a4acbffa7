"""What a test can expect of this machine's CUDA toolkit, found independently of setup.py, and of this torch."""

import functools
import os
import re
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import torch

from carafe_plugin._require import major_minor

TORCH = major_minor(torch.__version__)


def reason_for_no_cuda_half():
    """Why the build has no CUDA half, or None where it must have one."""
    if torch.version.cuda is None:
        return "torch is a CPU-only build"
    if os.environ.get("CARAFE_CUDA") == "0":
        return "CARAFE_CUDA=0"
    places = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    compilers = [shutil.which("nvcc"), *(str(Path(place) / "bin" / "nvcc") for place in places)]
    for nvcc in compilers:
        if nvcc and Path(nvcc).exists():
            output = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
            release = re.search(r"release (\d+)\.", output)
            if release and release.group(1) == torch.version.cuda.split(".")[0]:
                return None
    return f"no CUDA toolkit of the major version of torch's CUDA {torch.version.cuda} was found"


def needs_torch(major, minor, what):
    """Skips a test of what this torch does not have."""
    reason = f"{what}: from torch {major}.{minor} on, this is {torch.__version__}"
    return pytest.mark.skipif((major, minor) > TORCH, reason=reason)


@functools.cache
def has_half_on_cpu():
    """Whether torch itself has the arithmetic of a module in float16 on a CPU, autocast included."""
    one = torch.ones(1, 1, 1, 1, dtype=torch.float16)
    try:
        torch.nn.functional.conv2d(one, one).softmax(1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.autocast("cpu", dtype=torch.float16)
    except (RuntimeError, UserWarning):
        return False
    return True


def skip_without_half_on_cpu(*dtypes, device="cpu"):
    if torch.float16 in dtypes and torch.device(device).type == "cpu" and not has_half_on_cpu():
        pytest.skip(f"torch {torch.__version__} itself has no float16 on a CPU")


needs_opcheck = needs_torch(2, 4, "torch.library.opcheck")
needs_compile = needs_torch(2, 4, "torch.compile of these operators without a graph break")
