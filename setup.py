"""Builds the extension; everything else about the package is in pyproject.toml.

``carafe_plugin._C`` (CPU, schemas) and ``carafe_plugin._C_cuda`` use LibTorch's stable ABI: one CPU binary serves every
torch from 2.10 and every Python from 3.10 on. Environment:

CARAFE_CUDA           1 requires the CUDA half, 0 leaves it out; by default it is built where a CUDA toolkit of torch's
                      major version is found (CUDA_HOME), GPU or not.
TORCH_CUDA_ARCH_LIST  the GPU architectures, by default Ampere and Hopper, and Blackwell where the toolkit knows it.

A build with CUDA leaves build/ptxas.log: the registers and spills of every kernel, which tests/csrc reads.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from contextlib import contextmanager

from setuptools import setup
from setuptools.command.build_py import build_py

OLDEST_TORCH = (2, 10)
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10
PYTHON_ABI = "-DPy_LIMITED_API=0x030a0000"  # Python 3.10
BLACKWELL_TOOLKIT = (12, 8)  # the first that compiles for it


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


def toolkit_version(cuda_home: str | None) -> tuple[int, int] | None:
    """Version of the CUDA toolkit, or None where there is none that runs."""
    if cuda_home is None:
        return None
    try:
        output = subprocess.check_output([os.path.join(cuda_home, "bin", "nvcc"), "--version"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    release = re.search(r"release (\d+)\.(\d+)", output)
    return (int(release.group(1)), int(release.group(2))) if release else None


def wants_cuda() -> bool:
    import torch

    choice = os.environ.get("CARAFE_CUDA", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"CARAFE_CUDA must be 0 or 1, got {choice!r}")
    if choice == "0":
        return False
    cuda_home = find_cuda_home()
    version = toolkit_version(cuda_home)
    toolkit = version[0] if version else None
    wanted = int(torch.version.cuda.split(".")[0]) if torch.version.cuda else None
    if toolkit is not None and toolkit == wanted:
        os.environ["CUDA_HOME"] = cuda_home  # torch's own guess would be the folder above nvcc's link
        architectures = "8.0;9.0;10.0+PTX" if version >= BLACKWELL_TOOLKIT else "8.0;9.0+PTX"
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures)
        return True
    reason = f"CUDA toolkit {toolkit or 'not found'} (CUDA_HOME={cuda_home}), torch built for CUDA {wanted}"
    if choice == "1":
        sys.exit(f"CARAFE_CUDA=1, but the CUDA half cannot be built: {reason}")
    if toolkit is not None:
        warnings.warn(f"building the CPU half only: {reason}", stacklevel=1)
    return False


@contextmanager
def output_kept(path: str):
    """Copies what this process and the compilers it starts print to a file, which lasts if ptxas is in it."""
    partial = f"{path}.partial"
    tee = subprocess.Popen(["tee", partial], stdin=subprocess.PIPE)
    own = [os.dup(descriptor) for descriptor in (1, 2)]
    sys.stdout.flush(), sys.stderr.flush()
    for descriptor in (1, 2):
        os.dup2(tee.stdin.fileno(), descriptor)
    try:
        yield
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        for descriptor, saved in zip((1, 2), own, strict=True):
            os.dup2(saved, descriptor)
        tee.communicate()
        with open(partial, errors="replace") as log:
            compiled = "ptxas info" in log.read()
        os.replace(partial, path) if compiled else os.remove(partial)


class BuildPackage(build_py):
    """Puts the model index beside the configs that it names, where mim looks for an installed package's."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.copy_file("model-index.yml", os.path.join(self.build_lib, "carafe_plugin", "model-index.yml"))


def extensions() -> dict:
    version = torch_version()
    if version is None or version < OLDEST_TORCH:
        found = "none" if version is None else ".".join(map(str, version))
        print(f"carafe_plugin: no extension, the PyTorch reference serves (needs torch >= 2.10, found {found})")
        return {"cmdclass": {"build_py": BuildPackage}}
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    missing = None
    if shutil.which((os.environ.get("CXX") or "c++").split()[0]) is None:
        missing = "no C++ compiler; CXX names another one"
    elif not os.path.exists(header):
        missing = f"no {header}"
    if missing is not None:
        print(f"carafe_plugin: no extension, the PyTorch reference serves ({missing})")
        return {"cmdclass": {"build_py": BuildPackage}}
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
        nvcc = ["-O3", "-std=c++17", "-DUSE_CUDA", "-Xptxas=-v", "--threads=0", STABLE_ABI, PYTHON_ABI]
        nvcc += [f"-Xcompiler={prefix}" for prefix in prefixes]
        modules.append(
            CUDAExtension(
                "carafe_plugin._C_cuda",
                ["csrc/cuda/carafe.cu"],
                extra_compile_args={"cxx": cxx, "nvcc": nvcc},
                py_limited_api=True,
            )
        )

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            if not with_cuda or shutil.which("tee") is None:
                return super().build_extensions()
            os.makedirs("build", exist_ok=True)
            with output_kept(os.path.join("build", "ptxas.log")):
                super().build_extensions()

    return {
        "ext_modules": modules,
        "cmdclass": {"build_ext": Build, "build_py": BuildPackage},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extensions())
