"""tools/prepare_data.py coco-folder: folders of one's own in COCO's format, and training with what it writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import downloads
import pytest
from tool_runs import Trained, call_tool, one_line

pytest.importorskip("mmdet", reason="mmdet is not installed")

from carafe_plugin.engine.dataset_folder import CocoFolder

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = {"cat": 7, "dog": 3, "bird": 40}  # neither sorted nor contiguous; nor are those of the images
SPLITS = {"train": "train/_annotations.coco.json", "val": "valid/_annotations.coco.json"}


def write_folder(
    root: Path,
    files: Mapping[str, str] = SPLITS,
    images: Mapping[str, str] | None = None,
    objects: Sequence[str] = tuple(IDS),
    ids: Mapping[str, Any] = IDS,
    masks: bool = False,
) -> Path:
    """A folder with the annotation files ``files`` (split -> path) of three images each, one without an object; the
    images are beside them or in the folders ``images``.
    """
    for first, (split, name) in enumerate(files.items()):
        file = root / name
        folder = root / images[split] if images else file.parent
        kind = type(next(iter(ids.values())))
        listed = [dict(id=kind(100 - 10 * first - each), file_name=f"{first}{each}.png") for each in range(3)]
        annotations = []
        for place, image in enumerate(listed):
            downloads.picture(folder / image["file_name"], seed=place)
            image |= dict(zip(("width", "height"), downloads.SIZE, strict=True))
            for number, category in enumerate(objects if place < 2 else ()):
                x, y, side = 4 + 20 * number, 6 + place, 14
                polygon = [x, y, x + side, y, x + side, y + side, x, y + side]
                annotation = dict(id=len(annotations) + 1, image_id=image["id"], category_id=ids[category])
                annotation |= dict(bbox=[x, y, side, side], area=side**2, iscrowd=0)
                annotations.append({**annotation, **(dict(segmentation=[polygon]) if masks else {})})
        categories = [dict(id=number, name=category) for category, number in ids.items()]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(dict(images=listed, annotations=annotations, categories=categories)))
    return root


def change(file: Path, **lists: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **lists}))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A Mask R-CNN of three seconds an iteration no longer, in the place of one for eight GPUs."""
    path = tmp_path / "base.py"
    small = Path(__file__).parents[2] / "configs" / "demo" / "mask-rcnn_r18_carafe-fpn-mask-head_scenes.py"
    path.write_text(
        f"_base_ = {str(small)!r}\n"
        "train_cfg = dict(type='IterBasedTrainLoop', max_iters=1, val_interval=1)\n"
        "val_cfg = dict(type='ValLoop')\n"
        "val_dataloader = dict(batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False), "
        "dataset=dict(type='CocoDataset', ann_file='x', data_root='x', data_prefix=dict(img='x'), test_mode=True, "
        "pipeline=[dict(type='LoadImageFromFile'), dict(type='Resize', scale_factor=1.0, keep_ratio=True), "
        "dict(type='PackDetInputs')]))\n"
        "val_evaluator = dict(type='CocoMetric', ann_file='x', metric=['bbox', 'segm'])\n"
        "train_dataloader = dict(batch_size=2)\n"
    )
    return path


def run(root: Path, *options: object) -> int:
    return call_tool("prepare_data", "coco-folder", root, *options)


@pytest.mark.parametrize("ids", [IDS, {name: str(number) for name, number in IDS.items()}], ids=["numbers", "texts"])
def test_its_configuration_trains_and_tests(
    tmp_path: Path, base: Path, ids: Mapping[str, Any], capsys: pytest.CaptureFixture
) -> None:
    """Ids of categories and images may be any numbers, and texts."""
    root, config = write_folder(tmp_path / "own", ids=ids, masks=True), tmp_path / "own.py"
    assert run(root, "--classes", config, "--base", base, "--decode") == 0
    printed = capsys.readouterr().out
    assert f"wrote {config}: python tools/train.py {config}" in printed
    assert f"coco-folder {root} is complete" in printed
    assert "classes = ('cat', 'dog', 'bird')\n" in config.read_text()
    assert call_tool("train", config, "--work-dir", tmp_path / "work") == 0
    trained = Trained("mmdet", config, tmp_path / "work")
    assert 0 <= trained.metrics()["coco/segm_mAP"] <= 1, "measured: not -1, as of images that it does not list"
    assert call_tool("test", config, trained.checkpoint, "--work-dir", tmp_path / "test") == 0
    import torch

    content = torch.load(trained.checkpoint, weights_only=False)
    assert content["meta"]["dataset_meta"]["classes"] == ("cat", "dog", "bird")
    assert content["state_dict"]["roi_head.mask_head.conv_logits.weight"].shape[0] == 3


