"""The datasets that tools/prepare_data.py knows: what they consist of, and what is wrong with a copy."""

from __future__ import annotations

import csv
import io
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath

from carafe_plugin.engine.atomic import AtomicLocalBackend
from carafe_plugin.engine.dataset_bccd import BCCD
from carafe_plugin.engine.dataset_camvid import CAMVID
from carafe_plugin.engine.dataset_checks import pair_faults
from carafe_plugin.engine.dataset_dsb2018 import DSB2018
from carafe_plugin.engine.dataset_layout import Dataset, Folder, check_splits, differences
from carafe_plugin.engine.errors import UsageError, read_text
from carafe_plugin.images import shorten

_COCO = {split: f"instances_{split}.json" for split in ("train2017", "val2017")}
_COCO_SPLITS = {split: (f"annotations/{name}", split) for split, name in _COCO.items()}


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
            yield from differences(val, {line[0] for line in lines}, labels)


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
        partial(check_splits, splits=_COCO_SPLITS, masks=True),
        ("", "images/", "coco/", "coco/images/", "coco2017/"),
    ),
    "ade20k": Dataset(
        f"data/ade/{_ADE}",
        tuple(
            Folder(path, images, f"{_ADE}.zip", f"{_ADE}/{path}")
            for split, images in (("training", 20_210), ("validation", 2_000))
            for path in (f"images/{split}", f"annotations/{split}")
        ),
        _check_ade20k,
        ("", f"{_ADE}/", f"ade/{_ADE}/"),
    ),
    "imagenet": Dataset(
        "data/imagenet",
        (
            Folder("train", 1_281_167, "ILSVRC2012_img_train.tar", ""),
            Folder("val", 50_000, "ILSVRC2012_img_val.tar", ""),
        ),
        _check_imagenet,
        ("", "ILSVRC/Data/CLS-LOC/", "Data/CLS-LOC/", "ILSVRC2012_img_"),
        _write_val_labels,
        classes=1000,
    ),
    "camvid": CAMVID,
    "dsb2018": DSB2018,
    "bccd": BCCD,
}
