"""Files that are written completely or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend

UNFINISHED = ".tmp"  # the ending of a file or folder that is being written
_SUPERSEDED = f".old{UNFINISHED}"


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
        _sync(path.parent)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        """Write the text ``obj`` to ``filepath`` as :meth:`put` does."""
        self.put(obj.encode(encoding), filepath)


def _sync(path: Path) -> None:
    """Make a file's content, or a rename in a folder, last through a power cut, where the system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_into_place(unfinished: Path, path: Path) -> None:
    """Give a file or folder that is complete the name ``path``, in the place of what has it.

    Of folders, the old one steps aside first; where a kill comes in between, :func:`restore_superseded` has it back.
    """
    for file in unfinished.rglob("*"):
        _sync(file)
    old = path.with_name(path.name + _SUPERSEDED)
    if path.is_dir():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    unfinished.replace(path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore_superseded(folder: Path) -> None:
    """Give folders that were stepping aside in a run that was killed their names back; several processes may try."""
    for old in folder.glob(f"*{_SUPERSEDED}"):
        if not (path := old.with_name(old.name.removesuffix(_SUPERSEDED))).exists():
            with suppress(OSError):
                old.rename(path)


def use_atomic_writes() -> None:
    """Let every local file that mmengine's ``fileio`` writes in this process (checkpoints, pickles) be atomic."""
    register_backend("local", AtomicLocalBackend, force=True, prefixes="")
