"""benchmarks/module.py: the modules beside the same in PyTorch, and what training keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import comparison
from benchmarks import module as bench_module
from benchmarks.comparison import Inputs, Problem

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
    ]
    code = bench_module.main([*arguments, "deconvolution", "--json", str(file), "--plot", str(plot)])
    assert code == 0
    report = json.loads(file.read_text())
    assert report["command"].startswith("python -m benchmarks.module --quick")
    measured = {peer["name"]: peer for peer in report["results"][0]["peers"]}
    assert list(measured) == ["carafe", "pack-unfold", "nearest", "deconvolution"]
    ours, pack = measured["carafe"], measured["pack-unfold"]
    assert ours["parameters"] == pack["parameters"] == 8 * 64 + 64 + 64 * 9 * 100 + 100
    assert measured["nearest"]["parameters"] == 0
    assert measured["deconvolution"]["parameters"] == 8 * 8 * 4 + 8
    # Features, the compressed features, and the content encoder's output: nothing expanded.
    assert ours["forward_backward"]["saved_bytes"] == 4 * 30 * (8 + 64 + 100)
    assert ours["forward_backward"]["saved_tensors"] == 3
    assert pack["forward_backward"]["saved_bytes"] > 4 * 30 * (25 * 8 + 64 + 100)
    assert 0 <= pack["forward_backward"]["error"] < 1e-4
    assert "58,276" in capsys.readouterr().out
    assert plot.read_text().count("<svg") == 1


def test_mistakes_end_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench_module.main(["--peers", "unfold-einsum"])
    assert stopped.value.code == 2
    assert "--peers: invalid choice: 'unfold-einsum' (choose from " in capsys.readouterr().err
