"""The functional operator."""

from ._registration import is_compiled
from .carafe import carafe

__all__ = ["carafe", "is_compiled"]
