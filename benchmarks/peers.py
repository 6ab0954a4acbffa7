"""What `bench_op.py` compares: CARAFE's reassembly in the forms that people use, and other ways to rescale.

To add a peer, write its setup, which turns a `Problem` and its `Inputs` into a `Call`, and list it in `PEERS`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import mmcv_peer, upsamplers
from benchmarks.problem import Call, Inputs, Peer, Problem, shuffle_and_softmax
from carafe_plugin.ops import carafe
from carafe_plugin.ops.fused import reassemble_logits

Reassembly = Callable[[Tensor, Tensor, int, int, int, int], Tensor]

# ------------------------------------------------------------------- reassembly: (features, masks, k, g, up, down)


def public_operator(
    features: Tensor, masks: Tensor, kernel_size: int, group_size: int, up: int, down: int = 1
) -> Tensor:
    """`carafe_plugin.ops.carafe` with the scale as two integers."""
    return carafe(features, masks, kernel_size, group_size, Fraction(up, down))


def unfold_einsum(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, up: int, down: int = 1) -> Tensor:
    """Unfolds every source neighbourhood once and contracts it with the up^2 kernels that share it."""
    n, c = features.shape[:2]
    taps, height, width = kernel_size**2, *masks.shape[2:]
    h, w = height // up, width // up
    neighbours = F.unfold(features, kernel_size, padding=kernel_size // 2, stride=down)
    neighbours = neighbours.view(n, group_size, c // group_size, taps, h, w)
    kernels = masks.view(n, group_size, taps, h, up, w, up)
    return torch.einsum("ngcthw,ngthiwj->ngchiwj", neighbours, kernels).reshape(n, c, height, width)


def upsample_unfold(
    features: Tensor, masks: Tensor, kernel_size: int, group_size: int, up: int, down: int = 1
) -> Tensor:
    """Repeats every pixel first, then unfolds with a dilation of `up`: the form found in forks of YOLO."""
    n, c, h, w = features.shape
    taps, size = kernel_size**2, (h * up, w * up)
    repeated = F.interpolate(features, scale_factor=up, mode="nearest")
    neighbours = F.unfold(repeated, kernel_size, dilation=up, padding=kernel_size // 2 * up)
    neighbours = neighbours.view(n, group_size, c // group_size, taps, *size)
    kernels = masks.view(n, group_size, taps, *size)
    return torch.einsum("ngcthw,ngthw->ngchw", neighbours, kernels).reshape(n, c, *size)


def shifted_madd(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, up: int, down: int = 1) -> Tensor:
    """Adds k^2 shifted copies of the repeated (or, downsampling, strided) features, each times its weights.

    Of several ways to write it in PyTorch, eager and compiled, this one was the fastest: rows stay contiguous because
    pixels are repeated once beforehand, and one buffer accumulates in place.
    """
    n, c = features.shape[:2]
    height, width = masks.shape[2:]
    source = F.pad(features, (kernel_size // 2,) * 4)
    if up > 1:
        source = F.interpolate(source, scale_factor=up, mode="nearest")
    source = source.view(n, group_size, c // group_size, *source.shape[2:])
    kernels = masks.view(n, group_size, 1, kernel_size**2, height, width)
    output = features.new_zeros(n, group_size, c // group_size, height, width)
    for tap in range(kernel_size**2):
        top, left = tap // kernel_size * up, tap % kernel_size * up
        rows = slice(top, top + (height - 1) * down + 1, down)
        columns = slice(left, left + (width - 1) * down + 1, down)
        output.addcmul_(source[..., rows, columns], kernels[:, :, :, tap])
    return output.view(n, c, height, width)


def in_steps(
    function: Reassembly, features: Tensor, logits: Tensor, kernel_size: int, group_size: int, up: int, down: int = 1
) -> Tensor:
    """Pixel shuffle, softmax, then a reassembly: what the content encoder's output usually goes through."""
    masks = shuffle_and_softmax(logits, kernel_size, group_size, up)
    return function(features, masks, kernel_size, group_size, up, down)


