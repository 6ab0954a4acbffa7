"""Files that are written completely or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend

UNFINISHED = ".tmp"  # the ending of a file that is being written


class AtomicLocalBackend(LocalBackend):
    """mmengine's local file backend with writes that happen completely or not at all.

    Example:
        >>> import tempfile, pathlib
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / 'number'
        ...     AtomicLocalBackend().put_text('42', path)
        ...     path.read_text(), [file.name for file in path.parent.iterdir()]
        ('42', ['number'])
    """

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write ``obj`` and make missing folders. Readers see the old content or the new, never a part, also after an
        OSError (disk full, no permission).
        """
        path = Path(filepath)
        path.parent.mkdir(parents=True, exist_ok=True)
        # a name of its own: mmengine lets every process of a run write its metrics to one and the same file
        unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{UNFINISHED}")
        try:
            with unfinished.open("wb") as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())  # else a power cut could leave the new name on an empty file
            unfinished.replace(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        """Write the text ``obj`` to ``filepath`` as :meth:`put` does."""
        self.put(obj.encode(encoding), filepath)


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` last through a power cut, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def use_atomic_writes() -> None:
    """Let every local file that mmengine's ``fileio`` writes in this process (checkpoints, pickles) be atomic."""
    register_backend("local", AtomicLocalBackend, force=True, prefixes="")
