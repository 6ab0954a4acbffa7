"""How a dataset is laid out from what was downloaded: folders linked or unpacked, annotations rewritten."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from rich.progress import DownloadColumn, Progress

from carafe_plugin.engine.annotations import check_coco, read_coco
from carafe_plugin.engine.atomic import AtomicLocalBackend
from carafe_plugin.engine.console import progress_bar
from carafe_plugin.engine.errors import UsageError
from carafe_plugin.images import file_faults, list_images, shorten

#: A hidden file in a folder for as long as it is being unpacked: a kill may leave a part of a file.
UNFINISHED = ".unpacking"


@dataclass(frozen=True)
class Folder:
    """A folder of a dataset, and the archive in which it is downloaded."""

    path: str  # where the configurations look for it, below the dataset's root
    size: int  # how many images it holds, or how many annotation files; 0 for any number
    archive: str = ""  # none for a folder that is written from a Source
    inside: str = ""  # the folder in the archive
    files: tuple[str, ...] = ()  # the annotation files that it must hold; none in a folder of images

    def is_whole(self, path: Path, archive: Path) -> bool:
        """Whether an unpacked folder holds enough images, or its annotation files as the archive has them (without one,
        such as can be read).
        """
        if not path.is_dir() or (path / UNFINISHED).exists():
            return False
        if not self.files:
            return len(list_images(path)) >= self.size
        try:
            with zipfile.ZipFile(archive) as packed:
                sums = {name: packed.getinfo(f"{self.inside}/{name}").CRC for name in self.files}
        except (OSError, KeyError, zipfile.BadZipFile):
            sums = {}  # nothing to compare with
        try:
            if sums:
                return all(zlib.crc32((path / name).read_bytes()) == checksum for name, checksum in sums.items())
            return all(read_coco(path / name) for name in self.files)
        except (OSError, UsageError):
            return False


@dataclass(frozen=True)
class Source:
    """A download whose annotations are rewritten: an unpacked folder, or the archive in which it comes."""

    names: tuple[str, ...]  # where the unpacked folder may lie in ROOT, "." for ROOT itself
    holds: tuple[str, ...]  # what is in it
    archive: str
    inside: str  # the folder in the archive

    def find(self, root: Path, out: Path, progress: Progress) -> Path:
        """The unpacked folder; from the archive, it is unpacked into ``out``. Raises UsageError where there is neither,
        or the archive is damaged.
        """
        for name in self.names:
            if (root / name).is_dir() and all((root / name / part).exists() for part in self.holds):
                return root / name
        if (archive := root / self.archive).is_file():
            unpack(archive, self.inside, out / "download", progress)
            return out / "download"
        folders = " nor ".join(str(root / name) for name in self.names)
        wanted = f" is a folder with {', '.join(self.holds)}" if self.holds else " is a folder"
        raise UsageError(f"neither {folders}{wanted}, and there is no {archive}")


#: Rewrites a download (its unpacked folder) into the dataset's root, and yields what is wrong with it.
Conversion = Callable[[Path, Path, Progress], Iterator[str]]


@dataclass(frozen=True)
class Dataset:
    """What a dataset consists of, and what is checked and written beyond its folders."""

    root: str  # where the configurations look for it
    folders: tuple[Folder, ...]
    check: Callable[[Path], Iterator[str]]  # yields what is wrong with a copy, apart from the numbers of images
    prefixes: tuple[str, ...] = ()  # what a download may have before the folders' paths
    complete: Callable[[Path, Path], object] = lambda root, out: None  # of download and copy: writes the rest
    classes: int = 0  # how many folders of images a split may have; 0 for any number
    source: Source | None = None
    convert: Conversion = lambda source, out, progress: iter(())

    def usual_place(self) -> Path:
        """Where the configurations look for it: those of configs/real below the environment variable CARAFE_DATA_ROOT,
        if that is set.
        """
        parent = os.environ.get("CARAFE_DATA_ROOT") if self.source else None
        return Path(parent, Path(self.root).name) if parent else Path(self.root)

    def lay_out(self, root: Path, out: Path) -> list[str]:
        """Link, unpack or convert what was downloaded into ``root``, and write what else is needed; returns what went
        wrong.
        """
        faults, source = [], None
        with progress_bar("unpacking {task.description}", DownloadColumn()) as progress:
            steps: list[Callable] = [partial(self._place, each, progress) for each in self.folders if each.archive]
            for step in (*steps, self.complete):
                try:
                    step(root, out)
                except (UsageError, OSError) as error:
                    faults.append(str(error))
            try:
                source = self.source and self.source.find(root, out, progress)
            except (UsageError, OSError) as error:
                faults.append(str(error))
        if source:
            with progress_bar("converting {task.description}") as progress:
                try:
                    faults += self.convert(source, out, progress)
                except (UsageError, OSError) as error:
                    faults.append(str(error))
        return faults

    def _place(self, folder: Folder, progress: Progress, root: Path, out: Path) -> None:
        place, archive = out / folder.path, root / folder.archive
        if folder.is_whole(place, archive):
            return
        candidates = [root / (prefix + folder.path) for prefix in self.prefixes]
        there = [path for path in candidates if path.is_dir()]
        source = next((path for path in there if folder.is_whole(path, archive)), None)
        if source is None and there and not archive.is_file():
            source = there[0]
        if source:
            if source.resolve() != place.resolve():
                link(source, place)
        elif archive.is_file():
            if place.is_symlink():
                place.unlink()  # to an unpacked folder that is not whole
            unpack(archive, folder.inside, place, progress)
        elif not place.is_dir():
            tried = " nor ".join(str(path.relative_to(root)) for path in candidates[:2])
            raise UsageError(f"missing: {place}; ROOT has neither {tried} nor {folder.archive}")

    def count(self, folder: Folder, out: Path, any_number: bool = False) -> tuple[list[str], list[str]]:
        """The images, or annotation files, of a folder that is there, and what is wrong with them."""
        place = out / folder.path
        if folder.files:  # what is in them: check
            return [name for name in folder.files if (place / name).is_file()], []
        names = list_images(place)
        faults = file_faults(place, names, "images")
        if (place / UNFINISHED).exists():
            faults.append(f"{place} was not unpacked to its end")
        if folder.size not in (0, len(names)) and not any_number:
            faults.append(f"{place} holds {len(names):,} images of {folder.size:,}")
        classes = len({name.partition("/")[0] for name in names if "/" in name})
        if self.classes and classes not in (0, self.classes) and not any_number:
            faults.append(f"{place} holds {classes} classes of {self.classes}")
        return names, faults if names else [*faults, f"{place} holds no images"]


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


def unpack(archive: Path, inside: str, folder: Path, progress: Progress) -> None:
    """Unpack the folder ``inside`` (``""`` for all) of a .zip or .tar into ``folder``, with a bar. Images that are
    there already, in their full size, are not written again; a .tar of .tar files, one per class, becomes a folder per
    class. Raises UsageError where the archive is truncated or damaged, or has no such folder.
    """
    found, start = False, PurePosixPath(inside).parts
    members = _zip_members if archive.suffix == ".zip" else _tar_members
    try:
        with progress.open(archive, "rb", description=folder.name) as packed:
            for name, size, open_member in members(packed):
                path = PurePosixPath(name)
                if path.parts[: len(start)] != start or ".." in path.parts or path.is_absolute():
                    continue
                if not found:
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / UNFINISHED).touch()
                found, place = True, folder.joinpath(*path.parts[len(start) :])
                if place.suffix == ".json" or not place.is_file() or place.stat().st_size != size:
                    with open_member() as content:
                        write_file(place, content, size)
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


#: A file in an archive: its name, its size and how to open it.
Member = tuple[str, int, Callable[[], Any]]  # extractfile gives None for folders alone


def _zip_members(file: IO[bytes]) -> Iterator[Member]:
    with zipfile.ZipFile(file) as packed:
        for info in packed.infolist():
            if not info.is_dir():
                yield info.filename, info.file_size, partial(packed.open, info)


def _tar_members(file: IO[bytes] | None, folder: str = "") -> Iterator[Member]:
    with tarfile.open(fileobj=file) as packed:
        for member in packed:
            if member.isfile() and member.name.endswith(".tar"):
                yield from _tar_members(packed.extractfile(member), f"{PurePosixPath(member.name).stem}/")
            elif member.isfile():
                yield f"{folder}{member.name}", member.size, partial(packed.extractfile, member)


def write_labels(content: Mapping[str, Any], place: Path) -> None:
    """Write an annotation file in COCO's format, completely or not at all."""
    AtomicLocalBackend().put_text(json.dumps(content), place)


