"""benchmarks/model.py: the same work for every model, fair turns, a record that survives a cut."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import write_config
from tool_runs import ROOT, call_tool, environment, load_tool

pytest.importorskip("mmdet", reason="tools: mmdet is not installed")

from carafe_plugin.engine import bare_models, memory

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ("--shape", 64, 96, "--threads", 1)


@pytest.fixture
def tiny(tmp_path: Path, data: Path) -> list[str]:
    """The tiny detector with CARAFE++, and with the stock neck and mask head in its place."""
    path = write_config(tmp_path / "tiny.py", "mmdet", data)
    stock = path.with_name("stock.py")
    text = path.read_text().replace("CARAFEFPN", "FPN").replace("carafe_cfg=dict(compressed_channels=8)", "")
    stock.write_text(text.replace("CARAFEFCNMaskHead", "FCNMaskHead"))
    return [f"stock={stock}", str(path)]


def test_record_and_table(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "result.json"
    assert call_tool("benchmarks.model", *tiny, *SMALL, "--repeats", 3, "--profile", "--json", file) == 0
    report = json.loads(file.read_text())
    assert report["rounds"] == report["repeats"] == 3
    assert report["shape"] == [64, 96]
    assert report["machine"]["threads"] == 1
    assert str(tmp_path) not in json.dumps(report["models"])
    stock, carafe = report["models"]
    assert (stock["name"], carafe["name"]) == ("stock", "tiny")
    # Three upsamplers of 32 channels in the FPN; in the mask head one for a 2 x 2 deconvolution.
    upsampler = 32 * 8 + 8 + 8 * 9 * 100 + 100
    small_head = 32 * 64 + 64 + 64 * 9 * 100 + 100
    assert carafe["parameters"] - stock["parameters"] == 3 * upsampler + small_head - (32 * 32 * 4 + 32)
    assert stock["ratio"] == stock["ratio_min"] == stock["ratio_max"] == 1
    for model in report["models"]:
        assert len(model["samples"]) == 3
        assert 0 < model["seconds_min"] <= model["seconds"] <= model["seconds_max"]
        assert model["ratio_min"] <= model["ratio"] <= model["ratio_max"]
        assert set(model["kept"]) == {"proposals", "detections"}
        assert "paper_fps" not in model
    ratios = [one / other for one, other in zip(carafe["samples"], stock["samples"], strict=True)]
    assert carafe["ratio"] == pytest.approx(sorted(ratios)[1], rel=1e-3)
    for model, upsamplers in ((stock, 0), (carafe, 4)):  # three in the FPN, one in the mask head
        milliseconds, calls = model["profile"]["parts_ms"], model["profile"]["calls"]
        assert calls.get("reassembly", 0) == calls.get("content encoder", 0) == upsamplers
        assert (milliseconds["reassembly"] > 0) == bool(upsamplers)
        assert min(milliseconds.values()) >= 0
        assert milliseconds["total"] > milliseconds["rest"] > 0
    shown = capsys.readouterr().out
    assert "stock" in shown
    assert "Where a prediction's milliseconds go" in shown
    assert "Seconds per prediction at 64x96, 3 rounds" in shown


def test_memory_handed_back_is_measured_beside_memory_kept(tiny: list[str], tmp_path: Path) -> None:
    """In a second process, which takes turns with the first; another than glibc keeps no memory to compare."""
    file = tmp_path / "result.json"
    arguments = (*tiny, *SMALL, "--repeats", 3, "--compare-memory", "--json", file)
    command = [sys.executable, "-m", "benchmarks.model", *map(str, arguments)]
    unset = {name: value for name, value in environment().items() if not name.startswith("MALLOC_")}
    done = subprocess.run(command, cwd=ROOT, env=unset, capture_output=True, text=True)
    if memory._glibc() is None:
        assert done.returncode == 2
        return
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    other = report["handing_back"]
    assert report["keeps_memory"] is True
    assert min(report["resident_peak_bytes"], other["resident_peak_bytes"]) > 1e8
    for kept, back in zip(report["models"], other["models"], strict=True):
        assert kept["name"] == back["name"]
        assert len(kept["samples"]) == len(back["samples"]) == 3
        ratios = sorted(one / two for one, two in zip(back["samples"], kept["samples"], strict=True))
        assert back["times_kept"] == pytest.approx(ratios[1], rel=1e-3)
    shown = " ".join(done.stdout.split())  # a narrow table breaks its title
    assert "Seconds with freed memory kept, handed back" in shown


def test_memory_can_be_handed_back(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "result.json"
    assert call_tool("benchmarks.model", *tiny, *SMALL, "--repeats", 1, "--no-keep-memory", "--json", file) == 0
    report = json.loads(file.read_text())
    assert report["keeps_memory"] is False
    assert "handing_back" not in report
    assert call_tool("benchmarks.model", *tiny, *SMALL, "--no-keep-memory", "--compare-memory") == 2
    assert "--compare-memory compares with memory kept" in capsys.readouterr().err


def test_what_was_measured_survives_a_cut(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import measure

    file, taken = tmp_path / "result.json", []
    sample = measure.Timing.sample

    def cut(timing: measure.Timing) -> None:
        if len(taken) == 5:  # in the middle of the third round
            raise KeyboardInterrupt
        taken.append(timing)
        sample(timing)

    monkeypatch.setattr(measure.Timing, "sample", cut)
    with pytest.raises(KeyboardInterrupt):
        call_tool("benchmarks.model", *tiny, *SMALL, "--json", file)
    report = json.loads(file.read_text())
    assert report["rounds"] == 2
    assert [len(model["samples"]) for model in report["models"]] == [2, 2]
    assert not list(tmp_path.glob("result.json.*"))


def test_profile_tells_parts_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import model as bench_model
    from carafe_plugin import CARAFEUpsample
    from carafe_plugin.modules import carafe

    clock = [0.0]
    monkeypatch.setattr(torch.utils.benchmark, "timer", lambda: clock[0])

    def advance(seconds: float) -> None:
        clock[0] += seconds

    def taking(seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            advance(seconds)
            return function(*arguments, **settings)

        return call

    upsampler, pool = CARAFEUpsample(4, norm=torch.nn.BatchNorm2d, act=torch.nn.ReLU).eval(), torch.nn.MaxPool2d(2)
    names = ("channel_compressor", "compressor_norm", "compressor_act", "content_encoder")
    for seconds, module in zip((1, 2, 4, 8, 64), (*(getattr(upsampler, name) for name in names), pool), strict=True):
        module.forward = taking(seconds, module.forward)
    monkeypatch.setattr(carafe, "reassemble_logits", taking(16, carafe.reassemble_logits))
    interpolate = taking(32, torch.nn.functional.interpolate)
    monkeypatch.setattr(torch.nn.functional, "interpolate", interpolate)

    def predict() -> None:
        features = torch.rand(1, 4, 3, 3)
        upsampler(upsampler(features))
        advance(128)
        pool(torch.nn.functional.interpolate(features, scale_factor=2))

    seconds, calls = bench_model.split(torch.nn.ModuleList([upsampler, pool]), predict)
    assert seconds == {
        "channel compressor": 2,
        "content encoder": 16,
        "norm and activation": 12,
        "reassembly": 32,
        "interpolation": 32,
        "max pooling": 64,
        "rest": 128,
    }
    assert calls["reassembly"] == calls["content encoder"] == 2
    assert calls["interpolation"] == calls["max pooling"] == 1
    assert torch.nn.functional.interpolate is interpolate
    assert not upsampler._forward_hooks
    assert not pool._forward_pre_hooks
    record = bench_model.profile_record([seconds, {**seconds, "rest": 130}, {**seconds, "rest": 140}], calls)
    assert record["parts_ms"]["rest"] == 130_000
    assert record["parts_ms"]["total"] == 288_000


def test_every_model_comes_first_and_last_as_often() -> None:
    from benchmarks import model as bench_model

    models = ["a", "b", "c", "d"]
    rounds = [bench_model.turns(models, round_) for round_ in range(8)]
    assert all(sorted(order) == models for order in rounds)
    for place in (0, -1):
        assert all([order[place] for order in rounds].count(model) == 2 for model in models)


def test_heads_go_on_with_the_same_boxes(tiny: list[str]) -> None:
    cfgs = [bare_models.read_config(config.rpartition("=")[2]) for config in tiny]
    models = [bare_models.build_model(cfg) for cfg in cfgs]
    pooled: list[list[torch.Tensor]] = []
    for cfg, model in zip(cfgs, models, strict=True):
        kept = bare_models.fix_boxes(model, (64, 96))
        seen: list[torch.Tensor] = []
        for extractor in (model.roi_head.bbox_roi_extractor, model.roi_head.mask_roi_extractor):
            extractor.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[1]))
        (result,) = model.test_step(bare_models.one_image(cfg, (64, 96)))
        assert len(result.pred_instances.masks) == 5  # rcnn.max_per_img, whatever the weights detect
        assert 0 < kept["proposals"] <= 20
        pooled.append(seen)
    for stock, carafe, number in zip(*pooled, (20, 5), strict=True):  # rpn.max_per_img, rcnn.max_per_img
        assert stock.shape == (number, 5)
        torch.testing.assert_close(stock, carafe, rtol=0, atol=0)
        x1, y1, x2, y2 = stock[:, 1:].T
        assert bool(((x1 >= 0) & (y1 >= 0) & (x2 > x1) & (y2 > y1) & (x2 <= 96) & (y2 <= 64)).all())


def test_shared_parameters_are_equal_and_others_left() -> None:
    first, second = (torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, width)) for width in (4, 5))
    before = second[1].weight.clone()
    bare_models.share_parameters([first, second])
    torch.testing.assert_close(second[0].weight, first[0].weight, rtol=0, atol=0)
    torch.testing.assert_close(second[1].weight, before, rtol=0, atol=0)


def test_the_default_models_are_the_papers() -> None:
    bench = load_tool("benchmarks.model")
    named = bench.named_configs([])
    kinds = []
    for _, config, _ in named:
        model = bare_models.read_config(config).model
        kinds.append([model[part].type.rpartition(".")[2] for part in ("backbone", "neck")])
    assert kinds == [["ResNet", "FPN"], ["ResNet", "CARAFEFPN"], ["CARAFEResNet", "FPN"], ["CARAFEResNet", "CARAFEFPN"]]
    # Table 5: 12.5, 12.2, 12.1 and 11.7 frames per second.
    assert [round(named[0][2] / fps, 3) for _, _, fps in named] == [1, 1.025, 1.033, 1.068]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.py"], "no such configuration file"),
        (["a=x.py", "a=y.py"], "every model needs a name of its own (NAME=CONFIG), got a, a"),
        (["TINY", "--repeats", "0"], "--repeats: expected a positive int, got '0'"),
        (["TINY", "--threads", "9999"], "--threads: 9999 asked for"),
        (["TINY", "--shape", "0", "8"], "--shape: expected a positive int, got '0'"),
        (["TINY", "--device", "tpu"], "--device: expected cpu or cuda, got 'tpu'"),
        (["TINY", "--json", "no/such/file.json"], "--json: no folder no/such to write file.json into"),
    ],
)
def test_mistakes_end_in_one_line(
    arguments: list[str], message: str, tiny: list[str], capsys: pytest.CaptureFixture
) -> None:
    assert call_tool("benchmarks.model", *(tiny[1] if argument == "TINY" else argument for argument in arguments)) == 2
    shown = capsys.readouterr().err
    assert message in shown.splitlines()[-1]
    assert "Traceback" not in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_missing_gpu_is_told(tiny: list[str], capsys: pytest.CaptureFixture) -> None:
    assert call_tool("benchmarks.model", tiny[1], "--device", "cuda") == 2
    assert "--device cuda: torch finds no CUDA device" in capsys.readouterr().err
