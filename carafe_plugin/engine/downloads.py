"""From what was downloaded to a folder: by a link to what is unpacked already, else out of an archive."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, cast

from carafe_plugin.engine.errors import UsageError

#: A hidden file in a folder for as long as it is being unpacked: a kill may leave a part of a file.
UNFINISHED = ".unpacking"


def link(target: Path, place: Path) -> None:
    """Make ``place`` a symbolic link to ``target``. Raises UsageError where a file or a filled folder is there."""
    target = target.resolve()
    if place.is_symlink():
        place.unlink()
    elif place.is_dir() and not any(place.iterdir()):
        place.rmdir()
    elif place.exists():
        raise UsageError(f"{place} is in the way of a link to {target}: move it elsewhere")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target, target_is_directory=target.is_dir())


def has_whole_files(folder: Path, names: Iterable[str], archive: Path, inside: str) -> bool:
    """Whether a folder holds JSON files whole: as they are in their .zip or, without it, not truncated."""
    try:
        with zipfile.ZipFile(archive) as packed:
            known = {info.filename: info for info in packed.infolist()}
    except (OSError, zipfile.BadZipFile):  # nothing to compare with
        known = {}
    for name in names:
        place, info = folder / name, known.get(f"{inside}/{name}")
        if not (_is_unpacked(place, info.file_size, info.CRC) if info else _ends_as_json(place)):
            return False
    return True


def _ends_as_json(place: Path) -> bool:
    return place.is_file() and place.read_bytes()[-64:].rstrip().endswith(b"}")  # whoever uses it checks the rest


def _is_unpacked(place: Path, size: int, checksum: int | None) -> bool:
    """Whether a file is as in its archive; of annotations, half a gigabyte at most, the content is compared too."""
    if not place.is_file() or place.stat().st_size != size:
        return False
    return checksum is None or place.suffix != ".json" or zlib.crc32(place.read_bytes()) == checksum


def unpack(archive: Path, inside: str, folder: Path, advance: Callable[[int], None]) -> None:
    """Unpack the folder ``inside`` (``""`` for all) of a .zip or .tar into ``folder``. Files that are there already, in
    their full size, are not written again; a .tar of .tar files, one per class, becomes a folder per class.

    ``advance`` is called with the number of further bytes of the archive that are done. Raises UsageError where the
    archive is truncated or damaged, or has no such folder.
    """
    found, start = False, PurePosixPath(inside).parts
    try:
        for name, size, checksum, done, open_member in _members(archive):
            path = PurePosixPath(name)
            if path.parts[: len(start)] == start and ".." not in path.parts and not path.is_absolute():
                if not found:
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / UNFINISHED).touch()
                found, place = True, folder.joinpath(*path.parts[len(start) :])
                if not _is_unpacked(place, size, checksum):
                    with open_member() as content:
                        write_file(place, content, size)
            advance(done)
    except (zipfile.BadZipFile, zlib.error, tarfile.TarError, EOFError) as error:
        size = archive.stat().st_size
        raise UsageError(f"cannot unpack {archive} ({size} bytes; truncated or damaged): {error}") from error
    if not found:
        raise UsageError(f"{archive} holds no folder {inside or '/'}")
    (folder / UNFINISHED).unlink()


def write_file(place: Path, content: IO[bytes], size: int) -> None:
    """Write a file, or remove it where that fails; fewer than ``size`` bytes raise an EOFError.

    A hundred thousand times in a row, so it does not wait for the disk as an atomic write does; see ``UNFINISHED``.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)  # a link leads to somebody's own file
    try:
        with place.open("wb") as file:
            shutil.copyfileobj(content, file, 1 << 20)
        if place.stat().st_size != size:
            raise EOFError(f"{place.name} is not whole in it")
    except BaseException:
        place.unlink(missing_ok=True)
        raise


#: A file in an archive: its name, size and CRC-32 (None in a .tar), the bytes of the archive that end with it, and how
#: to open it.
Member = tuple[str, int, int | None, int, Callable[[], IO[bytes]]]


def _members(archive: Path) -> Iterator[Member]:
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as packed:
            for info in packed.infolist():
                if not info.is_dir():
                    yield info.filename, info.file_size, info.CRC, info.compress_size, partial(packed.open, info)
    else:
        with tarfile.open(archive) as packed_tar:
            yield from _tar_members(packed_tar)


def _tar_members(packed: tarfile.TarFile, folder: str = "") -> Iterator[Member]:
    for member in packed:
        open_member = cast("Callable[[], IO[bytes]]", partial(packed.extractfile, member))  # None for folders alone
        if member.isfile() and member.name.endswith(".tar"):
            with open_member() as file, tarfile.open(fileobj=file) as inner:
                yield from _tar_members(inner, f"{PurePosixPath(member.name).stem}/")
        elif member.isfile():
            yield f"{folder}{member.name}", member.size, None, member.size, open_member
