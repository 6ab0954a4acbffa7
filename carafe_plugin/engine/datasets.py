"""COCO, ADE20k and ImageNet: what they consist of, how downloads name it, and what is wrong with a copy."""

from __future__ import annotations

import csv
import io
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from rich.progress import Progress

from carafe_plugin.engine.annotations import check_coco, read_coco
from carafe_plugin.engine.atomic import AtomicLocalBackend
from carafe_plugin.engine.dataset_checks import pair_faults
from carafe_plugin.engine.errors import UsageError, read_text
from carafe_plugin.images import file_faults, list_images, shorten

#: A hidden file in a folder for as long as it is being unpacked: a kill may leave a part of a file.
UNFINISHED = ".unpacking"


@dataclass(frozen=True)
class Folder:
    """A folder of a dataset, and the archive in which it is downloaded."""

    path: str  # where the configurations look for it, below the dataset's root
    size: int  # how many images it holds, or how many annotation files
    archive: str
    inside: str  # the folder in the archive
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
class Dataset:
    """What a dataset consists of, and what is checked and written beyond its folders."""

    root: str  # where the configurations look for it
    folders: tuple[Folder, ...]
    prefixes: tuple[str, ...]  # what a download may have before the folders' paths
    check: Callable[[Path], Iterator[str]]  # yields what is wrong with a copy, apart from the numbers of images
    complete: Callable[[Path, Path], object] = lambda root, out: None  # of download and copy: writes the rest
    classes: int = 0  # how many folders of images a split may have; 0 for any number

    def lay_out(self, root: Path, out: Path, progress: Progress) -> list[str]:
        """Link or unpack what was downloaded into ``root``, and write what else is needed; returns what went wrong."""
        faults = []
        steps: list[Callable] = [partial(self._place, folder, progress) for folder in self.folders]
        for step in (*steps, self.complete):
            try:
                step(root, out)
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
        if len(names) != folder.size and not any_number:
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


_COCO = {split: f"instances_{split}.json" for split in ("train2017", "val2017")}


def _check_coco(root: Path) -> Iterator[str]:
    """Annotations readable and sound, and every image that they list there."""
    if not (root / "annotations").is_dir():
        return
    for split, name in _COCO.items():
        file, training = root / "annotations" / name, split == "train2017"
        try:
            content = read_coco(file)
            check_coco(content, file, measured=not training, masks=True, training=training)
        except UsageError as error:
            yield str(error)
            continue
        if (root / split).is_dir():
            yield from _differences(root / split, {image["file_name"] for image in content["images"]}, file)


def _differences(folder: Path, listed: set[str], source: Path) -> Iterator[str]:
    there = set(list_images(folder))
    if missing := sorted(listed - there):
        yield f"{len(missing)} images of {source} are not in {folder}: {shorten(missing)}"
    if unlisted := sorted(there - listed):
        yield f"{len(unlisted)} images in {folder} are not in {source}: {shorten(unlisted)}"


def _check_ade20k(root: Path) -> Iterator[str]:
    """Every image with its label map, of the same size, and the other way round."""
    for split in ("training", "validation"):
        images, maps = (root / kind / split for kind in ("images", "annotations"))
        if images.is_dir() and maps.is_dir():
            yield from pair_faults(images, maps, modes=("L", "P"))


