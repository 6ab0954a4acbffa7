"""torchvision's operators behind MMCV's names, where MMCV was installed without compiling its own.

MMCV takes minutes to hours to compile. Of its operators the models of MMDetection, MMSegmentation and MMPretrain mostly
need those that torchvision has compiled as well, for CPU and CUDA: non-maximum suppression, RoIAlign and deformable
convolution. To run a command on them, put this module in front of it::

    python -m carafe_plugin.openmmlab.mmcv_ops tools/train.py CONFIG      # instead of: python tools/train.py CONFIG
    python -m carafe_plugin.openmmlab.mmcv_ops -m torch.distributed.run --nproc_per_node 2 tools/train.py CONFIG

or, in Python, before the first import of a toolbox::

    from carafe_plugin.openmmlab import mmcv_ops
    mmcv_ops.install()

Either holds for the process and for those that it starts. This package's own tools do it by themselves. One line on
stderr says that the operators are torchvision's, when MMCV first asks for them. Importing this module changes nothing.

A compiled MMCV is never replaced. One that is there and does not load, because it was built for another torch, is an
error that offers ``CARAFE_MMCV_OPS=torchvision``: with that variable set, the operators here take its place.

Only the functions of MMCV's extension are here; what MMCV's Python code around them checks and returns stays MMCV's.

==========================================  =========================================================================
nms, roi_align (average), deform_conv,      torchvision's operators
modulated_deform_conv
roi_align (maximum), roi_pool               torchvision's operators, one sample or one bin each
ms_deform_attn, bbox_overlaps               MMCV's own PyTorch functions
softnms, masked_im2col, masked_col2im,      NumPy and PyTorch
sigmoid_focal_loss, softmax_focal_loss
carafe, carafe_naive                        this package's operator
==========================================  =========================================================================

Every other operator raises a NotImplementedError when it is called.

They agree with MMCV's on a CPU to the rounding of float32, and what nms and softnms keep is the same (with ``offset=1``
but for overlaps that rounding takes across the threshold). Beyond that, all take float64, float16 and bfloat16, and
RoIPool, masked convolution, the focal losses and CARAFE run on a CPU. There half precision is computed in float32, as
everywhere in the focal losses; the sigmoid's keeps its logarithm where MMCV cuts it off at the smallest float's.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from carafe_plugin.openmmlab.startup.sitecustomize import EXTENSION, FOLDER, VARIABLE, ExtensionFinder, is_ours
from carafe_plugin.ops import carafe

__all__ = ["fill", "install"]

USAGE = "usage: python -m carafe_plugin.openmmlab.mmcv_ops SCRIPT [ARGUMENT ...] (or -m MODULE [ARGUMENT ...])"


def install() -> None:
    """Let ``mmcv._ext`` be torchvision's operators where it is absent, here and in processes started from here.

    No toolbox is imported; the environment variable ``PYTHONPATH`` gets one more folder. Calling it again changes
    nothing.

    Raises:
        ValueError: the environment variable ``CARAFE_MMCV_OPS`` is set, and not to ``torchvision``.

    Example:
        >>> install()
        >>> from mmcv.ops import nms
    """
    choice = os.environ.get(VARIABLE) or "torchvision"
    if choice != "torchvision":
        raise ValueError(f"the environment variable {VARIABLE} must be 'torchvision' or unset, got {choice!r}")
    if any(map(is_ours, sys.meta_path)):
        return
    early = [name for name in ("mmdet", "mmseg", "mmpretrain") if name in sys.modules]
    if early and importlib.util.find_spec(EXTENSION) is None:
        warnings.warn(
            f"{', '.join(early)} was imported before mmcv's operators were there, and may do without them: call "
            f"{__name__}.install() first",
            stacklevel=2,
        )
    sys.meta_path.insert(0, ExtensionFinder)
    folders = os.environ.get("PYTHONPATH")  # an empty one among them is the current folder
    os.environ["PYTHONPATH"] = f"{FOLDER}{os.pathsep}{folders}" if folders else str(FOLDER)


def fill(module: ModuleType) -> None:
    """Put the operators into a module that is to be ``mmcv._ext``.

    Args:
        module: Gets the functions below, ``is_stand_in`` and, for every other name that is asked of it, a function
            that raises.

    Raises:
        ImportError: torchvision is not installed, or does not load beside this torch.
    """
    try:
        import torchvision  # noqa: F401  (its operators are registered with torch.ops)
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"mmcv has no compiled operators, and torchvision, whose operators would take their place, cannot be "
            f"imported: {error}",
            name=EXTENSION,
        ) from error
    for function in _OPERATORS:
        setattr(module, function.__name__, function)
    module.is_stand_in = True  # type: ignore[attr-defined]
    module.__dict__.pop("__file__", None)  # that of an extension which does not load

    def missing(name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        def call(*args: Any, **kwargs: Any) -> NoReturn:
            raise NotImplementedError(
                f"mmcv's operator {name} is compiled code, and torchvision has nothing in its place: install mmcv with "
                "its operators (pip install --no-build-isolation onedl-mmcv, or mmcv, beside the torch that is "
                "installed; make env MMCV=compiled in a checkout of carafe_plugin)"
            )

        return call

    module.__getattr__ = missing  # type: ignore[method-assign]


# ------------------------------------------------------------------------------------------------ what they share


def _wide(tensor: Tensor) -> Tensor:
    """The tensor in a dtype that torchvision computes in, and accurately."""
    cuda_half = tensor.dtype == torch.float16 and tensor.is_cuda
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) and not cuda_half else tensor


def _single(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def _order_does_not_matter() -> Iterator[None]:
    """Where torch is to be deterministic, a warning instead of an error: MMCV's kernels sum in any order, too."""
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(min(mode, 1))
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


