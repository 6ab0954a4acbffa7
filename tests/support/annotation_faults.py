"""A campaign against annotation files: a sound file in COCO's format with one random mutation, and what it means.

Each case has a number, from which everything in it follows. Its outcome must be the right result, or one line that
names the file and the fault. ``python tests/support/annotation_faults.py annotations 17`` repeats a case and says what
comes of it; of label maps with ``label_maps 17``.
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from carafe_plugin.engine.dataset_checks import check_dataset_files, check_not_empty
from carafe_plugin.engine.errors import UsageError

CLASSES = ("red", "blue")
SIZES = {"a.png": (48, 60), "b.png": (56, 50), "below/c.png": (40, 64)}  # height and width
NUMBERS = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")
#: Every image of a file: its id, its file's name, and its objects of ``CLASSES``.
Truth = list[tuple[Any, str, list[dict[str, Any]]]]


class Meaningless(Exception):
    """A file of which nobody can say what it means."""


# ------------------------------------------------------------------------------------------------------ a sound file
def write_images(folder: Path) -> None:
    for number, (name, size) in enumerate(SIZES.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


def sound_file(draw: random.Random) -> dict[str, Any]:
    """Every form that COCO has: one polygon and several, run lengths compressed and not, crowds, unused categories."""
    names = draw.choice([["red", "blue", "green"], ["green", "red", "blue"], ["red", "green", "blue"]])
    ids = draw.sample(range(1, 99), 3)
    categories = [dict(id=number, name=name, supercategory="thing") for number, name in zip(ids, names, strict=True)]
    images = [
        dict(id=number, file_name=name, height=height, width=width)
        for number, (name, (height, width)) in zip(draw.sample(range(999), 3), SIZES.items(), strict=True)
    ]
    annotations = []
    for image, form in itertools.product(images, range(3)):
        height, width = image["height"], image["width"]
        w, h = draw.randint(12, 40), draw.randint(12, 36)
        x, y = draw.randint(0, width - w), draw.randint(0, height - h)
        half = w // 2
        outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        if form == 1:
            outline = [[x, y, x + half, y, x, y + h], [x + half, y, x + w, y, x + w, y + h - 0.5]]
        runs = coco_mask.merge(coco_mask.frPyObjects(outline, height, width))
        shape: Any = outline
        if form == 2 and draw.random() < 0.5:
            shape = dict(size=[height, width], counts=runs["counts"].decode())
        elif form == 2:
            shape = dict(size=[height, width], counts=_run_lengths(coco_mask.decode(runs)))
        annotations.append(
            dict(
                id=draw.randint(1, 10**6) * 100 + len(annotations) + 1,
                image_id=image["id"],
                category_id=draw.choice(categories)["id"],
                bbox=[x, y, w, h],
                area=int(coco_mask.area(runs)),
                iscrowd=int(form == 2 and draw.random() < 0.3),
                segmentation=shape,
            )
        )
    draw.shuffle(annotations)
    return dict(info=dict(year=2026), images=images, annotations=annotations, categories=categories)


def _run_lengths(mask: np.ndarray) -> list[int]:
    values = mask.flatten(order="F")
    starts = np.flatnonzero(np.diff(values, prepend=0))
    return np.diff([0, *starts, len(values)]).tolist()


def predictions(content: dict[str, Any], draw: random.Random) -> dict[str, list[tuple]]:
    """By file, what a model found: label, box (x1, y1, x2, y2), score and mask; most are near an object."""
    found: dict[str, list[tuple]] = {name: [] for name in SIZES}
    files = {image["id"]: image["file_name"] for image in content["images"]}
    names = {category["id"]: category["name"] for category in content["categories"]}
    for annotation in content["annotations"]:
        file, name = files[annotation["image_id"]], names[annotation["category_id"]]
        label = CLASSES.index(name) if name in CLASSES and draw.random() < 0.9 else draw.randrange(2)
        x, y, w, h = annotation["bbox"]
        x1, y1 = max(x + draw.randint(-3, 3), 0), max(y + draw.randint(-3, 3), 0)
        box = [x1, y1, min(x1 + w, SIZES[file][1]), min(y1 + h, SIZES[file][0])]
        mask = np.zeros(SIZES[file], bool)
        mask[box[1] : box[3], box[0] : box[2]] = True
        found[file].append((label, box, draw.uniform(0.1, 1), mask))
    return found


# ----------------------------------------------------------------------------------------------------- one mutation
NAN, INF = float("nan"), float("inf")
ODD = (
    None, True, False, "", "7", "red", "é", "\ud800", "a\0b", "/", "../a.png", "a.png ", "A.PNG", [], {}, [[]], [1],
    0, 1, -1, 0.5, 1e-9, 1e7, 1e11, 1e308, 2**31, 2**32, 2**63, 10**30, 10**400, NAN, INF, -INF, [NAN], [[INF]], [None],
    [[1, 2]], [[1, 2, 3, 4, 5]], [[0, 0, 9, 0, 9, 9]], {"id": 1}, {"size": [1, 1], "counts": [1]}, {"counts": "0"},
)  # fmt: skip
#: In place of the key that a mutation is about: a line must not come, or may be about anything in the file.
HARMLESS, ANYTHING = "harmless", ""
#: What else a line about a key may speak of.
ALSO = dict(
    counts=["segmentation"], size=["segmentation"], image_id=["segmentation"], name=["categories"], id=["twice"],
    file_name=["images of", "its file"], images=["image"], annotations=["annotation"], categories=["categor"],
)  # fmt: skip
KEYS = (
    "id",
    "image_id",
    "category_id",
    "bbox",
    "area",
    "iscrowd",
    "segmentation",
    "file_name",
    "width",
    "height",
    "name",
)

Path_ = tuple[Any, ...]


def _paths(part: Any, above: Path_ = ()) -> Iterator[Path_]:
    items = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    for key, value in items:
        yield (*above, key)
        yield from _paths(value, (*above, key))


def _at(content: Any, path: Path_) -> Any:
    for key in path:
        content = content[key]
    return content


def _last_name(path: Path_) -> str:
    return next(key for key in reversed(path) if isinstance(key, str))


def _any_place(content: dict, draw: random.Random) -> Path_:
    """A place of a random depth: else most would be numbers of run lengths."""
    paths = [path for path in _paths(content) if path[0] != "info"]
    depth = draw.choice([1, 2, 3, 3, 3, 3, 3, 4, 4, 4, 5, 5])
    return draw.choice([path for path in paths if len(path) == depth])


def _replace(content: dict, draw: random.Random) -> tuple[str, str]:
    *above, key = _any_place(content, draw)
    old = _at(content, tuple(above))[key]
    derived: list[Any] = [str(old), [old], {"value": old}]
    if isinstance(old, (int, float)):
        derived = [str(old)] + [
            -old,
            old + 1,
            old - 1,
            old + 0.5,
            float(old),
            old * 2,
            old * 10,
            old * 10**9,
            float(f"{old}e300"),
        ]
    if isinstance(old, str):
        derived += [old + " ", old.upper(), old[:-1], old + "x", old[::-1]]
    if isinstance(old, list) and old:
        derived += [old[:-1], old[1:], old + old[:1], old + old, old[::-1], [old], [str(part) for part in old]]
    if isinstance(old, dict):
        derived += [list(old.values()), list(old), {**old, "size": [9, 9]}, {**old, "counts": []}]
    new = draw.choice(ODD if draw.random() < 0.4 else derived)
    _at(content, tuple(above))[key] = new
    return f"{'.'.join(map(str, [*above, key]))}: {old!r:.60} becomes {new!r:.60}", _last_name((*above, key))


def _delete(content: dict, draw: random.Random) -> tuple[str, str]:
    *above, key = _any_place(content, draw)
    del _at(content, tuple(above))[key]
    return f"without {'.'.join(map(str, [*above, key]))}", _last_name((*above, key))


def _copy_value(content: dict, draw: random.Random) -> tuple[str, str]:
    """Duplicate and swapped ids, objects of other images, names of other categories."""
    kind = draw.choice(["images", "annotations", "annotations", "categories"])
    source, target = draw.sample(content[kind], 2)
    key = draw.choice([key for key in source if key in KEYS])
    swap = draw.random() < 0.5
    source[key], target[key] = target[key] if swap else source[key], source[key]
    return f"{kind}: {key} {'swapped' if swap else 'copied'}: {source[key]!r:.60}, {target[key]!r:.60}", key


def _duplicate(content: dict, draw: random.Random) -> tuple[str, str]:
    kind = draw.choice(["images", "annotations", "categories"])
    entry = copy.deepcopy(draw.choice(content[kind]))
    if draw.random() < 0.5:
        entry["id"] = max(entry["id"] for entry in content[kind]) + 1
    content[kind].insert(draw.randrange(len(content[kind]) + 1), entry)
    return f"{kind}: {entry['id']} once more", kind


def _rename(content: dict, draw: random.Random) -> tuple[str, str]:
    paths = [path for path in _paths(content) if isinstance(path[-1], str) and path[0] != "info"]
    *above, key = draw.choice(paths)
    part = _at(content, tuple(above))
    new = draw.choice([key.upper(), key + "s", key[:-1], key + " ", key.replace("_", "")])
    part[new] = part.pop(key)
    return f"{'.'.join(map(str, above))}: {key} is called {new}", key


def _other_ids(content: dict, draw: random.Random) -> tuple[str, str]:
    """All ids of a kind consistently of another form."""
    kind, key = draw.choice([("images", "image_id"), ("categories", "category_id"), ("annotations", "")])
    change = draw.choice([str, float, lambda value: value + 2**31, lambda value: value + 2**63, lambda value: -value])
    some = draw.random() < 0.3
    chosen = {entry["id"] for entry in content[kind] if not some or draw.random() < 0.5}
    for part, name in ((kind, "id"), ("annotations", key)):
        for entry in content[part]:
            if name and entry[name] in chosen:
                entry[name] = change(entry[name])
    return f"{kind}: {'some' if some else 'all'} ids as {content[kind][0]['id']!r}", "id"


def _top_level(content: dict, draw: random.Random) -> Any:
    return draw.choice([[content], list(content.values()), content["annotations"], None, 7, "x", {"data": content}])


def _harmless(content: dict, draw: random.Random) -> tuple[str, str]:
    """What changes nothing: the order of images, objects and keys, keys of one's own, unused categories."""
    for kind in ("images", "annotations"):
        draw.shuffle(content[kind])
    for entry in content["annotations"]:
        entry["note"] = draw.choice(["é", None, [1]])
        items = list(entry.items())
        draw.shuffle(items)
        entry.clear()
        entry.update(items)
    content["categories"].insert(draw.randrange(4), dict(id=100, name="unused"))
    content["licenses"] = None
    return "in another order, with keys of one's own", HARMLESS


