"""The three operators, once: schema, reference, fake kernel, derivatives and FLOPs in one table, and its registration.

``carafe`` and its two gradients are the partial derivatives of one trilinear form (:mod:`.reference`), so that three
operators give every order of derivative. Each takes kernels and a normaliser: masks with ``normalizer=0``, or the
content encoder's logits with the number of their normaliser.

The dispatcher chooses what computes them. Python registers the reference for every device; where the libraries
``_C`` (CPU, schemas) and ``_C_cuda`` load, their kernels take precedence on these devices.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.utils import flop_counter

from . import _derivatives, _mmcv, reference
from ._autocast import cast_together
from ._compiled import chosen_backend, compiled_architectures, has_code_for, load, serving
from ._derivatives import NONE, NORMALIZERS, call

_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
# Device types on which autocast knows the operators, where torch has autocast for them.
_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "mps": "AutocastMPS", "xpu": "AutocastXPU"}

_libraries: list[Any] = []  # torch.library.Library: registrations last as long as they do


def normalizer_number(name: str) -> int:
    """How the operators number a kernel normaliser.

    Example:
        >>> normalizer_number("softmax")
        1
    """
    return NORMALIZERS.index(name)


# ------------------------------------------------------------------------------------------------- by the reference


def _masks(kernels: Tensor, k: int, g: int, up: int, down: int, normalizer: int) -> Tensor:
    if normalizer == NONE:
        return kernels
    return reference.masks_from_logits(kernels, k, g, up, down, NORMALIZERS[normalizer])


def _grad_kernels_from(grad_masks: Tensor, kernels: Tensor, k: int, g: int, up: int, normalizer: int) -> Tensor:
    if normalizer != NONE:
        grad_masks = reference.grad_logits(grad_masks, kernels, k, g, up, NORMALIZERS[normalizer])
    return _like(grad_masks, kernels)


def _carafe(features: Tensor, kernels: Tensor, k: int, g: int, up: int, down: int, normalizer: int = NONE) -> Tensor:
    _check_dtypes(features=features, kernels=kernels)
    masks = _masks(kernels, k, g, up, down, normalizer)
    return _like(reference.reassemble(features, masks, k, g, up, down), features)


def _grad_features(
    grad_output: Tensor,
    kernels: Tensor,
    height: int,
    width: int,
    k: int,
    g: int,
    up: int,
    down: int,
    normalizer: int = NONE,
) -> Tensor:
    _check_dtypes(grad_output=grad_output, kernels=kernels)
    masks = _masks(kernels, k, g, up, down, normalizer)
    return _like(reference.grad_features(grad_output, masks, height, width, k, g, up, down), grad_output)


def _grad_kernels(
    grad_output: Tensor, features: Tensor, kernels: Tensor, k: int, g: int, up: int, down: int, normalizer: int = NONE
) -> Tensor:
    _check_dtypes(grad_output=grad_output, features=features, kernels=kernels)
    grad_masks = reference.grad_masks(grad_output, features, k, g, up, down)
    return _grad_kernels_from(grad_masks, kernels, k, g, up, normalizer)


def _check_dtypes(**tensors: Tensor) -> None:
    if len({tensor.dtype for tensor in tensors.values()}) > 1:
        found = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
        raise RuntimeError(f"{' and '.join(tensors)} must have the same dtype, got {found}")


def _like(result: Tensor, source: Tensor) -> Tensor:
    return result.contiguous(memory_format=_memory_format(source))


def _memory_format(maps: Tensor) -> torch.memory_format:
    """That of results computed from ``maps``; one that is both counts as contiguous (arguments.h has the same rule)."""
    channels_last = maps.is_contiguous(memory_format=torch.channels_last) and not maps.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


# -------------------------------------------------------------------------------------------------- by mmcv's kernel


def _carafe_mmcv(features: Tensor, kernels: Tensor, *geometry: int) -> Tensor:
    k, g, up, down, _ = geometry = _complete(geometry)
    masks = _masks(kernels, *geometry)
    if not _mmcv.serves(features, masks, k, g, down):
        return _carafe(features, kernels, *geometry)
    return _like(_mmcv.reassemble(features, masks, k, g, up), features)


def _grad_features_mmcv(grad_output: Tensor, kernels: Tensor, height: int, width: int, *geometry: int) -> Tensor:
    k, g, up, down, _ = geometry = _complete(geometry)
    masks = _masks(kernels, *geometry)
    if not _mmcv.serves(grad_output, masks, k, g, down):
        return _grad_features(grad_output, kernels, height, width, *geometry)
    n, c, _, _ = grad_output.shape
    anything = grad_output.new_zeros((n, c, height, width))
    return _like(_mmcv.gradients(grad_output, anything, masks, k, g, up)[0], grad_output)


def _grad_kernels_mmcv(grad_output: Tensor, features: Tensor, kernels: Tensor, *geometry: int) -> Tensor:
    k, g, up, down, normalizer = geometry = _complete(geometry)
    masks = _masks(kernels, *geometry)
    if not _mmcv.serves(grad_output, masks, k, g, down):
        return _grad_kernels(grad_output, features, kernels, *geometry)
    grad_masks = _mmcv.gradients(grad_output, features, masks, k, g, up)[1]
    return _grad_kernels_from(grad_masks, kernels, k, g, up, normalizer)


def _complete(geometry: tuple[int, ...]) -> tuple[int, ...]:
    """k, G, up, down and the normaliser, which the dispatcher leaves out where it is the default."""
    return geometry if len(geometry) == 5 else (*geometry, NONE)


# ------------------------------------------------------------------------------------------------------------- fakes


def _empty_like(source: Tensor, *size: int) -> Tensor:
    return torch.empty(size, dtype=source.dtype, device=source.device, memory_format=_memory_format(source))


def _carafe_fake(features: Tensor, kernels: Tensor, k: int, g: int, up: int, down: int, normalizer: int = 0) -> Tensor:
    n, c, h, w = features.shape
    return _empty_like(features, n, c, reference.output_size(h, up, down), reference.output_size(w, up, down))


def _grad_features_fake(grad_output: Tensor, kernels: Tensor, height: int, width: int, *geometry: int) -> Tensor:
    return _empty_like(grad_output, grad_output.shape[0], grad_output.shape[1], height, width)


def _grad_kernels_fake(grad_output: Tensor, features: Tensor, kernels: Tensor, *geometry: int) -> Tensor:
    return _empty_like(kernels, *kernels.shape)


# --------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Operator:
    """An operator of this package.

    Attributes:
        name: in torch's namespace ``carafe_plugin``.
        schema: its arguments; csrc/registration.cpp has the same.
        reference: what computes it where nothing compiled does.
        mmcv: the same by mmcv's kernel where that serves.
        fake: its output without values.
        backward: from the output's gradient to those of the tensors.
        tangent: the terms of the output's tangent.
        tensors: how many tensors it takes; they come first.
        sizes: how many sizes (height and width) stand between the tensors and the geometry.
    """

    name: str
    schema: str
    reference: Callable[..., Tensor]
    mmcv: Callable[..., Tensor]
    fake: Callable[..., Tensor]
    backward: Callable[..., Any]
    tangent: Callable[..., Any]
    tensors: int
    sizes: int = 0


_GEOMETRY = "int kernel_size, int group_size, int up, int down, int normalizer=0"
OPERATORS = (
    Operator(
        "carafe",
        f"(Tensor features, Tensor kernels, {_GEOMETRY}) -> Tensor",
        _carafe,
        _carafe_mmcv,
        _carafe_fake,
        _derivatives.carafe_backward,
        _derivatives.carafe_tangent,
        tensors=2,
    ),
    Operator(
        "_carafe_grad_features",
        f"(Tensor grad_output, Tensor kernels, SymInt height, SymInt width, {_GEOMETRY}) -> Tensor",
        _grad_features,
        _grad_features_mmcv,
        _grad_features_fake,
        _derivatives.grad_features_backward,
        _derivatives.grad_features_tangent,
        tensors=2,
        sizes=2,
    ),
    Operator(
        "_carafe_grad_kernels",
        f"(Tensor grad_output, Tensor features, Tensor kernels, {_GEOMETRY}) -> Tensor",
        _grad_kernels,
        _grad_kernels_mmcv,
        _grad_kernels_fake,
        _derivatives.grad_kernels_backward,
        _derivatives.grad_kernels_tangent,
        tensors=3,
    ),
)


def multiply_adds(output: Sequence[int], kernel_size: int) -> int:
    """Multiply-adds of a reassembly, or of one of its two gradients.

    Args:
        output (Sequence[int]): shape of the reassembled map, (N, C, H', W').
        kernel_size (int): ``k``.

    Example:
        >>> multiply_adds((1, 256, 2, 2), kernel_size=5)  # what upsampling by 2 makes of one location
        25600
    """
    return prod(output) * kernel_size**2


def _flops(operator: Operator) -> Callable[..., int]:
    """Two for each multiply-add, as torch counts convolutions; the kernel normaliser counts nothing, as its softmax."""

    def count(*arguments: Any, **_: Any) -> int:
        shapes, geometry = arguments[: operator.tensors], _complete(arguments[operator.tensors + operator.sizes :])
        output = shapes[0]  # the gradient of the output, in the gradients
        if operator.name == "carafe":
            phases = 1 if geometry[4] == NONE else geometry[2]
            output = (*shapes[0][:2], *(phases * length for length in shapes[1][2:]))
        return 2 * multiply_adds(output, geometry[0])

    return count


# ------------------------------------------------------------------------------------------------------ registration


def _autograd(operator: Operator) -> Callable[..., Tensor]:
    """The kernel of the key Autograd; torch.library.register_autograd has no forward mode and drops tangents unsaid."""

    class Function(torch.autograd.function._SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Tensor:
            tensors, rest = arguments[: operator.tensors], arguments[operator.tensors :]
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)
            ctx.sizes, ctx.geometry = rest[: operator.sizes], _complete(rest[operator.sizes :])
            ctx.nothing = (None,) * len(rest)
            ctx.set_materialize_grads(False)
            # Both modes are off in here, and without them the other levels of torch.func's transforms would find
            # derivatives of zero.
            with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                return call(operator.name, *arguments)

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
            if grad is None:
                return (None,) * len(ctx.needs_input_grad)
            wanted = ctx.needs_input_grad[: operator.tensors]
            return *operator.backward(grad, ctx.saved_tensors, ctx.geometry, wanted), *ctx.nothing

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Tensor | None:
            given = tangents[: operator.tensors]
            primals = [forward_ad.unpack_dual(tensor).primal for tensor in ctx.saved_tensors]
            with forward_ad._set_fwd_grad_enabled(True):
                terms = list(operator.tangent(primals, given, ctx.geometry, *ctx.sizes))
            return functools.reduce(torch.add, terms) if terms else None

    Function.__name__ = Function.__qualname__ = operator.name

    def differentiate(*arguments: Any) -> Tensor:
        # Each transform of torch.func, as autograd itself, calls this kernel for a level of its own.
        with enable_single_level_autograd_function():
            return Function.apply(*arguments)  # type: ignore[attr-defined]

    return differentiate


def _autocast(operator: Operator, device_type: str) -> Callable[..., Tensor]:
    """Casts the tensors, then calls the operator below the autocast keys."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    for key in _autocast_keys().values():
        keys = keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(*arguments: Any) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            tensors = cast_together(arguments[: operator.tensors], device_type)
            return call(operator.name, *tensors, *arguments[operator.tensors :])

    return cast


