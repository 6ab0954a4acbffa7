"""Measures the modules, kernel prediction included, beside the same in PyTorch and other up- and downsamplers.

For each shape: forward, and a training step's forward + backward (to the features and all parameters), the parameters,
peak additional memory, and what autograd keeps between the two. `pack-...` are the module as mmcv's CARAFEPack is built
(channel compressor, content encoder, pixel shuffle, softmax, reassembly), with reassembly in several forms and with our
module's weights: their results are compared with ours before they are timed. Peers take turns.

    python -m benchmarks.module --json result.json --plot result.png

Exit code: 0; 1 when ours fails or a peer's result differs from ours; 2 for arguments that do not fit.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks import options, report
from benchmarks.peers import OTHERS, Reassembly, mmcv, shifted_madd, unfold_einsum
from benchmarks.problem import Call, Inputs, Peer, Problem, shuffle_and_softmax
from benchmarks.runner import TOLERANCES, is_sound
from carafe_plugin import CARAFEDownsample, CARAFEUpsample
from carafe_plugin.modules.kernel_prediction import KernelPrediction

# A gradient of the encoder's weights sums over every location, where one of the operator sums over hundreds.
TOLERANCE = {dtype: 10 * tolerance for dtype, tolerance in TOLERANCES.items()}


class ModuleProblem(Problem):
    """A problem whose bound counts the two convolutions of kernel prediction too, at their default sizes."""

    def _convolution_flop(self) -> int:
        compressed = 64 if self.up > 1 else 16
        features, kernels, _ = self.elements()
        return 2 * compressed * features + 2 * compressed * 9 * kernels

    def flop(self, backward: bool) -> int:
        """Those of the reassembly and of the convolutions, whose gradients cost twice the forward pass as well."""
        return super().flop(backward) + self._convolution_flop() * (3 if backward else 1)


class Pack(nn.Module):
    """Kernel prediction and reassembly as mmcv's CARAFEPack chains them, with the weights of one of our modules."""

    def __init__(self, ours: KernelPrediction, reassembly: Reassembly) -> None:
        super().__init__()
        self.predict = nn.Sequential(*filter(None, (ours.channel_compressor, ours.content_encoder)))
        self.geometry = ours.kernel_size, ours.group_size, ours.up, ours.down
        self.reassembly = reassembly

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H * up / down, W * up / down)."""
        masks = shuffle_and_softmax(self.predict(features), *self.geometry[:3])
        return self.reassembly(features, masks, *self.geometry)


def our_module(problem: Problem) -> KernelPrediction:
    """Our module for a problem, its weights drawn with a fixed seed, and large enough that kernels differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module: KernelPrediction
        if problem.down > 1:
            module = CARAFEDownsample(
                problem.channels, problem.down, down_kernel=problem.kernel_size, down_group=problem.group_size
            )
        else:
            module = CARAFEUpsample(
                problem.channels, problem.up, up_kernel=problem.kernel_size, up_group=problem.group_size
            )
        nn.init.normal_(module.content_encoder.weight, std=0.05)
    return module.to(problem.device, problem.dtype)


def _call(module: nn.Module, inputs: Inputs) -> Call:
    parameters = tuple(module.parameters())
    return Call(lambda: module(inputs.features), (inputs.features, *parameters), parameters=parameters)


def _ours(problem: Problem, inputs: Inputs) -> Call:
    return _call(our_module(problem), inputs)


def _pack(reassembly: Reassembly, problem: Problem, inputs: Inputs) -> Call:
    return _call(Pack(our_module(problem), reassembly), inputs)


def _pack_compiled(problem: Problem, inputs: Inputs) -> Call:
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1  # as in bench.peers
    torch._dynamo.reset()
    module = Pack(our_module(problem), shifted_madd)
    compiled = torch.compile(module, fullgraph=True, dynamic=False)
    return dataclasses.replace(_call(module, inputs), forward=lambda: compiled(inputs.features))


def _pack_mmcv(problem: Problem, inputs: Inputs) -> Call:
    return _pack(mmcv.reassembly(), problem, inputs)


OURS = (Peer("carafe", "ours: CARAFEUpsample or CARAFEDownsample", _ours, "carafe"),)
PEERS = (
    Peer("pack-unfold", "CARAFEPack with unfold, then einsum", functools.partial(_pack, unfold_einsum), "carafe"),
    Peer("pack-shifted", "CARAFEPack with shifted multiply-adds", functools.partial(_pack, shifted_madd), "carafe"),
    Peer("pack-compiled", "the same under torch.compile", _pack_compiled, "carafe", compiles=True),
    Peer("pack-mmcv", "CARAFEPack with mmcv's CUDA operator", _pack_mmcv, "carafe", unavailable=mmcv.unavailable),
    *OTHERS,
)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; exits with code 2 and one clear line when something in it does not fit."""
    parser = options.make_parser(
        "module", "Measure the modules, kernel prediction included, beside others.", (*OURS, *PEERS)
    )
    options.add_mmcv_option(parser)
    parsed = parser.parse_args(arguments)
    options.check(parser, parsed)
    mmcv.source = options.find_mmcv_source(parser, parsed.mmcv_source)
    parsed.peers = options.choose_peers(parser, parsed, PEERS)
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parsed = parse_arguments(arguments)
    record = options.new_report("module", parsed, arguments)
    report.print_header(record)
    problems = [ModuleProblem(**vars(problem)) for problem in options.problems(parsed)]
    how = dataclasses.replace(options.engine_options(parsed), tolerances=TOLERANCE)
    record["results"] = options.measure_peers(problems, OURS, parsed.peers, how)
    options.write_json(parsed, record)
    if parsed.plot:
        report.plot(record, parsed.plot)
    return 0 if all(map(is_sound, record["results"])) else 1


if __name__ == "__main__":
    sys.exit(main())
