"""Builds the extension; everything else about the package is in pyproject.toml.

``carafe_plugin._C`` (CPU, schemas) and ``carafe_plugin._C_cuda`` use LibTorch's stable ABI beside torch 2.10 and later:
one CPU binary serves every torch from 2.10 on and every Python from 3.10 on. Beside torch 2.1 to 2.9 the same sources
use ATen (csrc/torch_api.h), and the files are named after the torch that alone they serve, ``_C_torch2_1.abi3.so``.
Environment:

CXX                   the C++ compiler, by default c++; several words are allowed, such as "ccache g++".
CARAFE_ABI            aten builds for the installed torch alone where the stable ABI is to be had too.
CARAFE_CUDA           1 requires the CUDA half, 0 leaves it out, only builds nothing else; by default it is built where
                      a CUDA toolkit of torch's major version is found (CUDA_HOME), GPU or not.
TORCH_CUDA_ARCH_LIST  the GPU architectures, by default all from Turing on that the toolkit knows: 7.5 to 12.0. One
                      takes half a minute of processor time.
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
from types import ModuleType

import setuptools
from setuptools import setup
from setuptools.command.build_py import build_py

OLDEST_SETUPTOOLS = 64  # the first that installs a folder as it is (pip install -e) by pyproject.toml
OLDEST_TORCH = (2, 1)
STABLE_TORCH = (2, 10)  # the first whose stable ABI has all that is used
BLACKWELL_TOOLKIT, BLACKWELL_TORCH = (12, 8), (2, 7)  # the first that compile for it
# The binary interface of torch 2.10; that of Python 3.10 comes with py_limited_api.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# What a compiler or a C++ library without C++17 refuses; some take -std=c++17 and have only the one or the other.
CXX17 = "#include <optional>\nint main() { if constexpr (sizeof(int) > 1) return std::optional<int>(0).value(); }\n"


def torch_version() -> tuple[int, int]:
    import torch

    major, minor = (int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    return major, minor


def uses_aten() -> bool:
    """Whether the extension is built for the installed torch alone."""
    choice = os.environ.get("CARAFE_ABI", "")
    if choice not in ("", "aten"):
        sys.exit(f"CARAFE_ABI must be aten or not set, got {choice!r}")
    return choice == "aten" or torch_version() < STABLE_TORCH


def import_builder():
    """torch's builder. Torch 2.1's takes packaging from pkg_resources, where not every setuptools has it."""
    try:
        from torch.utils import cpp_extension
    except ImportError:
        import packaging.version

        sys.modules.setdefault("pkg_resources", ModuleType("pkg_resources")).packaging = packaging
        from torch.utils import cpp_extension
    return cpp_extension


def openmp_flags() -> tuple[list[str], list[str]]:
    """To compile and to link with. ATen's loops run on OpenMP's threads from within the including code.

    What GCC compiles finds torch's own OpenMP library in the process; a second one would have threads of its own. Clang
    calls another library by other names.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    return ["-fopenmp"], ["-fopenmp"] if "clang" in version else []


def reason_for_no_extension() -> str | None:
    """What the extension lacks that the system may well do without; a CXX that does not exist is an error."""
    try:
        import torch
    except ImportError:
        return "needs torch, found none"
    if torch_version() < OLDEST_TORCH:  # pip would replace it
        sys.exit(f"carafe_plugin needs torch >= 2.1, found {torch.__version__}; install a newer torch first")
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(compiler[0]) is None:
        if os.environ.get("CXX"):
            sys.exit(f"CXX={os.environ['CXX']}: there is no command {compiler[0]!r}")
        return "no C++ compiler found; set CXX to name one"
    if len(compiler) > 1 and not compiler[1].startswith("-"):
        os.environ.setdefault("TORCH_DONT_CHECK_COMPILER_ABI", "1")  # torch would ask ccache for g++'s version
    if complaint := complaint_about_cxx17(compiler):
        if os.environ.get("CXX"):
            sys.exit(f"CXX={os.environ['CXX']} does not compile C++17: {complaint}")
        return f"{compiler[0]} does not compile C++17: {complaint}"
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    return None if os.path.exists(header) else f"no {header}"


