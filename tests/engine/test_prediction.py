"""What a model gets of an image file of every kind, and the file of results that grows with the images."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import write_config

pytest.importorskip("mmdet", reason="mmdet is not installed")

from mmcv.transforms import TRANSFORMS
from mmengine.dataset import Compose

from carafe_plugin.engine.config import import_adapters, load_config, prediction_pipeline
from carafe_plugin.engine.prediction import Results, find_images, load_picture, prepare
from carafe_plugin.images import count_pages


def smooth(height: int = 32, width: int = 48) -> np.ndarray:
    """RGB pixels that lossy formats keep about as they are."""
    small = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


PIXELS = smooth()
PICTURE = Image.fromarray(PIXELS)
GREY = np.asarray(PICTURE.convert("L"))
DEEP = np.linspace(0, 65535, GREY.size).reshape(GREY.shape).astype(np.uint16)
ALPHA = Image.fromarray(np.tile(np.linspace(0, 255, 48, dtype=np.uint8), (32, 1)))
CLEAR = Image.merge("RGBA", [*PICTURE.split(), ALPHA])
PALETTE = PICTURE.quantize(64)


def plain_pgm(most: int) -> bytes:
    """Numbers as text, with a comment, which OpenCV does not read."""
    return b"P2\n# text\n48 32\n%d\n" % most + b" ".join(b"%d" % value for value in DEEP.ravel() // (65535 // most))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def encoded(pixels: np.ndarray, ending: str) -> bytes:
    return cv2.imencode(ending, pixels)[1].tobytes()


def turned(kind: str) -> bytes:
    """Lying, with the word that it is to be turned by 90 degrees clockwise."""
    exif = Image.Exif()
    exif[0x0112] = 6
    options = dict(lossless=True) if kind == "WEBP" else dict(quality=95) if kind in ("JPEG", "AVIF") else {}
    return saved(Image.fromarray(np.rot90(PIXELS).copy()), kind, exif=exif, **options)


def pages(kind: str) -> bytes:
    return saved(PICTURE, kind, save_all=True, append_images=[PICTURE.rotate(180)] * 2)


#: A file, and the pixels that it must come to: exactly, or with a tolerance of the mean.
FILES: dict[str, tuple[bytes, np.ndarray, float]] = {
    **{
        f"{kind.lower()}.{ending}": (saved(PICTURE, kind), PIXELS, 0)
        for kind, ending in dict(
            PNG="png", BMP="bmp", DIB="dib", PPM="ppm", TIFF="TIF", TGA="tga", SGI="sgi", PCX="pcx", QOI="qoi", IM="im",
            DDS="dds", JPEG2000="jp2",
        ).items()
    },
    "lossless.webp": (saved(PICTURE, "WEBP", lossless=True), PIXELS, 0),
    "ico.ico": (saved(PICTURE, "ICO", sizes=[(48, 32)]), PIXELS, 0),
    "jpeg.jfif": (saved(PICTURE, "JPEG", quality=95), PIXELS, 2),
    "avif.avif": (saved(PICTURE, "AVIF", quality=95), PIXELS, 2),
    "grey.pgm": (saved(Image.fromarray(GREY), "PPM"), GREY, 0),
    "grey.jpg": (saved(Image.fromarray(GREY), "JPEG", quality=95), GREY, 2),
    "text.pgm": (plain_pgm(255), DEEP // 257, 0),
    "bits.pbm": (saved(Image.fromarray(GREY > 128), "PPM"), 255 * (GREY > 128), 0),
    "bits.png": (saved(Image.fromarray(GREY > 128), "PNG"), 255 * (GREY > 128), 0),
    "cmyk.jpg": (saved(PICTURE.convert("CMYK"), "JPEG", quality=95), PIXELS, 3),
    "cmyk.tif": (saved(PICTURE.convert("CMYK"), "TIFF"), PIXELS, 0),
    "palette.png": (saved(PALETTE, "PNG"), np.asarray(PALETTE.convert("RGB")), 0),
    "palette.tif": (saved(PALETTE, "TIFF"), np.asarray(PALETTE.convert("RGB")), 0),
    "palette.gif": (saved(PALETTE, "GIF"), np.asarray(PALETTE.convert("RGB")), 0),
    "clear-colour.png": (saved(PALETTE, "PNG", transparency=3), np.asarray(PALETTE.convert("RGB")), 0),
    "clear.png": (saved(CLEAR, "PNG"), PIXELS, 0),
    "clear.webp": (saved(CLEAR, "WEBP", lossless=True, exact=True), PIXELS, 0),
    "clear.tga": (saved(CLEAR, "TGA"), PIXELS, 0),
    "grey-clear.png": (saved(Image.merge("LA", [Image.fromarray(GREY), ALPHA]), "PNG"), GREY, 0),
    "deep.png": (saved(Image.fromarray(DEEP), "PNG"), DEEP >> 8, 0),
    "deep.tif": (saved(Image.fromarray(DEEP), "TIFF"), DEEP >> 8, 0),
    "deep.pgm": (encoded(DEEP, ".pgm"), DEEP >> 8, 0),
    "deep.jp2": (saved(Image.fromarray(DEEP), "JPEG2000"), DEEP >> 8, 0),
    "deep-text.pgm": (plain_pgm(65535), DEEP >> 8, 0),
    "deep.im": (saved(Image.fromarray(DEEP), "IM"), DEEP >> 8, 0),
    "deep-colour.png": (encoded(np.dstack([DEEP, DEEP.T.reshape(DEEP.shape), DEEP[::-1]]), ".png"),
                        np.dstack([DEEP[::-1], DEEP.T.reshape(DEEP.shape), DEEP]) >> 8, 0),
    "float.hdr": (encoded((PIXELS[..., ::-1] / 255).astype(np.float32), ".hdr"), PIXELS, 2),
    "turned.jpg": (turned("JPEG"), PIXELS, 2),
    "turned.png": (turned("PNG"), PIXELS, 0),
    "turned.tif": (turned("TIFF"), PIXELS, 0),
    "pages.tif": (pages("TIFF"), PIXELS, 0),
    "pages.png": (pages("PNG"), PIXELS, 0),
    "pages.gif": (pages("GIF"), PIXELS, 12),
    "pages.webp": (pages("WEBP"), PIXELS, 4),
    "pages.avif": (pages("AVIF"), PIXELS, 4),
    "pages.mpo": (pages("MPO"), PIXELS, 4),
}  # fmt: skip
BY_PILLOW = {
    *("dib.dib", "tga.tga", "sgi.sgi", "pcx.pcx", "qoi.qoi", "im.im", "dds.dds", "ico.ico", "text.pgm", "clear.tga"),
    *("deep-text.pgm", "deep.im"),
}
#: Those that OpenCV reads in its own way: the model gets that, in a test too.
OWN_WAY: dict[str, tuple[bytes, np.ndarray]] = {
    "lying.webp": (turned("WEBP"), np.rot90(PIXELS)),
    "lying.avif": (turned("AVIF"), np.rot90(PIXELS)),
    "over-black.tif": (saved(CLEAR, "TIFF"), PIXELS * (np.asarray(ALPHA)[..., None] / 255)),
    "range.pgm": (b"P5\n48 32\n1023\n" + (DEEP >> 6).astype(">u2").tobytes(), DEEP >> 14),
}
if not cv2.haveImageWriter("a.avif"):  # OpenCV before 4.12 reads neither AVIF nor GIF
    FILES["lying.avif"] = (OWN_WAY.pop("lying.avif")[0], PIXELS, 4)
    BY_PILLOW |= {name for name in FILES if name.endswith((".avif", ".gif"))}
FAULTY: dict[str, tuple[bytes, str]] = {
    "empty.png": (b"", "the file is empty"),
    "words.jpg": (b"no image", "Pillow does not know its format, and the test pipeline cannot read it: "),
    "cut.png": (saved(PICTURE, "PNG")[:1500], "image file is truncated"),
    "cut.jpg": (saved(PICTURE, "JPEG")[:-200], "image file is truncated"),
    "cut.tif": (saved(PICTURE, "TIFF")[:3000], "image file is truncated"),
    "cut.pgm": (saved(Image.fromarray(GREY), "PPM")[:900], "image file is truncated"),
    "cut.webp": (saved(PICTURE, "WEBP")[:200], "could not create decoder object"),
    "bomb.png": (saved(Image.new("1", (16000, 12000)), "PNG"), "exceeds limit of 178956970 pixels"),
    "float.tif": (saved(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"), "more than 8 bits (mode F)"),
    "integer.tif": (saved(Image.fromarray(np.ones((9, 9), np.int32)), "TIFF"), "more than 8 bits (mode I)"),
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Compose:
    config = write_config(tmp_path_factory.mktemp("config") / "tiny.py", "mmdet", data)
    cfg = load_config(str(config))
    import_adapters("mmdet")
    return prediction_pipeline(cfg)


def difference(pixels: np.ndarray, expected: np.ndarray) -> float:
    expected = expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, axis=2)
    assert pixels.shape == expected.shape
    return np.abs(pixels - expected.astype(float)).mean()


@pytest.mark.parametrize("name", [*FILES, *OWN_WAY])
def test_pixels_of_every_format(name: str, pipeline: Compose, tmp_path: Path) -> None:
    """They are the image's; and what the model gets is what the pipeline gives a test, where it can read the file."""
    content, expected, *tolerance = FILES.get(name) or OWN_WAY[name]
    path = tmp_path / name
    path.write_bytes(content)
    assert find_images(tmp_path, tmp_path / "out") == ([path], []), "by its ending"
    picture = load_picture(pipeline, path)
    assert picture.pixels.dtype == np.uint8
    assert difference(picture.pixels, expected) <= (tolerance[0] if tolerance else 3)
    assert picture.alike == (name in FILES)
    assert count_pages(path) == (1 if not name.startswith("pages") else 2 if name.endswith(("gif", "webp")) else 3)
    (inputs,) = prepare(pipeline, picture)["inputs"]
    try:
        tested = pipeline(dict(img_path=str(path), img_id=0))["inputs"]
    except AssertionError:  # MMCV's: OpenCV does not read it
        assert name in BY_PILLOW
        path = tmp_path / "as.png"
        Image.fromarray(picture.pixels).save(path)
        tested = pipeline(dict(img_path=str(path), img_id=0))["inputs"]
    assert torch.equal(inputs, tested)