CHANGES: dict[Callable[[dict, random.Random], tuple[str, str]], int] = {
    _replace: 50, _delete: 12, _copy_value: 15, _duplicate: 6, _rename: 5, _other_ids: 6, _harmless: 6,
}  # fmt: skip


def _encoding(text: bytes, draw: random.Random) -> tuple[bytes, str]:
    place, string = draw.randrange(len(text)), text.decode()
    forms = {
        "cut off": text[:place],
        "one byte lost": text[:place] + text[place + 1 :],
        "one byte changed": text[:place] + bytes([draw.randrange(256)]) + text[place + 1 :],
        "one bit changed": text[:place] + bytes([text[place] ^ 1]) + text[place + 1 :],  # of a number, mostly
        "with a byte order mark": b"\xef\xbb\xbf" + text,
        "in UTF-16": string.encode("utf-16"),
        "in UTF-32": string.encode("utf-32-le"),
        "with a Latin-1 byte": text.replace(b"thing", b"th\xefng", 1),
        "twice": text + text,
        "empty": b"",
        "blank": b"  \n",
        "a page": b"<html>404</html>",
        "zeros": bytes(len(text)),
        "with a comma too many": text.replace(b"}]", b"},]", 1),
        "with a comment": b"// objects\n" + text,
        "with single quotes": text.replace(b'"', b"'"),
        "nested deeply": b'{"info":' + b"[" * 10**5 + b"]" * 10**5 + b"," + text[1:],
        "with a number of 5000 digits": text.replace(b'"year": 2026', b'"year": ' + b"9" * 5000, 1),
    }  # fmt: skip
    form = draw.choice(list(forms))
    return forms[form], f"file {form}"


