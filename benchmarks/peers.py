"""What the operator is compared with: CARAFE's reassembly in the forms that people use, and other ways to rescale.

To add a peer, write its setup, which turns a `Problem` and its `Inputs` into a `Call`, and list it in `PEERS`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.comparison import Call, Inputs, Peer, Problem, shuffle_and_softmax
from benchmarks.mmcv_operator import MmcvOperator
from carafe_plugin.modules.peers import DeconvUpsample, MaxPoolDownsample, PixelShuffleUpsample, StridedConvDownsample
from carafe_plugin.ops import carafe
from carafe_plugin.ops.fused import reassemble_logits

Reassembly = Callable[[Tensor, Tensor, int, int, int, int], Tensor]  # (features, masks, k, g, up, down)
Rows = tuple[tuple[str, str, Callable[[Problem], nn.Module]], ...]  # name, description, module


def public_operator(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, up: int, down: int) -> Tensor:
    """`carafe_plugin.ops.carafe` with the scale as two integers."""
    return carafe(features, masks, kernel_size, group_size, Fraction(up, down))


def unfold_einsum(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, up: int, down: int) -> Tensor:
    """Unfolds every source neighbourhood once and contracts it with the up^2 kernels that share it."""
    n, c = features.shape[:2]
    taps, height, width = kernel_size**2, *masks.shape[2:]
    h, w = height // up, width // up
    neighbours = F.unfold(features, kernel_size, padding=kernel_size // 2, stride=down)
    neighbours = neighbours.view(n, group_size, c // group_size, taps, h, w)
    kernels = masks.view(n, group_size, taps, h, up, w, up)
    return torch.einsum("ngcthw,ngthiwj->ngchiwj", neighbours, kernels).reshape(n, c, height, width)


def upsample_unfold(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, up: int, down: int) -> Tensor:
    """Repeats every pixel first, then unfolds with a dilation of `up`: the form found in forks of YOLO."""
    n, c, h, w = features.shape
    taps, size = kernel_size**2, (h * up, w * up)
    repeated = F.interpolate(features, scale_factor=up, mode="nearest")
    neighbours = F.unfold(repeated, kernel_size, dilation=up, padding=kernel_size // 2 * up)
    neighbours = neighbours.view(n, group_size, c // group_size, taps, *size)
    kernels = masks.view(n, group_size, taps, *size)
    return torch.einsum("ngcthw,ngthw->ngchw", neighbours, kernels).reshape(n, c, *size)


def shifted_madd(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, up: int, down: int) -> Tensor:
    """Adds k^2 shifted copies of the repeated (or, downsampling, strided) features, each times its weights.

    The fastest of several ways in PyTorch, eager and compiled: rows stay contiguous, one buffer accumulates in place.
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


def in_steps(function: Reassembly) -> Reassembly:
    """A reassembly after pixel shuffle and softmax."""
    return lambda features, logits, k, g, up, down: function(
        features, shuffle_and_softmax(logits, k, g, up), k, g, up, down
    )


# What `CARAFEUpsample` and `CARAFEDownsample` call after their content encoder.
fused = functools.partial(reassemble_logits, normalizer="softmax")


class PointSampler(nn.Module):
    """Upsampling by sampling at learnt points, after the idea of DySample (arXiv 2308.15085).

    A 1x1 convolution predicts, for every output location and each of a few groups of channels, how far from its usual
    place bilinear interpolation reads. The static range of the paper: a quarter of the distance between source pixels.
    `groups` must divide `channels`; None takes 4 where that does, else 2 or 1.
    """

    def __init__(self, channels: int, up: int, groups: int | None = None) -> None:
        super().__init__()
        self.up, self.groups = up, groups or math.gcd(4, channels)
        self.offset = nn.Conv2d(channels, 2 * self.groups * up**2, 1)
        nn.init.normal_(self.offset.weight, std=0.001)
        if self.offset.bias is not None:
            nn.init.zeros_(self.offset.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H * up, W * up)."""
        n, c, h, w = features.shape
        # (N * groups, H', W', 2): x and y offsets in source pixels; grid_sample counts from -1 to 1 over the map.
        offset = F.pixel_shuffle(0.25 * self.offset(features), self.up)
        offset = offset.view(n * self.groups, 2, h * self.up, w * self.up).permute(0, 2, 3, 1)
        usual = F.affine_grid(torch.eye(2, 3).to(features)[None], [1, 1, h * self.up, w * self.up], align_corners=False)
        grid = usual + offset * offset.new_tensor([2 / w, 2 / h])
        grouped = features.reshape(n * self.groups, c // self.groups, h, w)
        sampled = F.grid_sample(grouped, grid, mode="bilinear", padding_mode="border", align_corners=False)
        return sampled.view(n, c, h * self.up, w * self.up)


def of_reassembly(kernels: str, name: str, description: str, prepare: Callable[[], Reassembly], **others: Any) -> Peer:
    """A reassembly with the `kernels` of the inputs, 'masks' or 'logits'; `prepare` returns the function."""

    def setup(problem: Problem, inputs: Inputs) -> Call:
        function = compiled(prepare()) if others.get("compiles") else prepare()
        features, weights = inputs.features, getattr(inputs, kernels)
        return Call(lambda: function(features, weights, *problem.geometry), (features, weights), inputs.grad_output)

    return Peer(name, description, setup, "carafe" if kernels == "masks" else "fused", **others)


from_masks, from_logits = (functools.partial(of_reassembly, kernels) for kernels in ("masks", "logits"))


def of_steps(name: str, description: str, prepare: Callable[[], Reassembly], **others: Any) -> Peer:
    """Pixel shuffle, softmax, then a reassembly: what the content encoder's output usually goes through."""
    return from_logits(name, description, lambda: in_steps(prepare()), **others)


