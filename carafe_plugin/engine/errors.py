"""What a user can put right."""

from __future__ import annotations


class UsageError(Exception):
    """Something that the user can put right; the message says what was expected, what came, and where."""
