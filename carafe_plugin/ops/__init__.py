"""The functional operator."""

from . import _operators  # noqa: F401  (registers the operators)
from ._compiled import is_compiled
from .functional import carafe

__all__ = ["carafe", "is_compiled"]
