"""The sources compile for 64-bit Arm, and take nothing of its glibc that 2.28 lacks; test_kernels.py runs the kernels.

There is no torch for that processor here to link with: objects it is.
"""

import re
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from hosts import ARM_CXX, require_arm
from torch.utils.cpp_extension import include_paths

CSRC = Path(__file__).parents[2] / "csrc"
STABLE, ATEN = "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DCARAFE_ATEN"


@pytest.fixture(scope="module")
def python_headers(tmp_path_factory):
    """Those of this machine's Python; Debian's ask for the processor's own pyconfig.h: this one's does as well."""
    folder, include = tmp_path_factory.mktemp("include"), Path(sysconfig.get_paths()["include"])
    if not (include / "Python.h").exists():
        pytest.skip(f"no {include}/Python.h")
    own = Path("/usr/include/x86_64-linux-gnu", include.name, "pyconfig.h")
    if own.exists():
        (folder / "aarch64-linux-gnu" / include.name).mkdir(parents=True)
        (folder / "aarch64-linux-gnu" / include.name / "pyconfig.h").write_text(f'#include "{own}"\n')
    return folder, include


@pytest.mark.parametrize(
    ("source", "interface"),
    [
        *((source, STABLE) for source in ("registration", "cpu/carafe", "cpu/baseline", "cpu/avx2", "cpu/avx512")),
        *((source, ATEN) for source in ("registration", "cpu/carafe")),  # what includes torch's headers
    ],
)
def test_sources_compile_for_64_bit_arm(source, interface, python_headers, tmp_path):
    require_arm(ARM_CXX)
    if interface == STABLE and not (Path(include_paths()[0]) / "torch/csrc/stable/library.h").exists():
        pytest.skip(f"torch {torch.__version__} has no stable ABI")
    flags = ["-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror", "-Wno-psabi"]
    flags += [interface, "-DPy_LIMITED_API=0x030A0000"]
    flags += [f"-isystem{path}" for path in (*include_paths(), *python_headers)]
    made = tmp_path / "made.o"
    result = subprocess.run([ARM_CXX, "-c", *flags, str(CSRC / f"{source}.cpp"), "-o", str(made)], capture_output=True)
    assert result.returncode == 0, result.stderr.decode()[:4000]
    nm = ["aarch64-linux-gnu-nm", "--undefined-only", str(made)]
    symbols = subprocess.run(nm, capture_output=True, text=True, check=True).stdout.split()
    assert "__libc_single_threaded" not in symbols
    if source == "cpu/baseline":
        assert "exp@GLIBC_2.17" in symbols
        assert not [name for name in symbols if re.match("exp($|@GLIBC_2.29)", name)]
