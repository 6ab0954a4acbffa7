"""The functional operator."""

from . import flops
from ._registration import is_compiled
from .functional import carafe

__all__ = ["carafe", "flops", "is_compiled"]
