"""Whether this machine's CUDA toolkit must have led to a CUDA half, found independently of setup.py."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import torch


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
