"""CARAFE++ put into a model that somebody else wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..modules.carafe import KernelPrediction
from . import libraries
from .places import Place, Unsuitable, build, find
from .redirection import Redirected, Signature, redirect, signature, undo
from .report import Kept, Replaced, Report
from .tracing import Resizing, Trace, largest_difference, trace

_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)
#: Modules around a model that have taken stock of it, and the arguments that a place sets.
_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule")
_OF_THE_PLACE = ("channels", "scale_factor", "mode", "align_corners", "size", "rounds_down", "completes")


def convert(
    model: nn.Module,
    inputs: Any = None,
    *,
    upsample: bool | Mapping[str, Any] = True,
    downsample: bool | Mapping[str, Any] = False,
    names: str | Iterable[str] | None = None,
    dry_run: bool = False,
) -> Report:
    """Replace a model's up- and downsampling by CARAFE++ (arXiv 2012.04733), in place.

    Upsampling: ``nn.Upsample`` and calls of ``F.interpolate`` in a forward (nearest, and bilinear without aligned
    corners, by an integer), and 2x2 deconvolutions of stride 2, which become a 1x1 convolution and CARAFE++.
    Downsampling, on request: max and average pooling, and strided convolutions, which keep their weights and take
    their input from CARAFE++ (the paper's Fig. 4). Where it can, CARAFE++ starts as what it replaces, so that the
    model's outputs stay what they are, to rounding, until it is trained; the report says where it cannot.

    In models of torchvision, timm, transformers, segmentation_models_pytorch and ultralytics, calls of
    ``F.interpolate`` are replaced where they are known to upsample features, or scores where there is nothing else;
    masks and embeddings are not.

    Outputs stay at sizes that the model's scales divide; at others F.interpolate to a ``size`` has a scale of its own.
    Convert before anything takes stock of the model: the optimizer, DDP or FSDP, an average of the weights,
    ``torch.compile``. A state dict of the converted model loads into a model that has been converted with the same
    arguments. Calls that a forward makes in another number or order than in evaluation end with an error.

    Args:
        model (nn.Module): on any device, in any mode; new modules are on the device, and of the dtype, of the features
            where they stand.
        inputs (Any): an example, from which the number of channels of every place is learnt: passed as it is, a tuple
            or list as positional arguments, a mapping by name. None: an image that suits the model's library.
        upsample (bool | Mapping[str, Any]): whether to replace upsampling; a mapping means yes, with these arguments of
            :class:`carafe_plugin.CARAFEUpsample`. Left out, ``init`` is what each place does, and ``init_spread`` the
            least, 1e-6; more (0.05) changes outputs by that share of a difference of neighbours, and learns faster.
        downsample (bool | Mapping[str, Any]): likewise of downsampling, :class:`carafe_plugin.CARAFEDownsample`.
        names (str | Iterable[str] | None): patterns, as of files, of the places' names to replace, which may be calls
            that the library's own choice leaves. None: all that are suitable.
        dry_run (bool): report alone, and leave the model as it is.

    Returns:
        Report: every place, replaced or kept, the costs, and the largest change of the outputs.

    Raises:
        TypeError: an argument is not of its type, or an option not one of the module's.
        ValueError: the model does not run on the inputs or needs some, an option is out of its range, a pattern matches
            nothing, or there is nothing to replace. The model is as it was.

    Example:
        >>> import torch
        >>> from carafe_plugin import convert
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.Upsample(scale_factor=2))
        >>> image = torch.rand(1, 3, 16, 16)
        >>> before = model(image)
        >>> report = convert(model, image)
        >>> [place.name for place in report.replaced], torch.allclose(model(image), before, atol=1e-5)
        (['1'], True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    up, down = _options("upsample", upsample), _options("downsample", downsample)
    if up is None and down is None:
        raise ValueError("upsample or downsample must be asked for, got False for both")
    patterns = None if names is None else [names] if isinstance(names, str) else list(names)
    for name, module in model.named_modules():
        if type(module).__name__ in _WRAPPERS:
            where = f" at {name}" if name else ""
            raise ValueError(f"model must be converted before it is wrapped, got a {type(module).__name__}{where}")
    if inputs is None:
        inputs = _like_the_model(libraries.example_inputs(model), model)
        if inputs is None:
            raise ValueError(
                "inputs must be an example of what the model takes, which tells channels and sizes, got None"
            )

    before = trace(model, inputs)
    with torch.inference_mode(False), torch.random.fork_rng(enabled=dry_run):
        chosen, left = _choose(model, before, up, down, patterns)
    if not chosen:
        raise ValueError(_nothing(model, left))
    replaced = tuple(_told(place, new, keeps) for place, new, keeps in chosen)
    if dry_run:
        return Report(replaced, left, None, True)
    undoing: list[Callable[[], None]] = []
    try:
        _put(model, before, [(place, new) for place, new, _ in chosen], undoing)
        after = trace(model, inputs, "model: converted, {model} does not run on the inputs; it ends with")
        for place, new, _ in chosen:
            if not any(part in after.layers for part in new.modules() if isinstance(part, KernelPrediction)):
                raise ValueError(
                    f"model: {place.name} is not what the forward calls, so that CARAFE++ would not run there; "
                    "names=[...] without it converts the rest"
                )
        difference = largest_difference(after.output, before.output)
    except BaseException:
        for step in reversed(undoing):
            step()
        raise
    return Report(replaced, left, difference, False)


def _choose(
    model: nn.Module,
    before: Trace,
    up: Mapping[str, Any] | None,
    down: Mapping[str, Any] | None,
    patterns: Sequence[str] | None,
) -> tuple[list[tuple[Place, nn.Module, bool]], tuple[Kept, ...]]:
    """CARAFE++ for every place that takes it, and whether it starts as what is there; and the others."""
    kept: dict[tuple[nn.Module, str, str], list[str]] = {}
    chosen = []
    for place in _matching(list(find(model, before, up is not None, down is not None)), patterns):
        options = up if place.upsamples else down
        try:
            new, keeps = _build(place, options or {}, curated=patterns is None)
        except Unsuitable as reason:
            kept.setdefault((place.module, place.was, str(reason)), []).append(place.name)
        else:
            for part in new.modules():
                if isinstance(part, KernelPrediction):  # and not a convolution whose weights are the model's
                    part.to(place.passes[0].like.device, _dtype(model, place.passes[0].like))
            chosen.append((place, new.train(place.module.training), keeps))
    return chosen, tuple(Kept(tuple(names), was, reason) for (_, was, reason), names in kept.items())


def _dtype(model: nn.Module, like: Tensor) -> torch.dtype:
    """The dtype of features, if any parameter has it: under autocast they may have another."""
    dtypes = [parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()]
    return like.dtype if like.dtype in dtypes or not dtypes else dtypes[0]


def _like_the_model(inputs: Any, model: nn.Module) -> Any:
    """Example inputs on the device, and in the dtype, of a model's parameters."""
    parameter = next((each for each in model.parameters() if each.is_floating_point()), None)
    if parameter is None:
        return inputs
    return pytree.tree_map(lambda value: value.to(parameter) if isinstance(value, Tensor) else value, inputs)


def _options(name: str, value: bool | Mapping[str, Any]) -> dict[str, Any] | None:
    if isinstance(value, bool):
        return {} if value else None
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be True, False or a mapping of arguments, got {value!r}")
    for key in _OF_THE_PLACE:
        if key in value:
            raise ValueError(f"{name} must not set {key!r}: each place in the model does")
    return dict(value)


def _matching(places: list[Place], patterns: Sequence[str] | None) -> list[Place]:
    if patterns is None:
        return places
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for place in places for name in place.aliases):
            known = ", ".join(place.name for place in places) or "none"
            raise ValueError(f"names: {pattern!r} matches no place that resizes maps; they are {known}")
    return [place for place in places if any(fnmatchcase(n, pattern) for n in place.aliases for pattern in patterns)]