def _autocast_keys() -> dict[str, str]:
    return {device: key for device, key in _AUTOCAST_KEYS.items() if hasattr(torch._C.DispatchKey, key)}


def _register() -> None:
    with_schemas = "cpu" in serving  # _C has defined them
    library = torch.library.Library("carafe_plugin", "FRAGMENT")
    _libraries.append(library)
    for operator in OPERATORS:
        if not with_schemas:
            library.define(operator.name + operator.schema)
        library.impl(operator.name, operator.reference, "CompositeExplicitAutograd")
        library.impl(operator.name, _autograd(operator), "Autograd")
        library.impl(operator.name, operator.fake, "Meta")  # torch.library.register_fake came with torch 2.4
        for device_type, key in _autocast_keys().items():
            library.impl(operator.name, _autocast(operator, device_type), key)
        packet = getattr(torch.ops.carafe_plugin, operator.name)
        if hasattr(flop_counter, "register_flop_formula"):
            flop_counter.register_flop_formula(packet)(_flops(operator))
        else:  # torch 2.1 has the table alone
            vars(flop_counter)["flop_mapping"][packet] = _flops(operator)
    if torch.version.cuda and "cuda" not in serving and chosen_backend() != "reference":
        for operator in OPERATORS:
            library.impl(operator.name, operator.mmcv, "CUDA")
    if "cuda" in serving:
        # Asking a GPU for its capability starts CUDA, which an import must not do: processes could not fork any more.
        torch.cuda._lazy_call(_check_gpus)