def _gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad_output: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad(), _order_does_not_matter():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        return torch.autograd.grad(function(*leaves), leaves, grad_output)


# ---------------------------------------------------------------------------------------------------------- boxes


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    boxes = _single(boxes)
    if offset:  # a box that ends in a pixel takes all of it
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], dim=1)
    # MMCV compares in float32, where a threshold of 0.3 is the ratio 3 / 10 and suppresses nothing of that overlap.
    threshold = float(np.float32(iou_threshold))
    order = scores.sort(descending=True).indices  # equal scores in MMCV's order: torchvision's sort is a stable one
    ranks = torch.arange(len(order), 0, -1, device=boxes.device, dtype=boxes.dtype)
    return order[torch.ops.torchvision.nms(boxes[order], ranks, threshold)]


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Fills ``dets`` (N, 5) and returns the indices kept; the rest of ``dets`` stays as it was.

    One after the other, the box of the highest score lowers the scores of those behind it. What falls below
    ``min_score`` gives its place to the last box, which decides between equal scores.
    """
    threshold, spread, least = (np.float32(value) for value in (iou_threshold, sigma, min_score))
    table = torch.cat([boxes, scores[:, None]], dim=1).float().numpy()
    areas = (table[:, 2] - table[:, 0] + offset) * (table[:, 3] - table[:, 1] + offset)
    indices = np.arange(len(table))
    kept: list[int] = []
    while len(table):
        best = 0 if np.isnan(table[0, 4]) else int(np.nanargmax(table[:, 4]))
        for column in (table, areas, indices):
            column[[0, best]] = column[[best, 0]]
        box, rest = table[0], table[1:]
        dets[len(kept)] = torch.from_numpy(box)
        kept.append(int(indices[0]))
        size = np.minimum(box[2:4], rest[:, 2:4]) - np.maximum(box[:2], rest[:, :2]) + np.float32(offset)
        shared = np.prod(np.maximum(size, 0), axis=1)
        with np.errstate(invalid="ignore"):  # boxes without an area have none in common: 0 / 0
            overlap = shared / (areas[0] + areas[1:] - shared)
        if method == 2:
            exponent = -(overlap * overlap) / spread
            rest[:, 4] *= np.exp(exponent, dtype=np.float64).astype(np.float32)  # as exactly rounded as C's
        else:  # 0 drops what overlaps too much, 1 lowers its score
            rest[:, 4] *= np.where(overlap >= threshold, (1 - overlap) * method, np.float32(1))
        alive = ~(rest[:, 4] < least)
        order = np.arange(int(alive.sum()))
        order[~alive[: len(order)]] = np.flatnonzero(alive[len(order) :])[::-1] + len(order)
        table, areas, indices = (column[1:][order] for column in (table, areas, indices))
    return torch.tensor(kept, dtype=torch.long)


def bbox_overlaps(
    bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode: int, aligned: bool = False, offset: int = 0
) -> None:
    from mmcv.ops.bbox import _bbox_overlaps_cpu

    ious.copy_(_bbox_overlaps_cpu(_single(bboxes1), _single(bboxes2), ("iou", "iof")[mode], aligned, offset))


# ------------------------------------------------------------------------------------------- regions of interest
_MAXIMUM = 0  # pool_mode


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    if aligned and not rois.is_cuda and bool((rois[:, 3:] < rois[:, 1:3]).any()):
        raise RuntimeError("RoIAlign: rois must have x1 <= x2 and y1 <= y2, got one of negative size")

    features = _wide(input)

    def sample(rois: Tensor, height: int, width: int, ratio: int) -> Tensor:
        return torch.ops.torchvision.roi_align(features, _wide(rois), spatial_scale, height, width, ratio, aligned)

    height, width = aligned_height, aligned_width
    if pool_mode != _MAXIMUM:
        output.copy_(sample(rois, height, width, sampling_ratio))
        return
    for some, rows, columns in _sample_grids(rois, (height, width), spatial_scale, sampling_ratio, aligned):
        if rows <= 0 or columns <= 0:  # no sample: MMCV's maxima of nothing
            output[some] = torch.finfo(output.dtype).min if output.is_cuda else -10000
            continue
        # As many bins as samples, with one sample in each.
        values, index = _bins(sample(rois[some], height * rows, width * columns, 1), rows, columns).max(dim=-1)
        output[some] = values.to(output.dtype)
        argmax_y[some] = (index // columns).to(argmax_y.dtype)
        argmax_x[some] = (index % columns).to(argmax_x.dtype)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    def spread(grad: Tensor, rois: Tensor, ratio: int) -> Tensor:
        wide, size = (_wide(grad), _wide(rois)), grad.shape[2:]
        with _order_does_not_matter():
            spread_out = torch.ops.torchvision._roi_align_backward(
                *wide, spatial_scale, *size, *grad_input.shape, ratio, aligned
            )
        return spread_out.to(grad_input.dtype)

    height, width = aligned_height, aligned_width
    if pool_mode != _MAXIMUM:
        grad_input.copy_(spread(grad_output, rois, sampling_ratio))
        return
    for some, rows, columns in _sample_grids(rois, (height, width), spatial_scale, sampling_ratio, aligned):
        if rows <= 0 or columns <= 0:
            continue
        grad, index = grad_output[some], argmax_y[some].long() * columns + argmax_x[some].long()
        bins = grad.new_zeros(*grad.shape, rows * columns).scatter_(-1, index[..., None], grad[..., None])
        split = bins.reshape(*grad.shape, rows, columns).transpose(3, 4)
        grad_input += spread(split.reshape(*grad.shape[:2], height * rows, width * columns), rois[some], 1)


def _sample_grids(
    rois: Tensor, size: tuple[int, int], spatial_scale: float, sampling_ratio: int, aligned: bool
) -> list[tuple[Tensor, int, int]]:
    """RoIs (as indices) that have the same number of samples in a bin, with its rows and columns of samples."""
    if sampling_ratio > 0:
        grids = torch.full((len(rois), 2), sampling_ratio)
    else:
        corners = _wide(rois)[:, 1:] * spatial_scale - (0.5 if aligned else 0)
        sizes = corners[:, 2:] - corners[:, :2]
        if not aligned:
            sizes = sizes.clamp(min=1)
        grids = (sizes.flip(1) / sizes.new_tensor(size)).ceil().long().cpu()
    distinct, group = grids.unique(dim=0, return_inverse=True)
    return [
        ((group == number).nonzero()[:, 0].to(rois.device), *map(int, grid)) for number, grid in enumerate(distinct)
    ]


def _bins(samples: Tensor, rows: int, columns: int) -> Tensor:
    """Samples (R, C, height * rows, width * columns) as (R, C, height, width, rows * columns)."""
    r, c, h, w = samples.shape
    split = samples.reshape(r, c, h // rows, rows, w // columns, columns)
    return split.transpose(3, 4).reshape(r, c, h // rows, w // columns, rows * columns)


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Maximum over every bin; ``argmax`` gets its place in the map's rows, -1 for a bin that has none.

    torchvision rounds RoIs to whole locations and MMCV does not, so each bin goes to torchvision as a RoI of its own.
    """
    height, width = input.shape[2:]
    input, rois = _single(input), _single(rois)
    corners = torch.cat([rois[:, 1:3], rois[:, 3:] + 1], dim=1) * spatial_scale
    sizes = corners[:, 2:] - corners[:, :2]
    edges = []
    for axis, (bins, limit) in enumerate(((pooled_width, width), (pooled_height, height))):
        size, start = sizes[:, axis, None] / bins, corners[:, axis, None]
        number = torch.arange(bins + 1, device=rois.device)
        first, last = (number[:-1] * size + start).floor(), (number[1:] * size + start).ceil()
        edges += [first.clamp(0, limit), last.clamp(0, limit)]
    shape = (len(rois), pooled_height, pooled_width)
    x1, x2 = (edge[:, None, :].expand(shape) for edge in edges[:2])
    y1, y2 = (edge[:, :, None].expand(shape) for edge in edges[2:])
    empty = (x2 <= x1) | (y2 <= y1) | (sizes <= 0).any(dim=1)[:, None, None]
    image = rois[:, :1, None].expand(shape)
    places = torch.stack([image, x1, y1, x2 - 1, y2 - 1], dim=-1).reshape(-1, 5)
    values, index = torch.ops.torchvision.roi_pool(input, places, 1.0, 1, 1)
    for target, found, nothing in ((output, values, 0), (argmax, index, -1)):
        target.copy_(found.reshape(*shape, input.shape[1]).masked_fill(empty[..., None], nothing).permute(0, 3, 1, 2))


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    channels, locations = grad_input.shape[1], grad_input.shape[2] * grad_input.shape[3]
    planes = rois[:, :1].long() * channels + torch.arange(channels, device=rois.device)
    index = planes[:, :, None, None] * locations + argmax
    chosen = argmax >= 0
    grad_input.view(-1).index_add_(0, index[chosen], grad_output[chosen])


