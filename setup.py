"""Builds the extension; everything else about the package is in pyproject.toml.

``carafe_plugin._C`` (CPU, schemas) and ``carafe_plugin._C_cuda`` use LibTorch's stable ABI: one CPU binary serves every
torch from 2.10 and every Python from 3.10 on. Environment:

CARAFE_CUDA           1 requires the CUDA half, 0 leaves it out; by default it is built where a CUDA toolkit of torch's
                      major version is found (CUDA_HOME), GPU or not.
TORCH_CUDA_ARCH_LIST  the GPU architectures, "8.0;9.0+PTX" by default.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings

from setuptools import setup

OLDEST_TORCH = (2, 10)
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10
PYTHON_ABI = "-DPy_LIMITED_API=0x030a0000"  # Python 3.10


def torch_version() -> tuple[int, ...] | None:
    try:
        import torch
    except ImportError:
        return None
    return tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])


def find_cuda_home() -> str | None:
    """The root of a CUDA toolkit that can compile and link: an nvcc on the PATH may be a link into another folder."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc is not None:
        candidates[1:1] = [os.path.dirname(os.path.dirname(path)) for path in (os.path.realpath(nvcc), nvcc)]
    for root in filter(None, candidates):
        libraries = (
            os.path.join(root, folder, "libcudart.so") for folder in ("lib64", "lib", "targets/x86_64-linux/lib")
        )
        if os.path.exists(os.path.join(root, "bin", "nvcc")) and any(map(os.path.exists, libraries)):
            return root
    return None


def toolkit_major(cuda_home: str | None) -> int | None:
    """Major version of the CUDA toolkit, or None where there is none that runs."""
    if cuda_home is None:
        return None
    try:
        output = subprocess.check_output([os.path.join(cuda_home, "bin", "nvcc"), "--version"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    release = re.search(r"release (\d+)\.", output)
    return int(release.group(1)) if release else None


def wants_cuda() -> bool:
    import torch

    choice = os.environ.get("CARAFE_CUDA", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"CARAFE_CUDA must be 0 or 1, got {choice!r}")
    if choice == "0":
        return False
    cuda_home = find_cuda_home()
    toolkit = toolkit_major(cuda_home)
    wanted = int(torch.version.cuda.split(".")[0]) if torch.version.cuda else None
    if toolkit is not None and toolkit == wanted:
        os.environ["CUDA_HOME"] = cuda_home  # torch's own guess would be the folder above nvcc's link
        return True
    reason = f"CUDA toolkit {toolkit or 'not found'} (CUDA_HOME={cuda_home}), torch built for CUDA {wanted}"
    if choice == "1":
        sys.exit(f"CARAFE_CUDA=1, but the CUDA half cannot be built: {reason}")
    if toolkit is not None:
        warnings.warn(f"building the CPU half only: {reason}", stacklevel=1)
    return False


def extensions() -> dict:
    version = torch_version()
    if version is None or version < OLDEST_TORCH:
        found = "none" if version is None else ".".join(map(str, version))
        print(f"carafe_plugin: no extension, the PyTorch reference serves (needs torch >= 2.10, found {found})")
        return {}
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        print("carafe_plugin: no extension, the PyTorch reference serves (no C++ compiler; CXX names another one)")
        return {}
    with_cuda = wants_cuda()  # sets CUDA_HOME, which torch reads at import
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    # Messages name files as they are called here, not where they lay on the building machine.
    folders = {os.path.dirname(os.path.abspath(__file__)): "", os.path.dirname(torch.__file__): "torch/"}
    prefixes = [f"-ffile-prefix-map={folder}/={name}" for folder, name in folders.items()]
    # -std=c++17 alone would forbid fused multiply-adds, half of the arithmetic rate.
    cxx = [
        *prefixes,
        "-O3",
        "-std=c++17",
        "-ffp-contract=fast",
        "-Wall",
        "-Wno-psabi",
        "-fvisibility=hidden",
        STABLE_ABI,
        PYTHON_ABI,
    ]
    modules = [
        CppExtension(
            "carafe_plugin._C",
            ["csrc/registration.cpp", "csrc/cpu/carafe.cpp"],
            extra_compile_args={"cxx": cxx},
            py_limited_api=True,
        )
    ]
    if with_cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
        nvcc = ["-O3", "-std=c++17", "-DUSE_CUDA", "-Xptxas=-v", STABLE_ABI, PYTHON_ABI]
        nvcc += [f"-Xcompiler={prefix}" for prefix in prefixes]
        modules.append(
            CUDAExtension(
                "carafe_plugin._C_cuda",
                ["csrc/cuda/carafe.cu"],
                extra_compile_args={"cxx": cxx, "nvcc": nvcc},
                py_limited_api=True,
            )
        )
    return {
        "ext_modules": modules,
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extensions())