def mutate(content: dict[str, Any], draw: random.Random) -> tuple[bytes, str, str]:
    """A file's bytes with one mutation, the mutation in words, and the key that a line about it must name."""
    if draw.random() < 0.12:
        return *_encoding(json.dumps(content).encode(), draw), ANYTHING
    if draw.random() < 0.02:
        return json.dumps(_top_level(content, draw)).encode(), "another top level", ANYTHING
    change = draw.choices(list(CHANGES), list(CHANGES.values()))[0]
    words, key = change(content, draw)
    return json.dumps(content, indent=1 if key == HARMLESS else None).encode(), words, key


# ---------------------------------------------------------------------------------------------- what a file means
def meaning(path: Path) -> Truth:
    """What a file says, in its order; raises Meaningless where nobody can say.

    A reading of its own, in the order of the specification, that shares no line with the package or MMDetection.
    """
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
        images = {_plain(image["id"]): image for image in content["images"]}
        names = {_plain(category["id"]): category["name"] for category in content["categories"]}
        ids = [_plain(annotation["id"]) for annotation in content.get("annotations", [])]
        lengths = [len(content[kind]) for kind in ("images", "categories")] + [len(set(ids))]
        if lengths != [len(images), len(names), len(ids)] or any(list(names.values()).count(c) != 1 for c in CLASSES):
            raise Meaningless("an id or a class that is not there once")
        objects: dict[Any, list] = {image: [] for image in images}
        for annotation in content.get("annotations", []):
            image = images[annotation["image_id"]]
            if (image["height"], image["width"]) != SIZES[image["file_name"]]:
                raise Meaningless("an image that is not as large as its file")
            if (name := names[annotation["category_id"]]) in CLASSES:
                x, y, w, h = (_number(value) for value in annotation["bbox"])
                objects[annotation["image_id"]].append(
                    dict(
                        label=CLASSES.index(name), bbox=[x, y, w, h], area=_number(annotation["area"]),
                        iscrowd=annotation.get("iscrowd", 0), ignore=annotation.get("ignore", 0),
                        mask=partial(draw_mask, annotation.get("segmentation"), image),
                    )
                )  # fmt: skip
        return [(number, image["file_name"], objects[number]) for number, image in images.items()]
    except Meaningless:
        raise
    except Exception as error:
        raise Meaningless(f"{type(error).__name__}: {error}") from error