def _build(place: Place, options: Mapping[str, Any], curated: bool) -> tuple[nn.Module, bool]:
    if not place.name:
        raise Unsuitable("it is the model itself: a module that contains it can be converted")
    try:
        return build(place, options, curated)
    except (TypeError, ValueError) as error:
        argument = "upsample" if place.upsamples else "downsample"
        raise type(error)(f"{argument}={dict(options)!r}, at {place.name}: {error}") from error


def _nothing(model: nn.Module, kept: Sequence[Kept]) -> str:
    there = sum(isinstance(module, KernelPrediction) for module in model.modules())
    text = f"model: {type(model).__name__} has nothing to convert"
    if there:
        text += f" and {there} CARAFE++ already"
    return text + "".join(f"; {place}" for place in kept)


def _told(place: Place, new: nn.Module, keeps: bool) -> Replaced:
    (carafe,) = (module for module in new.modules() if isinstance(module, KernelPrediction))
    becomes = f"{'CARAFEUpsample' if place.upsamples else 'CARAFEDownsample'}({carafe.channels}, {carafe.scale_factor})"
    if isinstance(place.module, nn.ConvTranspose2d):
        becomes = f"Conv2d 1x1, {becomes}"
    elif isinstance(place.module, nn.Conv2d):
        becomes = f"{becomes}, Conv2d of stride 1"
    old = list(place.module.parameters()) if place.call is None else []
    parameters = sum(p.numel() for p in new.parameters()) - sum(p.numel() for p in old)
    flops = 0
    for each in place.passes:
        before, after = [maps[0] * maps[2] * maps[3] for maps in (each.before, each.after)]
        if isinstance(place.module, nn.ConvTranspose2d):
            flops += before * (new.projection.weight.numel() - place.module.weight.numel())  # type: ignore
        flops += after * carafe.channels * carafe.kernel_size**2
        flops += (before if carafe.down == 1 else after) * carafe.content_encoder.weight.numel()
        if carafe.channel_compressor is not None:
            flops += before * carafe.channel_compressor.weight.numel()
    return Replaced(place.name, place.was, becomes, carafe.init, keeps, parameters, flops)