@pytest.mark.parametrize("name", FAULTY)
def test_files_that_are_no_whole_image(name: str, pipeline: Compose, tmp_path: Path) -> None:
    content, expected = FAULTY[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(expected)):
        load_picture(pipeline, tmp_path / name)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (dict(color_type="grayscale"), GREY),
        (dict(to_float32=True), PIXELS),
        (dict(color_type="unchanged"), PIXELS),
        (dict(imdecode_backend="pillow"), PIXELS),
        (dict(color_type="color_ignore_orientation"), np.rot90(PIXELS)),
    ],
)
def test_pictures_are_drawn_on_what_the_pipeline_reads(step: dict, expected: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(turned("PNG") if "orientation" in str(step) else saved(PICTURE, "PNG"))
    picture = load_picture(Compose([TRANSFORMS.build(dict(type="LoadImageFromFile", **step))]), path)
    assert difference(picture.pixels, expected) < 1


def test_results_are_not_written_all_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After every picture at first; where writing takes long, a tenth of the time."""
    clock = SimpleNamespace(now=0.0, slow=0.001, written=0)

    def put(self: object, text: str, path: Path) -> None:
        clock.now += clock.slow * (1 + text.count("file_name"))
        clock.written += 1

    monkeypatch.setattr("carafe_plugin.engine.atomic.AtomicLocalBackend.put_text", put)
    monkeypatch.setattr("carafe_plugin.engine.prediction.time.monotonic", lambda: clock.now)
    results = Results(tmp_path / "results.json", [])
    for number in range(50):
        clock.now += 1
        results.add(dict(id=number, file_name="a"), [dict(image_id=number)])
        assert clock.written == number + 2
    clock.slow, start, before = 0.01, clock.now, clock.written
    for number in range(1000):
        clock.now += 1
        results.add(dict(id=number, file_name="a"), [])
    spent = clock.now - start - 1000
    assert 0 < spent < 0.2 * 1000
    assert before + 20 < clock.written < before + 100
    assert [one["id"] for one in results.content["annotations"]] == list(range(1, 51))