def complaint_about_cxx17(compiler: list[str]) -> str | None:
    """What a compiler says first where it does not compile C++17, instead of pages about torch's headers."""
    command = [*compiler, "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    try:
        result = subprocess.run(command, input=CXX17, capture_output=True, text=True)
    except OSError as error:
        return str(error)
    lines = (result.stderr.strip() or f"exit code {result.returncode}").splitlines()
    return next((line for line in lines if "error" in line), lines[0]) if result.returncode else None


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
    if choice not in ("", "0", "1", "only"):
        sys.exit(f"CARAFE_CUDA must be 0, 1 or only, got {choice!r}")
    if choice == "0":
        return False
    root, version = find_toolkit() or (None, None)
    wanted = int(torch.version.cuda.split(".")[0]) if torch.version.cuda else None
    if version and version[0] == wanted:
        os.environ["CUDA_HOME"] = root  # torch's own guess would be the folder above nvcc's link
        blackwell = version >= BLACKWELL_TOOLKIT and torch_version() >= BLACKWELL_TORCH
        architectures = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX" if blackwell else "7.5;8.0;8.6;8.9;9.0+PTX"
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures)
        return True
    found = f"found CUDA {version[0]}.{version[1]} in {root}" if version else "found none"
    wants = f"a CUDA {wanted} toolkit" if wanted else "no CUDA toolkit, being built for a CPU"
    reason = f"torch {torch.__version__} wants {wants}; {found}"
    if choice in ("1", "only"):
        sys.exit(f"CARAFE_CUDA={choice}, but the CUDA half cannot be built: {reason}")
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

    builder = import_builder()
    # Messages name files as they are called here, not where they lay on the building machine.
    folders = {os.path.dirname(os.path.abspath(__file__)): "", os.path.dirname(torch.__file__): "torch/"}
    prefixes = [f"-ffile-prefix-map={folder}/={name}" for folder, name in folders.items()]
    aten = uses_aten()
    suffix = "_torch{}_{}".format(*torch_version()) if aten else ""
    common = ["-O3", "-std=c++17", "-DCARAFE_ATEN" if aten else STABLE_ABI]
    compile_openmp, link_openmp = openmp_flags() if aten else ([], [])
    # -std=c++17 alone would forbid fused multiply-adds, half of the arithmetic rate.
    cxx = [*common, *prefixes, "-ffp-contract=fast", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
    nvcc = [*common, "-DUSE_CUDA", "--threads=0", *(f"-Xcompiler={prefix}" for prefix in prefixes)]
    nvcc.append(f"-DCARAFE_PTX={int('+PTX' in os.environ.get('TORCH_CUDA_ARCH_LIST', ''))}")
    sources = ["csrc/registration.cpp", *(f"csrc/cpu/{name}.cpp" for name in ("carafe", "baseline", "avx2", "avx512"))]
    options = {"py_limited_api": True, "define_macros": [("Py_LIMITED_API", "0x030a0000")] if aten else []}
    options["extra_compile_args"] = {"cxx": [*cxx, *compile_openmp], "nvcc": nvcc}
    options["extra_link_args"] = link_openmp
    modules = [builder.CppExtension(f"carafe_plugin._C{suffix}", sources, **options)]
    if with_cuda:
        sources = ["csrc/cuda/carafe.cu"]
        modules.append(builder.CUDAExtension(f"carafe_plugin._C_cuda{suffix}", sources, **options))
    if os.environ.get("CARAFE_CUDA") == "only":
        del modules[0]
    return {
        "ext_modules": modules,
        "cmdclass": {"build_ext": builder.BuildExtension, "build_py": BuildPackage},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    sys.exit(f"carafe_plugin is built by setuptools >= {OLDEST_SETUPTOOLS}, found {setuptools.__version__}")
# Here and not in pyproject.toml, where setuptools takes an SPDX name from 77 on, and torch 2.1's users have older ones.
setup(license="Apache-2.0", **extensions())