def of_module(name: str, description: str, build: Callable[[Problem], nn.Module], **others: Any) -> Peer:
    """A module on the problem's device and in its dtype, its weights drawn with a fixed seed."""

    def setup(problem: Problem, inputs: Inputs) -> Call:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = build(problem).to(problem.device, problem.dtype)
        forward = compiled(module) if others.get("compiles") else module
        features, parameters = inputs.features, tuple(module.parameters())
        return Call(lambda: forward(features), (features, *parameters), inputs.grad_output, parameters)

    return Peer(name, description, setup, "carafe", **others)


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function under torch.compile, to be called for each problem anew."""
    import torch._inductor.config

    # Otherwise a pool of idle compiler processes starts beside the measurement.
    torch._inductor.config.compile_threads = 1
    torch._dynamo.reset()  # each problem gets graphs of its own, never one made general by the sizes before
    return torch.compile(function, fullgraph=True, dynamic=False)


def variant(ours: Peer, suffix: str, **change: Any) -> Peer:
    """Ours on the same values in another layout or dtype, as `change` says; gradients start from theirs in the same."""

    def convert(tensor: Tensor) -> Tensor:
        return tensor.detach().to(**change).requires_grad_(tensor.requires_grad)

    def setup(problem: Problem, inputs: Inputs) -> Call:
        return ours.setup(problem, Inputs(*map(convert, vars(inputs).values())))

    def unavailable(problem: Problem) -> str | None:
        return "that is the run's own dtype" if change.get("dtype") == problem.dtype else None

    name, description, dtype = f"{ours.name}-{suffix}", f"{ours.name}, {suffix.replace('-', ' ')}", change.get("dtype")
    return Peer(name, description, setup, ours.name, variant=True, dtype=dtype, unavailable=unavailable)


def only_upsamples(problem: Problem) -> str | None:
    return "it only upsamples" if problem.down > 1 else None


def only_downsamples(problem: Problem) -> str | None:
    return "it only downsamples" if problem.down == 1 else None


mmcv = MmcvOperator()
# What the others are compared with: each row is compared with its `reference`.
OURS = (
    from_masks("carafe", "ours: carafe_plugin.ops.carafe, from masks", lambda: public_operator),
    from_logits("fused", "ours, as the modules call it: from the content encoder's output", lambda: fused),
)
VARIANTS = (
    *(variant(ours, "channels-last", memory_format=torch.channels_last) for ours in OURS),
    *(variant(ours, "float16", dtype=torch.float16) for ours in OURS),
    *(variant(ours, "bfloat16", dtype=torch.bfloat16) for ours in OURS),
)
# What a network would otherwise have in CARAFE's place.
UPSAMPLERS: Rows = (
    ("nearest", "nearest interpolation", lambda p: nn.Upsample(scale_factor=p.up, mode="nearest")),
    ("bilinear", "bilinear interpolation", lambda p: nn.Upsample(scale_factor=p.up, mode="bilinear")),
    ("deconvolution", "deconvolution, stride and kernel = scale", lambda p: DeconvUpsample(p.channels, p.up, p.up)),
    ("pixel-shuffle", "3x3 convolution, then pixel shuffle", lambda p: PixelShuffleUpsample(p.channels, p.up)),
    ("grid-sample", "grid_sample at learnt points, as DySample does", lambda p: PointSampler(p.channels, p.up)),
)
DOWNSAMPLERS: Rows = (
    ("max-pool", "3x3 max pooling", lambda p: MaxPoolDownsample(p.channels, p.down)),
    ("average-pool", "average pooling, kernel = stride", lambda p: nn.AvgPool2d(p.down, ceil_mode=True)),
    ("strided-conv", "3x3 convolution with a stride", lambda p: StridedConvDownsample(p.channels, p.down)),
)
OTHERS = (
    *(of_module(*row, equal=False, unavailable=only_upsamples) for row in UPSAMPLERS),
    *(of_module(*row, equal=False, unavailable=only_downsamples) for row in DOWNSAMPLERS),
)
PEERS: tuple[Peer, ...] = (
    from_masks("unfold-einsum", "unfold, then einsum", lambda: unfold_einsum),
    from_masks(
        "upsample-unfold", "nearest, dilated unfold, then einsum", lambda: upsample_unfold, unavailable=only_upsamples
    ),
    from_masks("shifted-madd", "k^2 shifted multiply-adds", lambda: shifted_madd),
    from_masks("shifted-madd-compiled", "the same under torch.compile", lambda: shifted_madd, compiles=True),
    from_masks("mmcv", "mmcv's CUDA operator", mmcv.reassembly, unavailable=mmcv.unavailable),
    of_steps("steps-carafe", "pixel shuffle, softmax, then ours from masks", lambda: public_operator),
    of_steps(
        "steps-compiled",
        "pixel shuffle, softmax and shifted multiply-adds under torch.compile",
        lambda: shifted_madd,
        compiles=True,
    ),
    of_steps(
        "steps-mmcv", "pixel shuffle, softmax, then mmcv's CUDA operator", mmcv.reassembly, unavailable=mmcv.unavailable
    ),
    *VARIANTS,
    *OTHERS,
)