def check_splits(root: Path, splits: Mapping[str, tuple[str, str]], masks: bool) -> Iterator[str]:
    """What is wrong with a dataset in COCO's format, as messages: its annotations must be sound, their images there.

    ``splits`` are the annotation file and the folder of images of each; "train*" is trained on, the others are
    measured, with ``masks`` too.
    """
    listed: dict[str, dict[Path, set[str]]] = {folder: {} for _, folder in splits.values()}
    for split, (name, folder) in splits.items():
        file, training = root / name, split.startswith("train")
        if not file.parent.is_dir():  # which is said already, once
            return
        try:
            content = read_coco(file)
            check_coco(content, file, measured=not training, masks=masks, training=training)
        except UsageError as error:
            yield str(error)
            listed.pop(folder, None)  # nobody knows which images it lists
        if folder in listed:
            listed[folder][file] = {image["file_name"] for image in content["images"]}
    for folder, files in listed.items():
        if (root / folder).is_dir():
            yield from differences(root / folder, set().union(*files.values()), shorten(files))


def differences(folder: Path, listed: set[str], source: object) -> Iterator[str]:
    """Which images of a list are not in a folder, and the other way round; ``source`` names the list."""
    there = set(list_images(folder))
    if missing := sorted(listed - there):
        yield f"{len(missing)} images of {source} are not in {folder}: {shorten(missing)}"
    if unlisted := sorted(there - listed):
        yield f"{len(unlisted)} images in {folder} are not in {source}: {shorten(unlisted)}"
