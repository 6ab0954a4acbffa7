"""tools/prepare_data.py on datasets of a few images: archives, links, interruptions, and what can be amiss."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from tool_runs import call_tool, one_line

from carafe_plugin.engine import dataset_layout, datasets
from carafe_plugin.images import list_images

SIZES = {
    "coco": dict(train2017=3, val2017=2),
    "ade20k": {
        f"{kind}/{split}": n for kind in ("images", "annotations") for split, n in (("training", 3), ("validation", 2))
    },
    "imagenet": dict(train=4, val=3),
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The datasets, with a few images in each folder."""
    for name, sizes in SIZES.items():
        dataset = datasets.DATASETS[name]
        folders = tuple(replace(folder, size=sizes.get(folder.path, folder.size)) for folder in dataset.folders)
        small = replace(dataset, folders=folders, classes=2 if dataset.classes else 0)
        monkeypatch.setitem(datasets.DATASETS, name, small)


def picture(path: Path, size: tuple[int, int] = (6, 4), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 7).save(path)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    root = tmp_path / "coco"
    first = 0
    for split, count in SIZES["coco"].items():
        names = [f"{first + index:012d}.jpg" for index in range(count)]
        for name in names:
            picture(root / split / name)
        box = [1, 1, 2, 0] if split == "train2017" else [1, 1, 2, 2]  # COCO's own training boxes have a few such
        content = dict(
            images=[dict(id=first + index, file_name=name, width=6, height=4) for index, name in enumerate(names)],
            categories=[dict(id=1, name="person")],
            annotations=[
                dict(
                    id=1,
                    image_id=first,
                    category_id=1,
                    bbox=box,
                    area=4,
                    iscrowd=0,
                    segmentation=[[1, 1, 3, 1, 3, 3]],
                )
            ],
        )
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        first += count
    return root


@pytest.fixture
def ade(tmp_path: Path) -> Path:
    root = tmp_path / "download"
    for split, count in (("training", 3), ("validation", 2)):
        for index in range(count):
            base = root / "ADEChallengeData2016"
            picture(base / "images" / split / f"ADE_{split}_{index}.jpg")
            picture(base / "annotations" / split / f"ADE_{split}_{index}.png", mode="L")
    return root


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """As it is downloaded: a tar of a tar a class, and a flat tar with its labels elsewhere."""
    root = tmp_path / "imagenet"
    root.mkdir()
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for name in ("n01", "n02"):
            inside = io.BytesIO()
            with tarfile.open(fileobj=inside, mode="w") as inner:
                for index in range(2):
                    picture(tmp_path / "x" / f"{name}_{index}.JPEG")
                    inner.add(tmp_path / "x" / f"{name}_{index}.JPEG", f"{name}_{index}.JPEG")
            info = tarfile.TarInfo(f"{name}.tar")
            info.size = inside.tell()
            inside.seek(0)
            outer.addfile(info, inside)
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as outer:
        for index in range(3):
            picture(tmp_path / "x" / f"val_{index}.JPEG")
            outer.add(tmp_path / "x" / f"val_{index}.JPEG", f"val_{index}.JPEG")
    return root


def zipped(root: Path, *folders: str, name: str = "") -> None:
    """Put folders into an archive beside them, and remove them."""
    for folder in folders:
        archive = name or dict(annotations="annotations_trainval2017").get(folder, folder)
        with zipfile.ZipFile(root / f"{archive}.zip", "w") as packed:
            for path in sorted((root / folder).rglob("*")):
                packed.write(path, path.relative_to(root))
        shutil.rmtree(root / folder)


def prepare(name: str, root: Path, out: Path, *options: str) -> int:
    return call_tool("prepare_data", name, root, "--out", out, *options)


