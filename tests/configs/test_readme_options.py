"""The ``--cfg-options`` lines and the configuration in the READMEs do what is said of them."""

import argparse
import re
import shlex

import pytest
import torch

pytest.importorskip("mmengine", reason="MMEngine is not installed")

from config_models import batch, build, carafe_modules, load, reduced
from config_table import BOTTLENECKS, CONFIGS, FPN
from mmengine.config import Config
from mmengine.runner import load_checkpoint

from carafe_plugin.engine.cli import add_config_options
from carafe_plugin.testing import relative_error


def option_lines(folder, containing):
    """The ``--cfg-options`` lines in a folder's README that contain a text."""
    text = (CONFIGS / folder / "README.md").read_text()
    found = re.findall(r"--cfg-options [^`\n]*(?:\n +[^` \n-][^`\n]*)*", text)  # a line may be wrapped
    return [line for line in found if containing in line]


def with_options(name, line):
    """The configuration with the options of a line merged in, as the tools do it."""
    parser = argparse.ArgumentParser()
    add_config_options(parser)
    config = load(name)
    config.merge_from_dict(parser.parse_args(shlex.split(line)).cfg_options)
    return config


def deformable_convolutions(backbone):
    return [name for name, module in backbone.named_modules() if name.endswith(".conv_offset")]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("mmdet/faster-rcnn_r50-carafe_fpn_1x_coco", "torchvision://resnet50"),
        ("mmseg/r50-carafe_upernet_20e_ade20k", "torchvision://resnet50"),
        ("mmseg/r50-carafe_carafe-upernet_80k_ade20k-512x512", "open-mmlab://resnet50_v1c"),
    ],
)
def test_starting_from_stock_weights(name, source, weights):
    """Only CARAFE++'s keys are missing, and all of CARAFE++ can learn, its statistics included."""
    (line,) = option_lines(name.partition("/")[0], f"checkpoint={source}")
    config = with_options(name, line)
    assert config.model.backbone.init_cfg.checkpoint == source
    path = config.model.backbone.init_cfg.checkpoint = str(weights(source))
    torch.manual_seed(0)
    backbone = build(config.model.backbone, config.default_scope)
    backbone.init_weights()
    loaded = {key: value for key, value in torch.load(path)["state_dict"].items() if not key.startswith("fc.")}
    state = backbone.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())
    places = tuple(f"{place.removeprefix('backbone.')}." for place in BOTTLENECKS)
    assert state.keys() - loaded.keys() == {key for key in state if key.startswith(places)}
    backbone.train()
    for module in carafe_modules(backbone).values():
        assert module.compressor_norm.training
        assert all(parameter.requires_grad for parameter in module.parameters())


def test_the_baseline_of_imagenet():
    (line,) = option_lines("mmpretrain", "model.backbone.type=ResNet")
    config = with_options("mmpretrain/resnet50-carafe_16xb64_in1k", line)
    backbone = build(config.model.backbone, "mmpretrain")
    assert type(backbone).__name__ == "ResNet"
    assert not carafe_modules(backbone)


def test_both_readings_of_dcn():
    """R101 has 3, 4, 23 and 3 blocks; the first of each strided stage gets CARAFE++ and a plain convolution."""
    name = "mmdet/faster-rcnn_r101-carafe-mdconv-c3-c5_carafe-fpn_2x_coco"
    literal, baseline = option_lines("mmdet", "stage_with_dcn")
    for config, expected in ((load(name), 4 + 23 + 3 - 3), (with_options(name, literal), 3 + 4 + 23 - 2)):
        config.model.backbone.init_cfg = None
        backbone = build(config.model.backbone, "mmdet")
        assert len(deformable_convolutions(backbone)) == expected
        assert len(carafe_modules(backbone)) == 7
    config = with_options("mmdet/faster-rcnn_r50_carafe-fpn_1x_coco", baseline)
    config.model.backbone.init_cfg = None
    assert len(deformable_convolutions(build(config.model.backbone, "mmdet"))) == 4 + 6 + 3


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("spread", [None, 1e-6])
def test_upgrading_a_trained_detector(tmp_path, spread):
    """The baseline's checkpoint gives its pyramid but for the share that is spread, and with the least its boxes."""
    pytest.importorskip("mmdet", reason="mmdet is not installed")
    (text,) = re.findall(
        r"```python\n(_base_.*?\nload_from.*?)```", (CONFIGS / "mmdet/README.md").read_text(), re.DOTALL
    )
    (tmp_path / "upgrade.py").write_text(text)
    config = reduced(Config.fromfile(tmp_path / "upgrade.py"))
    config.model.backbone.init_cfg = None  # its weights would be downloaded
    if spread is not None:
        config.model.neck.carafe_cfg.init_spread = spread
    checkpoint = str(tmp_path / config.load_from)

    torch.manual_seed(0)
    upgraded = build(config.model, "mmdet")
    upgraded.init_weights()
    assert carafe_modules(upgraded).keys() == set(FPN)
    config.model.neck = dict(config.model.neck, type="FPN")
    del config.model.neck["carafe_cfg"]
    baseline = build(config.model, "mmdet")
    baseline.init_weights()
    torch.save(dict(state_dict=baseline.state_dict()), checkpoint)
    load_checkpoint(upgraded, checkpoint)

    data = batch(config, size=2, labelled=False)
    images = baseline.data_preprocessor(data)["inputs"]
    with torch.no_grad():
        pyramids = [model.eval().extract_feat(images) for model in (baseline, upgraded)]
        before, after = ([each.pred_instances for each in model.test_step(data)] for model in (baseline, upgraded))
    for expected, got in zip(*pyramids, strict=True):
        assert relative_error(got, expected) < (spread or 0.05)
    for expected, got in zip(before, after, strict=True) if spread else ():
        assert len(expected) == 5
        torch.testing.assert_close(got.bboxes, expected.bboxes, rtol=0, atol=1e-3)  # of 60 x 90 pixels
        torch.testing.assert_close(got.scores, expected.scores, rtol=0, atol=1e-5)
        assert torch.equal(got.labels, expected.labels)
