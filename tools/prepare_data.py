#!/usr/bin/env python
"""Check a downloaded dataset and lay it out as the configurations expect it; nothing is downloaded.

ROOT is the folder that you downloaded into. Each part is taken from an unpacked folder there, by a link, or else
unpacked from its archive into --out. What was unpacked already is not unpacked again: stopped at any moment, the next
run goes on.

    coco       train2017(.zip), val2017(.zip), annotations(_trainval2017.zip)         -> data/coco
    ade20k     ADEChallengeData2016(.zip)                                             -> data/ade/ADEChallengeData2016
    imagenet   train and val, or ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar; -> data/imagenet
               for a flat val also val.txt, caffe_ilsvrc12.tar.gz or Kaggle's LOC_val_solution.csv

Then all files are counted, annotations read, and images compared with them. The exit code is 0 for a complete dataset,
1 where something is missing or wrong (each printed), 2 when nothing could be started.

Example:
    $ python tools/prepare_data.py coco ~/Downloads
    $ python tools/prepare_data.py ade20k /data/ade --check
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from carafe_plugin.engine.atomic import AtomicLocalBackend
from carafe_plugin.engine.cli import run_tool
from carafe_plugin.engine.data_files import DataError, damaged_images, link, list_images, unpack, whole_files
from carafe_plugin.engine.data_layouts import IMAGENET, LAYOUTS, Folder, Layout, find_val_labels, some
from carafe_plugin.engine.errors import UsageError


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0],
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", choices=list(LAYOUTS))
    parser.add_argument("root", metavar="ROOT", help="the folder that you downloaded into")
    parser.add_argument("--out", help="where to lay the dataset out (default: where the configurations look for it)")
    parser.add_argument("--check", action="store_true", help="write nothing: check what is laid out in --out")
    parser.add_argument("--decode", action="store_true", help="also decode every image, to find truncated ones (slow)")
    parser.add_argument("--partial", action="store_true", help="accept other numbers of images than the dataset's")
    return parser.parse_args(argv)


def is_whole(folder: Folder, path: Path, archive: Path) -> bool:
    """Whether an unpacked folder holds as many images as it should, or its annotation files as the archive has them."""
    if folder.files:
        return whole_files(path, folder.files, archive, folder.inside)
    return len(list_images(path)[0]) >= folder.images


def place_folder(folder: Folder, root: Path, out: Path, console: Console) -> str | None:
    """Link or unpack one folder of a dataset.

    Returns:
        What is wrong, None where the folder is in its place (perhaps without all its files).
    """
    place, archive = out / folder.path, root / folder.archive
    if place.is_dir() and is_whole(folder, place, archive):
        return None
    candidates = [root / path for path in folder.places if (root / path).is_dir()]
    whole = [path for path in candidates if is_whole(folder, path, archive)]
    if whole or (candidates and not archive.is_file()):
        source = (whole or candidates)[0]
        if source.resolve() != place.resolve():
            link(source, place)
        return None
    if not archive.is_file():
        return f"missing: {place}; ROOT has neither {' nor '.join(folder.places[:2])} nor {folder.archive}"
    if place.is_symlink():
        place.unlink()  # to an unpacked folder that is not whole, and here is the archive
    columns = (TextColumn(f"unpacking {folder.path}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=archive.stat().st_size)
        unpack(archive, folder.inside, place, lambda done: progress.update(task, advance=done))
    return None


def count_folder(folder: Folder, layout: Layout, out: Path, args: argparse.Namespace) -> tuple[str, list[str]]:
    """How many images a folder holds, and what is wrong with them."""
    place = out / folder.path
    if not place.is_dir():
        return "-", []  # reported as missing
    if folder.files:
        return str(sum((place / name).is_file() for name in folder.files)), []  # what is in them: Layout.check
    names, empty = list_images(place)
    faults = [f"{len(empty)} files in {place} are empty: {some(empty)}"] if empty else []
    if len(names) != folder.images and not args.partial:
        faults.append(f"{place} holds {len(names):,} images of {folder.images:,}")
    classes = len({name.partition("/")[0] for name in names if "/" in name})
    if layout.classes and classes not in (0, layout.classes) and not args.partial:
        faults.append(f"{place} holds {classes} classes of {layout.classes}")
    if not names:
        faults.append(f"{place} holds no images")
    if args.decode:
        console = Console(stderr=True)
        columns = (TextColumn(f"decoding {folder.path}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("", total=len(names))
            damaged = list(damaged_images(place, names, lambda: progress.update(task, advance=1)))
        if damaged:
            faults.append(f"{len(damaged)} images in {place} are truncated or damaged: {some(damaged)}")
    return f"{len(names):,}", faults


def place_val_labels(root: Path, out: Path) -> None:
    """Write ImageNet's ``meta/val.txt`` where val/ has no folders for the classes."""
    train, val, labels = out / "train", out / "val", out / "meta" / "val.txt"
    flat = val.is_dir() and not any(path.is_dir() for path in val.iterdir())
    if flat and train.is_dir() and not labels.is_file() and (content := find_val_labels(root, train)) is not None:
        AtomicLocalBackend().put_text(content, labels)


def prepare_data(args: argparse.Namespace) -> int:
    """Lay out and check; 1 when the dataset is not complete.

    Raises:
        UsageError: ROOT is no folder, or --out is a file.
    """
    layout = LAYOUTS[args.dataset]
    root, out = Path(args.root).expanduser().absolute(), Path(args.out or layout.root).expanduser().absolute()
    if not root.is_dir():
        raise UsageError(f"ROOT must be the folder that you downloaded into; no such folder: {root}")
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out must be a folder, and is a file: {out}")
    console = Console(highlight=False, soft_wrap=True)
    faults: list[str] = []
    for folder in layout.folders:
        try:
            fault = f"missing: {out / folder.path}" if args.check else place_folder(folder, root, out, console)
            faults += [fault] if fault and not (out / folder.path).is_dir() else []
        except (DataError, OSError) as error:
            faults.append(str(error))
    table = Table("", "expected", "found", "where", box=None)
    with console.status("checking") if console.is_terminal else nullcontext():
        if layout is IMAGENET and not args.check:
            try:
                place_val_labels(root, out)
            except DataError as error:
                faults.append(str(error))
        for folder in layout.folders:
            place = out / folder.path
            found, wrong = count_folder(folder, layout, out, args)
            faults += wrong
            expected = f"{len(folder.files) or folder.images:,}"
            where = (
                f"linked to {place.resolve()}" if place.is_symlink() else str(place) if place.is_dir() else "missing"
            )
            table.add_row(folder.path, expected, found, where)
        faults += layout.check(out)
    console.print(table)
    for fault in faults:
        console.print(f"- {fault}", markup=False)
    if faults:
        console.print(
            f"{args.dataset} in {out} is not complete: {len(faults)} fault{'s' * (len(faults) > 1)}", markup=False
        )
        return 1
    usual = Path(layout.root).absolute()
    hint = "" if out == usual else f"; the configurations look in {layout.root}: set data_root, or link it there"
    console.print(f"{args.dataset} in {out} is complete{hint}", markup=False)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_tool(prepare_data, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
