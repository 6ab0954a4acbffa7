"""What the three datasets consist of, how downloads name it, and what is wrong with a copy."""

from __future__ import annotations

import csv
import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from carafe_plugin.engine.annotations import AnnotationError, check_coco, read_coco
from carafe_plugin.engine.data_files import DataError, list_images


@dataclass(frozen=True)
class Folder:
    """A folder of a dataset.

    Attributes:
        path: Where the configurations look for it, below the dataset's root.
        images: How many images it holds; 0 where ``files`` says what it must hold.
        places: Where a download may have it, below the folder that was downloaded into.
        archive: The file in which it is downloaded.
        inside: The folder in that file.
        files: Annotation files that it must hold.
    """

    path: str
    images: int
    places: tuple[str, ...]
    archive: str
    inside: str
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """A dataset: its folders, where the configurations have its root, and its own checks.

    Attributes:
        check: Called with the root and whether the counts matter; returns what is wrong, one line each.
    """

    name: str
    root: str
    folders: tuple[Folder, ...]
    check: Callable[[Path], list[str]]
    classes: int = 0


def some(names: list[str], most: int = 10) -> str:
    """The first names of a list, and how many there are."""
    return ", ".join(names[:most]) + (f", ... ({len(names)})" if len(names) > most else "")


# ---------------------------------------------------------------------------------------------------- COCO


def _coco_folder(split: str, images: int) -> Folder:
    places = (split, f"images/{split}", f"coco/{split}", f"coco/images/{split}", f"coco2017/{split}")
    return Folder(split, images, places, f"{split}.zip", split)


def check_coco_copy(root: Path) -> list[str]:
    """Annotations readable and sound, and every image that they list there."""
    faults = []
    for split in ("train2017", "val2017"):
        file = root / "annotations" / f"instances_{split}.json"
        if not file.is_file():
            faults.append(f"missing: {file}")
            continue
        try:
            content = read_coco(file)
            training = split == "train2017"
            check_coco(content, file, empty_boxes=training, measured=not training, masks=True)
        except AnnotationError as error:
            faults.append(str(error))
            continue
        if not (root / split).is_dir():
            continue
        there, _ = list_images(root / split)
        listed = {image["file_name"] for image in content["images"]}
        if missing := sorted(listed - set(there)):
            faults.append(f"{len(missing)} images of {file.name} are not in {root / split}: {some(missing)}")
        if strange := sorted(set(there) - listed):
            faults.append(f"{len(strange)} images in {root / split} are not in {file.name}: {some(strange)}")
    return faults


COCO = Layout(
    "coco",
    "data/coco",
    (
        _coco_folder("train2017", 118_287),
        _coco_folder("val2017", 5_000),
        Folder(
            "annotations",
            0,
            ("annotations", "coco/annotations", "coco2017/annotations"),
            "annotations_trainval2017.zip",
            "annotations",
            ("instances_train2017.json", "instances_val2017.json"),
        ),
    ),
    check_coco_copy,
)

# -------------------------------------------------------------------------------------------------- ADE20k

_ADE = "ADEChallengeData2016"


def _ade_folder(path: str, images: int) -> Folder:
    places = (path, f"{_ADE}/{path}", f"ade/{_ADE}/{path}")
    return Folder(path, images, places, f"{_ADE}.zip", f"{_ADE}/{path}")


def check_ade_copy(root: Path) -> list[str]:
    """Every image with its label map, of the same size, and the other way round."""
    faults = []
    for split in ("training", "validation"):
        images, maps = (root / kind / split for kind in ("images", "annotations"))
        if not (images.is_dir() and maps.is_dir()):
            continue  # reported as missing
        stems = {PurePosixPath(name).stem: name for name in list_images(images)[0]}
        labels = {PurePosixPath(name).stem: name for name in list_images(maps)[0]}
        for have, lack, what in ((stems, labels, maps), (labels, stems, images)):
            if missing := sorted(have[stem] for stem in have.keys() - lack.keys()):
                faults.append(f"{len(missing)} files have no counterpart in {what}: {some(missing)}")
        for stem in sorted(stems.keys() & labels.keys()):
            if fault := _compare(images / stems[stem], maps / labels[stem]):
                faults.append(fault)
    return faults


def _compare(image: Path, label_map: Path) -> str | None:
    try:
        with Image.open(image) as picture, Image.open(label_map) as labels:
            if picture.size != labels.size:
                return f"{label_map} is of another size than its image: {labels.size}, {picture.size}"
            if labels.mode not in ("L", "P"):
                return f"{label_map} must hold one 8-bit label a pixel, and is of the mode {labels.mode}"
    except OSError as error:
        return f"cannot read {label_map} or its image: {error}"
    return None


