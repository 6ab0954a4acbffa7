"""The functions of MMCV's extension, on torchvision, PyTorch and this package's operator.

:mod:`~carafe_plugin.openmmlab.mmcv_ops` says which of them runs on what, and :func:`fill` puts every other public
function of this module into ``mmcv._ext``. MMCV passes tensors by position and settings by name; where it has allocated
the results, the functions fill them. Tensors that only a CUDA kernel needs as a buffer are left as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from carafe_plugin.ops import carafe

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


def _fill_gradients(
    results: Sequence[Tensor], function: Callable[..., Tensor], inputs: Sequence[Tensor], grad_output: Tensor
) -> None:
    with torch.enable_grad(), _order_does_not_matter():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        grads = torch.autograd.grad(function(*leaves), leaves, grad_output)
    for result, grad in zip(results, grads, strict=True):
        result.copy_(grad)


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


@dataclass(frozen=True)
class _RoIAlign:
    """The settings of a RoIAlign, by MMCV's names, and what average and maximum pooling do alike."""

    aligned_height: int
    aligned_width: int
    spatial_scale: float
    sampling_ratio: int
    pool_mode: int  # 0: maximum, 1: average
    aligned: bool

    def sample(self, features: Tensor, rois: Tensor, rows: int = 1, columns: int = 1, ratio: int = 1) -> Tensor:
        """The averages of ``ratio`` x ``ratio`` samples, in ``rows`` x ``columns`` parts of every bin."""
        size = (self.aligned_height * rows, self.aligned_width * columns)
        return torch.ops.torchvision.roi_align(features, _wide(rois), self.spatial_scale, *size, ratio, self.aligned)

    def spread(self, grad: Tensor, rois: Tensor, like: Tensor, ratio: int = 1) -> Tensor:
        """The gradient to a map ``like`` this one, from that to its samples."""
        arguments = (self.spatial_scale, *grad.shape[2:], *like.shape, ratio, self.aligned)
        with _order_does_not_matter():
            return torch.ops.torchvision._roi_align_backward(_wide(grad), _wide(rois), *arguments).to(like.dtype)

    def grids(self, rois: Tensor) -> list[tuple[Tensor, int, int]]:
        """RoIs (as indices) that have the same number of samples in a bin, with its rows and columns of samples."""
        if self.sampling_ratio > 0:
            grids = torch.full((len(rois), 2), self.sampling_ratio)
        else:
            corners = _wide(rois)[:, 1:] * self.spatial_scale - (0.5 if self.aligned else 0)
            sizes = corners[:, 2:] - corners[:, :2]
            if not self.aligned:
                sizes = sizes.clamp(min=1)
            grids = (sizes.flip(1) / sizes.new_tensor((self.aligned_height, self.aligned_width))).ceil().long().cpu()
        distinct, group = grids.unique(dim=0, return_inverse=True)
        return [((group == i).nonzero()[:, 0].to(rois.device), *map(int, grid)) for i, grid in enumerate(distinct)]


