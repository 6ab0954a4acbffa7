"""tools/export.py: the toolboxes' models in other runtimes, against what the toolboxes themselves compute."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tiny_models import SIZE, write_config
from tool_runs import ROOT, call_tool, environment, one_line, run
from toolkit import needs_torch

pytest.importorskip("mmdet", reason="tools: mmdet is not installed")
pytest.importorskip("mmseg", reason="tools: mmseg is not installed")
pytest.importorskip("mmpretrain", reason="tools: mmpretrain is not installed")

from carafe_plugin.engine import bare_models, export_comparison, exporting
from carafe_plugin.engine.config import ADAPTERS, import_adapters

pytestmark = needs_torch(2, 6, "torch.export's decompositions")

ENDINGS = {"onnx": ".onnx", "openvino": ".xml", "aoti": ".pt2", "torch-export": ".pt2"}
# Changes of the tiny models: CARAFE++ of few taps, so that exporting is quick; colours that are not alike.
COLOURS = "mean=[110.0, 100.0, 90.0], std=[50.0, 55.0, 60.0]"
MODELS = {
    "classifier": """
_base_ = './mmpretrain.py'
data_preprocessor = dict(COLOURS, to_rgb=True)
model = dict(backbone=dict(type='CARAFEResNet', carafe_cfg=dict(down_kernel=3, compressed_channels=4)))
""",
    "stem": """
_base_ = './mmpretrain.py'
model = dict(
    backbone=dict(type='CARAFEResNet', num_stages=1, out_indices=(0,), strides=(1,), dilations=(1,),
                  carafe_cfg=dict(down_kernel=3)),
    head=dict(in_channels=16))
""",
    "segmentor": """
_base_ = './mmseg.py'
model = dict(
    data_preprocessor=dict(COLOURS),
    backbone=dict(out_indices=(0, 1, 2, 3)),
    decode_head=dict(
        _delete_=True, type='CARAFEUPerHead', in_channels=[32, 64, 128], in_index=[1, 2, 3], channels=8,
        pool_scales=(1, 2), num_classes=3, norm_cfg=dict(type='BN'),
        carafe_cfg=dict(compressed_channels=4, up_kernel=3),
        loss_decode=dict(type='CrossEntropyLoss', avg_non_ignore=True)))
""",
    "one_stage": """
_base_ = './mmdet.py'
model = dict(
    _delete_=True, type='RetinaNet', data_preprocessor=dict(type='DetDataPreprocessor', COLOURS, pad_size_divisor=32),
    backbone=dict(type='ResNet', depth=18, base_channels=16, stem_channels=16),
    neck=dict(type='FPN', in_channels=[16, 32, 64, 128], out_channels=16, start_level=1, num_outs=4,
              add_extra_convs='on_input'),
    bbox_head=dict(
        type='RetinaHead', num_classes=2, in_channels=16, stacked_convs=1, feat_channels=16,
        anchor_generator=dict(type='AnchorGenerator', scales=[4], ratios=[1.0], strides=[8, 16, 32, 64]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True), loss_bbox=dict(type='L1Loss')),
    test_cfg=dict(nms_pre=100, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=5))
""",
    "two_stage": """
_base_ = './mmdet.py'
model = dict(data_preprocessor=dict(COLOURS, bgr_to_rgb=True), neck=dict(carafe_cfg=dict(up_kernel=3)))
""",
    "zoo_neck": """
_base_ = './mmdet.py'
model = dict(
    data_preprocessor=dict(pad_size_divisor=64),
    neck=dict(_delete_=True, type='FPN_CARAFE', in_channels=[16, 32, 64, 128], out_channels=32, num_outs=4,
              upsample_cfg=dict(type='carafe', up_kernel=3, up_group=1, encoder_kernel=3, encoder_dilation=1,
                                compressed_channels=8)))
