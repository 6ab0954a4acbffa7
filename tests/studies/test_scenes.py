"""The dataset generator: reproducible, valid in both formats, and as varied as its description says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from studies.demo import generate_scenes, scenes

SIZE = 128
ARGUMENTS = ["--seed", "3", "--train", "20", "--val", "20", "--size", str(SIZE)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "data"
    assert generate_scenes.main(["--out", str(out), *ARGUMENTS]) == 0
    return out


@pytest.fixture(scope="module")
def ade20k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same scenes in ADE20k's folders."""
    out = tmp_path_factory.mktemp("ade20k") / "data"
    assert generate_scenes.main(["--out", str(out), "--format", "ade20k", *ARGUMENTS]) == 0
    return out


@pytest.fixture(scope="module", params=["train", "val"])
def coco(dataset: Path, request: pytest.FixtureRequest) -> COCO:
    return COCO(str(dataset / "annotations" / f"instances_{request.param}.json"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_same_seed_gives_same_bytes_and_another_seed_others(dataset: Path, tmp_path: Path) -> None:
    assert generate_scenes.main(["--out", str(tmp_path / "again"), *ARGUMENTS]) == 0
    assert contents(tmp_path / "again") == contents(dataset)
    other = [*ARGUMENTS]
    other[1] = "4"
    assert generate_scenes.main(["--out", str(tmp_path / "other"), *other]) == 0
    same = [name for name, content in contents(tmp_path / "other").items() if content == contents(dataset)[name]]
    assert same == []


def test_a_scene_does_not_depend_on_how_many_there_are(dataset: Path, tmp_path: Path) -> None:
    assert (
        generate_scenes.main(
            ["--out", str(tmp_path / "few"), "--seed", "3", "--train", "5", "--val", "1", "--size", str(SIZE)]
        )
        == 0
    )
    few = contents(tmp_path / "few")
    images = [name for name in few if name.endswith(".png")]
    assert len(images) == 6
    assert all(few[name] == contents(dataset)[name] for name in images)


def test_files_are_valid_coco(dataset: Path, coco: COCO) -> None:
    split = coco.dataset["info"]["description"].split()[-1]
    assert len(coco.getImgIds()) == 20
    assert [item["name"] for item in coco.loadCats(sorted(coco.getCatIds()))] == list(scenes.CATEGORIES)
    assert len(coco.anns) == len(coco.dataset["annotations"])  # no identifier is used twice
    for item in coco.dataset["images"]:
        image = Image.open(dataset / split / item["file_name"])
        assert (image.mode, image.size) == ("RGB", (item["width"], item["height"])) == ("RGB", (SIZE, SIZE))
    for item in coco.dataset["annotations"]:
        mask = coco.annToMask(item)
        rows, columns = np.nonzero(mask)
        assert mask.shape == (SIZE, SIZE)
        assert item["area"] == mask.sum() >= scenes.MIN_PIXELS
        assert item["bbox"] == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
        assert item["image_id"] in coco.imgs
        assert item["category_id"] in coco.cats


def test_visible_masks_are_disjoint(coco: COCO) -> None:
    for image_id in coco.getImgIds():
        masks = [coco.annToMask(item) for item in coco.loadAnns(coco.getAnnIds(image_id))]
        assert np.max(np.sum(masks, axis=0), initial=0) <= 1


def test_ade20k_shows_the_same_scenes(dataset: Path, ade20k: Path, coco: COCO) -> None:
    """Each pixel's label is the category that COCO's masks give it, crowds included, and the background's elsewhere."""
    split = coco.dataset["info"]["description"].split()[-1]
    folder = {"train": "training", "val": "validation"}[split]
    seen = set()
    for item in coco.dataset["images"]:
        expected = np.full((SIZE, SIZE), 1)
        for annotation in coco.loadAnns(coco.getAnnIds(item["id"])):
            expected[coco.annToMask(annotation) > 0] = 1 + annotation["category_id"]
        stem = Path(item["file_name"]).stem
        label_map = Image.open(ade20k / "annotations" / folder / f"{stem}.png")
        assert (label_map.mode, label_map.size) == ("L", (SIZE, SIZE))
        np.testing.assert_array_equal(np.asarray(label_map), expected)
        seen |= set(expected.flat)
        image = Image.open(ade20k / "images" / folder / f"{stem}.jpg")
        assert image.mode == "RGB"
        loss = np.asarray(image).astype(int) - np.asarray(Image.open(dataset / split / item["file_name"]))
        assert np.abs(loss).mean() < 4, "of 255: what JPEG loses"
    assert seen == set(range(1, 8))
    assert len(list((ade20k / "images" / folder).iterdir())) == len(coco.dataset["images"])
    assert [item["name"] for item in coco.loadCats(sorted(coco.getCatIds()))] == list(generate_scenes.CLASSES[1:])


def test_mmseg_reads_ade20k(ade20k: Path) -> None:
    """With the class for ADE20k itself, and the labels that reduce_zero_label leaves."""
    mmseg = pytest.importorskip("mmseg.datasets", reason="mmseg reads the folders: it is not installed")
    prefix = {"img_path": "images/validation", "seg_map_path": "annotations/validation"}
    found = mmseg.ADE20KDataset(data_root=str(ade20k), data_prefix=prefix)
    assert len(found) == 20
    info = found[0]
    transformed = mmseg.LoadAnnotations()(dict(info))
    stored = np.asarray(Image.open(ade20k / "annotations" / "validation" / "000001.png"))
    np.testing.assert_array_equal(transformed["gt_seg_map"], stored - 1)
    assert transformed["gt_seg_map"].min() == 0
    assert generate_scenes.CLASSES[0] == "background"


def test_ade20k_is_reproducible_and_written_anew_if_damaged(ade20k: Path, tmp_path: Path) -> None:
    command = ["--out", str(tmp_path / "again"), "--format", "ade20k", *ARGUMENTS]
    assert generate_scenes.main(command) == 0
    assert contents(tmp_path / "again") == contents(ade20k)
    request = generate_scenes.Request(3, 20, 20, SIZE, format="ade20k")
    assert generate_scenes.is_complete(tmp_path / "again", request)
    for path in ("annotations/training/000003.png", "images/validation/000001.jpg"):
        (tmp_path / "again" / path).unlink()
        assert not generate_scenes.is_complete(tmp_path / "again", request)
        assert generate_scenes.generate(tmp_path / "again", request)
    assert contents(tmp_path / "again") == contents(ade20k)
    assert generate_scenes.generate(tmp_path / "again", generate_scenes.Request(3, 1, 1, SIZE)), "the other format"
    assert (tmp_path / "again" / "annotations" / "instances_val.json").is_file()


def test_more_figures_fill_a_scene(dataset: Path) -> None:
    """And the default is the scenes of old, whose stored request names no number of figures."""

    def share(figures: int) -> float:
        painted = (scenes.paint_scene(scene) for scene in scenes.scenes(0, "val", 6, SIZE, figures))
        return float(np.mean([np.mean(owner >= 0) for _, owner in painted]))

    assert share(32) > 2 * share(8)
    assert all(len(scene.objects) <= 3 for scene in scenes.scenes(0, "train", 3, SIZE, 3))
    request = {"seed": 3, "train": 20, "val": 20, "size": SIZE, "version": generate_scenes.VERSION}
    stored = (dataset / generate_scenes.MARKER).read_text()
    assert json.loads(stored) == request | {"figures": 8, "format": "coco"}
    (dataset / generate_scenes.MARKER).write_text(json.dumps(request))
    assert generate_scenes.is_complete(dataset, generate_scenes.Request(3, 20, 20, SIZE))
    (dataset / generate_scenes.MARKER).write_text(stored)


def test_variety(coco: COCO) -> None:
    annotations = coco.dataset["annotations"]
    single = [item for item in annotations if not item["iscrowd"]]
    assert {item["category_id"] for item in single} == set(coco.getCatIds())
    empty = [image_id for image_id in coco.getImgIds() if not coco.getAnnIds(image_id)]
    assert 0 < len(empty) <= len(coco.imgs) // 10
    crowds = [item for item in annotations if item["iscrowd"]]
    assert 0 < len(crowds) <= len(coco.imgs) // 4
    # Small beside an image of this size: less than half a per cent of it. And there are large ones too.
    share = np.array([item["area"] for item in single]) / SIZE**2
    assert np.mean(share < 0.005) > 0.1
    assert np.max(share) > 0.03


def test_crowd_is_one_annotation_of_several_figures(coco: COCO) -> None:
    crowds = [item for item in coco.dataset["annotations"] if item["iscrowd"]]
    for item in crowds:
        assert set(item["segmentation"]) == {"size", "counts"}
        assert coco_mask.area(item["segmentation"]) == item["area"]
    widths = [max(item["bbox"][2:]) for item in crowds]
    assert min(widths) > 3 * 0.05 * SIZE  # no single figure of a crowd is that wide


def test_figures_hide_one_another_but_stay_visible() -> None:
    hidden = 0
    for scene in scenes.scenes(seed=1, split="val", count=20, size=SIZE):
        _, owner = scenes.paint_scene(scene)
        for index, item in enumerate(scene.objects):
            alone = np.full((SIZE, SIZE), -1)
            scenes._claim(alone, item, index)
            visible, whole = owner == index, alone == index
            assert not np.any(visible & ~whole)
            # What is missing was taken by an object further to the front.
            assert np.all(owner[whole & ~visible] > index)
            assert visible.sum() >= max(scenes.MIN_PIXELS, scenes.MIN_VISIBLE * whole.sum())
            hidden += bool(visible.sum() < whole.sum())
    assert hidden >= 10


@pytest.mark.parametrize("category", scenes.CATEGORIES)
def test_outline_is_detailed_and_within_reach(category: str) -> None:
    """The figure is far from filling its circle, reaches it, and lies inside the window, whatever its details."""
    for detail in (0.0, 0.5, 1.0):
        for angle in (0.0, 0.7):
            figure = scenes.Figure(64.0, 64.0, 40.0, angle, detail, (1, 1, 1), (1, 1, 1))
            (rows, columns), coverage = scenes._coverage(category, figure, 128)
            assert 0.1 < coverage.sum() / (np.pi * 40**2) < 0.75
            assert max(coverage[0].max(), coverage[-1].max(), coverage[:, 0].max(), coverage[:, -1].max()) == 0
            y, x = np.nonzero(coverage)
            reach = np.hypot(y + rows.start + 0.5 - 64, x + columns.start + 0.5 - 64).max()
            assert 38 < reach < 44
            cut = scenes._coverage(category, figure, 64)[1]  # the same figure, cut by the image's border
            assert 0 < cut.sum() < coverage.sum()


def test_image_shows_the_objects_where_the_owner_map_says() -> None:
    """Painting without the objects changes the pixels inside the masks, and none that no figure touches."""
    for scene in scenes.scenes(seed=5, split="train", count=4, size=SIZE):
        image, owner = scenes.paint_scene(scene)
        bare, _ = scenes.paint_scene(dataclasses.replace(scene, objects=[]))
        changed = np.abs(image.astype(int) - bare).sum(2) > 0
        touched = np.zeros_like(changed)
        for item in scene.objects:
            for figure in item.figures:
                window, coverage = scenes._coverage(item.category, figure, SIZE)
                touched[window] |= coverage > 0
        assert not np.any(changed & ~touched)
        assert np.mean(changed[owner >= 0]) > 0.98


def test_complete_dataset_is_left_alone_and_a_damaged_one_is_written_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data"
    command = ["--out", str(out), "--train", "4", "--val", "2", "--size", "64"]
    assert generate_scenes.main(command) == 0
    before = contents(out)
    stamp = (out / "train" / "000001.png").stat().st_mtime_ns
    assert generate_scenes.main(command) == 0
    assert "already complete" in capsys.readouterr().out
    assert (out / "train" / "000001.png").stat().st_mtime_ns == stamp
    (out / "train" / "000002.png").unlink()
    assert generate_scenes.main(command) == 0
    assert contents(out) == before
    assert generate_scenes.main([*command, "--seed", "1"]) == 0  # another request replaces what the script itself wrote
    assert json.loads((out / generate_scenes.MARKER).read_text())["seed"] == 1
    assert contents(out) != before


@pytest.mark.parametrize("format", list(generate_scenes.FORMATS))
def test_interrupted_writing_leaves_no_dataset(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, request = tmp_path / "data", generate_scenes.Request(0, 3, 2, 64, format=format)
    writer = generate_scenes.FORMATS[format]

    def interrupted(folder: Path, split: str, *rest: object) -> None:
        if split == "val":
            raise KeyboardInterrupt
        writer.write(folder, split, *rest)

    monkeypatch.setitem(generate_scenes.FORMATS, format, dataclasses.replace(writer, write=interrupted))
    with pytest.raises(KeyboardInterrupt):
        generate_scenes.generate(out, request)
    assert not out.exists()
    monkeypatch.undo()
    assert generate_scenes.generate(out, request)
    assert generate_scenes.is_complete(out, request)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "data"
    assert generate_scenes.main(["--out", str(out), "--train", "1", "--val", "1", "--size", "64"]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_folder_of_somebody_else_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("draft")
    assert generate_scenes.main(["--out", str(tmp_path), "--train", "1", "--val", "1", "--size", "64"]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert contents(tmp_path) == {"thesis.txt": b"draft"}


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--seed", "-1", "at least 0"),
        ("--seed", "x", "at least 0"),
        ("--train", "0", "at least 1"),
        ("--val", "-5", "at least 1"),
        ("--figures", "0", "at least 1"),
        ("--size", "63", "from 64 to 1024"),
        ("--size", "2000", "from 64 to 1024"),
        ("--size", "64.5", "from 64 to 1024"),
    ],
)
def test_bad_value_is_named(
    option: str, value: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        generate_scenes.main(["--out", str(tmp_path / "data"), option, value])
    assert error.value.code == 2
    message = capsys.readouterr().err
    for part in (option, expected, repr(value)):
        assert part in message
    assert not (tmp_path / "data").exists()


def test_out_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        generate_scenes.main([])
    assert error.value.code == 2
    assert "--out" in capsys.readouterr().err