# --------------------------------------------------------------------------------------- GPUs without compiled code


def _check_gpus() -> None:
    """Let the reference serve the GPUs of this process that the binary has no code for, after one warning."""
    compiled = compiled_architectures()
    gpus = {index: torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    lacking = {index for index, capability in gpus.items() if not has_code_for(capability, compiled)}
    if not lacking:
        return
    named = ", ".join(f"{torch.cuda.get_device_name(index)} {gpus[index]}" for index in sorted(lacking))
    warnings.warn(
        f"carafe_plugin: the CUDA operators were compiled for sm_{', sm_'.join(map(str, compiled))}, so the slower "
        f"PyTorch reference serves on {named}; building the package with TORCH_CUDA_ARCH_LIST set mends it",
        stacklevel=2,
    )
    if len(lacking) == len(gpus):
        serving.discard("cuda")
    serve_by_reference("cuda", lacking)


def serve_by_reference(device_type: str, indices: set[int] | None = None) -> None:
    """Let the reference take the place of compiled kernels.

    Args:
        device_type (str): 'cpu' or 'cuda'.
        indices (set[int], optional): of the devices; None means all.
    """
    key = _DISPATCH_KEYS[device_type]
    library = torch.library.Library("carafe_plugin", "IMPL")
    _libraries.append(library)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\s*(Warning only once|Overriding a previously)")
        for operator in OPERATORS:
            library.impl(operator.name, _by_device(operator, key, indices), key, with_keyset=True, allow_override=True)


def _by_device(operator: Operator, key: str, indices: set[int] | None) -> Callable[..., Tensor]:
    compiled = torch.library.get_kernel(f"carafe_plugin::{operator.name}", key)

    def call(keys: Any, *arguments: Any) -> Tensor:
        if indices is None or arguments[0].device.index in indices:
            return operator.reference(*arguments)
        return compiled.call_boxed(keys, *arguments)

    return call


load()
_register()
