"""How a file is written completely or not at all; a leaf that needs nothing installed."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

UNFINISHED = ".tmp"  # the ending of a file or folder that is being written


def write_whole(content: bytes, path: Path) -> None:
    """Write ``content``. Readers see the old content or the new, never a part, also after an OSError (disk full, no
    permission).
    """
    # a name of its own: mmengine lets every process of a run write its metrics to one and the same file
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{UNFINISHED}")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave the new name on an empty file
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Make a file's content, or a rename in a folder, last through a power cut, where the system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