def roi_align_forward(
    input: Tensor, rois: Tensor, output: Tensor, argmax_y: Tensor, argmax_x: Tensor, **settings: Any
) -> None:
    align = _RoIAlign(**settings)
    if align.aligned and not rois.is_cuda and bool((rois[:, 3:] < rois[:, 1:3]).any()):
        raise RuntimeError("RoIAlign: rois must have x1 <= x2 and y1 <= y2, got one of negative size")
    features = _wide(input)
    if align.pool_mode != 0:
        output.copy_(align.sample(features, rois, ratio=align.sampling_ratio))
        return
    for some, rows, columns in align.grids(rois):
        if rows <= 0 or columns <= 0:  # no sample: MMCV's maxima of nothing
            output[some] = torch.finfo(output.dtype).min if output.is_cuda else -10000
            continue
        # As many bins as samples, with one sample in each.
        samples = align.sample(features, rois[some], rows, columns).unflatten(3, (-1, columns)).unflatten(2, (-1, rows))
        values, index = samples.transpose(3, 4).flatten(4).max(dim=-1)
        output[some] = values.to(output.dtype)
        argmax_y[some] = (index // columns).to(argmax_y.dtype)
        argmax_x[some] = (index % columns).to(argmax_x.dtype)


def roi_align_backward(
    grad_output: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor, grad_input: Tensor, **settings: Any
) -> None:
    align = _RoIAlign(**settings)
    if align.pool_mode != 0:
        grad_input.copy_(align.spread(grad_output, rois, grad_input, align.sampling_ratio))
        return
    for some, rows, columns in align.grids(rois):
        if rows <= 0 or columns <= 0:
            continue
        grad, index = grad_output[some], argmax_y[some].long() * columns + argmax_x[some].long()
        bins = grad.new_zeros(*grad.shape, rows * columns).scatter_(-1, index[..., None], grad[..., None])
        split = bins.unflatten(-1, (rows, columns)).transpose(3, 4)
        grad_input += align.spread(split.flatten(4, 5).flatten(2, 3), rois[some], grad_input)


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


def roi_pool_backward(grad_output: Tensor, rois: Tensor, argmax: Tensor, grad_input: Tensor, **settings: Any) -> None:
    channels, locations = grad_input.shape[1], grad_input.shape[2] * grad_input.shape[3]
    planes = rois[:, :1].long() * channels + torch.arange(channels, device=rois.device)
    index = planes[:, :, None, None] * locations + argmax
    chosen = argmax >= 0
    grad_input.view(-1).index_add_(0, index[chosen], grad_output[chosen])


# ------------------------------------------------------------------------------------------ deformable convolutions


def deform_conv_forward(*tensors: Tensor, **geometry: int) -> None:
    input, weight, offset, output, *_ = tensors
    output.copy_(_deform_conv(geometry, input, weight, offset))


def deform_conv_backward_input(*tensors: Tensor, **geometry: int) -> None:
    input, offset, grad_output, grad_input, grad_offset, weight, *_ = tensors
    grads = _deform_conv(geometry, input, weight, offset, grad_output=grad_output)
    grad_input.copy_(grads[0])
    grad_offset.copy_(grads[2])


def deform_conv_backward_parameters(*tensors: Tensor, scale: float, **geometry: int) -> None:
    # Neither function may keep the other's part: a backward pass may ask for one of them alone.
    input, offset, grad_output, grad_weight, *_ = tensors
    grads = _deform_conv(geometry, input, torch.zeros_like(grad_weight), offset, grad_output=grad_output)
    grad_weight.add_(grads[1], alpha=scale)


def modulated_deform_conv_forward(*tensors: Tensor, with_bias: bool, **geometry: int) -> None:
    input, weight, bias, _, offset, mask, output, _ = tensors
    output.copy_(_deform_conv(geometry, input, weight, offset, mask, bias if with_bias else None))


def modulated_deform_conv_backward(*tensors: Tensor, with_bias: bool, **geometry: int) -> None:
    input, weight, bias, _, offset, mask, _, *results, grad_output = tensors
    grads = _deform_conv(geometry, input, weight, offset, mask, bias if with_bias else None, grad_output)
    grad_input, grad_weight, grad_bias, grad_offset, grad_mask = results
    wanted = (grad_input, grad_weight, grad_offset, grad_mask, *([grad_bias] if with_bias else []))
    for target, grad in zip(wanted, grads, strict=False):
        target.copy_(grad)


def _deform_conv(
    geometry: dict[str, int],
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    grad_output: Tensor | None = None,
) -> Any:
    """Either version of the convolution, with MMCV's names for its geometry; with ``grad_output`` the gradients to
    input, weight, offset, mask and bias.
    """
    first = ("dH", "dW", "padH", "padW", "dilationH", "dilationW")
    second = ("stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w")
    placed = [geometry[name] for name in (first if "dH" in geometry else second)]
    use_mask = mask is not None
    mask = input.new_zeros(input.shape[0], 1) if mask is None else mask
    bias = input.new_zeros(weight.shape[0]) if bias is None else bias
    tensors = map(_wide, (input, weight, offset, mask, bias))
    arguments = (*tensors, *placed, geometry["group"], geometry["deformable_group"], use_mask)
    if grad_output is None:
        return torch.ops.torchvision.deform_conv2d(*arguments)
    with _order_does_not_matter():
        return torch.ops.torchvision._deform_conv2d_backward(_wide(grad_output), *arguments)


def masked_im2col_forward(
    im: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, col: Tensor, pad_h: int, pad_w: int, **kernel: int
) -> None:
    padded = F.pad(im[0], (pad_w, pad_w, pad_h, pad_h))
    places = [(i, j) for i in range(kernel["kernel_h"]) for j in range(kernel["kernel_w"])]
    taps = [padded[:, mask_h_idx + i, mask_w_idx + j] for i, j in places]
    col.copy_(torch.stack(taps, dim=1).flatten(0, 1))


def masked_col2im_forward(col: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, im: Tensor, **sizes: int) -> None:
    im[0, :, mask_h_idx, mask_w_idx] = col


# ------------------------------------------------------------------------------------------- attention and losses


def ms_deform_attn_forward(
    value: Tensor, shapes: Tensor, level_starts: Tensor, locations: Tensor, weights: Tensor, **settings: int
) -> Tensor:
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    return multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)


