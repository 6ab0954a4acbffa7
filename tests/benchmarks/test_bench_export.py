"""benchmarks/export.py: what it exports is what it compares with, its ratios are those of its samples."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from toolkit import TORCH

from benchmarks import export as bench_export
from benchmarks import runtimes

if TORCH < (2, 6):
    pytest.skip(f"carafe_plugin.export: from torch 2.6 on, this is {torch.__version__}", allow_module_level=True)
if not bench_export.installed():
    pytest.skip("neither onnxruntime with onnxscript nor openvino is installed", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("scale", ["2", "1/2"])
def test_record(scale: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, runtime = tmp_path / "result.json", bench_export.installed()[0]
    arguments = ["--shapes", "4x6x8", "--scale-factor", scale, "--runtimes", runtime, "--repeats", "3"]
    assert bench_export.main([*arguments, "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    assert record["command"].startswith("python -m benchmarks.export --shapes 4x6x8")
    assert str(tmp_path) not in json.dumps(record)
    assert record["machine"]["threads"] == 1
    (result,) = record["exported"]
    rows = {(row["name"], row["sizes"], row["runtime"]): row for row in result["rows"]}
    others = {"max-pool", "average-pool", "strided-conv"}
    if scale == "2":
        others = {"nearest", "bilinear", "deconvolution", "pixel-shuffle", "grid-sample"}
    assert {name for name, _, _ in rows} == {"module", "reassembly"} | others
    for name in ("module", "reassembly"):
        assert [sizes for each, sizes, _ in rows if each == name] == ["", "fixed", "any"]
        for sizes in ("fixed", "any"):
            assert 0 < rows[name, sizes, runtime]["error"] < 1e-5
    assert rows["module", "", "torch"]["times_ours"] == rows["reassembly", "", "torch"]["times_ours"] == 1
    ours, theirs = rows["reassembly", "", "torch"], rows["reassembly", "any", runtime]
    ratios = [one / other for one, other in zip(theirs["samples_ms"], ours["samples_ms"], strict=True)]
    assert theirs["times_ours"] == pytest.approx(statistics.median(ratios), rel=1e-2)  # of rounded samples
    shown = capsys.readouterr().out
    assert all(name in shown for name in others)
    assert "grid-sample" not in shown or scale == "2"


def test_a_model_that_differs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = bench_export.installed()[0]
    start = runtimes.RUNTIMES[runtime]
    monkeypatch.setitem(
        runtimes.RUNTIMES, runtime, lambda path: lambda inputs: [1.001 * each for each in start(path)(inputs)]
    )
    monkeypatch.setattr(bench_export, "DOWNSAMPLERS", ())
    arguments = ["--shapes", "4x6x8", "--scale-factor", "1/2", "--runtimes", runtime, "--repeats", "1"]
    assert bench_export.main(arguments) == 1


def test_peak_is_that_of_a_prediction(tmp_path: Path) -> None:
    """Twice 16 MB, a sum and its exponential: one that the runtime may write over, and the result."""
    runtime = bench_export.installed()[0]

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + x.flip(3)).exp()

    x = torch.rand(1, 4, 1000, 1000)
    subject = bench_export.Subject("model", Model().eval(), (x,), {"fixed": None})
    path, _ = bench_export.exported(subject, "fixed", runtime, tmp_path / "model")
    counted = bench_export.peak_bytes(runtime, path, [np.asarray(x)])
    if counted is None:
        pytest.skip("the peak of the resident memory cannot be reset here")
    assert 16e6 < counted < 80e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "4x5x8", "--scale-factor", "1/2"], "height and width must be multiples of 2, got 5x8"),
        (["--runtimes", "tensorrt"], "--runtimes: invalid choice: 'tensorrt' (choose from "),
        (["--repeats", "0"], "--repeats: expected a positive int, got '0'"),
    ],
)
def test_mistakes_end_in_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench_export.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_what_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_export, "installed", list)
    for arguments in ([], ["--runtimes", "openvino"]):
        with pytest.raises(SystemExit) as stopped:
            bench_export.parse_arguments(arguments)
        assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert "needs onnxruntime with onnx and onnxscript, or openvino; found none of them" in shown
    assert "--runtimes: openvino, or what exports for it, is not installed" in shown