def _check_imagenet(root: Path) -> Iterator[str]:
    """The same classes in both splits, or labels for a flat val/."""
    train, val, labels = root / "train", root / "val", root / "meta" / "val.txt"
    if not (train.is_dir() and val.is_dir()):
        return
    classes, own = set(_class_names(train)), set(_class_names(val))
    if own:
        if odd := sorted(own ^ classes):
            yield f"{len(odd)} classes are in one of train/ and val/ alone: {shorten(odd)}"
        if labels.is_file():  # MMPretrain would read it, and find none of its files
            yield f"val/ has a folder per class, so {labels} must not be there: it is for a flat val/"
    elif not labels.is_file():
        yield (
            f"val/ is flat and {labels} is missing: put val.txt (lines of 'ILSVRC2012_val_00000001.JPEG 65'), "
            "caffe_ilsvrc12.tar.gz, which holds it, or Kaggle's LOC_val_solution.csv into ROOT"
        )
    else:
        try:
            lines = [line.split() for line in read_text(labels).splitlines() if line.strip()]
        except UsageError as error:
            yield str(error)
            return
        known = {str(number) for number in range(len(classes))}
        if bad := [" ".join(line) for line in lines if len(line) != 2 or line[1] not in known]:
            yield f"{labels}: not a file name and a class from 0 to {len(classes) - 1}: {shorten(bad, 3)}"
        else:
            yield from _differences(val, {line[0] for line in lines}, labels)


def _class_names(split: Path) -> list[str]:
    return sorted(path.name for path in split.iterdir() if path.is_dir())


def _write_val_labels(root: Path, out: Path) -> None:
    """Write ImageNet's ``meta/val.txt`` (lines of a file name and a class) where val/ has no folders for classes."""
    train, val, labels = out / "train", out / "val", out / "meta" / "val.txt"
    if not (train.is_dir() and val.is_dir()) or _class_names(val) or labels.is_file():
        return
    for source, read in (
        (root / "meta/val.txt", read_text),
        (root / "val.txt", read_text),
        (root / "caffe_ilsvrc12.tar.gz", _labels_of_caffe),
        (root / "LOC_val_solution.csv", partial(_labels_of_kaggle, train)),
    ):
        if source.is_file():
            try:
                content = read(source)
            except (tarfile.TarError, EOFError, ValueError, LookupError, AttributeError) as error:
                raise UsageError(f"cannot read the labels in {source}: {error}") from error
            return AtomicLocalBackend().put_text(content, labels)


def _labels_of_caffe(packed: Path) -> str:
    with tarfile.open(packed) as archive:
        names = [name for name in archive.getnames() if PurePosixPath(name).name == "val.txt"]
        content = archive.extractfile(names[0] if names else "val.txt")
        return content.read().decode() if content else ""


def _labels_of_kaggle(train: Path, table: Path) -> str:
    """Kaggle's table has the classes' names; their numbers follow the alphabet, as those of the folders in train/."""
    numbers = {name: number for number, name in enumerate(_class_names(train))}
    rows = csv.DictReader(io.StringIO(read_text(table)))
    return "".join(sorted(f"{row['ImageId']}.JPEG {numbers[row['PredictionString'].split()[0]]}\n" for row in rows))


_ADE = "ADEChallengeData2016"
DATASETS = {
    "coco": Dataset(
        "data/coco",
        (
            Folder("train2017", 118_287, "train2017.zip", "train2017"),
            Folder("val2017", 5_000, "val2017.zip", "val2017"),
            Folder("annotations", 2, "annotations_trainval2017.zip", "annotations", tuple(_COCO.values())),
        ),
        ("", "images/", "coco/", "coco/images/", "coco2017/"),
        _check_coco,
    ),
    "ade20k": Dataset(
        f"data/ade/{_ADE}",
        tuple(
            Folder(path, images, f"{_ADE}.zip", f"{_ADE}/{path}")
            for split, images in (("training", 20_210), ("validation", 2_000))
            for path in (f"images/{split}", f"annotations/{split}")
        ),
        ("", f"{_ADE}/", f"ade/{_ADE}/"),
        _check_ade20k,
    ),
    "imagenet": Dataset(
        "data/imagenet",
        (
            Folder("train", 1_281_167, "ILSVRC2012_img_train.tar", ""),
            Folder("val", 50_000, "ILSVRC2012_img_val.tar", ""),
        ),
        ("", "ILSVRC/Data/CLS-LOC/", "Data/CLS-LOC/", "ILSVRC2012_img_"),
        _check_imagenet,
        _write_val_labels,
        classes=1000,
    ),
}
