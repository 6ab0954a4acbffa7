"""Whether a panoptic dataset in COCO's format can be used: segments in a JSON, and PNG files with their ids as colours.

mmdet looks for a segment's colour when it trains and measures, and of one that is not there it says nothing.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from carafe_plugin.engine.annotations import (
    check_coco,
    check_listed,
    check_panoptic,
    find_metrics,
    is_filtered,
    read_coco,
    truth_files,
    unread_dataset,
)
from carafe_plugin.engine.config import pipeline_steps, type_name
from carafe_plugin.engine.errors import UsageError, note
from carafe_plugin.images import decode, file_faults, read_header, shorten

#: How many PNG files of a dataset are read before a run: it takes seconds, and for all of them it would be minutes.
SAMPLE = 200


def check_panoptic_dataset(
    dataset: Mapping[str, Any], evaluators: Any = None, training: bool = False, model: Any = None
) -> None:
    """Raise a UsageError where an evaluation, or a training, cannot use one of mmdet's panoptic datasets: faulty
    annotations, missing images or PNG files, PNG files that say something else, a metric's file that is at fault or of
    other images, or a head of ``model`` for other numbers of things or stuff.

    ``dataset`` is its configuration, not that of a wrapper (of another kind, it is not looked at), ``evaluators`` that
    of the metric or metrics. What mmdet goes on with, as it does with ADE20k's annotations, is a line on stderr, and so
    is how many PNG files were read where there are more than ``SAMPLE``.
    """
    from mmdet.datasets import CocoDataset, CocoPanopticDataset
    from mmdet.registry import DATASETS

    given = dataset.get("data_prefix") or {}
    prefix = {key: part for key, part in given.items() if part is not None}  # with None it cannot be built
    built = unread_dataset({**dataset, "data_prefix": prefix}, DATASETS, CocoDataset)
    if not isinstance(built, CocoPanopticDataset):
        return
    steps = list(pipeline_steps(dataset.get("pipeline")))
    readers = [step for step in steps if type_name(step) == "LoadPanopticAnnotations"]
    metrics = [] if training else find_metrics(evaluators, "CocoPanopticMetric")
    if (readers or metrics) and _is_missing("panopticapi"):
        raise UsageError(
            f"mmdet's {type_name([*readers, *metrics][0])} needs the package panopticapi, which is not installed: "
            "pip install git+https://github.com/cocodataset/panopticapi.git"
        )
    if not built.ann_file or "img" not in prefix or (training and readers and "seg" not in prefix) or prefix != given:
        raise UsageError(
            "a panoptic dataset needs ann_file, and in data_prefix the folders of images, img, and PNG files, seg; got "
            f"ann_file={dataset.get('ann_file')!r}, data_prefix={dict(given)}"
        )
    if "://" in f"{built.ann_file}{built.data_prefix}":
        return
    path, folder = Path(built.ann_file).absolute(), Path(built.data_prefix["img"]).absolute()
    for metric in metrics:
        _check_metric(metric, steps)
    measured = truth_files(metrics)
    instances = truth_files([] if training else find_metrics(evaluators, "CocoMetric"))

    content = read_coco(path)
    check_panoptic(content, path, built.metainfo, measured=path in measured)
    check_heads(model, built.metainfo)
    segments = [segment for entry in content["annotations"] for segment in entry["segments_info"]]
    if left_out := sum(min(s["bbox"][2:]) < 1 or s["area"] <= 0 for s in segments):
        note(f"mmdet leaves out {left_out} of the {len(segments)} segments of {path}: boxes or areas without extent")
    used = _used_images(content, dataset, training)
    if faults := file_faults(folder, [i["file_name"] for i in used], f"images of {path}", sizes=not training):
        raise UsageError("; ".join(faults))
    # mmdet reads the file that is named as the image, not the one that the JSON names; its metric, without folders.
    pngs = {image["id"]: image["file_name"].replace(".jpg", ".png") for image in used}
    for metric in metrics:
        other = Path(metric.get("ann_file") or path).absolute()
        truth = content if other == path else read_coco(other)
        if other != path:
            check_panoptic(truth, other, built.metainfo)
            check_listed(content, path, truth, other)
        names = {key: Path(name).name for key, name in pngs.items()}
        check_segments(truth, other, Path(metric["seg_prefix"]).absolute(), names, folder)
        if (other, metric["seg_prefix"], names) == (path, built.data_prefix.get("seg"), pngs):
            readers = []  # they read what is checked now
    if readers and "seg" in prefix:
        check_segments(content, path, Path(built.data_prefix["seg"]).absolute(), pngs, folder, measured=False)
    for other in instances:  # of the things alone
        truth = read_coco(other)
        check_coco(truth, other, built.metainfo.get("thing_classes"), masks=True)
        check_listed(content, path, truth, other)


def _is_missing(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is None
    except ValueError:  # a module without a specification, in its place
        return sys.modules.get(package) is None


def _check_metric(metric: Mapping[str, Any], steps: list[Mapping[str, Any]]) -> None:
    place = metric.get("seg_prefix")
    if not place or not Path(place).is_dir():
        raise UsageError(f"CocoPanopticMetric needs the folder of the segments' PNG files as seg_prefix, got {place!r}")
    if not metric.get("ann_file") and not any("segments_info" in (step.get("meta_keys") or ()) for step in steps):
        raise UsageError(
            "CocoPanopticMetric needs ann_file, or 'segments_info' among the meta_keys of the pipeline's PackDetInputs"
        )


def check_heads(model: Any, metainfo: Mapping[str, Any], place: str = "model") -> None:
    """Raise a UsageError where a part of a model's configuration is for other numbers of things or stuff than
    ``metainfo`` has.
    """
    if isinstance(model, (list, tuple)):
        for number, part in enumerate(model):
            check_heads(part, metainfo, f"{place}.{number}")
    if not isinstance(model, Mapping):
        return
    things = set(metainfo["thing_classes"])
    for setting, classes in (
        ("num_things_classes", [name for name in metainfo["classes"] if name in things]),
        ("num_stuff_classes", [name for name in metainfo["classes"] if name not in things]),
    ):
        if model.get(setting, len(classes)) != len(classes):
            raise UsageError(
                f"{place}.{setting} is {model[setting]}, and the classes of the dataset's metainfo are {len(classes)}: "
                f"{shorten(classes)}"
            )
    for key, part in model.items():
        check_heads(part, metainfo, f"{place}.{key}")


def _used_images(content: Mapping[str, Any], dataset: Mapping[str, Any], training: bool) -> list[dict]:
    """The images that mmdet will open, as far as the configuration says."""
    if dataset.get("indices") is not None:  # some of them, counted after mmdet's own filters
        return []
    if not (training and is_filtered(dataset)):
        return content["images"]
    things = {category["id"] for category in content["categories"] if category["isthing"]}
    used = {
        entry["image_id"]
        for entry in content["annotations"]
        for segment in entry["segments_info"]
        if segment["category_id"] in things and not segment.get("iscrowd")
    }
    return [image for image in content["images"] if image["id"] in used]


def check_segments(
    content: Mapping[str, Any], path: Path, folder: Path, names: Mapping[Any, str], images: Path, measured: bool = True
) -> None:
    """Raise a UsageError where the PNG files in ``folder`` are not what the annotations say.

    ``content`` is what :func:`~carafe_plugin.engine.annotations.check_panoptic` accepted, from the file ``path``;
    ``names`` the PNG file of each image's id, ``images`` the folder of the images. All must be there; of more than
    ``SAMPLE`` so many are read, evenly spread. ``measured`` says that panoptic quality is measured against them.
    """
    source = f"PNG files (named as the images, .png for .jpg) of {path}"
    if faults := file_faults(folder, names.values(), source, sizes=measured):
        raise UsageError("; ".join(faults))
    listed = {image["id"]: image for image in content["images"]}
    segments = {entry["image_id"]: entry["segments_info"] for entry in content["annotations"]}
    chosen = list(names)[:: -(-len(names) // SAMPLE) or 1]
    differing = 0
    for key in chosen:
        image, png, listed_segments = listed[key], folder / names[key], segments.get(key, [])
        try:
            areas = _read_segments(png, images / image["file_name"], (image["height"], image["width"]), listed_segments)
        except UsageError as error:
            raise UsageError(f"{png}: {error} (image {key} of {path})") from None
        differing += any(segment["area"] != areas[segment["id"]] for segment in listed_segments)
    if len(chosen) < len(names):
        note(f"looked into {len(chosen)} of the {len(names)} PNG files in {folder}")
    if differing and measured:
        note(
            f"in {differing} of {len(chosen)} images of {path} segments have another area than pixels in {folder}; "
            "panoptic quality takes the former"
        )


def _read_segments(png: Path, picture: Path, size: tuple[int, int], segments: list[dict]) -> dict[int, int]:
    """How many pixels each id has in a PNG file. Raises UsageError where the file does not go with what is listed."""
    try:
        pixels = decode(png)
    except ValueError as error:
        raise UsageError(f"it cannot be read: {error}") from error
    sizes = {"it": (pixels.height, pixels.width), "the annotations": size}
    with suppress(OSError):  # of a format that another reader may know
        sizes[f"its image {picture}"] = read_header(picture)[0]
    if len(set(sizes.values())) > 1:
        got = ", ".join(f"{name} {height} x {width}" for name, (height, width) in sizes.items())
        raise UsageError(f"sizes differ (height x width): {got}")
    most = len(segments) + 1000  # Pillow's table is as large as this
    if (colours := pixels.convert("RGB").getcolors(most)) is None:
        raise UsageError(f"it has over {most} ids, and there are {len(segments)} segments: is it a photograph?")
    ids: Any = [(red + 256 * green + 256**2 * blue, count) for count, (red, green, blue) in colours]  # type: ignore
    found = dict(ids)
    kind = "" if pixels.mode == "RGB" else f" (of the mode {pixels.mode}, where an id is R + 256 G + 65536 B)"
    if extra := sorted(found.keys() - {segment["id"] for segment in segments} - {0}):
        raise UsageError(f"no segment has the ids {shorten(extra)} of its pixels{kind}")
    if empty := [segment["id"] for segment in segments if segment["id"] not in found]:
        raise UsageError(f"no pixel of it has the ids {shorten(empty)} of segments{kind}")
    return found
