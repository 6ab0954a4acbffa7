"""The derivatives of the operators, in reverse and in forward mode, by the operators themselves.

The form is linear in each of its tensors but for the kernel normaliser. So the tangent of an operator is the operator
itself with a tensor's tangent in the place of that tensor, and the gradient to a tensor is the operator that computes
this tensor, with the gradient of the result in the place of what the first operator computes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from . import reference
from ._operators import NONE, NORMALIZERS, OPERATORS, Call, Operator


def _evaluate(computes: str, at: Call) -> Tensor:
    """By the operator that computes a tensor of the form from the others."""
    operator = OPERATORS[computes]
    tensors, features, _, *geometry = at
    sizes = features[2:] if operator.sizes else ()
    if computes == "grad_output":
        geometry += at.outputs
    return operator(*(tensors[name] for name in operator.tensors), *sizes, *geometry)


def _along(name: str, direction: Tensor, at: Call) -> Call:
    """A call with a direction in the place of a tensor; one of logits becomes one of masks, in which it is linear."""
    tensors, _, _, k, g, up, down, normalizer = at
    if name == "kernels" and normalizer != NONE:
        direction = reference.tangent_of_masks(direction, tensors[name], k, g, up, down, NORMALIZERS[normalizer])
        direction = reference.crop(direction, at.cropped)
        at = at._replace(normalizer=NONE)
    return at._replace(tensors={**tensors, name: direction})


def _curvature(direction: Tensor, at: Call) -> Tensor | None:
    """The derivative of the gradient to the logits with respect to them in a direction; it is symmetric."""
    tensors, _, _, k, g, up, down, normalizer = at
    if normalizer == NONE:
        return None
    masks = reference.shuffle_logits(tensors["kernels"], up, down)
    masks = reference.crop(masks, at.cropped)  # their size alone matters
    grad_masks = _evaluate("kernels", at._replace(tensors={**tensors, "kernels": masks}, normalizer=NONE))
    return reference.curvature_of_masks(direction, grad_masks, tensors["kernels"], k, g, up, NORMALIZERS[normalizer])


def _gradients(operator: Operator, at: Call, grad: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
    """From the gradient of an operator's result to those of its tensors that are wanted."""
    names = [name for name, needed in zip(operator.tensors, wanted, strict=True) if needed]
    found: dict[str, Tensor | None] = {}
    if operator.computes in names:
        names.remove(operator.computes)
        found[operator.computes] = _curvature(grad, at)
    if names:
        replaced = _along(operator.computes, grad, at)
        found.update((name, _evaluate(name, replaced)) for name in names)
    return [found.get(name) for name in operator.tensors]


def _read(operator: Operator, normalizer: int, wanted: Sequence[bool]) -> set[str]:
    """The tensors whose values, not only sizes, are needed for the gradients to those that are wanted."""
    names = {name for name, needed in zip(operator.tensors, wanted, strict=True) if needed}
    if normalizer != NONE and "kernels" in names | {operator.computes}:
        return set(operator.tensors)
    # Kernels, where they are masks, are an argument of their own gradient for its size alone.
    names.discard(operator.computes)
    return {each for name in names for each in OPERATORS[name].tensors if each not in (name, operator.computes)}


def _tangents(operator: Operator, at: Call, tangents: Sequence[Tensor | None]) -> Iterator[Tensor]:
    """The terms of the tangent of an operator's result, from the tangents of its tensors."""
    for name, tangent in zip(operator.tensors, tangents, strict=True):
        if tangent is None:
            continue
        if name == operator.computes:
            term = _curvature(tangent, at)
            yield torch.zeros_like(tangent) if term is None else term
        else:
            yield _evaluate(operator.computes, _along(name, tangent, at))


def raise_lack_of_memory(name: str, source: Tensor, like: Tensor, error: RuntimeError) -> None:
    """On a GPU, raise OutOfMemoryError for a result like ``like``, or the scratch memory beside it, that does not fit.

    Args:
        name (str): the operator's.
        source (Tensor): one of its tensors.
        like (Tensor): its result without values.
        error (RuntimeError): what it raised.
    """
    result = source.new_empty(like.shape, dtype=like.dtype)  # where that does not fit, torch's own error
    if result.device.type == "cuda":
        size = result.numel() * result.element_size()
        raise torch.cuda.OutOfMemoryError(
            f"CUDA out of memory: carafe_plugin::{name} needs scratch memory beside its result of {size} bytes"
        ) from error


def autograd_kernel(operator: Operator) -> Callable[..., Tensor]:
    """The kernel of the key Autograd; torch.library.register_autograd has no forward mode and drops tangents unsaid."""
    count = len(operator.tensors)

    def below_autograd(*arguments: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            try:
                return operator(*arguments)
            except RuntimeError as error:
                if "aten::empty" in str(error):  # all that the stable ABI says of an allocation that fails
                    like = operator(*(tensor.to("meta") for tensor in arguments[:count]), *arguments[count:])
                    raise_lack_of_memory(operator.name, arguments[0], like, error)
                raise

    class Function(torch.autograd.function._SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, grad_enabled: bool, *arguments: Any) -> Tensor:
            tensors, ctx.rest = arguments[:count], arguments[count:]
            read = _read(operator, operator.parse(arguments).normalizer, ctx.needs_input_grad[1 : count + 1])
            named = zip(operator.tensors, tensors, strict=True)
            ctx.save_for_backward(*(tensor if name in read else None for name, tensor in named))
            ctx.save_for_forward(*tensors)
            ctx.shapes = [tensor.shape for tensor in tensors]
            ctx.set_materialize_grads(False)
            # Both modes are off in here: other levels of torch.func's transforms would find derivatives of zero.
            with torch.set_grad_enabled(grad_enabled), forward_ad._set_fwd_grad_enabled(True):
                return below_autograd(*arguments)

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
            if grad is None:
                return (None,) * len(ctx.needs_input_grad)
            # Of what was not read, the size is enough; a gradient that takes its layout from it is contiguous.
            saved = zip(ctx.saved_tensors, ctx.shapes, strict=True)
            tensors = [grad.new_empty(()).expand(shape) if t is None else t for t, shape in saved]
            at = operator.parse((*tensors, *ctx.rest))
            found = _gradients(operator, at, grad, ctx.needs_input_grad[1 : count + 1])
            return None, *found, *(None for _ in ctx.rest)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Tensor:
            primals = [forward_ad.unpack_dual(tensor).primal for tensor in ctx.saved_tensors]
            with forward_ad._set_fwd_grad_enabled(True):
                at = operator.parse((*primals, *ctx.rest))
                return functools.reduce(torch.add, _tangents(operator, at, tangents[1 : count + 1]))

    Function.__name__ = Function.__qualname__ = operator.name

    def differentiate(*arguments: Any) -> Tensor:
        operator.tensors_of(arguments)  # here for what it refuses
        grad_enabled = torch.is_grad_enabled()
        if not grad_enabled and forward_ad._current_level < 0:
            return below_autograd(*arguments)
        # Each transform of torch.func, as autograd itself, calls this kernel for a level of its own.
        with enable_single_level_autograd_function():
            return Function.apply(grad_enabled, *arguments)  # type: ignore[attr-defined]

    return differentiate
