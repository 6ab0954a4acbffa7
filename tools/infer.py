#!/usr/bin/env python
"""Detect objects in images: pictures with boxes and masks, and one COCO-style JSON file.

The JSON is a COCO dataset with predictions in place of annotations: images (id, file_name, width, height),
categories (id, name; the ids of the configuration's test annotations where that file exists, else 1, 2, ... in
the order of the classes) and annotations (image_id, category_id, bbox as x, y, width, height in pixels, score and,
from a model with masks, segmentation as compressed RLE). pycocotools.coco.COCO reads it, and its annotations
are what COCO.loadRes takes. It is a whole file at every moment and written after every image, or, where writing takes
long, in a tenth of the time: a kill loses the last moments at most. Of a panoptic model the pictures show the
segmentation, and the JSON has the objects alone.

Example:
    $ python tools/infer.py photos/ --config CONFIG --checkpoint CHECKPOINT --out-dir found --score-thr 0.5

A folder's images are those directly in it, whatever Pillow or OpenCV reads, by the endings of their names (in any
case); hidden files are passed over, and what else there is, sub-folders too, is named. The model gets what the
configuration's test pipeline reads, as in tools/test.py, and boxes, sizes and pictures are in its pixels; what that
cannot read (OpenCV knows no TGA, ICO, PSD, ...), Pillow does. With OpenCV 4.12 that means:
  16 bits              the upper 8; PGM and PPM of another range (maxval 1023) are not stretched
  EXIF orientation     turned in JPEG, PNG and TIFF; not in WebP and AVIF
  palette, CMYK, grey  as RGB; transparency is left out (in TIFF: over black)
  several pages        the first (TIFF, GIF, animated PNG, WebP and AVIF, MPO)
  integers of 32 bits, floating point    as OpenCV converts it (HDR, PFM, TIFF of three channels), else refused
  more than 179 megapixels, damaged      refused
Pages that are left out, and images that Pillow reads differently, are named at the end. A picture is called as its
image where the format holds RGB of 8 bits (JPEG, PNG, BMP, PPM, TIFF, WebP), else it is a PNG: scan.pgm's is scan.png,
or scan.pgm.png beside an image of that name.

The exit code is 0; 1 when some images could not be read or their pictures not written, which are named, and the others
done; 2 when nothing could be done; 130 after Ctrl-C, which keeps what is done.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path

from carafe_plugin.engine import prediction
from carafe_plugin.engine.cli import add_config_options, command
from carafe_plugin.engine.config import load_config, prediction_pipeline
from carafe_plugin.engine.console import progress_bar
from carafe_plugin.engine.errors import UsageError
from carafe_plugin.engine.evaluation import drawable
from carafe_plugin.engine.memory import add_memory_option, keep_memory
from carafe_plugin.engine.processes import choose_device
from carafe_plugin.images import count_pages, shorten


def score(text: str) -> float:
    """A score threshold from the command line."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text}")
    return value


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", metavar="IMAGE-OR-FOLDER", help="an image file, or a folder of them")
    parser.add_argument("--config", required=True, help="configuration file of a detector (mmdet)")
    parser.add_argument("--checkpoint", required=True, help="its checkpoint")
    parser.add_argument("--out-dir", required=True, help="folder for results.json and pictures/")
    parser.add_argument("--score-thr", type=score, default=0.3, help="leave out what scores less (default: 0.3)")
    parser.add_argument("--device", help="cpu, cuda:0, ... (default: the first GPU where there is one, else cpu)")
    add_config_options(parser)
    add_memory_option(parser)


def reason(error: Exception) -> str:
    """What is wrong, in words; of an error that is not ours, what it is and where, too."""
    if isinstance(error, (UsageError, ValueError)):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(place.filename).name}, line {place.lineno}: {error}"


def infer(args: argparse.Namespace) -> int:
    """Detect as the command line says; 1 when something was left out."""
    os.environ.setdefault("MPLBACKEND", "Agg")  # drawing into files needs no display
    out_dir = Path(args.out_dir)
    images, others = prediction.find_images(Path(args.images), out_dir)
    pictures = [out_dir / prediction.PICTURES / name for name in prediction.picture_names(images)]
    for folder in (out_dir, out_dir / prediction.PICTURES):
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"--out-dir is a folder; {folder.absolute()} is a file")
    prediction.check_not_overwritten(images, pictures, "--out-dir")
    cfg = load_config(args.config, args.cfg_options)
    device = choose_device(args.device)
    model = prediction.load_detector(cfg, args.checkpoint, device, args.drop_in)
    keep_memory(args, device)
    from mmdet.registry import VISUALIZERS

    pipeline = prediction_pipeline(model.cfg)
    visualizer = VISUALIZERS.build(dict(type="DetLocalVisualizer", name="infer"))
    visualizer.dataset_meta = model.dataset_meta
    classes = model.dataset_meta["classes"]
    categories = prediction.category_ids(model.cfg, classes)
    named = [dict(id=number, name=name) for number, name in zip(categories, classes, strict=True)]
    results = prediction.Results(out_dir / prediction.RESULTS, named)
    failed: dict[str, list[str]] = {"not read": [], "not predicted": [], "not written": []}
    remarks = {"the first of several pages": [], prediction.UNLIKE: [], "passed over": others}
    one_page, differing, _ = remarks.values()
    interrupted = panoptic = False
    try:
        with progress_bar("detecting") as progress:
            for number, path in enumerate(progress.track(images)):
                sample, step = None, "not read"
                try:
                    picture = prediction.load_picture(pipeline, path)
                    step = "not predicted"
                    sample = prediction.detect(model, pipeline, picture)
                    panoptic |= "pred_panoptic_seg" in sample
                    if "pred_instances" in sample:  # a panoptic model may have none
                        sample.pred_instances = sample.pred_instances[sample.pred_instances.scores >= args.score_thr]
                    step = "not written"
                    drawn = drawable(sample, model.dataset_meta)
                    visualizer.add_datasample("", picture.pixels, drawn, draw_gt=False, pred_score_thr=args.score_thr)
                    prediction.write_picture(pictures[number], visualizer.get_image())
                except Exception as error:  # whatever is the matter with one picture, the others go on
                    failed[step].append(f"{path.name} ({reason(error)})")
                    progress.console.print(f"{step}: {path} ({reason(error)})", markup=False)
                if sample is None:
                    continue
                height, width = picture.pixels.shape[:2]
                image = dict(id=number + 1, file_name=path.name, width=width, height=height)
                found = sample.get("pred_instances")
                results.add(image, [] if found is None else prediction.to_coco(found, number + 1, categories))
                one_page += [path.name] * (count_pages(path) > 1)
                differing += [path.name] * (not picture.alike)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        results.write()
    objects, listed = len(results.content["annotations"]), len(results.content["images"])
    left_out = [f"{why}: {shorten(names)}" for why, names in failed.items() if names]
    done = f"{listed - len(failed['not written'])} of {len(images)} images done"
    summary = "; ".join([f"{'interrupted: ' * interrupted}{done}", *left_out])
    if not listed and not interrupted:
        raise UsageError(summary)
    print(f"{objects} objects in {listed} images: {results.path}, {out_dir / prediction.PICTURES}")
    if panoptic:
        print(f"{results.path} lists objects alone: the panoptic segmentation is in the pictures")
    for remark, names in remarks.items():
        if names:
            print(f"{remark}: {shorten(names)}", file=sys.stderr)
    if left_out or interrupted:
        print(summary, file=sys.stderr)
    return 130 if interrupted else int(bool(left_out))


main = command(infer, add_options, __doc__)

if __name__ == "__main__":
    sys.exit(main())