""",
}
SCOPES = dict(classifier="mmpretrain", stem="mmpretrain", segmentor="mmseg")
SCOPES |= dict.fromkeys(("one_stage", "two_stage", "zoo_neck"), "mmdet")


class Model(NamedTuple):
    config: Path
    checkpoint: Path


@pytest.fixture(scope="module")
def models(tmp_path_factory, data):
    """The configuration and a checkpoint with random weights of a key of MODELS."""
    folder = tmp_path_factory.mktemp("models")
    for scope in ADAPTERS:
        write_config(folder / f"{scope}.py", scope, data)
    done = {}

    def make(name):
        if name not in done:
            (config := folder / f"{name}.py").write_text(MODELS[name].replace("COLOURS", COLOURS))
            import_adapters(SCOPES[name])
            cfg = bare_models.read_config(str(config), drop_in=name == "zoo_neck")
            torch.manual_seed(0)
            model = bare_models.build_model(cfg)
            for module in model.modules():
                if hasattr(module, "content_encoder"):
                    torch.nn.init.normal_(module.content_encoder.weight, std=0.2)  # else all weights would be alike
            classes = ("ground", "red", "blue") if name == "segmentor" else ("red", "blue")
            content = dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(classes=classes)))
            torch.save(content, folder / f"{name}.pth")
            done[name] = Model(config, folder / f"{name}.pth")
        return done[name]

    return make


def export(model, to, out, *options):
    arguments = (model.config, model.checkpoint, "--to", to, "--out", out, *options)
    if to != "aoti":
        return call_tool("export", *arguments)
    result = run("export.py", *arguments)  # a package that has been loaded stays: in a process of its own
    print(result.stdout, end="")
    return result.returncode


def runtime(path, to, names):
    """A function of the image, as a user of the runtime would write it, by the names that the description has."""
    if to == "onnx":
        session = importlib.import_module("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda image: session.run(names, {"image": image.numpy()})
    if to == "openvino":
        core = importlib.import_module("openvino").Core()
        compiled = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return lambda image: [result[name] for result in [compiled({"image": image.numpy()})] for name in names]
    if to == "aoti":
        return lambda image: of_package(path, image)
    return torch.export.load(path).module()


def of_package(path, image):
    """The outputs of a package, in a process of its own."""
    given, found = path.with_suffix(".image.pt"), path.with_suffix(".outputs.pt")
    torch.save(image, given)
    code = "import sys, torch, carafe_plugin; path, given, found = sys.argv[1:]; image = torch.load(given)\n"
    code += "torch.save(torch._inductor.aoti_load_package(path)(image), found)"
    command = [sys.executable, "-c", code, str(path), str(given), str(found)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert result.returncode == 0, result.stderr
    return torch.load(found)


@torch.no_grad()
def of_the_toolbox(cfg, model, size):
    """An image as a data loader gives it, and what the toolbox's own methods compute of it."""
    batch = bare_models.one_image(cfg, size)
    image = batch["inputs"][0].flip(0).float()[None]
    if cfg.default_scope == "mmpretrain":
        batch["inputs"] = torch.stack(batch["inputs"])
    prepared = model.data_preprocessor(batch, False)
    if cfg.default_scope == "mmpretrain":
        return image, [model(**prepared, mode="predict")[0].pred_score[None]]
    if cfg.default_scope == "mmseg":
        return image, [model(**prepared, mode="predict")[0].seg_logits.data[None]]
    if hasattr(model, "bbox_head"):
        return image, [level for kind in model(**prepared, mode="tensor") for level in kind]
    features = model.extract_feat(prepared["inputs"])
    return image, [level for kind in (*model.rpn_head(features), features) for level in kind]


NAMES = {
    "classifier": ["scores"],
    "stem": ["scores"],
    "segmentor": ["logits"],
    "one_stage": [f"{kind}_{level}" for kind in ("cls_score", "bbox_pred") for level in range(4)],
    "two_stage": [f"{kind}_{level}" for kind in ("rpn_cls_score", "rpn_bbox_pred", "feature") for level in range(4)],
}


def skip_without(to):
    for package in exporting.FORMATS[to].needs:
        pytest.importorskip(package, reason=f"--to {to} needs {package}, which is not installed")
    if to == "aoti" and shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("ahead-of-time compilation needs a C++ compiler, and g++ is not on the PATH")


