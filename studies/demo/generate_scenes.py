"""Generate a small dataset of textured scenes, for instance segmentation (COCO) or semantic segmentation (ADE20k).

A scene holds figures with thin and detailed outlines (stars, rings, crosses, crescents, gears, keys) before a textured
background. Figures hide one another, some are small, some scenes hold a crowd of equal figures (in COCO one annotation
with ``iscrowd=1``) and some hold none at all. Everything follows from the seed: the same arguments with the same
versions of numpy and Pillow give the same bytes, scene ``i`` of a split does not depend on how many scenes there are,
and both formats show the same scenes.

Example:
    $ python -m studies.demo.generate_scenes --out data/scenes --seed 0 --train 600 --val 120 --size 160
    $ python -m studies.demo.generate_scenes --out data/scenes-ade20k --format ade20k --figures 32
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.progress import track

from studies.demo import scenes_ade20k, scenes_coco
from studies.demo.scenes import FIGURES, SPLITS, scenes

#: Raise this whenever the same arguments give other scenes, so that datasets already on disk are written anew.
VERSION = 1
MARKER = "scenes.json"
MIN_SIZE, MAX_SIZE = 64, 1024
#: What writes each format, and knows its files.
FORMATS = {"coco": scenes_coco, "ade20k": scenes_ade20k}


@dataclass(frozen=True)
class Request:
    """What a dataset on disk was made from; stored beside it as ``scenes.json``."""

    seed: int
    train: int
    val: int
    size: int
    version: int = VERSION
    figures: int = FIGURES
    format: str = "coco"


def is_complete(out: Path, request: Request) -> bool:
    """Whether ``out`` already holds exactly the requested dataset."""
    try:
        stored = Request(**json.loads((out / MARKER).read_text()))
    except (OSError, ValueError, TypeError):
        return False
    holds = FORMATS[request.format].holds_split
    return stored == request and all(holds(out, split, getattr(request, split)) for split in SPLITS)


def annotation_files(out: Path, request: Request) -> list[Path]:
    """The files that hold the annotations of both splits."""
    return [file for split in SPLITS for file in FORMATS[request.format].annotation_files(out, split)]


def generate(out: Path, request: Request) -> bool:
    """Write the dataset unless it is complete already.

    It is written beside ``out`` and moved there at the end, so ``out`` never holds half a dataset.

    Returns:
        Whether anything was written.

    Raises:
        FileExistsError: ``out`` holds something that this script did not write.
    """
    if is_complete(out, request):
        return False
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MARKER).is_file())):
        raise FileExistsError(
            f"--out {out} exists and was not written by this script (it has no {MARKER}); "
            "give another path or remove it"
        )
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for split in SPLITS:
        count = getattr(request, split)
        described = scenes(request.seed, split, count, request.size, request.figures)
        title = f"Writing {split}"
        shown = track(described, title, total=count, transient=True, disable=not sys.stdout.isatty())
        FORMATS[request.format].write_split(partial, split, shown, request.version)
    (partial / MARKER).write_text(json.dumps(asdict(request)))
    if out.exists():
        shutil.rmtree(out)
    partial.replace(out)
    return True


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """An argparse type: an integer within bounds."""
    expected = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


def add_dataset_options(parser: argparse.ArgumentParser, defaults: Request) -> None:
    """The options that decide what the dataset contains."""

    def add(name: str, low: int, high: int | None, text: str) -> None:
        default = getattr(defaults, name)
        parser.add_argument(
            f"--{name}", type=integer(low, high), default=default, help=f"{text} (default: {default})", metavar="N"
        )

    add("seed", 0, None, "everything follows from it")
    add("train", 1, None, "number of training images")
    add("val", 1, None, "number of validation images")
    add("size", MIN_SIZE, MAX_SIZE, "height and width of an image in pixels")
    add("figures", 1, None, "the most figures in a scene")


def request_from(args: argparse.Namespace, format: str) -> Request:
    """The request that :func:`add_dataset_options` asks for."""
    return Request(args.seed, args.train, args.val, args.size, figures=args.figures, format=format)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Generate a dataset of textured scenes.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--format", choices=list(FORMATS), default="coco", help="instances or label maps (default: coco)"
    )
    add_dataset_options(parser, Request(seed=0, train=600, val=120, size=160))
    args = parser.parse_args(argv)
    try:
        written = generate(args.out, request_from(args, args.format))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {args.train} + {args.val} images {'written' if written else 'already there, nothing to do'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
