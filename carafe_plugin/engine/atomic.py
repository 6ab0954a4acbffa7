"""Files that are written completely or not at all."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend

from carafe_plugin.engine.writing import UNFINISHED, sync, write_whole

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
        write_whole(obj, path)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        """Write the text ``obj`` to ``filepath`` as :meth:`put` does."""
        self.put(obj.encode(encoding), filepath)


def move_into_place(unfinished: Path, path: Path) -> None:
    """Give a file or folder that is complete the name ``path``, in the place of what has it.

    Of folders, the old one steps aside first; where a kill comes in between, :func:`restore_superseded` has it back.
    """
    for file in unfinished.rglob("*"):
        sync(file)
    old = path.with_name(path.name + _SUPERSEDED)
    if path.is_dir():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    unfinished.replace(path)
    sync(path.parent)
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
