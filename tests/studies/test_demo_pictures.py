"""The demos' pictures show what is in the files."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

pytest.importorskip("mmseg", reason="the label maps' colours are in the demo's config: mmseg is not installed")

from studies.demo import detection, generate_scenes, segmentation
from studies.demo.comparison import Comparison, Demo, Model
from studies.demo.generate_scenes import Request


def demo_of(comparison: Comparison, request: Request, folder: Path, titles: list[str]) -> Demo:
    """A demo with the dataset that ``request`` asks for, whose models have these titles and no predictions yet."""
    generate_scenes.generate(folder / "data", request)
    models = tuple(Model(title, title, comparison.models[0].config) for title in titles)
    demo = Demo(comparison, folder / "work", folder / "data", request, 1, 0, models)
    for model in models:
        demo.folder(model).mkdir(parents=True)
    return demo


def test_outlines_show_what_was_predicted(tmp_path: Path) -> None:
    """Columns are compared with one another: perfect predictions look like the truth, unsure ones are not drawn."""
    demo = demo_of(detection.COMPARISON, Request(seed=0, train=1, val=4, size=96), tmp_path, ["sure", "unsure"])
    coco = COCO(str(tmp_path / "data" / "annotations" / "instances_val.json"))
    for model, score in zip(demo.models, (0.9, 0.1), strict=True):
        predictions = []
        for image_id in coco.getImgIds():
            items = [item for item in coco.loadAnns(coco.getAnnIds(image_id)) if not item["iscrowd"]]
            instances = {
                "masks": [item["segmentation"] for item in items],
                "labels": np.array([item["category_id"] - 1 for item in items]),
                "scores": np.full(len(items), score),
            }
            predictions.append({"img_id": image_id, "pred_instances": instances})
        demo.predictions(model).write_bytes(pickle.dumps(predictions))
    out = tmp_path / "pictures.png"
    detection.draw(demo, demo.models, out)
    picture = np.asarray(Image.open(out).convert("RGB")).astype(int)
    colour = np.array([0xE6, 0x9F, 0x00])  # of the first category
    stars = [item for item in coco.dataset["annotations"] if item["category_id"] == 1]
    assert stars, "the dataset of this seed has no star: choose another"
    hits = np.abs(picture - colour).sum(2) < 12
    hits[-40:] = False  # the legend
    truth, sure, unsure = (part.sum() for part in np.array_split(hits, 3, axis=1))
    assert truth > 100
    assert sure == pytest.approx(truth, rel=0.2)
    assert unsure < 0.1 * truth
    assert not list(tmp_path.glob("*.partial*"))


def test_label_maps_show_what_was_predicted(tmp_path: Path) -> None:
    """Columns are compared: a perfect model looks like the truth, one that sees nothing shows the background alone."""
    request = Request(seed=0, train=1, val=3, size=64, figures=24, format="ade20k")
    demo = demo_of(segmentation.COMPARISON, request, tmp_path, ["perfect", "blind"])
    truths = generate_scenes.annotation_files(tmp_path / "data", request)[1:]
    for model in demo.models:
        demo.predictions(model).mkdir()
        for path in truths:
            label_map = np.asarray(Image.open(path))
            shown = label_map if model.title == "perfect" else np.ones_like(label_map)
            Image.fromarray(shown).save(demo.predictions(model) / path.name)
    out = tmp_path / "pictures.png"
    segmentation.draw(demo, demo.models, out)
    picture = np.asarray(Image.open(out).convert("RGB")).astype(int)[:-40]  # without the legend
    counts = []
    for colour in demo.load_config(demo.models[0]).metainfo.palette:
        columns = np.array_split(np.abs(picture - colour).sum(2) < 6, 4, axis=1)
        counts.append([int(part.sum()) for part in columns])
    (_, *background), *figures = counts
    assert background[2] > background[0] == pytest.approx(background[1], rel=0.05)
    for _, truth, perfect, blind in figures:
        assert truth > 50
        assert perfect == pytest.approx(truth, rel=0.05)
        assert blind < 0.02 * truth
    assert not list(tmp_path.glob("*.partial*"))
