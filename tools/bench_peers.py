"""What `bench_op.py` compares: CARAFE's reassembly in the forms that people use, and cheaper ways to upsample.

A peer is one `Peer`: a name, a line of description, whether it computes CARAFE's function, and a `setup` that turns a
`Problem` and its `Inputs` into a `Call`. To add one, write its setup and list it in `PEERS`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from carafe_plugin.ops import carafe


@dataclass(frozen=True)
class Problem:
    """One size to measure: features (batch, channels, height, width), upsampled by the integer `up`."""

    channels: int
    height: int
    width: int
    batch: int = 1
    kernel_size: int = 5
    group_size: int = 1
    up: int = 2
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def taps(self) -> int:
        """Source locations that one output element sums: k^2."""
        return self.kernel_size**2

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the upsampled map."""
        return self.height * self.up, self.width * self.up

    @property
    def name(self) -> str:
        """The size as the command line writes it."""
        return f"{self.channels}x{self.height}x{self.width}"

    def _elements(self) -> tuple[int, int, int]:
        """Elements of the features, the masks and the output."""
        source, target = self.height * self.width, self.output_size[0] * self.output_size[1]
        masks = self.group_size * self.taps * target
        return self.batch * self.channels * source, self.batch * masks, self.batch * self.channels * target

    def flop(self, backward: bool) -> int:
        """Floating-point operations: a multiply and an add for each tap, and as many again for each gradient."""
        return 2 * self.taps * self._elements()[2] * (3 if backward else 1)

    def traffic(self, backward: bool) -> int:
        """Bytes that must move when each tensor is read or written once in each direction."""
        features, masks, output = self._elements()
        # Forward reads features and masks and writes the output. Backward reads the output's gradient and both
        # inputs again, and writes two gradients.
        elements = features + masks + output + (output + 2 * features + 2 * masks if backward else 0)
        return elements * self.dtype.itemsize


@dataclass(frozen=True)
class Inputs:
    """The tensors that every peer is given; those a peer differentiates by require grad.

    Attributes:
        features: (N, C, H, W).
        masks: (N, G * k^2, H', W'), normalised over each kernel's k^2 weights.
        grad_output: (N, C, H', W'), the gradient that backward starts from.
    """

    features: Tensor
    masks: Tensor
    grad_output: Tensor

    @classmethod
    def random(cls, problem: Problem, seed: int = 0) -> Inputs:
        """Draws inputs for `problem`, the same ones for the same seed on every device."""
        generator = torch.Generator().manual_seed(seed)
        n, g, (height, width) = problem.batch, problem.group_size, problem.output_size

        def place(tensor: Tensor) -> Tensor:
            return tensor.to(device=problem.device, dtype=problem.dtype)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        masks = normal(n, g, problem.taps, height, width).softmax(2).flatten(1, 2)
        return cls(
            features=place(normal(n, problem.channels, problem.height, problem.width)).requires_grad_(),
            masks=place(masks).requires_grad_(),
            grad_output=place(normal(n, problem.channels, height, width)),
        )


@dataclass(frozen=True)
class Call:
    """A peer made ready for one problem.

    Attributes:
        forward: computes the output.
        wrt: the tensors whose gradients the backward pass computes.
    """

    forward: Callable[[], Tensor]
    wrt: tuple[Tensor, ...]


@dataclass(frozen=True)
class Peer:
    """One way to upsample.

    Attributes:
        name: how the command line and the tables call it.
        description: one line.
        setup: makes it ready; not part of any timing.
        equal: whether it computes CARAFE's function; if so its results are checked before it is timed.
        unavailable: says why it cannot run on a problem; None where it can.
    """

    name: str
    description: str
    setup: Callable[[Problem, Inputs], Call]
    equal: bool = True
    unavailable: Callable[[Problem], str | None] = lambda problem: None