def _plain(value: Any) -> Any:
    if type(value) not in (int, str):
        raise Meaningless(f"the id {value!r}")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e10:
        raise Meaningless(f"the number {value!r}")
    return value


def draw_mask(shape: Any, image: dict[str, Any], training: bool = False) -> np.ndarray | None:
    """The pixels of a ``segmentation``. Of an unsound one MMDetection trains, as it documents, on the sound polygons
    alone; without any, it ignores the object: None.
    """
    size = SIZES[image["file_name"]]
    ignored = isinstance(shape, dict) and (
        shape.get("size") is None or not isinstance(shape.get("counts"), (str, list))
    )
    if training and shape and ignored:
        return None
    if isinstance(shape, list) and shape and all(isinstance(polygon, list) for polygon in shape):
        polygons = [[_number(value) for value in polygon] for polygon in shape]
        sound = [polygon for polygon in polygons if len(polygon) >= 6 and len(polygon) % 2 == 0]
        if len(sound) < len(polygons) and not training:
            raise Meaningless(f"the polygons {shape!r:.60}")
        return coco_mask.decode(coco_mask.frPyObjects(sound, *size)).any(axis=2) if sound else None
    if not isinstance(shape, dict) or shape.get("size") != list(size) or "counts" not in shape:
        raise Meaningless(f"the mask {shape!r:.60}")
    if isinstance(shape["counts"], str):
        mask = coco_mask.decode(dict(size=list(size), counts=shape["counts"].encode()))
        if coco_mask.encode(mask)["counts"].decode() != shape["counts"]:
            raise Meaningless("run lengths that are not those of an image of this size")
        return mask > 0
    runs = [_number(value) for value in shape["counts"]]
    if sum(runs) != size[0] * size[1] or min(runs) < 0 or any(type(run) is not int for run in runs):
        raise Meaningless(f"the run lengths {runs!r:.60}")
    return np.repeat(np.arange(len(runs)) % 2, runs).reshape(size, order="F") > 0


