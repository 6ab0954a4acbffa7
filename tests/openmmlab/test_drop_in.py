"""The drop-in: MMDetection's own CARAFE configurations, unmodified, on this package's operator."""

import importlib
import subprocess
import sys

import pytest
import torch

pytest.importorskip("mmdet", reason="MMDetection is not installed")

import mmcv.ops
from mmcv.cnn import build_upsample_layer
from mmdet.registry import MODELS as MMDET_MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.registry import MODELS, DefaultScope
from zoo_models import NAME, carafe_keys, stock_model, textbook, zoo_config

import carafe_plugin.ops
from carafe_plugin.openmmlab.layers import CARAFEUpsample

pytestmark = pytest.mark.usefixtures("one_thread")

MMCV_CARAFE = sys.modules["mmcv.ops.carafe"]
CARAFE_CFG = dict(type="carafe", up_kernel=5, up_group=1, encoder_kernel=3, encoder_dilation=1, compressed_channels=64)


@pytest.mark.parametrize(
    ("name", "masks"), [("faster-rcnn_r50_fpn-carafe_1x_coco.py", False), ("mask-rcnn_r50_fpn-carafe_1x_coco.py", True)]
)
def test_zoo_configs_run_unmodified(drop_in, name, masks):
    torch.manual_seed(0)
    config = zoo_config(name)
    detector = MMDET_MODELS.build(config.model)
    detector.init_weights()
    packs = {key: m for key, m in detector.named_modules() if isinstance(m, drop_in.CARAFEPack)}
    assert list(packs) == [f"neck.upsample_modules.{i}" for i in range(4)] + ["roi_head.mask_head.upsample"] * masks
    for pack in packs.values():
        assert abs(pack.content_encoder.weight.std().item() - 0.001) < 1e-4
        assert pack.content_encoder.bias.abs().max() == 0 == pack.channel_compressor.bias.abs().max()
        bound = (6 / (256 + 64)) ** 0.5  # Xavier-uniform
        assert 0.9 * bound < pack.channel_compressor.weight.abs().max() <= bound

    # The layout: the two checkpoints' keys in the neck and the upsamplers, the stock detector's everywhere else.
    state = {key: tuple(value.shape) for key, value in detector.state_dict().items()}
    expected = carafe_keys(masks)
    stock = MMDET_MODELS.build(stock_model(masks))
    for key, value in stock.state_dict().items():
        if not key.startswith("neck.") and not key.startswith("roi_head.mask_head.upsample."):
            expected[key] = tuple(value.shape)
    assert state == expected
    assert sum(p.numel() for p in detector.neck.upsample_modules.parameters()) == 4 * 74148

    data = detector.data_preprocessor(demo_mm_inputs(1, [(3, 96, 130)], num_items=[3], with_mask=True), True)
    losses, _ = detector.parse_losses(detector.loss(data["inputs"], data["data_samples"]))
    assert torch.isfinite(losses)
    losses.backward()
    for key, pack in packs.items():
        for kind, parameter in pack.named_parameters():
            assert parameter.grad is not None, f"{key}.{kind}"
            assert parameter.grad.abs().max() > 0, f"{key}.{kind}"
    with torch.no_grad():
        detector.eval().predict(data["inputs"], data["data_samples"])


def test_zoo_neck_agrees_with_the_textbook(drop_in, monkeypatch):
    torch.manual_seed(0)
    config = zoo_config("faster-rcnn_r50_fpn-carafe_1x_coco.py").model.neck
    neck = MMDET_MODELS.build(dict(config, in_channels=[8, 16, 24, 32], out_channels=32))
    neck.init_weights()
    for pack in neck.upsample_modules:
        torch.nn.init.normal_(pack.content_encoder.weight, std=0.5)  # kernels far from an average
    sizes = [(16, 32), (8, 16), (4, 8), (2, 4)]
    inputs = [torch.randn(2, c, *size) for c, size in zip([8, 16, 24, 32], sizes, strict=True)]
    outs = neck(inputs)
    monkeypatch.setattr(drop_in.CARAFEPack, "forward", textbook)
    for out, expected in zip(outs, neck(inputs), strict=True):
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_zoo_neck_keeps_another_start(drop_in):
    """MMDetection's neck gives all its convolutions Xavier's values, then calls init_weights of each CARAFEPack."""
    config = zoo_config("faster-rcnn_r50_fpn-carafe_1x_coco.py").model.neck
    config.upsample_cfg.init = "nearest"
    neck = MMDET_MODELS.build(dict(config, in_channels=[8, 16, 24, 32], out_channels=32))
    neck.init_weights()
    for pack in neck.upsample_modules:
        assert torch.equal(pack.content_encoder.bias, CARAFEUpsample(32, init="nearest").content_encoder.bias)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("scale_factor", [2, 3])
