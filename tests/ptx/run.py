"""One call of the project's CUDA launcher, its kernels executed on the CPU from nvcc's PTX: the error against the
reference, what the checks found, the launches, and the source lines that issue most instructions.

    python tests/ptx/run.py --op reassemble --dtype float16 --normalizer softmax --shape 1 64 50 84 --kernel 5 --scale 2
"""

from __future__ import annotations

import argparse
import collections
import sys
import time
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))
import executor
from executor import NORMALIZERS, OPERATORS, Executor

from carafe_plugin.ops import reference
from carafe_plugin.testing import relative_error

LAYOUTS = ("contiguous", "channels_last", "transposed")


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values; 'transposed' swaps rows and columns in memory."""
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.transpose(2, 3).contiguous().transpose(2, 3) if layout == "transposed" else tensor.contiguous()


def make_tensors(
    dtype: torch.dtype, normalizer: str, shape: tuple[int, ...], k: int, g: int, up: int, down: int,
    crop: tuple[int, int] = (0, 0), spread: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Features, kernels and a gradient of the output."""
    n, c, h, w = shape
    out = tuple(max(1, -(-length * up // down) - less) for length, less in zip((h, w), crop, strict=True))
    raw = normalizer != "none" and up > 1
    kernels = (n, g * k * k * (up * up if raw else 1), *((h, w) if raw else out))
    generator = torch.Generator().manual_seed(0)
    features, weights, grad = (torch.randn(size, generator=generator) for size in ((n, c, h, w), kernels, (n, c, *out)))
    return features.to(dtype), (weights * spread).to(dtype), grad.to(dtype)


def expected(
    op: str, tensors: tuple[Tensor, Tensor, Tensor], normalizer: str, k: int, g: int, up: int, down: int
) -> Tensor:
    """What the reference computes, in float64."""
    features, kernels, grad = (tensor.double() for tensor in tensors)
    with torch.enable_grad():
        features.requires_grad_(op == "grad_features")
        kernels.requires_grad_(op == "grad_kernels")
        masks = kernels if normalizer == "none" else reference.masks_from_logits(kernels, k, g, up, down, normalizer)
        output = reference.reassemble(features, masks[..., : grad.shape[2], : grad.shape[3]], k, g, up, down)
        if op == "reassemble":
            return output
        return torch.autograd.grad(output, features if op == "grad_features" else kernels, grad)[0]


def inputs_of(op: str, tensors: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    features, kernels, grad = tensors
    return {
        "reassemble": (features, kernels),
        "grad_features": (grad, kernels),
        "grad_kernels": (grad, features, kernels),
    }[op]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=OPERATORS, default="reassemble")
    parser.add_argument("--dtype", choices=("float64", "float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--normalizer", choices=NORMALIZERS, default="softmax")
    parser.add_argument("--shape", type=int, nargs=4, metavar=("N", "C", "H", "W"), default=(1, 32, 13, 21))
    parser.add_argument("--kernel", type=int, default=5)
    parser.add_argument("--group", type=int, default=1)
    parser.add_argument("--scale", type=Fraction, default=Fraction(2), help="such as 2, 1/2 or 3/2")
    parser.add_argument("--crop", type=int, nargs=2, default=(0, 0), help="rows and columns of the output less")
    parser.add_argument("--layout", choices=LAYOUTS, default="contiguous")
    parser.add_argument("--device", choices=executor.DEVICES, default="h100")
    parser.add_argument("--architecture", default="compute_80")
    parser.add_argument("--launch-header", type=Path, default=executor.CSRC, metavar="CSRC", help="another csrc folder")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="execute every N-th block only, to count")
    parser.add_argument("--no-checks", action="store_true", help="no search for races and uninitialised reads")
    parser.add_argument("--counts", type=Path, metavar="FILE", help="write what each instruction asks of the hardware")
    parser.add_argument("--top", type=int, default=12, metavar="LINES", help="source lines to show")
    options = parser.parse_args()
    if reason := executor.missing_tools():
        print(reason, file=sys.stderr)
        return 2

    begun = time.monotonic()
    machine = Executor(options.launch_header, options.architecture, options.device)
    print(f"compiled or found in {time.monotonic() - begun:.1f} s: {len(machine.module.spans)} kernels")
    up, down, k, g = options.scale.numerator, options.scale.denominator, options.kernel, options.group
    dtype = getattr(torch, options.dtype)
    tensors = make_tensors(dtype, options.normalizer, tuple(options.shape), k, g, up, down, options.crop)
    tensors = tuple(lay_out(tensor, options.layout) for tensor in tensors)  # type: ignore[assignment]
    geometry = dict(normalizer=options.normalizer, kernel_size=k, group_size=g, up=up, down=down)
    begun = time.monotonic()
    run = machine.run(
        options.op, inputs_of(options.op, tensors), size=tensors[0].shape[2:], out_size=tensors[2].shape[2:],
        every=options.every, checks=not options.no_checks, **geometry,
    )  # fmt: skip
    seconds = time.monotonic() - begun
    instructions = sum(launch.instructions for launch in run.launches)
    rate = instructions / seconds / 1e6
    print(f"executed in {seconds:.2f} s: {instructions} warp instructions, {rate:.1f} million a second")
    for launch in run.launches:
        shared = f"{launch.static_shared} + {launch.dynamic_shared} bytes of shared memory"
        print(f"  {launch.name.split('(')[0]}: grid {launch.grid}, block {launch.block}, {shared},", end=" ")
        print(f"{launch.instructions} instructions")
    if run.error:
        print(f"the launcher returned error {run.error}")
    if options.every == 1 and not run.error:
        error = relative_error(run.result, expected(options.op, tensors, options.normalizer, k, g, up, down))
        unwritten = "" if options.no_checks else f", {run.unwritten} elements not written"
        print(f"relative error {error:.3g}{unwritten}")
    print(f"{len(run.findings)} findings")
    for finding in run.findings[:20]:
        print(f"  {finding}")
    if options.counts:
        executor.write_counts(
            run, options.counts, op=options.op, dtype=options.dtype, shape=list(options.shape), **geometry
        )
    lines: collections.Counter[tuple[str, int]] = collections.Counter()
    for launch in run.launches:
        for record in launch.records():
            lines[tuple(record["location"][0]) if record["location"] else ("?", 0)] += record["issued"]
    for (file, line), count in lines.most_common(options.top):
        source = Path(file).read_text().splitlines() if Path(file).exists() else []
        text = source[line - 1].strip() if 0 < line <= len(source) else ""
        print(f"  {100 * count / max(1, instructions):5.1f} %  {Path(file).name}:{line}  {text[:90]}")
    return int(bool(run.error or run.findings))


if __name__ == "__main__":
    sys.exit(main())
