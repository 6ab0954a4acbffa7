"""Models from configurations without checkpoints, and one image for them: for tools that count or time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import get_object_from_string
from torch import nn

from carafe_plugin.analysis.complexity import Complexity, carafe_sites, count
from carafe_plugin.engine.config import import_adapters, load_config, toolbox, type_name
from carafe_plugin.engine.errors import UsageError, reading_named_files

# By scope. MMEngine's own is that of our inpainting networks.
SHAPES = {"mmdet": (800, 1333), "mmseg": (512, 512), "mmpretrain": (224, 224), "mmengine": (256, 256)}
SAMPLES = {
    "mmdet": "mmdet.structures.DetDataSample",
    "mmseg": "mmseg.structures.SegDataSample",
    "mmpretrain": "mmpretrain.structures.DataSample",
}
PROPOSALS, DETECTIONS = 1000, 100  # where a model's own settings do not say


def read_config(name: str, options: Mapping[str, Any] | None = None, drop_in: bool = False) -> Config:
    """Read a model's configuration and import the adapters that it needs. Raises UsageError where there is none, it has
    no model, or its toolbox is unknown.
    """
    cfg = load_config(name, options)
    scope = toolbox(cfg)
    if scope not in SHAPES:
        raise UsageError(f"{name}: default_scope must be one of {', '.join(SHAPES)}, got {scope!r}")
    if "model" not in cfg:
        raise UsageError(f"{name} describes no model")
    import_adapters(scope, drop_in=drop_in)
    return cfg


def build_model(cfg: Config) -> nn.Module:
    """Build the model of a configuration, in evaluation mode, with the values that its constructors draw.

    No ``init_cfg`` is executed, so no checkpoint is looked for. SyncBN becomes BN, which it is outside training.
    """
    init_default_scope(toolbox(cfg) or "mmengine")
    settings = dict(cfg.model)
    if cfg.get("data_preprocessor"):
        settings.setdefault("data_preprocessor", cfg.data_preprocessor)
    try:
        with reading_named_files():
            return revert_sync_batchnorm(MODELS.build(settings)).eval()
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        raise UsageError(f"cannot build the model of {cfg.filename}: {error}") from error


def image_shape(cfg: Config) -> tuple[int, int]:
    """Height and width that a configuration's models see in tests, as far as it says so plainly; else the usual."""
    if toolbox(cfg) == "mmengine" and (size := cfg.get("test_dataloader", {}).get("dataset", {}).get("size")):
        return size, size
    for step in cfg.get("test_pipeline") or ():
        size = step.get("scale") if toolbox(cfg) == "mmdet" else step.get("crop_size")
        if type_name(step) in ("Resize", "CenterCrop") and size:
            # A scale of mmdet bounds the sides of an image that may lie or stand: it lies here.
            return (size, size) if isinstance(size, int) else (min(size), max(size))
    return SHAPES[toolbox(cfg) or ""]


