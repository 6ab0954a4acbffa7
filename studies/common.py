"""What all studies share: the project's root, and how they print and write."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from carafe_plugin.engine.checkpoint import AtomicLocalBackend

ROOT = Path(__file__).resolve().parents[1]


def shown(path: Path) -> str:
    """The path as seen from the root where it lies below it."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def wide_console(width: int) -> Console:
    """A console for tables: as wide as its terminal, or ``width`` in a file or a pipe."""
    return Console(width=None if sys.stdout.isatty() else width)


def write_json(path: Path, content: Any) -> None:
    """Write all of ``content`` or nothing; missing folders are made."""
    AtomicLocalBackend().put_text(json.dumps(content, indent=2) + "\n", path)