def ms_deform_attn_backward(*tensors: Tensor, **settings: int) -> None:
    value, shapes, level_starts, locations, weights, grad_output, *results = tensors

    def attend(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn_forward(value, shapes, level_starts, locations, weights)

    _fill_gradients(results, attend, (value, locations, weights), grad_output)


def _focal_terms(input: Tensor, target: Tensor, weight: Tensor, *, alpha: float) -> tuple[Tensor, ...]:
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


def sigmoid_focal_loss_forward(*tensors: Tensor, gamma: float, alpha: float) -> None:
    *inputs, output = tensors
    _, share, wrong, log = _focal_terms(*inputs, alpha=alpha)
    output.copy_(-share * wrong**gamma * log)


def sigmoid_focal_loss_backward(*tensors: Tensor, gamma: float, alpha: float) -> None:
    *inputs, grad_input = tensors
    # Not autograd's, whose derivative of wrong**gamma is infinite at 0 for gamma < 1.
    sign, share, wrong, log = _focal_terms(*inputs, alpha=alpha)
    grad_input.copy_(sign * share * wrong**gamma * (gamma * (1 - wrong) * log - wrong))


def _label_scores(softmax: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weight of every row (0 where it is to be ignored), its label's score, and the logarithm of that."""
    label = target.clamp(min=0)
    chosen = _single(softmax).gather(1, label[:, None])[:, 0]
    share = (_single(weight)[label] if weight.numel() else torch.ones_like(chosen)).masked_fill(target < 0, 0)
    return share, chosen, chosen.clamp(min=torch.finfo(torch.float32).tiny).log()


def softmax_focal_loss_forward(*tensors: Tensor, gamma: float, alpha: float) -> None:
    *inputs, output = tensors
    share, chosen, log = _label_scores(*inputs)
    output.copy_(-alpha * share * (1 - chosen) ** gamma * log)


def softmax_focal_loss_backward(*tensors: Tensor, gamma: float, alpha: float) -> None:
    """Fills the last tensor with the gradient with respect to the logits of the first."""
    softmax, target, weight, _, grad_input = tensors
    share, chosen, log = _label_scores(softmax, target, weight)
    slope = alpha * share * (gamma * (1 - chosen) ** (gamma - 1) * chosen * log - (1 - chosen) ** gamma)
    grad_input.copy_(slope[:, None] * (F.one_hot(target.clamp(min=0), softmax.shape[1]) - _single(softmax)))


def carafe_forward(*tensors: Tensor, **settings: int) -> None:
    features, masks, *kept, output = tensors
    output.copy_(carafe(features, masks, **settings))
    if kept:  # carafe's alone: all that MMCV hands to its backward pass
        kept[0].copy_(features)


def carafe_backward(*tensors: Tensor, **settings: Any) -> None:
    grad_output, features, masks, *_, grad_features, grad_masks = tensors
    reassemble = functools.partial(carafe, **settings)
    _fill_gradients((grad_features, grad_masks), reassemble, (features, masks), grad_output)


carafe_naive_forward, carafe_naive_backward = carafe_forward, carafe_backward


def get_compiler_version() -> str:
    return "none: torchvision's operators, by carafe_plugin"


get_compiling_cuda_version = get_compiler_version


def fill(module: ModuleType) -> None:
    """Make a module ``mmcv._ext``: the operators, ``is_stand_in``, and for any other name a function that raises."""
    try:
        import torchvision  # noqa: F401  (its operators are registered with torch.ops)
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"mmcv has no compiled operators, and torchvision, whose operators would take their place, cannot be "
            f"imported: {error}",
            name=module.__name__,
        ) from error
    for name, value in globals().items():
        if isinstance(value, FunctionType) and value.__module__ == __name__ and name[0] != "_" and value is not fill:
            setattr(module, name, value)
    module.is_stand_in = True  # type: ignore[attr-defined]
    module.__dict__.pop("__file__", None)  # that of an extension which does not load

    def missing(name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        def call(*args: Any, **kwargs: Any) -> NoReturn:
            raise NotImplementedError(
                f"mmcv's operator {name} is compiled code, and torchvision has nothing in its place: install mmcv with "
                "its operators (pip install --no-build-isolation onedl-mmcv, or mmcv, for the torch that is "
                "installed; make env MMCV=compiled in a checkout of carafe_plugin)"
            )

        return call

    module.__getattr__ = missing  # type: ignore[method-assign]
