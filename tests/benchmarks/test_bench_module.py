"""benchmarks/module.py: the modules beside the same in PyTorch, and what training keeps."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import comparison
from benchmarks import module as bench_module
from benchmarks.comparison import Inputs, Peer, Problem
from carafe_plugin import CARAFEUpsample
from carafe_plugin.modules import guided, peers, rivals
from carafe_plugin.modules.guided import FADE
from carafe_plugin.modules.peers import DeconvUpsample
from carafe_plugin.modules.rivals import DySample

pytestmark = pytest.mark.usefixtures("one_thread")
PROBLEMS = [Problem(8, 5, 6, batch=2, group_size=2), Problem(4, 7, 5, kernel_size=3, up=1, down=2)]


@pytest.mark.parametrize("problem", PROBLEMS, ids=["up", "down"])
def test_pack_is_our_module_in_steps(problem: Problem) -> None:
    inputs = Inputs.random(problem)
    ours = bench_module.OURS[0].setup(problem, inputs)
    expected = [comparison.run_pass(ours, each) for each in comparison.PASSES]
    # Kernels differ from place to place, so every parameter matters.
    assert all(gradient.abs().max() > 1e-5 for gradient in expected[1])
    packs = [peer for peer in bench_module.PEERS if peer.name in ("pack-unfold", "pack-shifted")]
    assert len(packs) == 2
    for peer in packs:
        assert peer.equal
        call = peer.setup(problem, inputs)
        assert [each.shape for each in call.parameters] == [each.shape for each in ours.parameters]
        for each, values in zip(comparison.PASSES, expected, strict=True):
            for result, value in zip(comparison.run_pass(call, each), values, strict=True):
                torch.testing.assert_close(result, value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("problem", PROBLEMS, ids=["up", "down"])
def test_bound_counts_what_runs(problem: Problem) -> None:
    call = bench_module.OURS[0].setup(problem, Inputs.random(problem))
    counter = FlopCounterMode(display=False)
    with counter:
        call.forward()
    sizes = bench_module.ModuleProblem(**vars(problem))
    assert sizes.flop(backward=False) == counter.get_total_flops()
    assert sizes.flop(backward=True) == 3 * sizes.flop(backward=False)


UP = Problem(8, 5, 6, batch=2)


@pytest.mark.parametrize("peer", bench_module.RIVALS, ids=lambda peer: peer.name)
def test_rivals_learn_and_differentiate_all_their_maps(peer: Peer) -> None:
    call = peer.setup(UP, Inputs.random(UP))
    assert not peer.equal
    assert peer.unavailable(PROBLEMS[1]) == "it only upsamples"
    maps = [each for each in call.wrt if not any(each is parameter for parameter in call.parameters)]
    guided = [] if peer.name.startswith("d") else [(2, 8, 10, 12)]
    assert sorted(tuple(each.shape) for each in maps) == sorted([(2, 8, 5, 6), *guided])
    gradients = comparison.run_pass(call, "forward_backward")
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert sum(bool(gradient.any()) for gradient in gradients) > len(maps)
    assert bench_module.count_flop(call.forward) > 0


def flop_per_pixel(build: Callable[..., nn.Module], **settings: Any) -> float:
    """Of one of the features' pixels, at 256 channels and a scale of 2; no values are needed."""
    with torch.device("meta"):
        module = build(256, 2, **settings)
        maps = [torch.empty(1, 256, 50, 84), torch.empty(1, 256, 100, 168)]
        maps = maps if getattr(module, "guided", False) else maps[:1]
        return bench_module.count_flop(lambda: module(*maps)) / (50 * 84)


def test_flop_is_as_published() -> None:
    """CARAFE's paper has 199k a pixel, and its deconvolution 1180k; FADE's authors have 2.65G in a SegFormer-B1."""
    assert flop_per_pixel(CARAFEUpsample) == 199_168
    assert flop_per_pixel(DeconvUpsample) == pytest.approx(1180e3, rel=1e-3)
    # Three levels of a 512 x 512 image reach a quarter of it: from 16 pixels in three steps, from 32 in two, from 64
    # in one. A multiply-add is one there, as CARAFE's 1.45G show.
    pixels = 16**2 + 2 * 32**2 + 3 * 64**2
    assert flop_per_pixel(CARAFEUpsample) * pixels / 2 == pytest.approx(1.45e9, abs=5e6)
    gate = 2 * 2 * 4 * 256  # not counted here: two products for each value of the output
    assert (flop_per_pixel(FADE) + gate) * pixels / 2 == pytest.approx(2.65e9, abs=5e6)


