"""tools/browse_model.py: every CARAFE++ of the published configurations, none in stock ones, one line for mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import write_config
from tool_runs import ROOT, call_tool, one_line, run

pytest.importorskip("mmdet", reason="tools: mmdet is not installed")

from carafe_plugin.engine import bare_models
from carafe_plugin.engine.errors import UsageError

pytestmark = pytest.mark.usefixtures("one_thread")
# What upsampling by 2 takes at one location of 256 channels: compressor, encoder, reassembly.
UP_256 = 256 * 64 + 64 * 9 * 100 + 100 * 256


def browse(tmp_path: Path, config: object, *options: object) -> dict:
    file = tmp_path / "found.json"
    assert call_tool("browse_model", config, *options, "--json", file) == 0
    return json.loads(file.read_text())


def test_mask_rcnn_with_carafe_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = "configs/mmdet/mask-rcnn_r50-carafe_carafe-fpn_carafe-mask-head_1x_coco.py"
    # A tenth of the boxes saves seconds; the mask head takes no more than a hundred anyway.
    few = ("--cfg-options", "model.test_cfg.rpn.max_per_img=100")
    report = browse(tmp_path, ROOT / config, "--shape", 64, 96, *few)
    sites = {site["name"]: site for site in report["sites"]}
    assert report["carafe"]["modules"] == len(sites) == 11
    assert [site["direction"] for site in sites.values()] == ["down"] * 7 + ["up"] * 4
    assert all(site["runs"] for site in sites.values())
    assert [sites[f"neck.upsample_modules.{i}"]["flops"] for i in (2, 1, 0)] == [n * UP_256 for n in (6, 24, 96)]
    # As many boxes as the settings allow, 14 x 14 each, whatever the random weights propose.
    assert sites["roi_head.mask_head.upsample"]["flops"] == 100 * 14 * 14 * UP_256
    # 64 channels, 32 x 48 to 16 x 24: compressor, norm, encoder, reassembly.
    assert sites["backbone.maxpool"]["flops"] == 1536 * (64 * 16 + 2 * 16) + 384 * (16 * 9 * 25 + 25 * 64)
    assert sites["neck.upsample_modules.0"]["parameters"] == 256 * 64 + 64 + 64 * 9 * 100 + 100
    assert report["carafe"]["flops"] == sum(site["flops"] for site in sites.values())
    assert report["carafe"]["share"] == report["carafe"]["flops"] / report["model"]["flops"]
    shown = capsys.readouterr().out
    assert "11 in all" in shown
    assert all(name in shown for name in sites)


def test_upernet_with_carafe_everywhere(tmp_path: Path) -> None:
    pytest.importorskip("mmseg", reason="mmseg is not installed")
    report = browse(tmp_path, ROOT / "configs/mmseg/r50-carafe_carafe-upernet_20e_ade20k.py", "--shape", 64, 64)
    assert report["carafe"]["modules"] == 17
    assert report["carafe"]["parameters"] == sum(site["parameters"] for site in report["sites"])
    places = [site["name"].rpartition(".")[0] for site in report["sites"] if site["name"].startswith("decode_head")]
    assert (
        places
        == ["decode_head.ppm_upsamplers"] * 4
        + ["decode_head.upsample_modules"] * 3
        + ["decode_head.fuse_upsamplers"] * 3
    )
    assert all(site["runs"] for site in report["sites"])


def test_backbone_of_mmpretrain_at_its_own_size(tmp_path: Path) -> None:
    pytest.importorskip("mmpretrain", reason="mmpretrain is not installed")
    report = browse(tmp_path, ROOT / "configs/mmpretrain/resnet50-carafe_16xb64_in1k.py")
    assert report["shape"] == [224, 224]
    assert report["carafe"]["modules"] == 7
    assert report["sites"][0]["flops"] == 112**2 * (64 * 16 + 2 * 16) + 56**2 * (16 * 9 * 25 + 25 * 64)


def test_a_stock_model_has_none(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    report = browse(tmp_path, "mmdet::retinanet/retinanet_r18_fpn_1x_coco.py", "--shape", 64, 64)
    assert report["sites"] == []
    assert report["carafe"] == dict(modules=0, parameters=0, flops=0, share=0)
    assert report["model"]["flops"] > 0
    assert "0 modules, 0 parameters, 0 FLOPs" in capsys.readouterr().out


def test_options_change_the_model(tmp_path: Path) -> None:
    config = "mmdet::retinanet/retinanet_r18_fpn_1x_coco.py"
    changes = ("model.neck.type=CARAFEFPN", "model.neck.carafe_cfg.compressed_channels=8")
    report = browse(tmp_path, config, "--shape", 64, 64, "--cfg-options", *changes)
    assert [site["compressed_channels"] for site in report["sites"]] == [8, 8]


def test_default_sizes(tmp_path: Path, data: Path) -> None:
    stock = bare_models.read_config("mmdet::retinanet/retinanet_r18_fpn_1x_coco.py")
    assert bare_models.image_shape(stock) == (800, 1333)
    tiny = write_config(tmp_path / "tiny.py", "mmseg", data)
    assert bare_models.image_shape(bare_models.read_config(str(tiny))) == (512, 512)


def test_layers_of_mmcv_are_refused() -> None:
    ops = pytest.importorskip("mmcv.ops", reason="mmcv is not installed")
    model = torch.nn.Sequential(torch.nn.ReLU(), ops.CARAFEPack(8, 2))
    cfg = bare_models.read_config("mmdet::retinanet/retinanet_r18_fpn_1x_coco.py")
    with pytest.raises(UsageError, match="1 are mmcv's own layers, which are not counted: add --drop-in"):
        bare_models.count_model(cfg, model, (64, 64))


def test_drop_in_counts_them(tmp_path: Path) -> None:
    """In a process of its own: a drop-in lasts as long as the process."""
    config = "mmdet::carafe/faster-rcnn_r50_fpn-carafe_1x_coco.py"
    options = ("--shape", 64, 64, "--drop-in", "--cfg-options", "model.test_cfg.rpn.max_per_img=10")
    counted = run("browse_model.py", config, "--json", tmp_path / "found.json", *options)
    assert counted.returncode == 0, counted.stderr
    sites = json.loads((tmp_path / "found.json").read_text())["sites"]
    # From P6 of 1 x 1 (64 is the padding's divisor) to P2.
    assert [site["flops"] for site in sites] == [n * UP_256 for n in (64, 16, 4, 1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.py"], "no such configuration file"),
        (["mmdet::nowhere.py"], "no such configuration file"),
        (["yolo::nowhere.py"], "'yolo' is not one of mmdet, mmseg, mmpretrain"),
        (["TINY", "--shape", "0", "5"], "--shape: expected two positive sizes, got 0 5"),
        (["TINY", "--json", "no/such/folder.json"], "--json: no folder no/such to write folder.json into"),
        (["TINY", "--cfg-options", "model.neck.type=Nowhere"], "Nowhere is not in the mmdet::model registry"),
        (["TINY", "--cfg-options", "model.neck.carafe_cfg.up_kernel=4"], "must be an odd positive int, got 4"),
        (["TINY", "--cfg-options", "default_scope=mmpose"], "default_scope must be one of mmdet, mmseg, mmpretrain"),
    ],
)
def test_mistakes_end_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture
) -> None:
    tiny = write_config(tmp_path / "tiny.py", "mmdet", data)
    capsys.readouterr()
    assert call_tool("browse_model", *(tiny if argument == "TINY" else argument for argument in arguments)) == 2
    assert message in one_line(capsys)


def test_inpainting(tmp_path: Path) -> None:
    """The generator alone runs; the discriminator's parameters belong to the model."""
    config = ROOT / "configs/inpainting/partial-conv-carafe_scenes-64x64.py"
    report = browse(tmp_path, config)
    assert report["shape"] == [64, 64]
    sites = {site["name"]: site for site in report["sites"]}
    assert [site["direction"] for site in sites.values()] == ["down", "down", "up", "up"]
    assert all(site["runs"] and site["flops"] > 0 for site in sites.values())
    assert report["model"]["parameters"] == 445_318
    assert not report["uncounted"]
    assert call_tool("browse_model", config, "--shape", 30, 32) == 2
