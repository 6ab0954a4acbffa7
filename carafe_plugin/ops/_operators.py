"""The three operators, once: the table, and of each entry the kernels in Python, the fake kernel and the FLOPs.

``carafe`` and its two gradients are the partial derivatives of one trilinear form (:mod:`.reference`), so that three
operators give every order of derivative. Each takes kernels and a normaliser: masks with ``normalizer=0``, or the
content encoder's logits with the number of their normaliser.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _mmcv, reference
from .functional import check_kernels, check_maps
from .reference import NONE

NORMALIZERS = ("none", *reference.NORMALIZERS)  #: by number; csrc/common/operators.h has the same


class Call(NamedTuple):
    """An operator's arguments: tensors by name, the shape of the features, the output's size, and the geometry."""

    tensors: dict[str, Tensor]
    features: Sequence[int]
    wanted: Sequence[int | None]  # (H', W') of the output, the first rows and columns; None is all of them
    k: int
    g: int
    up: int
    down: int
    normalizer: int = NONE  # the dispatcher leaves out the default

    @property
    def whole(self) -> tuple[int, int]:
        """The size of the whole output."""
        height, width = (reference.output_size(length, self.up, self.down) for length in self.features[2:])
        return height, width

    @property
    def outputs(self) -> tuple[int, ...]:
        """The size of what is wanted."""
        return tuple(most if length is None else length for length, most in zip(self.wanted, self.whole, strict=True))

    @property
    def cropped(self) -> Sequence[int] | None:
        """The output's size, where it is not all that is wanted."""
        return None if self.outputs == self.whole else self.outputs

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Those that the form's three tensors have to have."""
        n, c, h, w = self.features
        phases, coarse = (1, self.outputs) if self.normalizer == NONE or self.up == 1 else (self.up, (h, w))
        kernels = (n, self.g * self.k**2 * phases**2, *coarse)
        return {"features": (n, c, h, w), "kernels": kernels, "grad_output": (n, c, *self.outputs)}


@dataclass(frozen=True)
class Operator:
    """The derivative of the trilinear form with respect to ``features``, ``kernels`` or ``grad_output``.

    Attributes:
        name (str): in torch's namespace ``carafe_plugin``.
        computes (str): with respect to which of the three; the derivative to ``grad_output`` is the rescaled map.
        tensors (tuple[str, ...]): those of the three that it takes, its first arguments.
        like (str): the tensor that its result has the dtype and the memory format of.
        sizes (tuple[str, ...]): arguments between the tensors and the geometry, where no tensor tells the size.
    """

    name: str
    computes: str
    tensors: tuple[str, ...]
    like: str
    sizes: tuple[str, ...] = ()

    @property
    def schema(self) -> str:
        """Its arguments and result; csrc/registration.cpp has the same."""
        arguments = [f"Tensor {name}" for name in self.tensors] + [f"SymInt {name}" for name in self.sizes]
        geometry = "int kernel_size, int group_size, int up, int down, int normalizer=0"
        if self.computes == "grad_output":  # then no tensor tells how much of it is wanted; all by default
            geometry += ", SymInt? out_height=None, SymInt? out_width=None"
        return f"({', '.join(arguments)}, {geometry}) -> Tensor"

    def __call__(self, *arguments: Any) -> Tensor:
        """Call it through the dispatcher."""
        return getattr(torch.ops.carafe_plugin, self.name).default(*arguments)

    def parse(self, arguments: Sequence[Any]) -> Call:
        """The arguments of a call by their names."""
        tensors, rest = self.tensors_of(arguments), arguments[len(self.tensors) :]
        if self.computes == "features":
            shape = tensors["grad_output"].shape
            return Call(tensors, (*shape[:2], *rest[:2]), shape[2:], *rest[2:])
        features = tensors["features"].shape
        if self.computes == "kernels":
            return Call(tensors, features, tensors["grad_output"].shape[2:], *rest)
        return Call(tensors, features, (*rest[5:], None, None)[:2], *rest[:5])

    def tensors_of(self, arguments: Sequence[Any]) -> dict[str, Tensor]:
        """The tensors of a call by their names; a RuntimeError where one is missing."""
        tensors = dict(zip(self.tensors, arguments, strict=False))
        for name, tensor in tensors.items():
            if tensor is None:  # the dispatcher admits it, as a tensor that is not defined
                raise RuntimeError(f"{name} must be a torch.Tensor, got NoneType")
        return tensors

    def by_reference(self, *arguments: Any) -> Tensor:
        """What computes it where nothing compiled does."""
        return self._compute(self.parse(arguments), reference)

    def by_mmcv(self, *arguments: Any) -> Tensor:
        """The same by mmcv's kernel where that serves."""
        call = self.parse(arguments)
        _check(call)
        masks = call._replace(wanted=call.whole, normalizer=NONE).shapes()["kernels"]
        serves = _mmcv.serves(arguments[0], prod(masks), call.k, call.g, call.down)
        return self._compute(call, _mmcv if serves else reference)

    def _compute(self, call: Call, module: Any) -> Tensor:
        _check(call)
        tensors, size, _, k, g, up, down, number = call
        kernels, normalizer = tensors["kernels"], NORMALIZERS[number]
        if self.computes == "kernels":
            result = module.grad_masks(tensors["grad_output"], tensors["features"], k, g, up, down)
            if number != NONE:
                result = reference.grad_logits(result, kernels, k, g, up, normalizer)
        else:
            masks = kernels
            if number != NONE:
                masks = reference.crop(reference.masks_from_logits(kernels, k, g, up, down, normalizer), call.cropped)
            if self.computes == "features":
                result = module.grad_features(tensors["grad_output"], masks, *size[2:], k, g, up, down)
            else:
                result = module.reassemble(tensors["features"], masks, k, g, up, down)
        return result.contiguous(memory_format=_memory_format(tensors[self.like]))

    def fake(self, *arguments: Any) -> Tensor:
        """Its result without values."""
        call = self.parse(arguments)
        _check_numbers(call)
        like = call.tensors[self.like]
        shape = like.shape if self.computes == self.like else call.shapes()[self.computes]
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=_memory_format(like))

    def flops(self, *arguments: Any, out_shape: Any = None, **_: Any) -> int:
        """N * C * H' * W' * k^2 multiply-adds, two FLOPs each as in a convolution; the normaliser counts nothing."""
        output = out_shape if self.computes == "grad_output" else arguments[0]
        return 2 * prod(output) * arguments[len(self.tensors) + len(self.sizes)] ** 2