@pytest.mark.parametrize(
    ("name", "to", "dynamic"),
    [
        ("classifier", "onnx", False),
        ("classifier", "openvino", False),
        ("stem", "onnx", True),
        ("stem", "aoti", False),
        ("segmentor", "onnx", False),
        ("segmentor", "openvino", False),
        ("segmentor", "torch-export", True),
        ("one_stage", "onnx", True),
        ("one_stage", "openvino", False),
        ("two_stage", "onnx", False),
        ("two_stage", "openvino", True),
        ("two_stage", "torch-export", False),
    ],
)
def test_outputs_are_the_toolboxes(name, to, dynamic, models, tmp_path, capsys):
    skip_without(to)
    model, out, size = models(name), tmp_path / f"model{ENDINGS[to]}", (128, 160)
    assert export(model, to, out, "--size", *size, *["--dynamic"] * dynamic) == 0
    said = capsys.readouterr().out
    description = json.loads((tmp_path / f"{out.name}.json").read_text())
    names = [output["name"] for output in description["outputs"]]
    assert names == NAMES[name]
    cfg = bare_models.read_config(str(model.config))
    network = bare_models.build_model(cfg)
    network.load_state_dict(torch.load(model.checkpoint)["state_dict"])
    run = runtime(out, to, names)
    for height_and_width in (size, *([(192, 128 + 64)] if dynamic else [])):
        image, expected = of_the_toolbox(cfg, network, height_and_width)
        for output, got, wanted in zip(description["outputs"], run(image), expected, strict=True):
            got = torch.as_tensor(got)
            # What the command promises, of values that are about 1.
            assert torch.allclose(got, wanted, rtol=0, atol=1e-4 * max(1.0, wanted.abs().max())), output["name"]
            assert wanted.std() > 1e-3, "weights that are seen in the outputs"
            sides = dict(zip(("batch", "channels", "height", "width"), image.shape, strict=True))
            shape = [eval(str(length), {"ceil": math.ceil, **sides}) for length in output["shape"]]
            assert shape == list(wanted.shape)
    for output in description["outputs"]:
        assert set(output["differences"]) == {"random pixels", *["random pixels, two larger images"] * dynamic}
        assert all(0 <= one["relative"] <= one["absolute"] for one in output["differences"].values())
        assert f"  {output['name']} " in said
    assert all(f"  {line}\n" in said for line in description["left to the caller"])


def test_description(models, tmp_path):
    model, out = models("two_stage"), tmp_path / "new/model.pt2"
    assert export(model, "torch-export", out, "--size", 64, 96, "--cfg-options", "model.test_cfg.rpn.nms_pre=50") == 0
    assert sorted(path.name for path in out.parent.iterdir()) == ["model.pt2", "model.pt2.json"]
    found = json.loads(Path(f"{out}.json").read_text())
    sha256 = hashlib.sha256(model.checkpoint.read_bytes()).hexdigest()
    assert found["checkpoint"] == dict(name="two_stage.pth", sha256=sha256)
    assert (found["config"], found["model"], found["format"]) == (str(model.config), "MaskRCNN", "torch-export")
    assert (found["classes"], found["dynamic"]) == (["red", "blue"], False)
    assert found["inputs"] == [dict(name="image", dtype="float32", shape=[1, 3, 64, 96])]
    assert found["outputs"][0]["shape"] == [1, 1, 16, 24]
    assert found["preprocessing"] == dict(
        channel_order="RGB",
        range=[0, 255],
        mean=[110.0, 100.0, 90.0],
        std=[50.0, 55.0, 60.0],
        channel_order_of_the_model="RGB",
        pad_size_divisor=32,
        pad_value=[110.0, 100.0, 90.0],
    )
    assert found["settings"]["test_cfg"]["rpn"]["nms_pre"] == 50
    assert found["settings"]["rpn_head"]["anchor_generator"]["strides"] == [4, 8, 16, 32]
    assert found["versions"]["torch"] == torch.__version__
    left = "\n".join(found["left to the caller"])
    assert "AnchorGenerator of strides" in left
    assert "DeltaXYWHBBoxCoder" in left
    assert "StandardRoIHead" in left

    assert export(models("one_stage"), "torch-export", out, "--size", 96, 96, "--dynamic", "--force") == 0
    found = json.loads(Path(f"{out}.json").read_text())
    assert found["inputs"][0]["shape"] == ["batch", 3, "height", "width"]
    assert (found["inputs"][0]["smallest"], found["inputs"][0]["divisible_by"]) == ([96, 96], 32)
    shapes = {output["name"]: output["shape"] for output in found["outputs"]}
    assert shapes["cls_score_0"] == ["batch", 2, "height / 8", "width / 8"]
    assert shapes["bbox_pred_3"] == ["batch", 4, "ceil(height / 64)", "ceil(width / 64)"]
    assert found["preprocessing"]["mean"] == [90.0, 100.0, 110.0], "of red, green, blue"
    assert found["preprocessing"]["channel_order_of_the_model"] == "BGR"