def fused(features: Tensor, logits: Tensor, kernel_size: int, group_size: int, up: int, down: int = 1) -> Tensor:
    """What `CARAFEUpsample` and `CARAFEDownsample` call behind their content encoder."""
    return reassemble_logits(features, logits, kernel_size, group_size, up, down, "softmax")


# ---------------------------------------------------------------------------------------------------- setups


def _geometry(problem: Problem) -> tuple[int, int, int, int]:
    return problem.kernel_size, problem.group_size, problem.up, problem.down


def _of_masks(function: Reassembly, problem: Problem, inputs: Inputs) -> Call:
    features, masks, geometry = inputs.features, inputs.masks, _geometry(problem)
    return Call(lambda: function(features, masks, *geometry), (features, masks))


def _of_logits(function: Reassembly, problem: Problem, inputs: Inputs) -> Call:
    features, logits, geometry = inputs.features, inputs.logits, _geometry(problem)
    return Call(lambda: function(features, logits, *geometry), (features, logits))


def _compiled(
    setup: Callable[[Reassembly, Problem, Inputs], Call], function: Reassembly, problem: Problem, inputs: Inputs
) -> Call:
    import torch._inductor.config

    # Otherwise a pool of idle compiler processes starts beside the measurement.
    torch._inductor.config.compile_threads = 1
    torch._dynamo.reset()  # each problem gets graphs of its own, never one made general by the sizes before
    return setup(torch.compile(function, fullgraph=True, dynamic=False), problem, inputs)


def _variant(
    setup: Callable[[Problem, Inputs], Call],
    layout: torch.memory_format,
    dtype: torch.dtype | None,
    problem: Problem,
    inputs: Inputs,
) -> Call:
    """Ours on the same values in another layout or dtype; gradients start from theirs in the same."""

    def convert(tensor: Tensor) -> Tensor:
        converted = tensor.detach().to(dtype=dtype or tensor.dtype, memory_format=layout)
        return converted.requires_grad_(tensor.requires_grad)

    converted = Inputs(*(convert(tensor) for tensor in vars(inputs).values()))
    call = setup(problem, converted)
    return Call(call.forward, call.wrt, converted.grad_output)


def _module(name: str, problem: Problem, inputs: Inputs) -> Call:
    _, module = upsamplers.others(problem.channels, problem.up, problem.down)[name]
    module = module.to(inputs.features)
    parameters = tuple(module.parameters())
    return Call(lambda: module(inputs.features), (inputs.features, *parameters), parameters=parameters)


# ------------------------------------------------------------------------------------------------------ mmcv


class Mmcv:
    """mmcv's CUDA operator: the installed one or, with a source folder, that source alone.

    Attributes:
        source: the ``csrc`` folder to compile; None for the installed operator.
    """

    source: Path | None = None

    def unavailable(self, problem: Problem) -> str | None:
        """Why it cannot run on a problem."""
        if torch.device(problem.device).type != "cuda":
            return "mmcv has this operator for CUDA alone"
        if not problem.is_upsampling:
            return "mmcv's operator upsamples alone"
        if problem.taps * problem.group_size > 384:
            return "mmcv's kernel writes past its shared memory when kernel_size^2 * group_size exceeds 384"
        if problem.dtype == torch.bfloat16:
            return "mmcv's operator does not know bfloat16"
        if self.source is not None:
            return None  # a compiler that fails is a result, not an absence
        try:
            mmcv_peer.installed_operator()
        except ImportError as error:
            return f"mmcv's operators cannot be imported ({error}); --mmcv-source compiles this one alone"
        return None

    def reassembly(self) -> Reassembly:
        """The operator itself; compiles it where it has a source."""
        operator = mmcv_peer.installed_operator() if self.source is None else mmcv_peer.compiled_operator(self.source)
        return lambda features, masks, k, g, up, down: operator(features, masks, k, g, up)

    def from_masks(self, problem: Problem, inputs: Inputs) -> Call:
        """Made ready as it is."""
        return _of_masks(self.reassembly(), problem, inputs)

    def from_logits(self, problem: Problem, inputs: Inputs) -> Call:
        """Made ready behind pixel shuffle and softmax."""
        return _of_logits(functools.partial(in_steps, self.reassembly()), problem, inputs)