def precision(truth: Truth, found: dict[str, list[tuple]], converted: bool) -> dict[str, float]:
    """The metrics of ``found`` by pycocotools alone, from a file whose every value is plain.

    ``converted``: as MMDetection documents for a metric without a file of its own: objects that it leaves out do not
    count, and areas are those of the boxes.
    """
    images, annotations, results = [], [], []
    for number, (_, name, objects) in enumerate(sorted(truth, key=lambda image: image[0])):  # as pycocotools sorts them
        height, width = SIZES[name]
        images.append(dict(id=number, height=height, width=width))
        for thing in objects:
            if converted and not is_trained_on(thing, name):
                continue
            runs = coco_mask.encode(np.asfortranarray(thing["mask"](), np.uint8))
            annotations.append(
                dict(
                    id=len(annotations) + 1, image_id=number, category_id=thing["label"], bbox=thing["bbox"],
                    area=thing["bbox"][2] * thing["bbox"][3] if converted else thing["area"],
                    iscrowd=int(thing["iscrowd"]), segmentation=runs,
                )
            )  # fmt: skip
        for label, (x1, y1, x2, y2), score, mask in found[name]:
            runs = coco_mask.encode(np.asfortranarray(mask, np.uint8))
            box = [x1, y1, x2 - x1, y2 - y1]
            results.append(dict(image_id=number, category_id=label, score=score, bbox=box, segmentation=runs))
    coco, numbers = COCO(), {}
    coco.dataset = dict(images=images, annotations=annotations, categories=[dict(id=0), dict(id=1)])
    coco.createIndex()
    for kind in ("bbox", "segm"):
        run = COCOeval(
            coco, coco.loadRes([{k: v for k, v in r.items() if kind == "bbox" or k != "bbox"} for r in results]), kind
        )
        run.params.maxDets = [100, 300, 1000]
        run.evaluate()
        run.accumulate()
        run.summarize()
        numbers |= {f"coco/{kind}_{name}": value for name, value in zip(NUMBERS, run.stats, strict=False)}
    return numbers


def is_trained_on(thing: dict[str, Any], name: str) -> bool:
    """Whether MMDetection keeps an object: of at least one pixel, inside the image, with an area, not to be ignored."""
    (x, y, w, h), (height, width) = thing["bbox"], SIZES[name]
    inside = min(x + w, width) > max(x, 0) and min(y + h, height) > max(y, 0)
    return inside and w >= 1 and h >= 1 and thing["area"] > 0 and not thing["ignore"]


# ------------------------------------------------------------------------------------------------ what becomes of it
class Loader:
    """A data loader whose dataset is built when it is asked for, as the runner's."""

    def __init__(self, build: Callable[[], Any]) -> None:
        self.build = build

    @cached_property
    def dataset(self) -> Any:
        return self.build()


def judge(run: Callable[[], str], path: Path, *words: str) -> tuple[str, str]:
    """What comes of a faulty file at ``path`` in ``run``, which returns what is wrong with a result: 'right', 'refused'
    by a line that names the file and one of ``words``, or 'WRONG'; and the details.
    """
    try:
        details = run()
        return ("WRONG" if details else "right"), details
    except UsageError as error:
        details = " ".join(str(error).split())  # as a command prints it
        whole = str(path) in details or all(part in details for part in (f"{path.parent}: ", path.name))
        named = whole and (not words or any(word in details for word in words))
        return ("refused" if named and len(details) < 900 else "WRONG"), details
    except Exception as error:
        return "WRONG", "".join(traceback.format_exception(error)[-3:])