def test_sampling_counts_four_taps() -> None:
    layer = 2 * 256 * 32
    assert flop_per_pixel(DySample) == layer + 4 * 256 * 2 * 4


ROW = re.compile(r"\| `(.+?)` \| ([\d,]+) \| ([\d.]+) \|")


def test_table_in_docs() -> None:
    """docs/rivals.md's numbers of parameters and FLOPs are these."""
    rows = ROW.findall((Path(__file__).parents[2] / "docs" / "rivals.md").read_text())
    names = {kind.__name__: kind for kind in (CARAFEUpsample, *peers.UPSAMPLERS, *rivals.RIVALS, *guided.GUIDED)}
    assert {row[0].split("(")[0] for row in rows} == names.keys()
    for code, parameters, flop in rows:
        kind, _, settings = code.rstrip(")").partition("(")
        arguments = eval(f"dict({settings})")
        assert f"{sum(p.numel() for p in names[kind](256, **arguments).parameters()):,}" == parameters, code
        assert f"{flop_per_pixel(names[kind], **arguments) * 50 * 84 / 1e9:.3f}" == flop, code


def test_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, plot = tmp_path / "result.json", tmp_path / "plot.svg"
    arguments = [
        "--quick",
        "--threads",
        "1",
        "--repeats",
        "1",
        "--shapes",
        "8x5x6",
        "--peers",
        "pack-unfold",
        "nearest",
        "freqfusion",
    ]
    code = bench_module.main([*arguments, "deconvolution", "--json", str(file), "--plot", str(plot)])
    assert code == 0
    report = json.loads(file.read_text())
    assert report["command"].startswith("python -m benchmarks.module --quick")
    measured = {peer["name"]: peer for peer in report["results"][0]["peers"]}
    assert list(measured) == ["carafe", "pack-unfold", "nearest", "freqfusion", "deconvolution"]
    ours, pack = measured["carafe"], measured["pack-unfold"]
    assert ours["parameters"] == pack["parameters"] == 8 * 64 + 64 + 64 * 9 * 100 + 100
    assert measured["nearest"]["parameters"] == 0
    assert measured["deconvolution"]["parameters"] == 8 * 8 * 4 + 8
    # Without the encoder's map: compressors, filters, then direction and scale of the offsets, at both resolutions.
    offsets = 2 * (72 * 9 + 1) * (8 + 32)
    assert measured["freqfusion"]["parameters"] == 2 * (8 * 64 + 64) + (64 * 9 + 1) * (25 + 9) + offsets
    assert ours["flop"] == 2 * 30 * (8 * 64 + 64 * 9 * 100 + 4 * 25 * 8)
    assert measured["nearest"]["flop"] == 0
    assert measured["freqfusion"]["flop"] > ours["flop"]
    # Features, the compressed features, and the content encoder's output: nothing expanded.
    assert ours["forward_backward"]["saved_bytes"] == 4 * 30 * (8 + 64 + 100)
    assert ours["forward_backward"]["saved_tensors"] == 3
    assert pack["forward_backward"]["saved_bytes"] > 4 * 30 * (25 * 8 + 64 + 100)
    assert 0 <= pack["forward_backward"]["error"] < 1e-4
    output = capsys.readouterr().out
    assert "58,276" in output
    assert f"  carafe                 {ours['flop'] / 1e9:8.3f} G\n" in output
    assert plot.read_text().count("<svg") == 1


def test_mistakes_end_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench_module.main(["--peers", "unfold-einsum"])
    assert stopped.value.code == 2
    assert "--peers: invalid choice: 'unfold-einsum' (choose from " in capsys.readouterr().err
