"""MMSegmentation's MaskFormer, for a pixel decoder that upsamples by CARAFE++. MaskFormer needs MMDetection."""

from __future__ import annotations

from typing import Any

from mmseg.models.decode_heads import MaskFormerHead
from mmseg.registry import MODELS

from carafe_plugin.openmmlab.mmdet.pixel_decoders import project_memory


@MODELS.register_module()
class CARAFEMaskFormerHead(MaskFormerHead):
    """MaskFormerHead that projects the memory of ``CARAFEPixelDecoder`` to its transformer decoder's channels.

    MaskFormerHead does so for PixelDecoder, which it recognises by its exact type. Takes MaskFormerHead's arguments and
    loads its checkpoints; CARAFE++ is set in its ``pixel_decoder``.

    Args:
        *args: MaskFormerHead's.
        enforce_decoder_input_project: Project even where the channels are the same.
        **kwargs: MaskFormerHead's.
    """

    def __init__(self, *args: Any, enforce_decoder_input_project: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, enforce_decoder_input_project=enforce_decoder_input_project, **kwargs)
        project_memory(self, enforce_decoder_input_project)
