"""Masks, folders of images, the order of draws, and the metrics."""

import copy
import itertools
import math
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmengine", reason="mmengine is not installed")

from PIL import Image

from carafe_plugin.inpainting import DrawSampler, InpaintingFolder, InpaintingMetric, free_form_mask
from carafe_plugin.inpainting import dataset as dataset_module


def test_free_form_masks():
    shares = []
    for seed in range(60):
        mask = free_form_mask(np.random.default_rng(seed), (64, 96))
        assert mask.shape == (64, 96)
        assert mask.dtype == np.uint8
        assert set(np.unique(mask)) == {0, 1}
        assert np.array_equal(mask, free_form_mask(np.random.default_rng(seed), (64, 96)))
        shares.append(mask.mean())
    assert len({round(share, 6) for share in shares}) > 50
    assert max(shares) <= 0.6
    assert 0.1 < np.mean(shares) < 0.35
    thin = [free_form_mask(np.random.default_rng(s), (64, 64), (1, 1), (2, 2), (0.01, 0.02)) for s in range(20)]
    assert all(0 < mask.mean() < 0.05 for mask in thin)
    small = [free_form_mask(np.random.default_rng(s), (64, 64), most=0.2).mean() for s in range(20)]
    assert max(small) <= 0.2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(size=(3, 64)), "size must be at least 4 x 4, got 3 x 64"),
        (dict(strokes=(3, 2)), r"strokes must be \(least, most\)"),
        (dict(width=(0, 0.1)), r"width must be \(least, most\)"),
        (dict(most=0.1), "most must be from 0.2 to 1, got 0.1"),
        (dict(strokes=(9, 9), width=(0.8, 0.9)), "no mask of .* leaves 40% of the image"),
    ],
)
def test_free_form_mistakes(settings, message):
    with pytest.raises(ValueError, match=message):
        free_form_mask(np.random.default_rng(0), **{"size": (16, 16), **settings})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five images in three folders, of several sizes and kinds, and three that are none."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, shape in {
        "a/1.png": (40, 32, 3),
        "a/2.JPG": (32, 60, 3),
        "b/deep/3.png": (20, 20),
        "b/4.png": (33, 47, 4),
        "5.bmp": (32, 32, 3),
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(root / name)
    whole = (root / "a/2.JPG").read_bytes()
    (root / "a/1b-truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "b/0-text.png").write_text("no image")
    (root / "zzz.png").write_bytes(b"")
    (root / "notes.txt").write_text("not taken for an image")
    return root


@pytest.fixture
def reported(monkeypatch):
    """The lines that go to MMEngine's logger."""
    lines = []
    monkeypatch.setattr(dataset_module, "print_log", lambda line, logger, level: lines.append(line))
    return lines


def test_testing_leaves_out_what_cannot_be_read(folder, reported):
    dataset = InpaintingFolder(str(folder), size=32, test_mode=True)
    names = [Path(path).relative_to(folder).as_posix() for path in dataset.paths]
    assert names == ["5.bmp", "a/1.png", "a/2.JPG", "b/4.png", "b/deep/3.png"]
    for name in ("a/1b-truncated.jpg", "b/0-text.png", "zzz.png"):
        assert sum(line.startswith(f"skipped, cannot be read: {folder / name} (") for line in reported) == 1
    for index in range(5):
        sample = dataset[index]
        assert sample["inputs"].shape == (3, 32, 32)
        assert sample["inputs"].dtype == sample["holes"].dtype == torch.uint8
        assert sample["paths"].endswith(names[index])
        assert torch.equal(sample["holes"], dataset[index]["holes"]), "always the same hole"
    expected = np.asarray(Image.open(folder / "a/1.png"))[4:36]
    assert np.array_equal(dataset[1]["inputs"].permute(1, 2, 0), expected), "the central crop"
    assert len({dataset[index]["holes"].sum().item() for index in range(5)}) > 1


def test_training_takes_the_next_image(folder, reported):
    dataset = InpaintingFolder(str(folder), size=32)
    assert len(dataset) == 8  # nothing was read yet
    assert not reported
    names = [Path(path).name for path in dataset.paths]
    for repeated in range(2):
        assert dataset[names.index("1b-truncated.jpg"), 10 + repeated]["paths"].endswith("2.JPG")
    assert dataset[names.index("zzz.png"), 12]["paths"].endswith("5.bmp")
    assert sum("1b-truncated.jpg" in line for line in reported) == 1


def test_a_draw_depends_on_nothing_but_itself(folder):
    first, second = (InpaintingFolder(str(folder), size=16, seed=1) for _ in range(2))
    expected = [first[1, draw] for draw in range(20)]
    np.random.seed(5)
    for draw in reversed(range(20)):
        found = second[1, draw]
        assert torch.equal(found["inputs"], expected[draw]["inputs"])
        assert torch.equal(found["holes"], expected[draw]["holes"])
    assert len({sample["inputs"].numpy().tobytes() for sample in expected}) > 3, "crops, mirrored or not"
    assert len({sample["holes"].numpy().tobytes() for sample in expected}) == 20
    other = InpaintingFolder(str(folder), size=16, seed=2)[1, 0]
    assert not torch.equal(other["holes"], expected[0]["holes"])
    unflipped = InpaintingFolder(str(folder), data_prefix="b/deep", size=20, flip=0.0)
    mirrored = InpaintingFolder(str(folder), data_prefix="b/deep", size=20, flip=1.0)
    assert torch.equal(unflipped[0]["inputs"].flip(-1), mirrored[0]["inputs"])


def test_images_are_read_as_people_see_them(tmp_path, reported):
    """Turned as they say; what would be misread, or is not there, is reported; linked folders count, once."""
    folder, rng = tmp_path / "images", np.random.default_rng(0)
    (folder / "below").mkdir(parents=True)
    pixels = rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)
    upright = Image.fromarray(pixels)
    exif = upright.getexif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise to look at it"
    Image.fromarray(np.rot90(pixels).copy()).save(folder / "turned.png", exif=exif)
    Image.fromarray(rng.integers(0, 65536, (32, 32), dtype=np.uint16)).save(folder / "below/deep.png")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "elsewhere").mkdir()
    upright.save(tmp_path / "elsewhere/linked.png")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "below/loop").symlink_to(folder)
    dataset = InpaintingFolder(str(folder), size=32, test_mode=True)
    assert [Path(path).relative_to(folder).as_posix() for path in dataset.paths] == ["link/linked.png", "turned.png"]
    for sample in dataset:
        assert np.array_equal(sample["inputs"].permute(1, 2, 0), pixels[:, 4:36])
    assert sum("below/deep.png (its pixels have more than 8 bits (mode I;16))" in line for line in reported) == 1
    assert sum("gone.png (" in line for line in reported) == 1
    assert len(reported) == 2
    training = InpaintingFolder(str(folder), size=32, flip=0.0)
    assert {Path(training[i, 0]["paths"]).name for i in range(len(training))} == {"linked.png", "turned.png"}


