"""mmcv's CUDA operator as a peer: the installed one, or its source alone, compiled against the installed torch.

Of mmcv's source two files matter, ``pytorch/cuda/carafe_cuda.cu`` and ``common/cuda/carafe_cuda_kernel.cuh``: a minute
of compiling, where all of mmcv takes many.

    python -m benchmarks.mmcv_operator DIR [--empty]    only compiles, and prints where the result is; no GPU is needed

With --empty an empty module is compiled in place of the binding, for a rehearsal with a DIR that has as little in it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])
from benchmarks.comparison import Problem

LAUNCHERS = Path("pytorch/cuda/carafe_cuda.cu")
BINDING = Path(__file__).with_name("mmcv_binding.cpp")
EMPTY = """#include <Python.h>
PyMODINIT_FUNC PyInit_carafe_mmcv_peer() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "carafe_mmcv_peer", nullptr, -1};
  return PyModule_Create(&definition);
}
"""


def find_source(folder: Path | None = None) -> Path | None:
    """The ``csrc`` of mmcv, given its repository, its package or a folder below these; None where it is not there.

    Without `folder` the installed mmcv is looked at, but not imported.
    """
    if folder is None:
        spec = importlib.util.find_spec("mmcv")
        if spec is None or spec.origin is None:
            return None
        folder = Path(spec.origin).parent
    places = ("", "csrc", "ops/csrc", "mmcv/ops/csrc")
    return next((folder / place for place in places if (folder / place / LAUNCHERS).is_file()), None)


@functools.cache
def compile_source(csrc: Path, verbose: bool = False, binding: Path = BINDING) -> Any:
    """Compiles mmcv's launchers with a binding (ours), or loads what an earlier call compiled.

    Raises RuntimeError or OSError where there is no CUDA compiler, or it fails.
    """
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architecture())
    from torch.utils import cpp_extension

    if toolkit := cuda_home():  # torch takes the folder above nvcc, which may be a link's
        cpp_extension.CUDA_HOME = toolkit
    include = [csrc / "common", csrc / "common" / "cuda"]
    # A toolkit may lack the headers of cuBLAS, cuSPARSE and others, which torch's own headers ask for; the wheels that
    # torch brings hold them.
    wheels = Path(torch.__file__).parents[1] / "nvidia"
    include += sorted(path.parent for path in wheels.glob("*/include/cusparse.h"))
    return cpp_extension.load(
        "carafe_mmcv_peer",
        [str(binding), str(csrc / LAUNCHERS)],
        extra_include_paths=[str(path) for path in include],
        extra_cuda_cflags=["-O3"],
        verbose=verbose,
        with_cuda=True,
    )


def cuda_home() -> str | None:
    """The CUDA toolkit that CUDA_HOME names, else one that has the libraries to link with; None where there is none."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    found = [Path(path).parents[1] for path in (os.path.realpath(nvcc), nvcc)] if nvcc else []
    for root in (*found, Path("/usr/local/cuda")):
        if named is None and (root / "bin" / "nvcc").exists() and any(root.glob("lib*/libcudart.so")):
            return str(root)
    return named


def architecture() -> str:
    """The architecture of this machine's GPU; Hopper's where there is none (then the result is only compiled)."""
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return f"{major}.{minor}"


class MmcvOperator:
    """mmcv's CUDA operator: the installed one or, with a source folder, that source alone."""

    source: Path | None = None  # the ``csrc`` folder to compile

    def unavailable(self, problem: Problem) -> str | None:
        """Why it cannot run on a problem; None where it can."""
        if torch.device(problem.device).type != "cuda":
            return "mmcv has this operator for CUDA only"
        if problem.down > 1:
            return "mmcv's operator only upsamples"
        if problem.taps * problem.group_size > 384:
            return "mmcv's kernel writes past its shared memory when kernel_size^2 * group_size exceeds 384"
        if problem.dtype == torch.bfloat16:
            return "mmcv's operator does not support bfloat16"
        if self.source is not None:
            return None  # a compiler that fails is a result, not an absence
        try:
            self._installed()
        except ImportError as error:
            return f"mmcv's operators cannot be imported ({error}); --mmcv-source compiles this one alone"
        return None

    def reassembly(self) -> Callable[[Tensor, Tensor, int, int, int, int], Tensor]:
        """The operator, compiled where it has a source; ImportError where mmcv's compiled part is not installed."""
        if self.source is None:
            operator = self._installed()
            return lambda features, masks, k, g, up, down: operator(features, masks, k, g, up)
        library = compile_source(self.source)
        return lambda features, masks, k, g, up, down: _Carafe.apply(features, masks, library, (k, g, up))

    def _installed(self) -> Callable[[Tensor, Tensor, int, int, int], Tensor]:
        from mmcv import _ext
        from mmcv.ops import carafe

        if hasattr(_ext, "is_stand_in"):
            raise ImportError("what stands in for mmcv's compiled operators runs carafe_plugin's own")
        return carafe


class _Carafe(torch.autograd.Function):
    """Scratch tensors are as many and as large as mmcv's own Function allocates, since they are part of its cost."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, masks: Tensor, library: Any, geometry: tuple[int, int, int]) -> Tensor:
        n, c, h, w = features.shape
        output = features.new_zeros(n, c, h * geometry[2], w * geometry[2])
        rearranged = torch.zeros_like(features)
        scratch = torch.zeros_like(output), torch.zeros_like(masks)
        library.forward(features, masks, rearranged, *scratch, output, *geometry)
        ctx.save_for_backward(features, masks, rearranged)
        ctx.library, ctx.geometry = library, geometry
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        features, masks, rearranged = ctx.saved_tensors
        grad_output = grad_output.contiguous()
        likes = (grad_output, grad_output, features, masks, features, masks)
        scratch = [torch.zeros_like(like, memory_format=torch.contiguous_format) for like in likes]
        ctx.library.backward(grad_output, rearranged, masks, *scratch, *ctx.geometry)
        return scratch[-2], scratch[-1], None, None


def main(arguments: list[str]) -> None:
    """Compiles as the command line says; ends the process where there is no source."""
    folders = [word for word in arguments if word != "--empty"]
    found = find_source(Path(folders[0]) if folders else None)
    if found is None:
        sys.exit(f"no {LAUNCHERS} below {' '.join(folders) or 'an installed mmcv'}")
    binding = BINDING
    if "--empty" in arguments:
        binding = found / "empty.cpp"
        binding.write_text(EMPTY)
    print(compile_source(found, verbose=True, binding=binding).__file__)


if __name__ == "__main__":
    main(sys.argv[1:])
