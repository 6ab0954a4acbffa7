"""Builds the extension; everything else about the package is in pyproject.toml.

``carafe_plugin._C`` (CPU, schemas) and ``carafe_plugin._C_cuda`` use LibTorch's stable ABI: one CPU binary serves every
torch from 2.10 on and every Python from 3.10 on. Environment:

CXX                   the C++ compiler, by default c++; several words are allowed, such as "ccache g++".
CARAFE_CUDA           1 requires the CUDA half, 0 leaves it out; by default it is built where a CUDA toolkit of torch's
                      major version is found (CUDA_HOME), GPU or not.
TORCH_CUDA_ARCH_LIST  the GPU architectures, by default Ampere and Hopper, and Blackwell where the toolkit knows it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import warnings

from setuptools import setup
from setuptools.command.build_py import build_py

OLDEST_TORCH = (2, 10)
BLACKWELL_TOOLKIT = (12, 8)  # the first that compiles for it
# The binary interface of torch 2.10; that of Python 3.10 comes with py_limited_api.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"


def reason_for_no_extension() -> str | None:
    """What the extension lacks that the system may well do without; a CXX that does not exist is an error."""
    try:
        import torch
    except ImportError:
        return "needs torch >= 2.10, found none"
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < OLDEST_TORCH:
        return f"needs torch >= 2.10, found {torch.__version__}"
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(compiler[0]) is None:
        if os.environ.get("CXX"):
            sys.exit(f"CXX={os.environ['CXX']}: there is no command {compiler[0]!r}")
        return "no C++ compiler found; set CXX to name one"
    if len(compiler) > 1 and not compiler[1].startswith("-"):
        os.environ.setdefault("TORCH_DONT_CHECK_COMPILER_ABI", "1")  # torch would ask ccache for g++'s version
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    return None if os.path.exists(header) else f"no {header}"


def find_toolkit() -> tuple[str, tuple[int, int]] | None:
    """Root and version of a CUDA toolkit that can compile and link: nvcc on the PATH may be a link to elsewhere."""
    nvcc = shutil.which("nvcc")
    roots = [os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")]
    roots += [os.path.dirname(os.path.dirname(path)) for path in (os.path.realpath(nvcc), nvcc)] if nvcc else []
    for root in filter(None, [*roots, "/usr/local/cuda"]):
        folders = (os.path.join(root, folder) for folder in ("lib64", "lib", "targets/x86_64-linux/lib"))
        if not any(os.path.exists(os.path.join(folder, "libcudart.so")) for folder in folders):
            continue
        try:
            output = subprocess.check_output([os.path.join(root, "bin", "nvcc"), "--version"], text=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        if release := re.search(r"release (\d+)\.(\d+)", output):
            return root, (int(release[1]), int(release[2]))
    return None


def wants_cuda() -> bool:
    """Whether the CUDA half is built; if so, sets what torch's builder reads from the environment."""
    import torch

    choice = os.environ.get("CARAFE_CUDA", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"CARAFE_CUDA must be 0 or 1, got {choice!r}")
    if choice == "0":
        return False
    root, version = find_toolkit() or (None, None)
    wanted = int(torch.version.cuda.split(".")[0]) if torch.version.cuda else None
    if version and version[0] == wanted:
        os.environ["CUDA_HOME"] = root  # torch's own guess would be the folder above nvcc's link
        architectures = "8.0;9.0;10.0+PTX" if version >= BLACKWELL_TOOLKIT else "8.0;9.0+PTX"
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures)
        return True
    toolkit = f"{version[0]} ({root})" if version else "not found"
    reason = f"CUDA toolkit {toolkit}, torch built for CUDA {wanted}"
    if choice == "1":
        sys.exit(f"CARAFE_CUDA=1, but the CUDA half cannot be built: {reason}")
    if version:
        warnings.warn(f"building the CPU half only: {reason}", stacklevel=1)
    return False


class BuildPackage(build_py):
    """Puts the model index beside the configs that it names, where mim looks for an installed package's."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.copy_file("model-index.yml", os.path.join(self.build_lib, "carafe_plugin", "model-index.yml"))


def extensions() -> dict:
    if reason := reason_for_no_extension():
        print(f"carafe_plugin: no extension, the PyTorch reference serves ({reason})")
        return {"cmdclass": {"build_py": BuildPackage}}
    with_cuda = wants_cuda()  # before the import: torch reads CUDA_HOME there
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    # Messages name files as they are called here, not where they lay on the building machine.
    folders = {os.path.dirname(os.path.abspath(__file__)): "", os.path.dirname(torch.__file__): "torch/"}
    prefixes = [f"-ffile-prefix-map={folder}/={name}" for folder, name in folders.items()]
    common = ["-O3", "-std=c++17", STABLE_ABI]
    # -std=c++17 alone would forbid fused multiply-adds, half of the arithmetic rate.
    cxx = [*common, *prefixes, "-ffp-contract=fast", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
    nvcc = [*common, "-DUSE_CUDA", "--threads=0", *(f"-Xcompiler={prefix}" for prefix in prefixes)]
    nvcc.append(f"-DCARAFE_PTX={int('+PTX' in os.environ.get('TORCH_CUDA_ARCH_LIST', ''))}")
    sources = ["csrc/registration.cpp", *(f"csrc/cpu/{name}.cpp" for name in ("carafe", "baseline", "avx2", "avx512"))]
    options = {"extra_compile_args": {"cxx": cxx, "nvcc": nvcc}, "py_limited_api": True}
    modules = [CppExtension("carafe_plugin._C", sources, **options)]
    if with_cuda:
        modules.append(CUDAExtension("carafe_plugin._C_cuda", ["csrc/cuda/carafe.cu"], **options))
    return {
        "ext_modules": modules,
        "cmdclass": {"build_ext": BuildExtension, "build_py": BuildPackage},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(license="Apache-2.0", **extensions())
