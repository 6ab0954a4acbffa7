#!/usr/bin/env python
"""Check a downloaded dataset and lay it out as the configurations expect it; nothing is downloaded.

ROOT is the folder that you downloaded into. Each part is taken from an unpacked folder there, by a link, or else
unpacked from its archive into --out. What was unpacked already is not unpacked again: stopped at any moment, the next
run resumes.

    coco       train2017(.zip), val2017(.zip), annotations(_trainval2017.zip)         -> data/coco
    ade20k     ADEChallengeData2016(.zip)                                             -> data/ade/ADEChallengeData2016
    imagenet   train and val, or ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar; -> data/imagenet
               for a flat val also val.txt, caffe_ilsvrc12.tar.gz or Kaggle's LOC_val_solution.csv

Then all files are counted, annotations read, and images compared with them. The exit code is 0 for a complete dataset,
1 where something is missing or wrong (each fault is printed), 2 when nothing could be started.

Example:
    $ python tools/prepare_data.py coco ~/Downloads
    $ python tools/prepare_data.py ade20k /data/ade --check
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from carafe_plugin.engine.cli import command
from carafe_plugin.engine.console import progress_bar
from carafe_plugin.engine.datasets import DATASETS
from carafe_plugin.engine.errors import UsageError
from carafe_plugin.images import decode, shorten


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", choices=list(DATASETS))
    parser.add_argument("root", metavar="ROOT", help="the folder that you downloaded into")
    parser.add_argument("--out", help="where to lay the dataset out (default: where the configurations look for it)")
    parser.add_argument("--check", action="store_true", help="write nothing: check what is laid out in --out")
    parser.add_argument("--decode", action="store_true", help="also decode every image, to find truncated ones (slow)")
    parser.add_argument("--partial", action="store_true", help="accept other numbers of images than the dataset's")


def prepare_data(args: argparse.Namespace) -> int:
    """Lay out and check; 1 when the dataset is not complete."""
    dataset = DATASETS[args.dataset]
    root, usual = Path(args.root).expanduser().absolute(), dataset.usual_place().absolute()
    out = Path(args.out).expanduser().absolute() if args.out else usual
    if not root.is_dir():
        raise UsageError(f"ROOT must be the folder that you downloaded into; no such folder: {root}")
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
    for fault in faults:
        console.print(f"- {fault}", markup=False)
    if faults:
        count = f"{len(faults)} fault{'s' * (len(faults) > 1)}"
        console.print(f"{args.dataset} in {out} is not complete: {count}", markup=False)
        return 1
    hint = (
        "" if out == usual else f"; the configurations look in {dataset.usual_place()}: set data_root, or link it there"
    )
    console.print(f"{args.dataset} in {out} is complete{hint}", markup=False)
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