def test_crops_are_those_of_the_resized_image(tmp_path):
    smooth = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(smooth).resize((97, 61), Image.Resampling.BICUBIC)
    image.save(tmp_path / "smooth.png")
    whole = np.asarray(image.resize((51, 32), Image.Resampling.BICUBIC)).astype(int)
    found = InpaintingFolder(str(tmp_path), size=32, test_mode=True)[0]["inputs"].permute(1, 2, 0).numpy()
    assert np.abs(found - whole[:, 9:41]).mean() < 1.5
    training = InpaintingFolder(str(tmp_path), size=32, flip=0.0)
    places = set()
    for draw in range(12):
        crop = training[0, draw]["inputs"].permute(1, 2, 0).numpy()
        errors = [np.abs(crop - whole[:, x : x + 32]).mean() for x in range(20)]
        assert min(errors) < 1.5
        places.add(int(np.argmin(errors)))
    assert len(places) > 5
    Image.new("RGB", (2, 20_000)).save(tmp_path / "strip.png")  # as a whole it would have 11 megapixels at this width
    assert InpaintingFolder(str(tmp_path), size=32)[1]["inputs"].shape == (3, 32, 32)


def test_folders_without_images(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no such folder of images: {tmp_path}/absent"):
        InpaintingFolder(str(tmp_path), "absent")
    with pytest.raises(FileNotFoundError, match=f"no image that can be read in folder {tmp_path}"):
        InpaintingFolder(str(tmp_path))
    (tmp_path / "x.png").write_text("no image")
    with pytest.raises(FileNotFoundError, match="no image that can be read"):
        InpaintingFolder(str(tmp_path), test_mode=True)
    with pytest.raises(FileNotFoundError, match="no image that can be read"):
        InpaintingFolder(str(tmp_path))[0]
    with pytest.raises(ValueError, match="size must be a positive multiple of 4, got 30"):
        InpaintingFolder(str(folder), size=30)
    with pytest.raises(ValueError, match="flip must be a probability"):
        InpaintingFolder(str(folder), flip=2)


def test_draws():
    def take(sampler, count):
        return list(itertools.islice(sampler, count))

    sampler = DrawSampler(range(7), seed=3)
    draws = take(sampler, 21)
    assert [draw for _, draw in draws] == list(range(21))
    passes = [[index for index, _ in draws[start : start + 7]] for start in (0, 7, 14)]
    assert all(sorted(indices) == list(range(7)) for indices in passes)
    assert len({tuple(indices) for indices in passes}) == 3
    assert take(DrawSampler(range(7), seed=3), 21) == draws
    assert take(DrawSampler(range(7), seed=4), 7) != draws[:7]
    resumed = copy.deepcopy(DrawSampler(range(7), seed=3))
    resumed.skip(9)
    assert take(resumed, 12) == draws[9:]

    shares = []
    for rank in range(3):
        sampler = DrawSampler(range(7), seed=3)
        sampler.rank, sampler.world_size = rank, 3
        shares.append(take(sampler, 7))
        sampler.skip(4)
        assert take(sampler, 3) == shares[-1][4:]
    assert sorted(itertools.chain(*shares), key=lambda item: item[1]) == draws
    with pytest.raises(TypeError, match="shuffle"):
        DrawSampler(range(7), shuffle=False)


def test_metric_is_the_formulas():
    skimage = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    torch.manual_seed(0)
    metric, samples, expected = InpaintingMetric(), [], []
    for side in (8, 0, 24):
        original, holes = torch.rand(3, 24, 24) * 2 - 1, torch.zeros(1, 24, 24)
        holes[:, :side, :side] = 1
        completed = torch.where(holes > 0, torch.rand(3, 24, 24) * 2 - 1, original)
        samples.append(dict(completed=completed, original=original, holes=holes))
        a, b = ((image.double().numpy() + 1) / 2 for image in (completed, original))
        found = dict(l1=100 * np.abs(a - b).mean(), psnr=100.0, l1_hole=math.nan, psnr_hole=math.nan)
        if side:
            found["psnr"] = skimage.peak_signal_noise_ratio(b, a, data_range=1)
            square = (slice(None), slice(side), slice(side))
            found["l1_hole"] = 100 * np.abs(a[square] - b[square]).mean()
            found["psnr_hole"] = skimage.peak_signal_noise_ratio(b[square], a[square], data_range=1)
        found["ssim"] = skimage.structural_similarity(
            a, b, channel_axis=0, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        expected.append(found)
    metric.process({}, samples[:2])
    metric.process({}, samples[2:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = metric.evaluate(3)
    for name, value in found.items():
        column = [image[name.removeprefix("inpainting/")] for image in expected]
        assert value == pytest.approx(np.nanmean(column)), name
    assert len(found) == 5
    assert found["inpainting/psnr"] < 100


def test_metric_writes_what_was_completed(tmp_path):
    torch.manual_seed(0)
    metric = InpaintingMetric(folder=str(tmp_path / "out"))
    metric.dataset_meta = dict(folder=str(tmp_path / "images"))
    hole = torch.zeros(1, 8, 12)
    hole[..., :4] = 1
    samples = []
    for name in ("a/same.jpg", "b/same.jpg"):
        image = torch.rand(3, 8, 12) * 2 - 1
        samples.append(dict(completed=image, original=image, holes=hole, path=str(tmp_path / "images" / name)))
    metric.process({}, samples)
    for sample, name in zip(samples, ("a/same.jpg.png", "b/same.jpg.png"), strict=True):
        found = np.asarray(Image.open(tmp_path / "out" / name)).transpose(2, 0, 1)
        assert np.array_equal(found, ((sample["completed"] + 1) * 127.5).round().numpy())
    assert "inpainting/ssim" not in metric.evaluate(2), "smaller than its window"


def test_metric_names_what_it_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ImportError, match=r"the SSIM of InpaintingMetric needs skimage, .* install scikit-image"):
        InpaintingMetric()