def test_coco_is_linked(coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "data" / "coco"
    assert prepare("coco", coco, out) == 0
    assert (out / "train2017").resolve() == coco / "train2017"
    assert (out / "train2017").is_symlink()
    assert (out / "annotations" / "instances_val2017.json").is_file()
    assert f"coco in {out} is complete; the configurations look in data/coco" in capsys.readouterr().out
    before = sorted(coco.rglob("*"))
    assert prepare("coco", coco, out) == 0, "again"
    assert prepare("coco", coco, coco) == 0, "where it is"
    assert prepare("coco", coco, out, "--check", "--decode") == 0
    assert sorted(coco.rglob("*")) == before


def test_coco_is_unpacked_and_goes_on_where_it_stopped(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(coco / "train2017", tmp_path / "whole")
    zipped(coco, "train2017", "val2017", "annotations")
    (coco / "train2017").mkdir()  # somebody's own attempt at unpacking, which was stopped
    out = tmp_path / "out"
    written: list[str] = []
    write = dataset_layout.write_file

    def stop_after(limit: int):
        def write_some(place: Path, content, size: int) -> None:
            if len(written) == limit:
                raise KeyboardInterrupt
            written.append(place.name)
            write(place, content, size)

        return write_some

    monkeypatch.setattr(dataset_layout, "write_file", stop_after(2))
    with pytest.raises(KeyboardInterrupt):
        prepare("coco", coco, out)
    assert len(list_images(out / "train2017")) == 2
    (out / "train2017" / f"{0:012d}.jpg").write_bytes(b"half")
    monkeypatch.setattr(dataset_layout, "write_file", stop_after(99))
    assert prepare("coco", coco, out) == 0
    assert len(written) == 2 + 3 - 2 + 1 + 2 + 2, "the rest, and the one that was not whole"
    assert not (out / "train2017").is_symlink()
    for path in (tmp_path / "whole").iterdir():
        assert (out / "train2017" / path.name).read_bytes() == path.read_bytes()
    capsys.readouterr()
    (coco / "val2017.zip").write_bytes((coco / "val2017.zip").read_bytes()[:-30])
    assert prepare("coco", coco, tmp_path / "other") == 1
    printed = capsys.readouterr().out
    assert f"cannot unpack {coco}/val2017.zip" in printed
    assert "1 fault\n" in printed, "a folder that is missing is missing once, not image by image as well"


def test_kill_in_the_last_file(coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """It leaves as many files as there should be, and one of them is a part."""
    zipped(coco, "train2017", "val2017")
    out = tmp_path / "out"
    assert prepare("coco", coco, out) == 0
    assert not (out / "train2017" / dataset_layout.UNFINISHED).exists()
    last = out / "train2017" / f"{2:012d}.jpg"
    content = last.read_bytes()
    last.write_bytes(content[:-1])
    (out / "train2017" / dataset_layout.UNFINISHED).touch()
    capsys.readouterr()
    assert prepare("coco", coco, out, "--check") == 1
    assert f"{out}/train2017 was not unpacked to its end" in capsys.readouterr().out
    assert prepare("coco", coco, out) == 0
    assert last.read_bytes() == content


def test_what_an_archive_cannot_give_is_not_left(coco: Path, tmp_path: Path) -> None:
    """A file of the right size with the wrong content would be taken for unpacked; somebody's own file stays."""
    content = (coco / "train2017" / f"{0:012d}.jpg").read_bytes()
    zipped(coco, "train2017")
    archive, out = coco / "train2017.zip", tmp_path / "out"
    packed = archive.read_bytes()
    archive.write_bytes(packed.replace(content, content[:-9] + bytes(9)))  # the checksum stays
    (out / "train2017").mkdir(parents=True)
    (tmp_path / "own.jpg").write_bytes(b"mine")
    (out / "train2017" / f"{0:012d}.jpg").symlink_to(tmp_path / "own.jpg")
    assert prepare("coco", coco, out) == 1
    assert not (out / "train2017" / f"{0:012d}.jpg").exists()
    archive.write_bytes(packed)
    assert prepare("coco", coco, out) == 0
    assert (out / "train2017" / f"{0:012d}.jpg").read_bytes() == content
    assert (tmp_path / "own.jpg").read_bytes() == b"mine"


def test_coco_that_is_not_whole(coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    val = coco / "annotations" / "instances_val2017.json"
    (coco / "train2017" / f"{1:012d}.jpg").unlink()
    (coco / "train2017" / f"{2:012d}.jpg").rename(coco / "elsewhere.jpg")
    (coco / "train2017" / f"{2:012d}.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (coco / "val2017" / f"{3:012d}.jpg").write_bytes(b"")
    picture(coco / "val2017" / "holiday.jpg")
    val.write_text(val.read_text().replace("[1, 1, 2, 2]", "[1, NaN, 2, 2]"))
    assert prepare("coco", coco, out) == 1
    printed = capsys.readouterr().out
    for line in (
        f"1 of the 2 images are missing in {out}/train2017: {2:012d}.jpg",
        f"{out}/train2017 holds 2 images of 3",
        f"1 images of {out}/annotations/instances_train2017.json are not in {out}/train2017: {1:012d}.jpg",
        f"1 of the 3 images are empty in {out}/val2017: {3:012d}.jpg",
        f"{out}/val2017 holds 3 images of 2",
        f"{out}/annotations/instances_val2017.json: annotation 1 of image 3: bbox must be four finite numbers",
        f"coco in {out} is not complete: 6 faults",
    ):
        assert line in printed
    shutil.rmtree(coco / "val2017")
    (coco / "annotations").rename(coco / "elsewhere")
    assert prepare("coco", coco, tmp_path / "other") == 1
    assert capsys.readouterr().out.count(f"{tmp_path}/other/annotations") == 1
    (coco / "elsewhere").rename(coco / "annotations")
    val.write_text(val.read_text()[:40])
    assert prepare("coco", coco, tmp_path / "again") == 1
    printed = capsys.readouterr().out
    assert f"missing: {tmp_path}/again/val2017; ROOT has neither val2017 nor images/val2017 nor val2017.zip" in printed
    assert "instances_val2017.json (40 bytes; truncated, or not JSON)" in printed


@pytest.mark.parametrize("damage", ["captions alone", "truncated", "other content", "fewer images"])
@pytest.mark.parametrize("inside", [False, True], ids=["linked", "in place"])
def test_annotations_that_are_not_whole_are_unpacked(coco: Path, tmp_path: Path, damage: str, inside: bool) -> None:
    """With their archive beside them, wherever they are; without it, they are linked and found at fault."""
    (coco / "annotations" / "captions_train2017.json").write_text("{}")
    (coco / "annotations" / "captions_val2017.json").write_text("{}")
    shutil.copytree(coco / "annotations", tmp_path / "own")
    zipped(coco, "annotations")
    (tmp_path / "own").rename(coco / "annotations")
    val = coco / "annotations" / "instances_val2017.json"
    content = val.read_bytes()
    if damage == "captions alone":
        for path in (coco / "annotations").glob("instances_*"):
            path.unlink()
    else:
        fewer = json.loads(content)
        fewer["images"].pop()
        damaged = {
            "truncated": content[:30],
            "other content": b" " * (len(content) - 1) + b"}",
            "fewer images": json.dumps(fewer).encode(),
        }
        val.write_bytes(damaged[damage])
    out = coco if inside else tmp_path / "out"
    (coco / "annotations_trainval2017.zip").rename(tmp_path / "away.zip")
    assert prepare("coco", coco, out) == 1
    (tmp_path / "away.zip").rename(coco / "annotations_trainval2017.zip")
    assert prepare("coco", coco, out) == 0
    assert (out / "annotations" / val.name).read_bytes() == content
    assert inside or val.is_file() == (damage != "captions alone"), "what was downloaded stays as it is"
    (coco / "annotations_trainval2017.zip").write_bytes(b"PK")
    assert prepare("coco", coco, out) == 0, "nothing to compare with"


def test_of_several_copies_the_whole_one_is_linked(coco: Path, tmp_path: Path) -> None:
    shutil.copytree(coco / "annotations", coco / "coco2017" / "annotations")
    val = coco / "annotations" / "instances_val2017.json"
    val.write_bytes(val.read_bytes()[:30])
    assert prepare("coco", coco, tmp_path / "out") == 0
    assert (tmp_path / "out" / "annotations").resolve() == coco / "coco2017" / "annotations"


def test_images_without_a_file_name(coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    val = coco / "annotations" / "instances_val2017.json"
    content = json.loads(val.read_text())
    del content["images"][1]["file_name"]
    val.write_text(json.dumps(content))
    assert prepare("coco", coco, tmp_path / "out") == 1
    assert "instances_val2017.json: image 4 has no file_name: {" in capsys.readouterr().out


def test_parts_of_a_dataset_on_request(coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = coco / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["images"].pop()
    file.write_text(json.dumps(content))
    (coco / "train2017" / f"{2:012d}.jpg").unlink()
    assert prepare("coco", coco, tmp_path / "out") == 1
    assert "train2017 holds 2 images of 3" in capsys.readouterr().out
    assert prepare("coco", coco, tmp_path / "out", "--partial") == 0


def test_ade20k(ade: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base, out = ade / "ADEChallengeData2016", tmp_path / "ade"
    assert prepare("ade20k", ade, out) == 0
    assert (out / "annotations" / "validation").resolve() == base / "annotations" / "validation"
    labels = base / "annotations" / "training"
    picture(labels / "ADE_training_0.png", size=(4, 6), mode="L")
    picture(labels / "ADE_training_1.png")
    (labels / "ADE_training_2.png").rename(labels / "ADE_training_5.png")
    truncated = base / "images" / "validation" / "ADE_validation_1.jpg"
    picture(base / "annotations" / "validation" / "ADE_validation_1.png", size=(64, 48), mode="L")
    Image.effect_noise((64, 48), 50).convert("RGB").save(truncated)
    truncated.write_bytes(truncated.read_bytes()[:-20])
    capsys.readouterr()
    assert prepare("ade20k", ade, out, "--decode") == 1
    printed = capsys.readouterr().out
    for line in (
        f"ADE_training_0.png is 6 x 4, its image {out}/images/training/ADE_training_0.jpg is 4 x 6 (height x width)",
        f"{out}/annotations/training/ADE_training_1.png must hold one label per pixel (Pillow's mode L or P), got RGB",
        f"1 of the 3 annotations are missing in {out}/annotations/training: ADE_training_2.png",
        f"1 annotations in {out}/annotations/training have no image in {out}/images/training: ADE_training_5",
        f"1 images in {out}/images/validation are truncated or damaged: ADE_validation_1.jpg",
        "5 faults",
    ):
        assert line in printed


def test_ade20k_is_unpacked(ade: Path, tmp_path: Path) -> None:
    zipped(ade, "ADEChallengeData2016")
    assert prepare("ade20k", ade, tmp_path / "out") == 0
    assert (tmp_path / "out" / "images" / "training" / "ADE_training_2.jpg").is_file()


def test_imagenet(imagenet: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, labels = tmp_path / "out", "".join(f"val_{index}.JPEG {index % 2}\n" for index in range(3))
    assert prepare("imagenet", imagenet, out) == 1
    printed = capsys.readouterr().out
    assert f"val/ is flat and {out}/meta/val.txt is missing: put val.txt" in printed
    assert "1 fault\n" in printed
    assert sorted(path.name for path in (out / "train" / "n02").iterdir()) == ["n02_0.JPEG", "n02_1.JPEG"]

    rows = ["ImageId,PredictionString", *(f"val_{index},n0{1 + index % 2} 1 2 3 4" for index in (2, 0, 1))]
    (imagenet / "LOC_val_solution.csv").write_text("\n".join(rows))
    assert prepare("imagenet", imagenet, out) == 0
    assert (out / "meta" / "val.txt").read_text() == labels
    (imagenet / "LOC_val_solution.csv").unlink()
    (out / "meta" / "val.txt").unlink()
    with tarfile.open(imagenet / "caffe_ilsvrc12.tar.gz", "w:gz") as packed:
        info = tarfile.TarInfo("./val.txt")
        info.size = len(labels)
        packed.addfile(info, io.BytesIO(labels.encode()))
    assert prepare("imagenet", imagenet, out) == 0
    assert (out / "meta" / "val.txt").read_text() == labels

    capsys.readouterr()
    (out / "meta" / "val.txt").write_text(labels.replace("val_0", "val_9"))
    assert prepare("imagenet", imagenet, out, "--check") == 1
    printed = capsys.readouterr().out
    assert f"1 images of {out}/meta/val.txt are not in {out}/val: val_9.JPEG" in printed
    assert f"1 images in {out}/val are not in {out}/meta/val.txt: val_0.JPEG" in printed
    (out / "meta" / "val.txt").write_text(labels.replace("JPEG 1", "JPEG 2"))
    assert prepare("imagenet", imagenet, out, "--check") == 1
    assert "not a file name and a class from 0 to 1: val_1.JPEG 2" in capsys.readouterr().out

    content = (imagenet / "ILSVRC2012_img_train.tar").read_bytes()
    (imagenet / "ILSVRC2012_img_train.tar").write_bytes(content[: len(content) // 2])
    assert prepare("imagenet", imagenet, tmp_path / "new") == 1
    printed = capsys.readouterr().out
    assert "ILSVRC2012_img_train.tar" in printed
    assert "truncated" in printed


def test_imagenet_with_folders_for_classes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root, out = tmp_path / "kaggle", tmp_path / "out"
    for split, names in (("train", ("n01/a", "n01/b", "n02/c", "n02/d")), ("val", ("n01/e", "n01/f", "n02/g"))):
        for name in names:
            picture(root / "ILSVRC" / "Data" / "CLS-LOC" / split / f"{name}.JPEG")
    assert prepare("imagenet", root, out) == 0
    (root / "ILSVRC/Data/CLS-LOC/val/n02").rename(root / "ILSVRC/Data/CLS-LOC/val/n03")
    (out / "meta").mkdir()
    (out / "meta" / "val.txt").write_text("")
    capsys.readouterr()
    assert prepare("imagenet", root, out) == 1
    printed = capsys.readouterr().out
    assert "2 classes are in one of train/ and val/ alone: n02, n03" in printed
    assert f"so {out}/meta/val.txt must not be there" in printed


def test_mistakes(coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert prepare("coco", tmp_path / "absent", tmp_path / "out") == 2
    assert f"no such folder: {tmp_path}/absent" in one_line(capsys)
    (tmp_path / "file").write_text("")
    assert prepare("coco", coco, tmp_path / "file") == 2
    assert f"--out must be a folder, and is a file: {tmp_path}/file" in one_line(capsys)
    assert prepare("voc", coco, tmp_path / "out") == 2
    (tmp_path / "out" / "val2017").mkdir(parents=True)
    (tmp_path / "out" / "val2017" / "mine.txt").write_text("")
    capsys.readouterr()
    assert prepare("coco", coco, tmp_path / "out") == 1
    assert f"{tmp_path}/out/val2017 is in the way of a link to {coco}/val2017" in capsys.readouterr().out
    assert (tmp_path / "out" / "val2017" / "mine.txt").exists()