def _put(
    model: nn.Module, seen: Trace, chosen: Sequence[tuple[Place, nn.Module]], undoing: list[Callable[[], None]]
) -> None:
    layers = {place.module: new for place, new in chosen if place.call is None}
    calls: dict[nn.Module, dict[int, nn.Module]] = {}
    for place, new in chosen:
        if place.call is not None:
            calls.setdefault(place.module, {})[place.call] = new
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in layers:
            parent, (_, _, attribute) = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")
            new = layers[module]
            for hooks in _HOOKS:
                vars(new)[hooks] = vars(module)[hooks]
            libraries.adopt(new, module, model)
            undoing.append(partial(setattr, parent, attribute, module))
            setattr(parent, attribute, new)
    for module in list(model.modules()):
        if isinstance(module, Redirected):
            undoing.append(partial(setattr, module, "carafe_calls", module.carafe_calls))
            module.carafe_calls = _without_taken(module, seen, layers, calls)
    for module, answers in calls.items():
        keys = _keys(module, seen, layers, calls)
        redirect(module, {str(number): new for number, new in answers.items()}, keys)
        undoing.append(partial(undo, module))


def _answered(
    seen: Trace, layers: Mapping[nn.Module, nn.Module], calls: Mapping[nn.Module, Mapping[int, Any]]
) -> Iterator[tuple[Resizing, int, bool]]:
    """The calls of ``F.interpolate`` in modules: the number in the innermost's pass, and whether CARAFE++ takes it."""
    numbers: dict[tuple[nn.Module, int], int] = {}
    for call in seen.calls:
        if call.within:
            innermost = call.within[-1]
            number = numbers[innermost] = numbers.get(innermost, -1) + 1
            yield call, number, number in calls.get(innermost[0], ()) or innermost[0] in layers


def _keys(
    module: nn.Module, seen: Trace, layers: Mapping[nn.Module, nn.Module], calls: Mapping[nn.Module, Mapping[int, Any]]
) -> list[tuple[str | None, Signature]]:
    """For each call of ``F.interpolate`` in a pass of ``module`` that is still one, what answers it."""
    in_passes: dict[int, list[tuple[str | None, Signature]]] = {}
    for call, number, answered in _answered(seen, layers, calls):
        for ancestor, one_pass in call.within:
            own = ancestor is call.within[-1][0]
            if ancestor is module and (own or not answered):
                known_by = signature(call.before[1], call.mode, call.align_corners)
                in_passes.setdefault(one_pass, []).append((str(number) if answered else None, known_by))
    first, *others = in_passes.values()
    if any(other != first for other in others):
        raise ValueError(
            f"model: the forward of a {type(module).__name__} interpolates differently from pass to pass, so that its "
            "calls cannot be told apart; names=[...] without it converts the rest"
        )
    return first


def _without_taken(
    module: Redirected, seen: Trace, layers: Mapping[nn.Module, nn.Module], calls: Mapping[nn.Module, Mapping[int, Any]]
) -> tuple[tuple[str | None, Signature], ...]:
    """The calls of a module that was converted before, without those in modules inside it that are converted now."""
    taken = [
        answered
        for call, _, answered in _answered(seen, layers, calls)
        if any(ancestor is module and one_pass == 1 for ancestor, one_pass in call.within)
    ]
    passing = [place for place, (key, _) in enumerate(module.carafe_calls) if key is None]  # those that were seen
    gone = {place for place, answered in zip(passing, taken, strict=False) if answered}
    return tuple(call for place, call in enumerate(module.carafe_calls) if place not in gone)
