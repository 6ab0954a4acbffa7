"""CARAFE++ in the models of other libraries, or of your own: :func:`convert`."""

from .conversion import convert
from .report import Kept, Replaced, Report

__all__ = ["Kept", "Replaced", "Report", "convert"]
