"""Folders of images: counting them, linking to them, and unpacking the archives in which they are downloaded."""

from __future__ import annotations

import os
import tarfile
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from PIL import Image

ENDINGS = (".jpg", ".jpeg", ".png")


class DataError(Exception):
    """A file of a download cannot be used; the message says which and why."""


def list_images(folder: Path) -> tuple[list[str], list[str]]:
    """The images in a folder and in the folders in it, and which of them have no content.

    Returns:
        Paths below ``folder``, sorted; hidden files, and what is no image by its name, are left out.
    """
    images, empty = [], []
    for below in ["", *sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())]:
        with os.scandir(folder / below) as entries:
            for entry in entries:
                if entry.name.lower().endswith(ENDINGS) and not entry.name.startswith(".") and entry.is_file():
                    name = f"{below}/{entry.name}" if below else entry.name
                    images.append(name)
                    if entry.stat().st_size == 0:
                        empty.append(name)
    return sorted(images), sorted(empty)


def damaged_images(folder: Path, names: list[str], advance: Callable[[], None]) -> Iterator[str]:
    """Decode images and yield those that are truncated or damaged."""
    for name in names:
        try:
            with Image.open(folder / name) as image:
                image.load()
        except Exception:  # Pillow's decoders raise anything, down to struct.error
            yield name
        advance()


def link(target: Path, place: Path) -> None:
    """Make ``place`` a symbolic link to ``target``, replacing a link that is there.

    Raises:
        DataError: something else than a link is there.
    """
    target = target.resolve()
    if place.is_symlink():
        if place.resolve() == target:
            return
        place.unlink()
    elif place.is_dir() and not any(place.iterdir()):
        place.rmdir()
    elif place.exists():
        raise DataError(f"{place} is in the way of a link to {target}: move it elsewhere")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target, target_is_directory=target.is_dir())


def write_file(place: Path, content: IO[bytes]) -> None:
    """Write a file completely or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    unfinished = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with unfinished.open("wb") as file:
            while chunk := content.read(1 << 20):
                file.write(chunk)
        unfinished.replace(place)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def whole_files(folder: Path, names: Iterable[str], archive: Path, inside: str) -> bool:
    """Whether a folder holds JSON files whole: as they are in their .zip, or else, without it, not truncated."""
    try:
        with zipfile.ZipFile(archive) as packed:
            known = {info.filename: info for info in packed.infolist()}
    except (OSError, zipfile.BadZipFile):  # nothing to compare with
        known = {}
    for name in names:
        place, info = folder / name, known.get(f"{inside}/{name}")
        if not place.is_file() or (info and not _is_unpacked(place, info.file_size, info.CRC)):
            return False
        if not info and not _ends_as_json(place):
            return False
    return True


def _ends_as_json(place: Path) -> bool:
    with place.open("rb") as file:  # half a gigabyte: whoever reads all of it checks the rest
        file.seek(max(place.stat().st_size - 64, 0))
        return file.read().rstrip().endswith(b"}")


def _is_unpacked(place: Path, size: int, checksum: int | None) -> bool:
    """Whether a file is as in its archive; of annotations, half a gigabyte at most, the content is compared too."""
    if not place.is_file() or place.stat().st_size != size:
        return False
    if checksum is None or place.suffix != ".json":
        return True
    found = 0
    with place.open("rb") as file:
        while chunk := file.read(1 << 20):
            found = zlib.crc32(chunk, found)
    return found == checksum


def unpack(archive: Path, inside: str, folder: Path, advance: Callable[[int], None]) -> None:
    """Unpack one folder of an archive. What is there already, in its full size, is not written again.

    Args:
        archive: A .zip or .tar file. A .tar of .tar files, one a class, becomes a folder a class.
        inside: The folder in the archive; ``""`` for all of it.
        folder: Where its files go.
        advance: Called with the number of bytes of the archive that are done, again and again.

    Raises:
        DataError: The archive is truncated or damaged, or has no such folder.
    """
    found = False
    try:
        for name, size, checksum, done, open_member in _members(archive):
            parts = PurePosixPath(name).parts
            start = PurePosixPath(inside).parts
            if parts[: len(start)] != start or ".." in parts or PurePosixPath(name).is_absolute():
                advance(done)
                continue
            found = True
            place = folder.joinpath(*parts[len(start) :])
            if not _is_unpacked(place, size, checksum):
                with open_member() as content:
                    write_file(place, content)
                if place.stat().st_size != size:
                    place.unlink()
                    raise DataError(f"{archive} is truncated: {name} is not whole in it")
            advance(done)
    except (zipfile.BadZipFile, zlib.error, tarfile.TarError, EOFError) as error:
        size = archive.stat().st_size
        raise DataError(f"cannot unpack {archive} ({size} bytes; truncated or damaged): {error}") from error
    if not found:
        raise DataError(f"{archive} holds no folder {inside or '/'}")


#: A file in an archive: its name, size and CRC-32 (of a .tar none), the bytes of the archive that end with it, and how
#: to open it.
Member = tuple[str, int, int | None, int, Callable[[], IO[bytes]]]


def _members(archive: Path) -> Iterator[Member]:
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as packed:
            for info in packed.infolist():
                if not info.is_dir():
                    open_part = lambda info=info: packed.open(info)  # noqa: E731
                    yield info.filename, info.file_size, info.CRC, info.compress_size, open_part
        return
    with tarfile.open(archive) as packed:
        for member in packed:
            if member.isfile() and member.name.endswith(".tar"):
                with _content(packed, member) as file, tarfile.open(fileobj=file) as inner:
                    folder = PurePosixPath(member.name).stem
                    for part in inner:
                        if part.isfile():
                            open_part = lambda part=part: _content(inner, part)  # noqa: E731
                            yield f"{folder}/{part.name}", part.size, None, part.size, open_part
            elif member.isfile():
                open_part = lambda member=member: _content(packed, member)  # noqa: E731
                yield member.name, member.size, None, member.size, open_part


def _content(packed: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = packed.extractfile(member)
    assert content is not None  # a regular file has one
    return content
