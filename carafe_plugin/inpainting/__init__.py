"""Image inpainting with CARAFE++ (paper, Sec. 4.3 and 5.1): Global&Local and Partial Conv, with and without it.

Importing this package needs MMEngine, and registers its types in MMEngine's root registries, so that a configuration
with ``custom_imports = dict(imports=["carafe_plugin.inpainting"])`` names them.
"""

from .dataset import DrawSampler, InpaintingFolder, free_form_mask
from .masked import MaskedCARAFEDownsample, MaskedCARAFEUpsample, PartialConv2d
from .metric import InpaintingMetric
from .model import InpaintingGAN, InpaintingPreprocessor
from .networks import InpaintingGenerator, PatchDiscriminator
from .training import ExactResumeHook, PerNetworkDistributedDataParallel, PerNetworkOptimWrapperConstructor

__all__ = [
    "DrawSampler",
    "ExactResumeHook",
    "InpaintingFolder",
    "InpaintingGAN",
    "InpaintingGenerator",
    "InpaintingMetric",
    "InpaintingPreprocessor",
    "MaskedCARAFEDownsample",
    "MaskedCARAFEUpsample",
    "PartialConv2d",
    "PatchDiscriminator",
    "PerNetworkDistributedDataParallel",
    "PerNetworkOptimWrapperConstructor",
    "free_form_mask",
]