ADE20K = Layout(
    "ade20k",
    f"data/ade/{_ADE}",
    tuple(
        _ade_folder(f"{kind}/{split}", images)
        for split, images in (("training", 20_210), ("validation", 2_000))
        for kind in ("images", "annotations")
    ),
    check_ade_copy,
)

# ------------------------------------------------------------------------------------------------ ImageNet


def _imagenet_folder(split: str, images: int) -> Folder:
    places = (split, f"ILSVRC/Data/CLS-LOC/{split}", f"Data/CLS-LOC/{split}", f"ILSVRC2012_img_{split}")
    return Folder(split, images, places, f"ILSVRC2012_img_{split}.tar", "")


def check_imagenet_copy(root: Path) -> list[str]:
    """The same classes in both splits, or labels for a flat val/."""
    train, val = root / "train", root / "val"
    if not (train.is_dir() and val.is_dir()):
        return []
    classes = {path.name for path in train.iterdir() if path.is_dir()}
    own = {path.name for path in val.iterdir() if path.is_dir()}
    labels = root / "meta" / "val.txt"
    if own:
        faults = [f"{len(own ^ classes)} classes are in one of train/ and val/ alone: {some(sorted(own ^ classes))}"]
        faults = faults if own != classes else []
        if labels.is_file():  # MMPretrain would read it, and find none of its files
            faults.append(f"val/ has a folder a class, so {labels} must not be there: it is for a flat val/")
        return faults
    if not labels.is_file():
        return [
            f"val/ is flat and {labels} is missing: put val.txt (lines of 'ILSVRC2012_val_00000001.JPEG 65'), "
            "caffe_ilsvrc12.tar.gz, which holds it, or Kaggle's LOC_val_solution.csv into ROOT"
        ]
    lines = [line.split() for line in labels.read_text().splitlines() if line.strip()]
    bad = [" ".join(line) for line in lines if len(line) != 2 or not line[1].isdigit() or int(line[1]) >= len(classes)]
    if bad:
        return [f"{labels}: not a file name and a class from 0 to {len(classes) - 1}: {some(bad, 3)}"]
    there, listed = set(list_images(val)[0]), {line[0] for line in lines}
    faults = []
    if missing := sorted(listed - there):
        faults.append(f"{len(missing)} images of {labels} are not in {val}: {some(missing)}")
    if strange := sorted(there - listed):
        faults.append(f"{len(strange)} images in {val} have no label in {labels}: {some(strange)}")
    return faults


def find_val_labels(root: Path, train: Path) -> str | None:
    """The content of ``meta/val.txt``, from whatever ROOT has it in: 'file name, class' lines; None where nothing has.

    Args:
        root: The folder that was downloaded into.
        train: The training images: their folders, in alphabetical order, are the classes.

    Raises:
        DataError: a file that should have the labels cannot be read.
    """
    for place in ("meta/val.txt", "val.txt"):
        if (root / place).is_file():
            return (root / place).read_text()
    packed, table = root / "caffe_ilsvrc12.tar.gz", root / "LOC_val_solution.csv"
    try:
        if packed.is_file():
            with tarfile.open(packed) as archive:
                names = [name for name in archive.getnames() if PurePosixPath(name).name == "val.txt"]
                content = archive.extractfile(names[0]) if names else None
                return content.read().decode() if content else None
        if table.is_file():
            numbers = {name: n for n, name in enumerate(sorted(path.name for path in train.iterdir() if path.is_dir()))}
            rows = csv.DictReader(io.StringIO(table.read_text()))
            lines = [f"{row['ImageId']}.JPEG {numbers[row['PredictionString'].split()[0]]}\n" for row in rows]
            return "".join(sorted(lines))
    except (tarfile.TarError, EOFError, OSError, UnicodeDecodeError, KeyError, IndexError) as error:
        source = packed if packed.is_file() else table
        raise DataError(f"cannot read the labels in {source}: {error}") from error
    return None


IMAGENET = Layout(
    "imagenet",
    "data/imagenet",
    (_imagenet_folder("train", 1_281_167), _imagenet_folder("val", 50_000)),
    check_imagenet_copy,
    classes=1000,
)

LAYOUTS = {layout.name: layout for layout in (COCO, ADE20K, IMAGENET)}
