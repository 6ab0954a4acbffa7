"""From the content encoder's output to the rescaled map: pixel shuffle, kernel normaliser and reassembly in one pass.

:func:`.reference.masks_from_logits` and the reassembly are the definition. In one pass, neither the shuffled nor the
normalised kernels ever lie in memory, and autograd keeps the features and the logits alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._tracing import as_one_node
from .forms import reassembly
from .functional import read_output_size
from .reference import NORMALIZERS, crop, masks_from_logits

_MAX_SCALE, _MAX_CUDA_SCALE = 64, 8
_MAX_WEIGHTS = 512  # of a pixel, on CUDA: of a block's few pixels they must fit into its shared memory


@as_one_node
def reassemble_logits(
    features: Tensor,
    logits: Tensor,
    k: int,
    g: int,
    up: int,
    down: int,
    normalizer: str,
    output_size: int | Sequence[int] | None = None,
) -> Tensor:
    """Features rescaled by the kernels that ``logits`` stand for.

    Args:
        features (Tensor[N, C, H, W]): as for :func:`carafe_plugin.ops.carafe`.
        logits (Tensor[N, G * k^2 * up^2, H'', W'']): the content encoder's output; ``(H'', W'')`` is ``(H, W)`` where
            ``up > 1`` and ``(ceil(H / down), ceil(W / down))`` where ``up`` is 1.
        k (int): size of the reassembly kernels.
        g (int): ``G``, groups of channels.
        up (int): with ``down``, the scale.
        down (int): see ``up``.
        normalizer (str): one of :data:`.reference.NORMALIZERS`.
        output_size (int | Sequence[int] | None): as for :func:`carafe_plugin.ops.carafe`; the logits are of all
            outputs nevertheless.

    Returns:
        Tensor[N, C, H', W'].
    """
    wanted = () if output_size is None else read_output_size(output_size, features, up, down)
    operator = reassembly(features)
    scale = max(up, down)
    one_pass = min(up, down) == 1 and scale <= _MAX_SCALE
    if features.device.type == "cuda":
        one_pass = one_pass and scale <= _MAX_CUDA_SCALE and (k * scale) ** 2 <= _MAX_WEIGHTS
    if not one_pass:
        masks = crop(masks_from_logits(logits, k, g, up, down, normalizer), wanted or None)
        return operator(features, masks, k, g, up, down, 0, *wanted)
    if up == 1:
        logits = crop(logits, wanted or None)
    return operator(features, logits, k, g, up, down, 1 + NORMALIZERS.index(normalizer), *wanted)
