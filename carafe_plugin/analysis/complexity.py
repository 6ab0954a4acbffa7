"""FLOPs and parameters of models that contain CARAFE++, by MMEngine's analyser.

MMEngine counts a multiply-add as one FLOP (torch's ``FlopCounterMode`` as two). Of operators that it does not know it
counts nothing, and ``get_model_complexity_info`` takes no handles: :func:`count` gives its analyser those of the
reassembly, and of MMCV's modulated deformable convolution, which the paper's recipe stands beside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from carafe_plugin._require import require
from carafe_plugin.modules.carafe import KernelPrediction

require("mmengine", __name__)

from mmengine.analysis import FlopAnalyzer  # noqa: E402

_SETTINGS = ("channels", "kernel_size", "encoder_kernel", "group_size", "compressed_channels", "normalizer")
# Of PyTorch's own operators that MMEngine does not count, the two that are not small.
_ATTENTION = ("aten::scaled_dot_product_attention", "aten::_native_multi_head_attention")


@dataclass(frozen=True)
class Complexity:
    """What :func:`count` found, by the names of modules, their children included; ``""`` is the whole model.

    FLOPs are multiply-adds; ``uncounted`` says how often operators of weight without a count ran: those that are not
    PyTorch's own, and PyTorch's attention; ``idle`` modules did not run.
    """

    flops: dict[str, int]
    parameters: dict[str, int]
    uncounted: dict[str, int]
    idle: frozenset[str]


@dataclass(frozen=True)
class Site:
    """One CARAFE++ of a model: where it is, its settings in the paper's terms, and what it costs.

    ``direction`` is ``"up"`` or ``"down"`` and ``scale`` how many times larger or smaller the map becomes, such as
    ``"2"`` or ``"3/2"``; ``share`` is of the whole model's FLOPs, and ``runs`` whether the forward pass came by.
    """

    name: str
    direction: str
    scale: str
    channels: int
    kernel_size: int
    encoder_kernel: int
    group_size: int
    compressed_channels: int | None
    normalizer: str
    parameters: int
    flops: int
    share: float
    runs: bool


def add_handles(analyzer: FlopAnalyzer) -> FlopAnalyzer:
    """Teach one of MMEngine's FLOP analysers what the reassembly costs; returns the analyser.

    Example:
        >>> import torch
        >>> from mmengine.analysis import FlopAnalyzer
        >>> from carafe_plugin import CARAFEUpsample
        >>> analyzer = add_handles(FlopAnalyzer(CARAFEUpsample(256), (torch.rand(1, 256, 1, 1),)))
        >>> analyzer.unsupported_ops_warnings(False).by_operator()["carafe"]  # 4 locations, 25 taps
        25600
    """
    analyzer.set_op_handle("carafe_plugin::carafe", _reassembly)
    return analyzer.set_op_handle("prim::PythonOp.ModulatedDeformConv2dFunction", _deformable_convolution)


def _reassembly(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    kernel_size = inputs[2].toIValue()
    return Counter(carafe=prod(outputs[0].type().sizes()) * kernel_size**2)


def _deformable_convolution(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    batch, _, height, width = outputs[0].type().sizes()
    weight = inputs[3].type().sizes()  # after the features, the offsets and the modulation
    return Counter(conv=batch * height * width * prod(weight))


def count(model: nn.Module, inputs: Tensor, **arguments: Any) -> Complexity:
    """Count the FLOPs of one forward pass, and the parameters, of every module of a model, which is not changed.

    ``inputs`` is the first argument of the forward pass; the others go by name, of any type (``data_samples``,
    ``mode``). Biases, activations and the kernel normaliser's softmax do not count, as in MMEngine.

    Example:
        >>> import torch
        >>> from carafe_plugin import CARAFEDownsample
        >>> found = count(CARAFEDownsample(256), torch.rand(1, 256, 2, 2))
        >>> found.flops["content_encoder"], found.parameters[""]
        (3600, 7737)
    """
    forward = model.forward

    def traceable(inputs: Tensor) -> Any:
        # The tracer takes and returns tensors alone.
        leaves = pytree.tree_flatten(forward(inputs, **arguments))[0]
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor)) or inputs

    replaced = "forward" in vars(model)
    analyzer = add_handles(FlopAnalyzer(model, (inputs,)))
    analyzer.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    model.forward = traceable
    try:
        with torch.no_grad():
            flops = analyzer.by_module()
    finally:
        del model.forward
        if replaced:
            model.forward = forward
    foreign = {
        name.removeprefix("aten::"): number
        for name, number in analyzer.unsupported_ops().items()
        if not name.startswith("aten::") or name in _ATTENTION
    }
    return Complexity(
        flops={name: int(number) for name, number in flops.items()},
        parameters={name: sum(p.numel() for p in part.parameters()) for name, part in model.named_modules()},
        uncounted={name.removeprefix("prim::PythonOp."): number for name, number in sorted(foreign.items())},
        idle=frozenset(analyzer.uncalled_modules()),
    )


def carafe_sites(model: nn.Module, found: Complexity) -> Iterator[Site]:
    """Every CARAFE++ in ``model``, in the order of its modules, with what :func:`count` found for it."""
    for name, module in model.named_modules():
        if isinstance(module, KernelPrediction):
            scale = Fraction(module.up, module.down)
            yield Site(
                name=name,
                direction="up" if scale >= 1 else "down",
                scale=str(max(scale, 1 / scale)),
                **{setting: getattr(module, setting) for setting in _SETTINGS},
                parameters=found.parameters[name],
                flops=found.flops[name],
                share=found.flops[name] / max(1, found.flops[""]),
                runs=name not in found.idle,
            )