def test_layouts(tmp_path: Path) -> None:
    """COCO's own, Roboflow's, one folder for everything, and a lone file."""
    coco = write_folder(
        tmp_path / "coco",
        {split: f"annotations/instances_{split}2017.json" for split in ("train", "val")},
        dict(train="images/train2017", val="images/val2017"),
    )
    (coco / "annotations" / "captions_train2017.json").write_text("{}")
    alike = write_folder(tmp_path / "alike", dict(train="train.json"), dict(train="train"))
    write_folder(alike, dict(val="val.json"), dict(val="dev"))  # images of the same names
    roboflow = write_folder(tmp_path / "roboflow", {**SPLITS, "test": "test/_annotations.coco.json"})
    flat = write_folder(tmp_path / "flat", dict(train="train.json", val="dev.json"))
    lone = write_folder(tmp_path / "lone", dict(train="labels.json"), dict(train="pictures"))
    for root, folders in (
        (coco, dict(train="images/train2017", val="images/val2017")),
        (roboflow, dict(train="train", val="valid", test="test")),
        (flat, dict(train=".", val=".")),
        (alike, dict(train="train", val="dev")),
        (lone, dict(train="pictures")),
    ):
        folder = CocoFolder(root)
        assert folder.files.keys() == folders.keys()
        assert {split: folder.image_folder(split) for split in folders} == {k: root / v for k, v in folders.items()}
        assert folder.classes == tuple(IDS)