def unfold_einsum(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, up: int) -> Tensor:
    """Unfolds every source neighbourhood once and contracts it with the up^2 kernels that share it."""
    n, c, h, w = features.shape
    taps = kernel_size**2
    neighbours = F.unfold(features, kernel_size, padding=kernel_size // 2)
    neighbours = neighbours.view(n, group_size, c // group_size, taps, h, w)
    kernels = masks.view(n, group_size, taps, h, up, w, up)
    return torch.einsum("ngcthw,ngthiwj->ngchiwj", neighbours, kernels).reshape(n, c, h * up, w * up)


def upsample_unfold(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, up: int) -> Tensor:
    """Repeats every pixel first, then unfolds with a dilation of `up`: the form found in forks of YOLO."""
    n, c, h, w = features.shape
    taps, size = kernel_size**2, (h * up, w * up)
    repeated = F.interpolate(features, scale_factor=up, mode="nearest")
    neighbours = F.unfold(repeated, kernel_size, dilation=up, padding=kernel_size // 2 * up)
    neighbours = neighbours.view(n, group_size, c // group_size, taps, *size)
    kernels = masks.view(n, group_size, taps, *size)
    return torch.einsum("ngcthw,ngthw->ngchw", neighbours, kernels).reshape(n, c, *size)


def shifted_madd(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, up: int) -> Tensor:
    """Adds k^2 shifted copies of the repeated features, each times its weights.

    Of several ways to write it in PyTorch, eager and compiled, this one was the fastest: rows stay contiguous because
    pixels are repeated once beforehand, and one buffer accumulates in place.
    """
    n, c, h, w = features.shape
    height, width = h * up, w * up
    padded = F.pad(features, (kernel_size // 2,) * 4)
    repeated = F.interpolate(padded, scale_factor=up, mode="nearest")
    repeated = repeated.view(n, group_size, c // group_size, *repeated.shape[2:])
    kernels = masks.view(n, group_size, 1, kernel_size**2, height, width)
    output = features.new_zeros(n, group_size, c // group_size, height, width)
    for tap in range(kernel_size**2):
        top, left = tap // kernel_size * up, tap % kernel_size * up
        output.addcmul_(repeated[..., top : top + height, left : left + width], kernels[:, :, :, tap])
    return output.view(n, c, height, width)


Reassembly = Callable[[Tensor, Tensor, int, int, int], Tensor]


def _reassembly(function: Reassembly, problem: Problem, inputs: Inputs) -> Call:
    features, masks = inputs.features, inputs.masks
    geometry = problem.kernel_size, problem.group_size, problem.up
    return Call(lambda: function(features, masks, *geometry), (features, masks))


def _compiled(function: Reassembly, problem: Problem, inputs: Inputs) -> Call:
    import torch._inductor.config

    # Otherwise a pool of idle compiler processes starts beside the measurement.
    torch._inductor.config.compile_threads = 1
    torch._dynamo.reset()  # each problem gets a graph of its own, never one made general by the sizes before
    return _reassembly(torch.compile(function, fullgraph=True, dynamic=False), problem, inputs)


def _mmcv(problem: Problem, inputs: Inputs) -> Call:
    from mmcv.ops import carafe as mmcv_carafe

    return _reassembly(mmcv_carafe, problem, inputs)


def _mmcv_unavailable(problem: Problem) -> str | None:
    if torch.device(problem.device).type != "cuda":
        return "mmcv has this operator for CUDA alone"
    if problem.taps * problem.group_size > 384:
        return "mmcv's kernel writes past its shared memory when kernel_size^2 * group_size exceeds 384"
    try:
        import mmcv.ops  # noqa: F401
    except ImportError as error:
        return f"mmcv's operators cannot be imported ({error})"
    return None


def _interpolation(mode: str, problem: Problem, inputs: Inputs) -> Call:
    def forward() -> Tensor:
        return F.interpolate(inputs.features, scale_factor=problem.up, mode=mode)

    return Call(forward, (inputs.features,))


def _deconvolution(problem: Problem, inputs: Inputs) -> Call:
    c, up = problem.channels, problem.up
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(c, c, up, up, generator=generator) / (c * up * up) ** 0.5
    weight = weight.to(inputs.features).requires_grad_()
    return Call(lambda: F.conv_transpose2d(inputs.features, weight, stride=up), (inputs.features, weight))


OURS = Peer("carafe", "carafe_plugin's operator", functools.partial(_reassembly, carafe))
PEERS: tuple[Peer, ...] = (
    Peer("unfold-einsum", "unfold, then einsum", functools.partial(_reassembly, unfold_einsum)),
    Peer("upsample-unfold", "nearest, dilated unfold, then einsum", functools.partial(_reassembly, upsample_unfold)),
    Peer("shifted-madd", "k^2 shifted multiply-adds", functools.partial(_reassembly, shifted_madd)),
    Peer("shifted-madd-compiled", "the same under torch.compile", functools.partial(_compiled, shifted_madd)),
    Peer("mmcv", "mmcv's CUDA operator", _mmcv, unavailable=_mmcv_unavailable),
    Peer("nearest", "nearest interpolation", functools.partial(_interpolation, "nearest"), equal=False),
    Peer("bilinear", "bilinear interpolation", functools.partial(_interpolation, "bilinear"), equal=False),
    Peer("deconvolution", "deconvolution, stride and kernel = scale", _deconvolution, equal=False),
)