def test_mmcvs_own_class_runs_on_our_operator(drop_in, scale_factor, group):
    """Models built before the import, and the root registry's key, hold MMCV's class."""
    stock = MMCV_CARAFE.CARAFEPack(8, scale_factor, up_group=group, compressed_channels=4)
    ours = drop_in.CARAFEPack(8, scale_factor, up_group=group, compressed_channels=4)
    assert list(stock.state_dict()) == list(ours.state_dict())
    torch.nn.init.normal_(stock.content_encoder.weight)
    ours.load_state_dict(stock.state_dict(), strict=True)
    x = torch.randn(2, 8, 5, 6)
    torch.testing.assert_close(stock(x), ours(x), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours(x), textbook(ours, x), atol=1e-5, rtol=1e-5)
    with DefaultScope.overwrite_default_scope(None):
        assert MODELS.get("carafe") is MMCV_CARAFE.CARAFEPack


def test_operator_and_class_are_ours(drop_in):
    assert mmcv.ops.carafe is MMCV_CARAFE.carafe is carafe_plugin.ops.carafe
    assert issubclass(drop_in.CARAFEPack, MMCV_CARAFE.CARAFEPack)
    assert issubclass(drop_in.CARAFEPack, CARAFEUpsample)
    features, masks = torch.randn(1, 4, 3, 3), torch.rand(1, 9, 6, 6)
    assert torch.equal(MMCV_CARAFE.CARAFE(3, 1, 2)(features, masks), carafe_plugin.ops.carafe(features, masks, 3, 1, 2))
    pack = drop_in.CARAFEPack(8, 2, 7, 4, 5, 1, 16)  # MMCV's order of arguments
    assert (pack.up_kernel, pack.up_group, pack.encoder_kernel, pack.compressed_channels) == (7, 4, 5, 16)


@pytest.mark.parametrize("toolbox", ["mmdet", "mmseg"])
def test_key_carafe_in_the_toolboxes_registries(drop_in, toolbox):
    pytest.importorskip(toolbox, reason=f"{toolbox} is not installed")
    registry = importlib.import_module(f"{toolbox}.registry").MODELS
    assert registry.get("carafe") is drop_in.CARAFEPack
    with DefaultScope.overwrite_default_scope(toolbox):
        cfg = dict(CARAFE_CFG, channels=8, scale_factor=2)
        assert type(MODELS.build(cfg)) is type(build_upsample_layer(cfg)) is drop_in.CARAFEPack


def test_importing_again_changes_nothing(drop_in):
    assert importlib.import_module(NAME) is drop_in
    assert MMDET_MODELS.get("carafe") is drop_in.CARAFEPack
    again = importlib.reload(drop_in)
    assert MMDET_MODELS.get("carafe") is again.CARAFEPack
    assert issubclass(again.CARAFEPack, MMCV_CARAFE.CARAFEPack)


def test_somebody_elses_key_is_an_error(drop_in, monkeypatch):
    class Other(torch.nn.Module):
        pass

    monkeypatch.setitem(MMDET_MODELS.module_dict, "carafe", Other)
    with pytest.raises(RuntimeError, match=r"the type 'carafe' in mmdet's MODELS registry is already .*Other"):
        importlib.reload(drop_in)
    assert MMDET_MODELS.get("carafe") is Other


def test_a_toolbox_that_does_not_import_is_a_warning(drop_in, monkeypatch):
    monkeypatch.setitem(sys.modules, "mmdet.registry", None)
    with pytest.warns(UserWarning, match="mmdet does not import, so its type 'carafe' stays as it is"):
        importlib.reload(drop_in)


WITHOUT_OPERATORS = """
import sys
sys.modules[sys.argv[1]] = None
try:
    import mmseg.models
except ImportError as error:
    sys.exit(print("mmseg does not import:", error))
import torch
from mmcv.cnn import build_upsample_layer
from mmengine.registry import init_default_scope
import carafe_plugin.openmmlab.drop_in as drop_in
init_default_scope("mmseg")
pack = build_upsample_layer(dict(type="carafe", channels=16, scale_factor=2))
assert type(pack) is drop_in.CARAFEPack
assert pack(torch.rand(2, 16, 5, 7)).shape == (2, 16, 10, 14)
print("ran without MMCV's operators")
"""


@pytest.mark.parametrize("missing", ["mmcv._ext", "mmcv.ops"])
def test_mmcv_without_compiled_operators(missing):
    """MMSegmentation, since onedl's, runs on such an MMCV; MMDetection does not import."""
    pytest.importorskip("mmseg", reason="MMSegmentation is not installed")
    command = [sys.executable, "-c", WITHOUT_OPERATORS, missing]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    if result.stdout.startswith("mmseg does not import:"):
        pytest.skip(f"this version of MMSegmentation needs MMCV's operators as well: {result.stdout}")
    assert "ran without MMCV's operators" in result.stdout


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device on this machine")
def test_zoo_config_on_cuda(drop_in):
    detector = MMDET_MODELS.build(zoo_config("mask-rcnn_r50_fpn-carafe_1x_coco.py").model).cuda()
    detector.init_weights()
    data = detector.data_preprocessor(demo_mm_inputs(1, [(3, 96, 130)], num_items=[3], with_mask=True), True)
    losses, _ = detector.parse_losses(detector.loss(data["inputs"], data["data_samples"]))
    losses.backward()
    assert torch.isfinite(losses)
    assert all(p.grad.abs().max() > 0 for p in detector.neck.upsample_modules.parameters())
