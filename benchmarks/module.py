"""Measures the modules, kernel prediction included, beside the same in PyTorch and other up- and downsamplers.

For each shape: forward, and a training step's forward + backward (to the features and all parameters), the parameters,
peak additional memory, and what autograd keeps between the two. `pack-...` are the module as mmcv's CARAFEPack is built
(channel compressor, content encoder, pixel shuffle, softmax, reassembly), with reassembly in several forms and with our
module's weights: their results are compared with ours before they are timed. Peers take turns.

    python -m benchmarks.module --json result.json --plot result.png

Exit code: 0; 1 when ours fails or a peer's result differs from ours; 2 for invalid arguments.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])
from benchmarks import command, report
from benchmarks.comparison import Call, Comparison, Inputs, Peer, Problem
from benchmarks.peers import OTHERS, Reassembly, in_steps, mmcv, of_module, only_upsamples, shifted_madd, unfold_einsum
from carafe_plugin import CARAFEDownsample, CARAFEUpsample
from carafe_plugin.modules.carafe import KernelPrediction
from carafe_plugin.modules.guided import FADE, SAPA, FreqFusion
from carafe_plugin.modules.rivals import DLU, DySample


class ModuleProblem(Problem):
    """A problem whose bound counts the two convolutions of kernel prediction too, at their default sizes."""

    # A gradient of the encoder's weights sums over every location, where one of the operator sums over hundreds.
    tolerances = {dtype: 10 * tolerance for dtype, tolerance in Problem.tolerances.items()}

    def flop(self, backward: bool) -> int:
        """Those of the reassembly and of the convolutions, whose gradients cost twice the forward pass as well."""
        compressed = 64 if self.up > 1 else 16
        features, kernels, _ = self.elements()
        convolutions = 2 * compressed * features + 2 * compressed * 9 * kernels
        return super().flop(backward) + convolutions * (3 if backward else 1)


class Pack(nn.Module):
    """Kernel prediction and reassembly as mmcv's CARAFEPack chains them, with the weights of one of our modules."""

    def __init__(self, ours: KernelPrediction, reassembly: Reassembly) -> None:
        super().__init__()
        self.predict = nn.Sequential(*filter(None, (ours.channel_compressor, ours.content_encoder)))
        self.geometry = ours.kernel_size, ours.group_size, ours.up, ours.down
        self.reassembly = in_steps(reassembly)

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H * up / down, W * up / down)."""
        return self.reassembly(features, self.predict(features), *self.geometry)


def our_module(problem: Problem) -> KernelPrediction:
    """Our module for a problem, its weights large enough that kernels differ."""
    kernel_size, group_size, up, down = problem.geometry
    module: KernelPrediction
    if down > 1:
        module = CARAFEDownsample(problem.channels, down, down_kernel=kernel_size, down_group=group_size)
    else:
        module = CARAFEUpsample(problem.channels, up, up_kernel=kernel_size, up_group=group_size)
    nn.init.normal_(module.content_encoder.weight, std=0.05)
    return module


def _pack(name: str, description: str, prepare: Callable[[], Reassembly], **others: Any) -> Peer:
    return of_module(name, description, lambda problem: Pack(our_module(problem), prepare()), **others)


class Guided(nn.Module):
    """A guided upsampler as a module of one map: the encoder's, (N, C, H', W'), is drawn with it."""

    def __init__(self, upsampler: nn.Module, problem: Problem) -> None:
        super().__init__()
        self.encoder_features = nn.Parameter(torch.randn(problem.batch, problem.channels, *problem.output_size))
        self.upsampler = upsampler

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H * up, W * up)."""
        return self.upsampler(features, self.encoder_features)


def _rival(name: str, description: str, kind: Callable[[int, int], nn.Module]) -> Peer:
    if not getattr(kind, "guided", False):
        return of_module(name, description, lambda problem: kind(problem.channels, problem.up), **_RIVAL)
    peer = of_module(name, description, lambda problem: Guided(kind(problem.channels, problem.up), problem), **_RIVAL)

    def setup(problem: Problem, inputs: Inputs) -> Call:
        call = peer.setup(problem, inputs)
        return dataclasses.replace(call, parameters=call.parameters[1:])  # the encoder's map is none

    return dataclasses.replace(peer, setup=setup)


_RIVAL: dict[str, Any] = dict(equal=False, unavailable=only_upsamples)
RIVALS = (
    _rival("dysample", "DySample: bilinear at predicted points", DySample),
    _rival("dysample+", "the same with a dynamic scope", functools.partial(DySample, dynamic_scope=True)),
    _rival(
        "dysample-s+", "the same after a pixel shuffle", functools.partial(DySample, style="pl", dynamic_scope=True)
    ),
    _rival("dlu", "DLU: kernels sampled from a small map of them", DLU),
    _rival("fade", "FADE: kernels from both maps, and a gate", FADE),
    _rival("sapa", "SAPA-B: kernels by similarity to the encoder's map", SAPA),
    _rival("freqfusion", "FreqFusion: low-pass, offsets, and the encoder's high-pass", FreqFusion),
)
OURS = (of_module("carafe", "ours: CARAFEUpsample or CARAFEDownsample", our_module),)
PEERS = (
    _pack("pack-unfold", "CARAFEPack with unfold, then einsum", lambda: unfold_einsum),
    _pack("pack-shifted", "CARAFEPack with shifted multiply-adds", lambda: shifted_madd),
    _pack("pack-compiled", "the same under torch.compile", lambda: shifted_madd, compiles=True),
    _pack("pack-mmcv", "CARAFEPack with mmcv's CUDA operator", mmcv.reassembly, unavailable=mmcv.unavailable),
    *OTHERS,
    *RIVALS,
)
SAMPLED = {torch.ops.aten.grid_sampler_2d: lambda *shapes, out_shape=None, **_: 8 * torch.Size(out_shape).numel()}


def count_flop(forward: Callable[[], Tensor]) -> int:
    """FLOPs of a forward pass: torch's counter, which leaves out sampling, whose four taps are added."""
    counter = FlopCounterMode(display=False, custom_mapping=SAMPLED)
    with counter:  # with gradients on: its tracker of modules fails on a view of what requires them, made without
        forward()
    return counter.get_total_flops()


class ModuleComparison(Comparison):
    """A comparison that counts FLOPs besides, of peers that do not compile; what a failed one has is not known."""

    def run(self) -> dict[str, Any]:
        """Returns the record, with the ``flop`` of a peer's forward pass."""
        result = super().run()
        print(f"{report.shape_title(result['shape'])}, FLOPs of a forward pass")
        for peer, record in self.records.items():
            if record["forward"].get("status") == "ok" and not peer.compiles:
                with self._guard({}):  # a foreign operator, of which the counter may know nothing
                    record["flop"] = count_flop(self.calls[peer].forward)
                    print(f"  {peer.name:22} {record['flop'] / 1e9:8.3f} G")
        return result


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; exits with code 2 and one clear line when an argument is invalid."""
    description = "Measure the modules, kernel prediction included, beside others."
    return command.parse(command.make_parser("module", description, OURS, PEERS, ModuleProblem), arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    options = parse_arguments(arguments)
    options.comparison = functools.partial(ModuleComparison, **options.comparison.keywords)
    return command.compare(options)


if __name__ == "__main__":
    sys.exit(main())
