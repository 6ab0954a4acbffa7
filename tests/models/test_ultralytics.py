"""Models of ultralytics in its own hands: its summary, fusing, prediction, export and trainer."""

import warnings

import numpy as np
import pytest
import torch
import yaml
from yolo_data import write_data

from carafe_plugin import CARAFEUpsample, convert
from carafe_plugin.models import ultralytics as carafe

pytest.importorskip("ultralytics", reason="ultralytics is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")


def carafes(model):
    return [module for module in model.modules() if isinstance(module, CARAFEUpsample)]


@pytest.fixture
def yolo(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    from ultralytics import YOLO

    torch.manual_seed(0)
    return YOLO("yolo11n.yaml")


def test_what_it_reads_of_its_layers(yolo):
    layer = yolo.model.model[11]
    number, source = layer.i, layer.f
    parameters = sum(value.numel() for value in yolo.model.parameters())
    report = convert(yolo.model)
    new = yolo.model.model[11]
    own = sum(value.numel() for value in new.parameters())
    assert (new.i, new.f, new.type, new.np) == (number, source, "CARAFEInterpolation", own)
    _, total, *_ = yolo.info(detailed=True)
    assert total == parameters + report.parameters


def test_fused_and_predicting(yolo):
    image = np.random.default_rng(0).integers(255, size=(96, 128, 3), dtype=np.uint8)
    expected = yolo.predict(image, imgsz=64, conf=0.0, verbose=False)[0].boxes.data
    convert(yolo.model)
    found = yolo.predict(image, imgsz=64, conf=0.0, verbose=False)[0].boxes.data
    assert len(expected) > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    yolo.model.fuse()
    assert yolo.model.is_fused()
    assert len(carafes(yolo.model)) == 2


def test_its_own_export(yolo, tmp_path):
    """By torch.onnx.export(dynamo=False); onnxslim, which it would install, is left out."""
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    convert(yolo.model, upsample=dict(init_spread=0.1))
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected, *_ = yolo.model.eval()(image)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = yolo.export(format="onnx", imgsz=64, simplify=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


def test_its_trainer_on_yaml(yolo, tmp_path):
    from ultralytics import YOLO

    carafe.register()
    carafe.register()  # again changes nothing
    description = carafe.with_carafe(yolo.model.yaml)
    assert yolo.model.yaml["scale"] == "n"
    assert list(description["scales"]) == ["n"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(description))  # a name that says no scale
    model = YOLO("mine.yaml")
    before = carafes(model.model)
    assert [layer.channels for layer in before] == [256, 128]
    options = dict(epochs=1, imgsz=64, batch=2, device="cpu", workers=0, amp=False, plots=False, verbose=False)
    model.train(data=str(write_data(tmp_path)), project=str(tmp_path), name="run", **options)
    after = carafes(model.model)
    assert len(after) == 2
    assert not set(after) & set(before)
    again = YOLO(str(tmp_path / "run" / "weights" / "last.pt"))
    assert len(carafes(again.model)) == 2
    assert all(value.isfinite().all() for value in again.model.parameters())


def test_its_trainer_does_not_keep_what_was_converted(yolo, tmp_path):
    """Which is why there is a name for YAML."""
    from ultralytics.models.yolo.detect import DetectionTrainer

    convert(yolo.model)
    overrides = dict(model="yolo11n.yaml", data=str(write_data(tmp_path)), device="cpu", project=str(tmp_path))
    trainer = DetectionTrainer(overrides=overrides)
    assert not carafes(trainer.get_model(cfg=yolo.model.yaml, weights=yolo.model, verbose=False))


def test_another_class_of_that_name(monkeypatch):
    from ultralytics.nn import tasks

    monkeypatch.setattr(tasks, "CARAFE", torch.nn.Identity, raising=False)
    with pytest.raises(RuntimeError, match=r"tasks.CARAFE is torch.nn.modules.linear.Identity already"):
        carafe.register()


def test_description_without_upsampling():
    rows = dict(backbone=[[-1, 1, "Conv", [64, 3, 2]]], head=[])
    with pytest.raises(ValueError, match=r"must have an nn.Upsample with a scale factor"):
        carafe.with_carafe(rows)
