"""CARAFE++ in the ResNets of the three toolboxes: wherever the map shrinks, its content decides how.

The paper's Sec. 4.1 and Fig. 4. Every place where a ResNet shrinks the map is found in the built network and swapped
for a module that shrinks it by CARAFE++, with the names of all other parameters unchanged:

======================================================  ====================================================
place                                                   becomes
======================================================  ====================================================
stem: ``maxpool``                                       the downsampler itself
stage: the first block's convolution with the stride    :class:`DownsampledConv2d`
(``conv2``; ``conv1`` with ``style="caffe"`` and in a
``BasicBlock``), deformable or not
stage: the shortcut's 1x1 convolution                   :class:`DownsampledConv2d`
stage: the shortcut's pooling (``avg_down``)            the downsampler itself
======================================================  ====================================================

A ResNet-50 gets seven CARAFE++: one in the stem, two in each of the stages 2, 3 and 4 (the paper's Res-3, -4 and -5).
No block is subclassed or restated, so whatever the toolboxes do with blocks (checkpointing, plugins, zero
initialisation, learning rates by depth) they do here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from inspect import signature
from typing import Any

from mmengine.logging import print_log
from mmengine.registry import MODELS, Registry
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from carafe_plugin import modules
from carafe_plugin.modules.strided import DownsampledConv2d
from carafe_plugin.openmmlab.layers import CARAFEDownsample, build_downsampler, pop_switch, read_cfg
from carafe_plugin.openmmlab.resnet_checkpoints import ARCHITECTURES, CheckpointMismatch, matching_depths

#: The keys of a carafe_cfg that CARAFEDownsample takes; a place in the network sets the first two.
_LAYER_KEYS = [*signature(modules.CARAFEDownsample).parameters, "norm_cfg", "act_cfg"]


class DownsamplingBackbone(nn.Module):
    """Mixed into a toolbox's ResNet, downsamples by CARAFE++ wherever its map shrinks.

    Takes the ResNet's arguments and ``carafe_cfg``, a dictionary of

    * ``stem``: whether CARAFE++ replaces the max pooling; a dictionary means yes, with these arguments there instead
      of those for all places;
    * ``stages``: one bool for each of the ResNet's stages (the paper's Res-2 first): whether CARAFE++ replaces its
      strides. Left out, ``stem`` and ``stages`` mean every place that has a stride; with all of them False
      the ResNet is the parent bit for bit;
    * ``norm_eval``: whether CARAFE++'s norms follow the backbone's ``norm_eval``. False (the default) lets them learn
      their statistics, which they must where the backbone starts from a stock checkpoint; True keeps them, for a
      backbone that was pretrained with CARAFE++;
    * ``type``, ``"CARAFEDownsample"`` when left out, and its arguments: ``down_kernel``, ``compressed_channels``, ...
      ``norm_cfg`` and ``act_cfg``, after the channel compressor, are the backbone's BatchNorm (or BN) and ReLU when
      left out (Sec. 5.1), trained even where the backbone's are not; None leaves them out.

    ``frozen_stages`` freezes the stem's CARAFE++ with the stem and the blocks' with their stage; frozen norms keep
    their statistics whatever ``norm_eval`` says. So a backbone that starts from a stock checkpoint, which has nothing
    for CARAFE++, wants ``frozen_stages=-1``; where it does not, loading logs a warning. A checkpoint of another depth
    is refused: ``CheckpointMismatch``.

    With DCNv2 the strided deformable convolutions become CARAFE++ and plain ones, the others stay (Sec. 5.2). Everyone
    trains ``stage_with_dcn=(False, True, True, True)``; the paper's text, read to the letter ("Res-2, Res-3, Res-4"),
    is ``(True, True, True, False)``. ``fallback_on_stride`` is not needed: leave it out.

    Attributes:
        downsampler_names (list[str]): the names of the downsamplers among the submodules, the stem's first.

    Example:
        >>> from carafe_plugin.openmmlab.mmdet import CARAFEResNet
        >>> CARAFEResNet(18, carafe_cfg=dict(stages=(False, True, False, False))).downsampler_names
        ['maxpool', 'layer2.0.conv1.downsampler', 'layer2.0.downsample.0.downsampler']
    """

    maxpool: nn.Module
    depth: int
    num_stages: int
    frozen_stages: int
    norm_eval: bool
    norm_cfg: dict
    stem_channels: int
    res_layers: list[str]
    downsampler_names: list[str]

    def __init__(self, *args: Any, carafe_cfg: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        cfg = read_cfg(carafe_cfg)
        stem, stages = cfg.pop("stem", True), self._read_stages(cfg.pop("stages", None))
        self.downsampler_norm_eval, pointwise = (pop_switch(cfg, name, False) for name in ("norm_eval", "pointwise"))
        if not isinstance(stem, (bool, Mapping)):
            raise TypeError(f"carafe_cfg: 'stem' must be True or False, got {stem!r} (or a dictionary of arguments)")
        self._complete(cfg)
        self.downsampler_names = []
        if stem is not False:
            stem_cfg = cfg if stem is True else {**cfg, **stem}
            self.maxpool = build_downsampler(stem_cfg, self.stem_channels, _stride(self.maxpool))
            self.downsampler_names.append("maxpool")
        for index, (name, wanted) in enumerate(zip(self.res_layers, stages, strict=True)):
            places = list(_strided(getattr(self, name)[0])) if wanted is not False else []
            if wanted and not places:
                raise ValueError(
                    f"carafe_cfg: stages[{index}] is True, but {name} has no stride for CARAFE++ to stand in for: "
                    f"expected False there, or 'stages' left out"
                )
            for place in places:
                self.downsampler_names.append(self._swap(f"{name}.0.{place}", cfg, pointwise))
        self._freeze_stages()  # once more: what is new belongs to its stage

    def _read_stages(self, stages: Any) -> Sequence[bool | None]:
        """Whether each stage is to have CARAFE++; None where its stride decides."""
        if stages is None:
            return [None] * self.num_stages
        if not isinstance(stages, Sequence) or not all(isinstance(stage, bool) for stage in stages):
            raise TypeError(f"carafe_cfg: 'stages' must be a sequence of one bool for each stage, got {stages!r}")
        if len(stages) != self.num_stages:
            raise ValueError(f"carafe_cfg: 'stages' must have {self.num_stages} entries (num_stages), got {stages!r}")
        return stages

    def _complete(self, cfg: dict[str, Any]) -> None:
        """Check the keys of this package's layer, and give its compressor the backbone's norm and activation."""
        kind: Any = cfg.setdefault("type", "CARAFEDownsample")
        if isinstance(kind, str):
            with suppress(RuntimeError):  # not registered: building it says so
                kind = MODELS.get(kind)
        if not (isinstance(kind, type) and issubclass(kind, CARAFEDownsample)):
            return
        if unknown := cfg.keys() - {"type", "_scope_", *_LAYER_KEYS}:
            raise TypeError(
                f"carafe_cfg has the unknown key {sorted(unknown)[0]!r}; expected 'stem' and 'stages' for the "
                f"places, 'norm_eval', 'pointwise', 'type', {', '.join(map(repr, _LAYER_KEYS[2:]))}"
            )
        if cfg.get("compressed_channels", 0) is not None:  # without a compressor there is nothing to normalise
            norm = getattr(self.norm_cfg["type"], "__name__", self.norm_cfg["type"])
            usual = "BN" in norm or "BatchNorm" in norm
            cfg.setdefault("norm_cfg", dict(self.norm_cfg, requires_grad=True) if usual else dict(type="BN"))
            cfg.setdefault("act_cfg", dict(type="ReLU", inplace=True))

    def _swap(self, place: str, cfg: Mapping[str, Any], pointwise: bool) -> str:
        """Swap the strided module called ``place`` and return the name of its downsampler."""
        parent_name, _, name = place.rpartition(".")
        parent: Any = self.get_submodule(parent_name)
        old: Any = self.get_submodule(place)
        if isinstance(old, nn.AvgPool2d):  # of a shortcut: the convolution after it knows the channels
            setattr(parent, name, build_downsampler(cfg, parent[1].in_channels, _stride(old)))
            return place
        if pointwise:
            old = _pointwise(old)
        try:
            setattr(parent, name, DownsampledConv2d(old, build_downsampler(cfg, old.in_channels, _stride(old))))
        except TypeError as error:
            raise TypeError(f"CARAFE++ in {place}: {error}") from error
        return f"{place}.downsampler"

    def _freeze_stages(self) -> None:
        super()._freeze_stages()  # type: ignore[misc]
        if self.frozen_stages >= 0:
            self.maxpool.eval()
            self.maxpool.requires_grad_(False)

    def train(self, mode: bool = True) -> DownsamplingBackbone:
        """Set the mode; see ``norm_eval`` and ``frozen_stages`` for what stays in evaluation mode."""
        super().train(mode)
        if mode and self.norm_eval and not self.downsampler_norm_eval:
            for name in self.downsampler_names:
                for module in self.get_submodule(name).modules():
                    if isinstance(module, _BatchNorm):
                        module.train()
            self._freeze_stages()
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        # Loaded non-strictly, as the toolboxes do, another depth would pass with no more than warnings.
        depths = matching_depths(state_dict, prefix)
        if depths and self.depth in ARCHITECTURES and self.depth not in depths:
            found = " or ".join(map(str, depths))
            raise CheckpointMismatch(
                f"{self._checkpoint_name(prefix)} is a ResNet's of depth {found}, the backbone's depth is {self.depth}"
            )
        if f"{prefix}stem.0.conv.weight" in state_dict and "stem.0.weight" in dict(self.named_parameters()):
            raise CheckpointMismatch(
                f"{self._checkpoint_name(prefix)} has MMPretrain's names for the stem: "
                "tools/convert_backbone.py gives it this toolbox's"
            )
        unloaded = [name for name in self.downsampler_names if not _has_any(state_dict, f"{prefix}{name}.")]
        frozen = [name for name in unloaded if _is_frozen(self.get_submodule(name))]
        if frozen and _has_any(state_dict, prefix):
            print_log(
                f"frozen_stages={self.frozen_stages} freezes {', '.join(frozen)}, for which the checkpoint holds "
                "nothing: CARAFE++ stays as it was initialised there. Start from a checkpoint that was trained with "
                "CARAFE++, or set frozen_stages=-1.",
                logger="current",
                level=logging.WARNING,
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _checkpoint_name(self, prefix: str) -> str:
        init_cfg = getattr(self, "init_cfg", None)
        path = init_cfg.get("checkpoint") if isinstance(init_cfg, Mapping) and not prefix else None
        return f"the checkpoint {path}" if path else "the checkpoint"

    def extra_repr(self) -> str:
        return f"downsampler_names={self.downsampler_names}"


_VARIANTS = {
    "ResNet": "torchvision's checkpoints load as well",
    "ResNetV1c": "a stem of three 3x3 convolutions",
    "ResNetV1d": "V1c with average pooling in the shortcuts, in whose place CARAFE++ stands",
    "ResNeXt": "its grouped convolutions stay grouped",
}

_DOCSTRING = """{name} ({about}) that downsamples by CARAFE++ (arXiv 2012.04733, Sec. 4.1 and Fig. 4).

    Takes {name}'s arguments and loads its checkpoints, with only CARAFE++'s keys missing. ``carafe_cfg`` switches each
    place and sets the operator: see :class:`~carafe_plugin.openmmlab.resnet.DownsamplingBackbone`.

    Args:
        *args: {name}'s.
        carafe_cfg (dict | None): the places, and CARAFE++'s arguments. Defaults to the paper's setting at every place
            with a stride: seven in a ResNet-50.
        **kwargs: {name}'s.

    Raises:
        TypeError: ``carafe_cfg`` is not a dictionary, has an unknown key, or a value of a wrong type; or a convolution
            with a stride is of a type (``conv_cfg``) whose stride CARAFE++ cannot take.
        ValueError: ``carafe_cfg`` asks for CARAFE++ where there is no stride, or ``stages`` has a wrong length.
        KeyError: ``carafe_cfg`` names a type that is not registered.

    Example:
        >>> import torch
        >>> from {module} import CARAFE{name}
        >>> backbone = CARAFE{name}(depth=50, carafe_cfg=dict(stages=(False, True, True, True)))
        >>> backbone(torch.rand(1, 3, 64, 96))[-1].shape
        torch.Size([1, 2048, 2, 3])
    """


def downsampling_resnets(module: str, registry: Registry, *parents: type[nn.Module]) -> list[Any]:
    """A toolbox's ResNets (``parents``), downsampling by CARAFE++ and registered as ``CARAFE`` and the parent's name.

    ``module`` is the full name of the module that assigns the classes, by which they are pickled.
    """
    classes = []
    for parent in parents:
        name = parent.__name__
        text = _DOCSTRING.format(name=name, about=_VARIANTS[name], module=module)
        namespace = dict(__module__=module, __doc__=text)
        classes.append(type(f"CARAFE{name}", (DownsamplingBackbone, parent), namespace))
        registry.register_module(module=classes[-1])
    return classes


def _pointwise(conv: nn.Module) -> nn.Module:
    """A 1x1 convolution like a larger one; anything else as it is."""
    if type(conv).__name__ != "Conv2d" or not isinstance(conv, nn.Conv2d) or max(conv.kernel_size) == 1:
        return conv
    bias = conv.bias is not None
    return nn.Conv2d(conv.in_channels, conv.out_channels, 1, _stride(conv), groups=conv.groups, bias=bias)


def _has_any(state_dict: Mapping[str, Tensor], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in state_dict)


def _is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def _stride(module: nn.Module | None) -> int:
    """How many times smaller a module makes the map; 1 for modules without a stride."""
    stride: Any = getattr(module, "stride", 1)
    return max(stride) if isinstance(stride, tuple) else stride


def _strided(block: Any) -> Iterator[str]:
    """The names of the modules in a block that shrink the map: a convolution, and the shortcut's or its pooling."""
    yield from (name for name in ("conv1", "conv2", "conv3") if _stride(getattr(block, name, None)) > 1)
    shortcut = block.downsample or ()
    yield from (f"downsample.{index}" for index, module in enumerate(shortcut) if _stride(module) > 1)