class Campaign:
    """Runs cases in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_images(folder / "images")

    def case(self, number: int) -> tuple[str, str, str]:
        """Run a case; returns what came of it ('right', 'refused' or 'WRONG'), the mutation and the details."""
        draw = random.Random(number)
        content = sound_file(draw)
        found = predictions(content, draw)
        text, mutation, key = mutate(content, draw)
        mode = draw.choice(["measured", "measured", "converted", "train"])
        path = self.folder / f"case_{number}.json"
        path.write_bytes(text)
        outcome, details = judge(lambda: self._run(path, mode, found), path, key, *ALSO.get(key, []))
        path.unlink()
        return ("WRONG" if key == HARMLESS and outcome == "refused" else outcome), f"{mode}, {mutation}", details

    def _run(self, path: Path, mode: str, found: dict[str, list[tuple]]) -> str:
        """What is wrong with the result, or nothing."""
        init_default_scope("mmdet")  # a case may follow one of another toolbox
        split = "train" if mode == "train" else "test"
        steps = [dict(type="LoadAnnotations", with_bbox=True, with_mask=True)] if mode == "train" else []
        dataset = dict(
            type="CocoDataset", data_root=str(self.folder), data_prefix=dict(img="images"), ann_file=path.name,
            metainfo=dict(classes=CLASSES), test_mode=mode != "train", filter_cfg=dict(filter_empty_gt=True),
            pipeline=[dict(type="LoadImageFromFile"), *steps, dict(type="PackDetInputs")],
        )  # fmt: skip
        metric = dict(type="CocoMetric", metric=["bbox", "segm"])
        if mode == "measured":
            metric["ann_file"] = str(path)
        settings = {f"{split}_dataloader": dict(dataset=dataset), f"{split}_evaluator": metric}
        cfg = Config(dict(default_scope="mmdet", **settings))
        check_dataset_files(cfg, split)
        from mmdet.registry import DATASETS, METRICS

        loader = Loader(lambda: DATASETS.build(copy.deepcopy(dataset)))
        check_not_empty(SimpleNamespace(cfg=cfg, **{f"{split}_dataloader": loader}), split)
        built = loader.dataset
        try:
            truth = meaning(path)
            if mode == "train":
                return _compare_training(built, truth)
            expected = precision(truth, found, converted=mode == "converted")
        except Meaningless as error:
            return f"accepted, although it holds {error}"
        measure = METRICS.build(metric)
        measure.dataset_meta = built.metainfo
        for number in range(len(built)):
            info = built.get_data_info(number)
            name = str(Path(info["img_path"]).relative_to(self.folder / "images"))
            labels, boxes, scores, masks = zip(*found[name], strict=True)
            instances = InstanceData(
                labels=torch.tensor(labels), bboxes=torch.tensor(boxes, dtype=torch.float32),
                scores=torch.tensor(scores), masks=torch.from_numpy(np.stack(masks)),
            )  # fmt: skip
            sample = dict(
                img_id=info["img_id"], ori_shape=SIZES[name], pred_instances=instances, instances=info["instances"]
            )
            measure.process({}, [sample])
        got = measure.evaluate(len(built))
        wrong = [
            f"{key} {got.get(key)} for {expected[key]:.4f}"
            for key in expected
            if not abs(got.get(key, NAN) - expected[key]) < 2e-3
        ]
        return ", ".join(wrong)


def _compare_training(built: Any, truth: Truth) -> str:
    expected = [(name, objects) for _, name, objects in truth if objects]
    if len(expected) != len(built):
        return f"{len(built)} images for {len(expected)}"
    for sample, (name, objects) in zip(built, expected, strict=True):
        sample = sample["data_samples"]
        kept = {False: [], True: []}
        for thing in objects:
            if is_trained_on(thing, name):
                thing["pixels"] = thing["mask"](training=True)
                kept[bool(thing["iscrowd"]) or thing["pixels"] is None].append(thing)
        for part, things in ((sample.gt_instances, kept[False]), (sample.ignored_instances, kept[True])):
            boxes = [[x, y, x + w, y + h] for x, y, w, h in (thing["bbox"] for thing in things)]
            if part.labels.tolist() != [thing["label"] for thing in things]:
                return f"{name}: labels {part.labels.tolist()}"
            if not np.allclose(part.bboxes.numpy().reshape(-1, 4), np.reshape(boxes, (-1, 4))):
                return f"{name}: boxes {part.bboxes}"
            for mask, thing in zip(part.masks.masks, things, strict=True):
                if not np.array_equal(mask > 0, mask < 0 if thing["pixels"] is None else thing["pixels"]):
                    return f"{name}: another mask"
    return ""


@contextmanager
def quiet() -> Iterator[None]:
    """Errors alone are logged."""
    loggers = [logging.getLogger("mmengine"), logging.getLogger("current"), MMLogger.get_current_instance()]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def main() -> None:
    from label_faults import LabelCampaign

    kinds = dict(annotations=Campaign, label_maps=LabelCampaign)
    if len(sys.argv) != 3 or sys.argv[1] not in kinds or not sys.argv[2].isdigit():
        sys.exit(__doc__)
    with quiet(), TemporaryDirectory() as folder:
        print(*kinds[sys.argv[1]](Path(folder)).case(int(sys.argv[2])), sep="\n")


if __name__ == "__main__":
    main()