mmcv = Mmcv()

# ------------------------------------------------------------------------------------------------- the list


def _only_upsampling(problem: Problem) -> str | None:
    return None if problem.is_upsampling else "it upsamples alone"


def _is_bfloat16(problem: Problem) -> str | None:
    return "that is the run's own dtype" if problem.dtype == torch.bfloat16 else None


def _other(name: str, description: str, direction: str) -> Peer:
    def unavailable(problem: Problem) -> str | None:
        known = name in upsamplers.others(1, problem.up, problem.down)
        return None if known else f"it {direction} alone"

    return Peer(name, description, functools.partial(_module, name), "carafe", equal=False, unavailable=unavailable)


_masks, _logits = functools.partial(_of_masks, public_operator), functools.partial(_of_logits, fused)
_steps_compiled = functools.partial(_compiled, _of_logits, functools.partial(in_steps, shifted_madd))

# What the others are compared with: each row is compared with its `reference`.
OURS = (
    Peer("carafe", "ours: carafe_plugin.ops.carafe, from masks", _masks, "carafe"),
    Peer("fused", "ours, as the modules call it: from the content encoder's output", _logits, "fused"),
)
FROM_MASKS = (
    Peer("unfold-einsum", "unfold, then einsum", functools.partial(_of_masks, unfold_einsum), "carafe"),
    Peer(
        "upsample-unfold",
        "nearest, dilated unfold, then einsum",
        functools.partial(_of_masks, upsample_unfold),
        "carafe",
        unavailable=_only_upsampling,
    ),
    Peer("shifted-madd", "k^2 shifted multiply-adds", functools.partial(_of_masks, shifted_madd), "carafe"),
    Peer(
        "shifted-madd-compiled",
        "the same under torch.compile",
        functools.partial(_compiled, _of_masks, shifted_madd),
        "carafe",
        compiles=True,
    ),
    Peer("mmcv", "mmcv's CUDA operator", mmcv.from_masks, "carafe", unavailable=mmcv.unavailable),
)
FROM_LOGITS = (
    Peer(
        "steps-carafe",
        "pixel shuffle, softmax, then ours from masks",
        functools.partial(_of_logits, functools.partial(in_steps, public_operator)),
        "fused",
    ),
    Peer(
        "steps-compiled",
        "pixel shuffle, softmax and shifted multiply-adds under torch.compile",
        _steps_compiled,
        "fused",
        compiles=True,
    ),
    Peer(
        "steps-mmcv",
        "pixel shuffle, softmax, then mmcv's CUDA operator",
        mmcv.from_logits,
        "fused",
        unavailable=mmcv.unavailable,
    ),
)
VARIANTS = tuple(
    Peer(
        f"{name}-{suffix}",
        f"{name}, {suffix.replace('-', ' ')}",
        functools.partial(_variant, setup, layout, dtype),
        name,
        variant=True,
        dtype=dtype,
        unavailable=unavailable,
    )
    for suffix, layout, dtype, unavailable in (
        ("channels-last", torch.channels_last, None, lambda problem: None),
        ("bfloat16", torch.preserve_format, torch.bfloat16, _is_bfloat16),
    )
    for name, setup in (("carafe", _masks), ("fused", _logits))
)
OTHERS = tuple(
    _other(name, description, direction)
    for scale, direction in (((2, 1), "upsamples"), ((1, 2), "downsamples"))
    for name, (description, _) in upsamplers.others(1, *scale).items()
)
PEERS: tuple[Peer, ...] = (*FROM_MASKS, *FROM_LOGITS, *VARIANTS, *OTHERS)