def test_without_this_package(models, tmp_path):
    """--standalone leaves no operator of this package in what is written."""
    for options, left in (((), True), (("--standalone",), False)):
        out = tmp_path / f"model{len(options)}.pt2"
        assert export(models("stem"), "torch-export", out, "--size", 64, 64, *options) == 0
        targets = [str(node.target) for node in torch.export.load(out).graph.nodes]
        assert any("carafe" in target for target in targets) == left


def test_images(models, data, tmp_path, capsys):
    """As the test pipeline gives them, filled up where that is smaller; resized, which is said, where it is not."""
    images = sorted((data / "images").glob("*.png"))[:2]
    for name, size, resized in (
        ("two_stage", (SIZE, SIZE + 32), False),
        ("segmentor", (128, 160), False),
        ("classifier", (SIZE, SIZE), False),
        ("classifier", (SIZE, SIZE + 32), True),
        ("two_stage", (SIZE, 32), True),
    ):
        out = tmp_path / "model.pt2"
        assert export(models(name), "torch-export", out, "--size", *size, "--force", "--images", *images) == 0
        note = f"note: resized to {size[0]} x {size[1]}, as the test pipeline gives another size: 00.png (64 x 64), "
        assert (note in capsys.readouterr().err) == resized
        for output in json.loads(Path(f"{out}.json").read_text())["outputs"]:
            assert output["differences"]["images"]["images"] == 2


def test_images_are_the_toolboxes(models, data):
    """The pixels that are compared on, normalised, are the batch of a test."""
    cfg = bare_models.read_config(str(models("two_stage").config))
    network = bare_models.build_model(cfg)
    part = exporting_part(cfg, network)
    path = data / "images/03.png"
    (image,) = export_comparison.read_images(cfg, part, [path], (64, 96))
    pipeline = export_comparison.prediction_pipeline(cfg)
    batch = export_comparison.prepare(pipeline, export_comparison.load_picture(pipeline, path))
    expected = network.data_preprocessor(batch, False)["inputs"]
    normalised = part.pixels(image)
    assert torch.allclose(normalised[..., :64], expected, atol=1e-6)  # one division, in another order of colours
    assert (normalised[..., 64:] == 0).all()


def exporting_part(cfg, network):
    return importlib.import_module("carafe_plugin.engine.deployable").deployable(cfg, network)


def test_drop_in(models, tmp_path, capsys):
    model, out = models("zoo_neck"), tmp_path / "model.pt2"
    assert export(model, "torch-export", out, "--size", 64, 128, "--drop-in") == 0
    assert "feature_3" in capsys.readouterr().out
    assert export(model, "torch-export", out, "--size", 96, 128, "--drop-in", "--force") == 2
    assert "--size must be divisible by 64, the data_preprocessor's pad_size_divisor: got 96 128, 128 128 is" in (
        one_line(capsys)
    )


def test_what_differs_is_not_written(models, tmp_path, capsys, monkeypatch):
    model, out = models("stem"), tmp_path / "model.pt2"
    kept = {out: "another model", tmp_path / "model.pt2.json": "and what it was"}
    for path, text in kept.items():
        path.write_text(text)
    load = exporting.FORMATS["torch-export"].load

    def changed(change):
        faulty = dataclasses.replace(
            exporting.FORMATS["torch-export"],
            load=lambda path: lambda image: [change(value) for value in load(path)(image)],
        )
        monkeypatch.setitem(exporting.FORMATS, "torch-export", faulty)
        assert export(model, "torch-export", out, "--size", 64, 64, "--force") == 1
        assert {path: path.read_text() for path in tmp_path.iterdir()} == kept
        return one_line(capsys)

    assert "scores differs from PyTorch's by 2.0e-04 on random pixels" in changed(lambda value: value + 2e-4)
    assert "1e-04 is allowed; nothing is written" in changed(lambda value: value * torch.nan)
    assert "scores has the shape (1, 1), in PyTorch (1, 2)" in changed(lambda value: value[:, :1])
    assert "the exported model does not run on 1 x 3 x 64 x 64 values: RuntimeError: " in changed(
        lambda value: value.reshape(7)
    )
    monkeypatch.undo()
    assert export(model, "torch-export", out, "--size", 64, 64, "--force") == 0
    assert out.read_bytes()[:2] == b"PK"


