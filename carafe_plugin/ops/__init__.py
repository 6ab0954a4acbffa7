"""The functional operator."""

from ._registration import is_compiled
from .functional import carafe

__all__ = ["carafe", "is_compiled"]
