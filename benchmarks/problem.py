"""What is compared: a size, the tensors of that size, and the ways to rescale them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """One size to measure: features (batch, channels, height, width), rescaled by the integer `up` or by 1/`down`."""

    channels: int
    height: int
    width: int
    batch: int = 1
    kernel_size: int = 5
    group_size: int = 1
    up: int = 2
    down: int = 1
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    # The largest difference from ours, relative to ours' largest value, that rounding explains: peers add 25 products
    # (a gradient: hundreds) in the dtype itself, ours accumulates in float32.
    tolerances: ClassVar = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}

    @property
    def geometry(self) -> tuple[int, int, int, int]:
        """What a reassembly is told besides its tensors: kernel size, groups, `up` and `down`."""
        return self.kernel_size, self.group_size, self.up, self.down

    @property
    def taps(self) -> int:
        """Source locations that one output element sums: k^2."""
        return self.kernel_size**2

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the rescaled map, H' = ceil(H * up / down)."""
        return -(-self.height * self.up // self.down), -(-self.width * self.up // self.down)

    def elements(self) -> tuple[int, int, int]:
        """Elements of the features, the kernels (as masks or as the content encoder's output) and the output."""
        source, target = self.height * self.width, self.output_size[0] * self.output_size[1]
        kernels = self.group_size * self.taps * target
        return self.batch * self.channels * source, self.batch * kernels, self.batch * self.channels * target

    def flop(self, backward: bool) -> int:
        """A multiply and an add for each tap, as many again for each gradient; the normaliser's few are left out."""
        return 2 * self.taps * self.elements()[2] * (3 if backward else 1)

    def traffic(self, backward: bool) -> int:
        """Bytes that must move when each tensor is read or written once a direction, the same from masks and logits."""
        features, kernels, output = self.elements()
        # Forward reads features and kernels and writes the output. Backward reads the output's gradient and both
        # inputs again, and writes two gradients.
        elements = features + kernels + output + (output + 2 * features + 2 * kernels if backward else 0)
        return elements * self.dtype.itemsize

    def needed_memory(self, backward: bool) -> int:
        """Bytes that peak memory is compared with: output and masks or, with backward, output and both gradients."""
        features, kernels, output = self.elements()
        return (output + kernels + (features if backward else 0)) * self.dtype.itemsize


@dataclass(frozen=True)
class Inputs:
    """The tensors that every peer is given; those that a peer differentiates require grad."""

    features: Tensor  # (N, C, H, W)
    masks: Tensor  # (N, G * k^2, H', W'): the kernels that `logits` stand for
    logits: Tensor  # the content encoder's output: (N, G * k^2 * up^2, H, W), or (N, G * k^2, H', W') downsampling
    grad_output: Tensor  # (N, C, H', W'): what backward starts from

    @classmethod
    def random(cls, problem: Problem, seed: int = 0) -> Inputs:
        """Draws inputs for `problem`, the same ones for the same seed on every device."""
        draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed))
        n, c, g, up = problem.batch, problem.channels, problem.group_size, problem.up
        height, width = problem.output_size
        logits = draw(n, g * problem.taps * up**2, height // up, width // up)
        features, grad_output = draw(n, c, problem.height, problem.width), draw(n, c, height, width)
        masks = shuffle_and_softmax(logits, problem.kernel_size, g, up)
        tensors = [tensor.to(problem.device, problem.dtype) for tensor in (features, masks, logits, grad_output)]
        for tensor in tensors[:3]:
            tensor.requires_grad_()
        return cls(*tensors)


def shuffle_and_softmax(logits: Tensor, kernel_size: int, group_size: int, up: int) -> Tensor:
    """The two steps between content encoder and reassembly, as mmcv and the copies of it write them."""
    shuffled = F.pixel_shuffle(logits, up)
    n, _, h, w = shuffled.shape
    return shuffled.view(n, group_size, kernel_size**2, h, w).softmax(2).view(shuffled.shape)


@dataclass(frozen=True)
class Call:
    """A peer made ready for one problem."""

    forward: Callable[[], Tensor]
    wrt: tuple[Tensor, ...]  # what backward computes gradients of
    grad_output: Tensor | None = None  # None for that of the inputs; set where dtype or layout differ
    parameters: tuple[Tensor, ...] = ()  # learnt values among `wrt`


Setup = Callable[[Problem, Inputs], Call]


@dataclass(frozen=True)
class Peer:
    """One way to rescale a map.

    `reference` names the peer that computes the same function of the same inputs: results are compared with its results
    before anything is timed, and times with its times. It is the peer's own name for ours.
    """

    name: str
    description: str
    setup: Setup  # not part of any timing
    reference: str
    equal: bool = True  # False for one that computes another function, of which only times are compared
    compiles: bool = False  # whether its first call also compiles, and its time says nothing of the others
    variant: bool = False  # whether it is ours too, in another layout or dtype
    dtype: torch.dtype | None = None  # of its results and inputs, where that is not the problem's
    unavailable: Callable[[Problem], str | None] = lambda problem: None  # why it cannot run; None where it can

    @property
    def is_ours(self) -> bool:
        """Whether the others are compared with it."""
        return self.name == self.reference