_TABLE = (
    Operator("carafe", "grad_output", ("features", "kernels"), like="features"),
    Operator("_carafe_grad_features", "features", ("grad_output", "kernels"), "grad_output", ("height", "width")),
    Operator("_carafe_grad_kernels", "kernels", ("grad_output", "features", "kernels"), like="kernels"),
)
OPERATORS = {operator.computes: operator for operator in _TABLE}  #: by the tensor of the form


def _check(call: Call) -> None:
    """What callers of torch.ops are told, as csrc/arguments.h does for the compiled kernels."""
    _check_numbers(call)
    tensors, features, _, k, _, up, down, _ = call
    if k >= 2**15 or max(up, down, *features[2:]) >= 2**31:  # beyond it, products of two do not fit into 64 bits
        raise RuntimeError(
            "kernel_size must be at most 32767, up, down, height and width at most 2147483647, "
            f"got {', '.join(map(str, (k, up, down, *features[2:])))}"
        )
    if not all(0 <= length <= most for length, most in zip(call.outputs, call.whole, strict=True)):
        sizes = (" x ".join(map(str, size)) for size in (call.whole, call.outputs))
        raise RuntimeError(
            "the output (out_height x out_width, or grad_output) must be of at most {}, got {}".format(*sizes)
        )
    expected = call.shapes()
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            raise RuntimeError(f"{name} must have shape {expected[name]}, got {tuple(tensor.shape)}")


def _check_numbers(call: Call) -> None:
    """What of it asks for no size of a map, so that tracing with sizes that are symbols is told too."""
    tensors, features, _, k, g, up, down, normalizer = call
    try:
        check_maps(tensors)
        check_kernels(features[1], k, g)
    except (TypeError, ValueError) as error:
        raise RuntimeError(str(error)) from error
    for what, must in (("dtype", "have the same dtype"), ("device", "be on the same device")):
        found = [getattr(tensor, what) for tensor in tensors.values()]
        if len(set(found)) > 1:
            got = " and ".join(str(each).removeprefix("torch.") for each in found)
            raise RuntimeError(f"{' and '.join(tensors)} must {must}, got {got}")
    if up < 1 or down < 1:
        raise RuntimeError(f"up and down must be at least 1, got {up} and {down}")
    if not NONE <= normalizer < len(NORMALIZERS):
        raise RuntimeError(f"normalizer must be 0, 1, 2 or 3, got {normalizer}")


def _memory_format(maps: Tensor) -> torch.memory_format:
    """That of results computed from ``maps``; one that is both counts as contiguous (arguments.h has the same rule)."""
    channels_last = maps.is_contiguous(memory_format=torch.channels_last) and not maps.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format