def test_what_a_configuration_says(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """mmdet's own, by default: Mask R-CNN where all objects have masks; without val, test is validated on."""
    from mmengine.config import Config

    own, config = tmp_path / "own.py", {}
    for masks in (False, True):
        root = write_folder(
            tmp_path / str(masks), dict(train="train.json", test="test.json"), objects=["cat"], masks=masks
        )
        assert run(root, "--classes", own) == 0
        config[masks] = Config.fromfile(own)
        heads = config[masks].model.roi_head
        assert [heads[name].num_classes for name in ("bbox_head", "mask_head") if name in heads] == [1] * (1 + masks)
        for split, file in (("train", "train"), ("val", "test"), ("test", "test")):
            dataset = config[masks][f"{split}_dataloader"].dataset
            place = dataset.data_root, dataset.ann_file, dataset.data_prefix.img, dataset.metainfo.classes
            assert place == (f"{root}/", f"{file}.json", "", ("cat",))
        assert config[masks].val_evaluator.ann_file == str(root / "test.json")
    assert "dog, bird, which are left out of the classes" in capsys.readouterr().err
    assert "mask_head" not in config[False].model.roi_head
    root = write_folder(tmp_path / "lone", dict(train="labels.json"))
    assert run(root, "--classes", own, "--base", "mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py") == 0
    lone = Config.fromfile(own)
    assert [head.num_classes for head in lone.model.roi_head.bbox_head] == [3] * 3
    assert lone.model.roi_head.bbox_head[2].bbox_coder.target_stds == [0.033, 0.033, 0.067, 0.067]
    assert [lone[f"val_{part}"] for part in ("dataloader", "cfg", "evaluator")] == [None] * 3
    capsys.readouterr()
    assert run(root, "--classes") == 0
    assert own.read_text().partition("\n")[2].partition("\n")[0] in capsys.readouterr().out


def test_classes_that_a_split_lacks(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = write_folder(tmp_path / "own", dict(train="train.json", val="val.json"))
    for split, absent in (("train", "dog"), ("val", "bird")):
        content = json.loads((root / f"{split}.json").read_text())
        kept = [each for each in content["annotations"] if each["category_id"] != IDS[absent]]
        change(root / f"{split}.json", annotations=kept)
    assert run(root) == 0
    notes = capsys.readouterr().err
    assert "note: no object of train is of the classes dog: they cannot be learnt" in notes
    assert "note: no object of val is of the classes bird: results there are of the others" in notes
    change(root / "val.json", categories=[dict(id=IDS[name], name=name) for name in ("cat", "dog")])
    assert run(root) == 1
    assert "val.json: no category for 1 of the 3 classes of the configuration (bird)" in capsys.readouterr().out
    change(root / "val.json", categories=[dict(id=IDS[name], name=name) for name in ("bird", "dog", "cat")])
    assert run(root, "--classes", tmp_path / "own.py") == 1
    assert "its categories come in the order bird, dog, cat" in capsys.readouterr().out
    assert not (tmp_path / "own.py").exists()


def test_a_folder_that_is_not_sound(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The lines that a training would end in."""
    root = write_folder(tmp_path / "own", dict(train="train.json", val="val.json"))
    train, val = (json.loads((root / f"{split}.json").read_text()) for split in ("train", "val"))

    def printed(*options: object) -> str:
        assert run(root, *options) == 1
        return capsys.readouterr().out

    (root / "00.png").rename(root / "away.png")
    (root / "10.png").write_bytes(b"")
    lines = printed()
    assert "1 of the 2 images of" in lines, "of those with objects: no training opens the third"
    assert f"are missing in {root}: 00.png" in lines
    assert f"val.json are empty in {root}: 10.png" in lines
    assert "is not complete: 2 faults" in lines
    (root / "away.png").rename(root / "00.png")
    downloads.picture(root / "10.png", size=(32, 48))
    assert "image 90 is 48 x 64 (height x width), and its file" in printed()
    downloads.picture(root / "10.png")
    beside = {**val["annotations"][0], "bbox": [700, 6, 10, 10]}
    change(root / "val.json", annotations=[beside, *val["annotations"][1:]])
    assert "annotation 1 of image 90: bbox must be on its image, 48 x 64" in printed()
    change(root / "val.json", annotations=val["annotations"])
    mixed = [{**train["categories"][0], "id": "7"}, *train["categories"][1:]]
    change(root / "train.json", categories=mixed)
    assert "ids of categories must be all integers or all texts" in printed()
    change(root / "train.json", categories=train["categories"])
    assert run(root) == 0
    content = (root / "02.png").read_bytes()
    (root / "02.png").write_bytes(content[:-40])
    assert f"1 images in {root} are truncated or damaged: 02.png" in printed("--decode")


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = write_folder(tmp_path / "own")
    assert run(root, "--out", tmp_path / "out") == 2
    assert "--out, --check and --partial are not for coco-folder" in one_line(capsys)
    assert run(root, "--classes", tmp_path) == 2
    assert f"--classes must be a file that ends in .py, got {tmp_path}" in one_line(capsys)
    assert run(root, "--base", "mmseg::upernet/upernet_r50_4xb4-80k_ade20k-512x512.py") == 2
    assert "--base must be a configuration of MMDetection, got mmseg::" in one_line(capsys)
    assert run(root, "--base", tmp_path / "absent.py") == 2
    assert f"no such configuration file: {tmp_path}/absent.py" in one_line(capsys)
    assert run(root, "--base", "mmdet::rpn/rpn_r50_fpn_1x_coco.py") == 2
    assert "--base must have a model with num_classes, got mmdet::rpn/" in one_line(capsys)
    (root / "valid" / "second.json").write_text("{}")
    assert run(root) == 1
    printed = capsys.readouterr().out
    assert "may be that of val: valid/_annotations.coco.json, valid/second.json" in printed
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty") == 1
    assert "(*.json) says 'train' in its name or that of its folder; found none" in capsys.readouterr().out