# ------------------------------------------------------------------------------------------ deformable convolutions


def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor, **geometry: int
) -> None:
    output.copy_(_deform_conv(input, weight, offset, None, None, geometry))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **geometry: int,
) -> None:
    grads = _deform_conv_backward(grad_output, input, weight, offset, None, None, geometry)
    grad_input.copy_(grads[0])
    grad_offset.copy_(grads[2])


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    scale: float,
    **geometry: int,
) -> None:
    # Neither function may keep the other's part: a backward pass may ask for one of them alone.
    grads = _deform_conv_backward(grad_output, input, torch.zeros_like(grad_weight), offset, None, None, geometry)
    grad_weight.add_(grads[1], alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    with_bias: bool,
    **geometry: int,
) -> None:
    output.copy_(_deform_conv(input, weight, offset, mask, bias if with_bias else None, geometry))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    with_bias: bool,
    **geometry: int,
) -> None:
    grads = _deform_conv_backward(grad_output, input, weight, offset, mask, bias if with_bias else None, geometry)
    wanted = (grad_input, grad_weight, grad_offset, grad_mask, *([grad_bias] if with_bias else []))
    for target, grad in zip(wanted, grads, strict=False):
        target.copy_(grad)


def _deform_conv(*arguments: Any) -> Tensor:
    return torch.ops.torchvision.deform_conv2d(*_deform_conv_arguments(*arguments))