def one_image(cfg: Config, shape: tuple[int, int]) -> dict[str, list]:
    """A batch as a data loader makes it: one image of random pixels, the same for every model, and its sample. An
    inpainting network gets a hole over the middle quarter. ``shape`` is height and width.
    """
    image = torch.randint(256, (3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    if toolbox(cfg) == "mmengine":
        hole = torch.zeros(1, *shape)
        hole[:, shape[0] // 4 : shape[0] * 3 // 4, shape[1] // 4 : shape[1] * 3 // 4] = 1
        return dict(inputs=[image], holes=[hole])
    sample = get_object_from_string(SAMPLES[toolbox(cfg) or ""])
    meta = dict(img_shape=shape, ori_shape=shape, scale_factor=(1.0, 1.0))
    return dict(inputs=[image], data_samples=[sample(metainfo=meta)])


def fix_boxes(model: nn.Module, shape: tuple[int, int]) -> dict[str, int]:
    """Let every two-stage detector continue with the same boxes, whatever its random weights propose.

    The region proposal network and the box head run and suppress as always; what they keep is replaced by as many
    random boxes as the settings allow at most, so that later heads have the same work in every model. The result is
    filled as the model runs: what it kept itself in its last forward pass, under 'proposals' and 'detections'.
    """
    kept: dict[str, int] = {}
    if getattr(model, "rpn_head", None) is not None and getattr(model, "roi_head", None) is not None:
        _replace(model.rpn_head, "predict", kept, "proposals", PROPOSALS, shape)
        if hasattr(model.roi_head, "predict_bbox"):
            _replace(model.roi_head, "predict_bbox", kept, "detections", DETECTIONS, shape)
    return kept


def _replace(head: Any, method: str, kept: dict[str, int], name: str, usual: int, shape: tuple[int, int]) -> None:
    settings = getattr(head, "test_cfg", None) or {}
    number = (settings.get("rcnn") or settings).get("max_per_img", usual)
    predict = getattr(head, method)
    boxes = _random_boxes(number, shape)  # now: under the FLOP counter torch 2.1 draws nothing from a generator

    def same_boxes(*arguments: Any, **settings: Any) -> list:
        results = predict(*arguments, **settings)
        kept[name] = sum(len(result) for result in results)
        return [_with_boxes(result, boxes) for result in results]

    setattr(head, method, same_boxes)


def _random_boxes(number: int, shape: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    height, width = shape
    # Sizes from 1/32 of the image to all of it, evenly on a logarithmic scale: every level of a pyramid gets some.
    sizes = 2 ** (-5 * torch.rand(number, 2, generator=generator)) * torch.tensor([width, height])
    corners = torch.rand(number, 2, generator=generator) * (torch.tensor([width, height]) - sizes)
    return torch.cat([corners, corners + sizes], dim=1)


def _with_boxes(like: Any, boxes: torch.Tensor) -> Any:
    boxes, number = boxes.to(like.bboxes), len(boxes)
    return type(like)(
        bboxes=boxes,
        scores=torch.linspace(1, 0.5, number).to(boxes),
        labels=torch.zeros(number, dtype=torch.long, device=boxes.device),
    )


def share_parameters(models: Iterable[nn.Module]) -> None:
    """Give parameters and buffers of the same name and shape the values of the first model that has them."""
    values: dict[tuple[str, torch.Size], torch.Tensor] = {}
    for model in models:
        for name, own in model.state_dict().items():
            own.copy_(values.setdefault((name, own.shape), own))


def count_model(cfg: Config, model: nn.Module, shape: tuple[int, int]) -> Complexity:
    """Count a forward pass of ``model`` over one image of ``shape``."""
    check_no_mmcv_layers(cfg, model, "counted")
    fix_boxes(model, shape)
    preprocess: Any = model.data_preprocessor
    data = preprocess(one_image(cfg, shape), False)
    inputs = data.pop("inputs")
    try:
        return count(model, inputs, **data, mode="tensor")
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"the model of {cfg.filename} does not run at {shape[0]}x{shape[1]}: {error}") from error


def check_no_mmcv_layers(cfg: Config, model: nn.Module, what: str) -> None:
    """Raise a UsageError where a model has mmcv's layer 'carafe'; ``what`` is the participle that it is not."""
    names = [name for name, part in model.named_modules() if type(part).__module__.startswith("mmcv.ops.carafe")]
    if names:
        raise UsageError(
            f"{cfg.filename}: {', '.join(names)} are mmcv's own layers, which are not {what}: add --drop-in"
        )


def describe_model(cfg: Config, model: nn.Module, shape: tuple[int, int]) -> dict[str, Any]:
    """A model's CARAFE++ and what they cost over one image of ``shape``, as plain values."""
    found = count_model(cfg, model, shape)
    sites = list(carafe_sites(model, found))
    flops, parameters = (sum(getattr(site, name) for site in sites) for name in ("flops", "parameters"))
    return {
        "shape": list(shape),
        "flop": "one multiply-add",
        "model": {"type": type(model).__name__, "parameters": found.parameters[""], "flops": found.flops[""]},
        "carafe": {
            "modules": len(sites),
            "parameters": parameters,
            "flops": flops,
            "share": flops / max(1, found.flops[""]),
        },
        "sites": [dataclasses.asdict(site) for site in sites],
        "uncounted": found.uncounted,
    }
