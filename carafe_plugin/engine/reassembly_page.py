"""A page that shows the kernel and the sources of any location of a chain: one HTML file, from reassembly_page.html."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from carafe_plugin.analysis import Reassembly, chain_groups
from carafe_plugin.engine.atomic import AtomicLocalBackend
from carafe_plugin.engine.reassembly_view import View

TEMPLATE = Path(__file__).with_name("reassembly_page.html")
MAX_SIDE = 1024  # of the image that the page holds, in pixels: more makes the file larger, and hardly clearer
DRAWN_WIDTH = 640  # of the page's canvases: small images are drawn larger, so that their locations can be told apart


def pack_kernels(kernels: Tensor) -> tuple[np.ndarray, bool]:
    """Kernels (G, k, k, H', W') of weights from 0 to 1 in a byte a weight, (G, H', W', k * k) uint8, and whether they
    are normalised. Then each kernel is divided by its largest weight, for precision, and a weight is its byte over the
    sum of its kernel's bytes; else a weight is its byte over 255.
    """
    flat = kernels.flatten(1, 2).permute(0, 2, 3, 1).double()
    normalised = bool(torch.allclose(flat.sum(-1), torch.ones(()).double(), atol=0.02))  # half precision included
    if normalised:
        flat = flat / flat.amax(-1, keepdim=True)
    return (255 * flat).round().to(torch.uint8).numpy(), normalised


def page_data(
    title: str, chain: Sequence[Reassembly], view: View, pixels: np.ndarray, start: tuple[int, int], group: int | None
) -> dict[str, Any]:
    """What the page's script reads of a chain, in the order in which it ran, on an image of (H, W, 3) uint8 RGB pixels.

    ``start`` is row and column of the location that is shown first, on the last output, ``group`` as
    :func:`carafe_plugin.analysis.compose` takes it: for None, the average, the page holds the kernels of all groups,
    and composes each before it averages, as that function does.
    """
    image = Image.fromarray(pixels)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=85)
    operators = []
    groups = chain_groups(chain)
    chosen = [[0] * len(chain)] if group is not None else groups  # of those that the page holds
    for index, reassembly in enumerate(chain):
        kernels = reassembly.kernels[0]
        packed, normalised = pack_kernels(kernels if group is None else kernels[[groups[group][index]]])
        operators.append(
            dict(
                name=reassembly.name,
                k=reassembly.kernels.shape[2],
                up=reassembly.up,
                down=reassembly.down,
                source=reassembly.source_size,
                output=reassembly.output_size,
                source_cells=view.cells(reassembly.source_size, chain),
                output_cells=view.cells(reassembly.output_size, chain),
                normalised=normalised,
                kernels=base64.b64encode(packed.tobytes()).decode(),
            )
        )
    about = f"{title}: {len(chain)} CARAFE++ in a row. Red squares are the locations that the green one is reassembled "
    about += "from, the deeper the more. What lies between two operators is left out, as if each location passed its "
    about += "value on."
    if len(groups) > 1:
        which = f"group {group} of" if group is not None else "the average over"
        about += f" Channels have kernels by group: this is {which} {len(groups)}."
    return dict(
        title=title,
        about=about,
        image=f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}",
        image_size=view.image_size,
        shown_width=max(DRAWN_WIDTH, image.width),
        start=start,
        groups=chosen,
        operators=operators,
    )


def write_page(path: Path, data: dict[str, Any]) -> None:
    """Write the page with ``data`` in it, completely or not at all."""
    # In a script element, nothing but "<" could end the data early.
    text = json.dumps(data).replace("<", "\\u003c")
    AtomicLocalBackend().put_text(TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/", text), path)