def _deform_conv_backward(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    with _order_does_not_matter():
        return torch.ops.torchvision._deform_conv2d_backward(_wide(grad_output), *_deform_conv_arguments(*arguments))


def _deform_conv_arguments(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor | None, geometry: dict[str, int]
) -> tuple:
    """What torchvision's operators take, from MMCV's names for both versions of the convolution."""
    first = ("dH", "dW", "padH", "padW", "dilationH", "dilationW")
    second = ("stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w")
    placed = [geometry[name] for name in (first if "dH" in geometry else second)]
    use_mask = mask is not None
    mask = input.new_zeros(input.shape[0], 1) if mask is None else mask
    bias = input.new_zeros(weight.shape[0]) if bias is None else bias
    tensors = map(_wide, (input, weight, offset, mask, bias))
    return (*tensors, *placed, geometry["group"], geometry["deformable_group"], use_mask)


def masked_im2col_forward(
    im: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    padded = F.pad(im[0], (pad_w, pad_w, pad_h, pad_h))
    taps = [padded[:, mask_h_idx + i, mask_w_idx + j] for i in range(kernel_h) for j in range(kernel_w)]
    col.copy_(torch.stack(taps, dim=1).flatten(0, 1))


def masked_col2im_forward(
    col: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, im: Tensor, height: int, width: int, channels: int
) -> None:
    im[0, :, mask_h_idx, mask_w_idx] = col


# ------------------------------------------------------------------------------------------- attention and losses


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    return multi_scale_deformable_attn_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    def attend(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        none = value_level_start_index
        return ms_deform_attn_forward(value, value_spatial_shapes, none, locations, weights, im2col_step)

    grads = _gradients(attend, (value, sampling_locations, attention_weights), grad_output)
    for target, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads, strict=True):
        target.copy_(grad)


def _focal_terms(input: Tensor, target: Tensor, weight: Tensor, alpha: float) -> tuple[Tensor, ...]:
    """Signs (+1 at the label's class, -1 elsewhere, the background being no class) and weights (N, C) of the terms, the
    probability of each to be wrong, and the logarithm of that to be right.
    """
    chosen = target[:, None] == torch.arange(input.shape[1], device=input.device)
    sign = chosen.to(_single(input).dtype) * 2 - 1
    share = torch.where(chosen, alpha, 1 - alpha).to(sign)
    if weight.numel():
        share = share * _single(weight)[target][:, None]
    logits = sign * _single(input)
    return sign, share, (-logits).sigmoid(), F.logsigmoid(logits)


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    _, share, wrong, log = _focal_terms(input, target, weight, alpha)
    output.copy_(-share * wrong**gamma * log)


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    # Not autograd's, whose derivative of wrong**gamma is infinite at 0 for gamma < 1.
    sign, share, wrong, log = _focal_terms(input, target, weight, alpha)
    grad_input.copy_(sign * share * wrong**gamma * (gamma * (1 - wrong) * log - wrong))


def _label_scores(softmax: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weight of every row (0 where it is to be ignored), its label's score, and the logarithm of that."""
    label = target.clamp(min=0)
    chosen = _single(softmax).gather(1, label[:, None])[:, 0]
    share = (_single(weight)[label] if weight.numel() else torch.ones_like(chosen)).masked_fill(target < 0, 0)
    return share, chosen, chosen.clamp(min=torch.finfo(torch.float32).tiny).log()


def softmax_focal_loss_forward(
    softmax: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    share, chosen, log = _label_scores(softmax, target, weight)
    output.copy_(-alpha * share * (1 - chosen) ** gamma * log)


def softmax_focal_loss_backward(
    softmax: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Fills ``grad_input`` with the gradient to the logits behind ``softmax``."""
    share, chosen, log = _label_scores(softmax, target, weight)
    slope = alpha * share * (gamma * (1 - chosen) ** (gamma - 1) * chosen * log - (1 - chosen) ** gamma)
    grad_input.copy_(slope[:, None] * (F.one_hot(target.clamp(min=0), softmax.shape[1]) - _single(softmax)))


# --------------------------------------------------------------------------------------------------------- CARAFE


def carafe_forward(
    features: Tensor,
    masks: Tensor,
    rfeatures: Tensor,
    routput: Tensor,
    rmasks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    carafe_naive_forward(features, masks, output, kernel_size, group_size, scale_factor)
    rfeatures.copy_(features)  # all that MMCV hands to the backward pass


def carafe_backward(
    top_grad: Tensor,
    rfeatures: Tensor,
    masks: Tensor,
    rtop_grad: Tensor,
    rbottom_grad_hs: Tensor,
    rbottom_grad: Tensor,
    rmask_grad: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    carafe_naive_backward(top_grad, rfeatures, masks, bottom_grad, mask_grad, kernel_size, group_size, scale_factor)


def carafe_naive_forward(
    features: Tensor, masks: Tensor, output: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> None:
    output.copy_(carafe(features, masks, kernel_size, group_size, scale_factor))


def carafe_naive_backward(
    top_grad: Tensor,
    features: Tensor,
    masks: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    def reassemble(features: Tensor, masks: Tensor) -> Tensor:
        return carafe(features, masks, kernel_size, group_size, scale_factor)

    grads = _gradients(reassemble, (features, masks), top_grad)
    bottom_grad.copy_(grads[0])
    mask_grad.copy_(grads[1])


# ---------------------------------------------------------------------------------------------------- information


def get_compiler_version() -> str:
    return "none: torchvision's operators, by carafe_plugin"


def get_compiling_cuda_version() -> str:
    return get_compiler_version()


_OPERATORS = (
    bbox_overlaps,
    carafe_backward,
    carafe_forward,
    carafe_naive_backward,
    carafe_naive_forward,
    deform_conv_backward_input,
    deform_conv_backward_parameters,
    deform_conv_forward,
    get_compiler_version,
    get_compiling_cuda_version,
    masked_col2im_forward,
    masked_im2col_forward,
    modulated_deform_conv_backward,
    modulated_deform_conv_forward,
    ms_deform_attn_backward,
    ms_deform_attn_forward,
    nms,
    roi_align_backward,
    roi_align_forward,
    roi_pool_backward,
    roi_pool_forward,
    sigmoid_focal_loss_backward,
    sigmoid_focal_loss_forward,
    softmax_focal_loss_backward,
    softmax_focal_loss_forward,
    softnms,
)


def main(arguments: Sequence[str]) -> int:
    """Go on as ``python ARGUMENTS``, with the operators at hand; returns for ``--help`` or a usage error."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    try:
        install()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sys.stdout.flush()
    options = sys.orig_argv[1 : sys.orig_argv.index("-m")] if "-m" in sys.orig_argv else []  # such as -u
    os.execv(sys.executable, [sys.executable, *options, *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