def test_sizes_that_a_dynamic_model_does_not_take(models, tmp_path, capsys):
    """A level of one row or column is compiled as such, so that smaller images would be another model's."""
    out = tmp_path / "model.pt2"
    assert export(models("one_stage"), "torch-export", out, "--size", 64, 64, "--dynamic") == 1
    assert "the exported model does not run on 1 x 3 x 64 x 64 values: AssertionError: Guard failed: " in (
        one_line(capsys)
    )
    assert not list(tmp_path.iterdir())


def test_mistakes(models, data, tmp_path, capsys, monkeypatch):
    model, out = models("stem"), tmp_path / "model.onnx"

    def error(*options, model=model, to="torch-export", out=tmp_path / "model.pt2", size=(64, 64)):
        capsys.readouterr()
        assert export(model, to, out, "--size", *size, *options) == 2
        return one_line(capsys)

    for to in ("onnx", "openvino"):
        package = exporting.FORMATS[to].needs[0]
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)  # as if it were not installed
            assert f"--to {to} needs {package}, which is not installed: install {package}" in error(to=to)
    assert "--out must end in .pt2 with --to torch-export, got " in error(out=out)
    assert "--standalone is for aoti and torch-export: onnx has standard" in error("--standalone", to="onnx", out=out)
    (tmp_path / "taken.pt2").write_text("")
    assert "taken.pt2 is there already: choose another --out, or add --force" in error(out=tmp_path / "taken.pt2")
    (tmp_path / "old.pt2.json").write_text("")
    assert "old.pt2.json is there already" in error(out=tmp_path / "old.pt2")
    (tmp_path / "folder.pt2").mkdir()
    assert "--out must be a file, and " in error("--force", out=tmp_path / "folder.pt2")
    assert "cannot write --out " in error(out=tmp_path / "taken.pt2/model.pt2")
    assert "by which the sizes that a model exported with --dynamic takes are divisible: got 64 72, 64 96 is" in (
        error("--dynamic", size=(64, 72))
    )
    assert "must be divisible by 32, the data_preprocessor's pad_size_divisor" in (
        error(model=models("two_stage"), size=(64, 72))
    )
    missing = Model(model.config, tmp_path / "absent.pth")
    assert f"no such checkpoint: {tmp_path}/absent.pth" in error(model=missing)
    other = Model(model.config, models("two_stage").checkpoint)
    assert "two_stage.pth is of another model: it " in error(model=other)
    inpainting = next((ROOT / "configs/inpainting").glob("*.py"))
    assert "InpaintingGAN is not exported: MMPretrain's classifiers, " in error(
        model=Model(inpainting, model.checkpoint)
    )
    content = torch.load(model.checkpoint)
    torch.save({**content, "meta": dict(dataset_meta=dict(classes=("a", "b", "c")))}, tmp_path / "three.pth")
    assert "has num_classes=2, and checkpoint" in error(model=Model(model.config, tmp_path / "three.pth"))
    broken = {name: value * torch.nan for name, value in content["state_dict"].items()}
    torch.save({**content, "state_dict": broken}, tmp_path / "nan.pth")
    assert "scores of the model in PyTorch is not finite on random pixels" in (
        error(model=Model(model.config, tmp_path / "nan.pth"))
    )
    swapped = error("--cfg-options", "model.decode_head.in_index=[2,1,3]", model=models("segmentor"))
    assert "EncoderDecoder does not run on 64 x 64 pixels in PyTorch: RuntimeError: " in swapped
    with monkeypatch.context() as patch:
        patch.setattr("torch.export.export", lambda *_, **__: {}["no such form"])
        assert "ImageClassifier cannot be exported to torch-export: KeyError: 'no such form'" in error()
    assert f"no such image: {tmp_path}/absent.png" in error("--images", tmp_path / "absent.png")
    assert f"cannot read image {data}/instances.json: " in error("--images", data / "instances.json")
    assert {path.suffix for path in tmp_path.iterdir()} == {".pt2", ".json", ".pth"}
    assert not (tmp_path / "model.pt2").exists()
    capsys.readouterr()
    assert export(model, "torch-export", tmp_path / "model.pt2", "--size", 0, 64) == 2
    assert "argument --size: expected at least 1, got 0" in capsys.readouterr().err
