"""studies/quantised.py on a tiny demo: what is quantised is what each variant says, and the metrics are the demo's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("mmdet", reason="the study trains a detector: mmdet is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from tiny_demos import arguments
from toolkit import needs_torch

from studies import quantised

onnx = pytest.importorskip("onnx", reason="onnx is not installed")

pytestmark = needs_torch(2, 6, "carafe_plugin.export")


def quantised_operators(path: Path) -> list[str]:
    """The operators that compute on what was in 8-bit integers."""
    nodes = onnx.load(path).graph.node
    made_by = {output: node.op_type for node in nodes for output in node.output}
    return [
        node.op_type
        for node in nodes
        if "QuantizeLinear" not in node.op_type and made_by.get(node.input[0]) == "DequantizeLinear"
    ]


def test_variants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(quantised, "CALIBRATION_IMAGES", 2)
    assert quantised.main(arguments("demo", tmp_path)) == 0
    work = tmp_path / "work"
    found = json.loads((work / "quantised.json").read_text())
    results = found["results"]
    assert list(results) == ["PyTorch", "onnxruntime, float32", *quantised.VARIANTS]
    shown = capsys.readouterr().out
    assert all(title in shown for title in results)

    evaluated = json.loads((work / "carafe_all" / "results.json").read_text())  # by tools/test.py
    assert results["PyTorch"] == pytest.approx({name: evaluated[name] for name in quantised.METRICS}, abs=1e-4)
    # Scores that almost tie may swap places, in a detector that has hardly learnt anything.
    for name in quantised.METRICS:
        assert results["onnxruntime, float32"][name] == pytest.approx(results["PyTorch"][name], abs=0.01)

    sizes = [results[title]["megabytes"] for title in list(results)[1:]]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[1] < 0.4 * sizes[0]
    in_float, reassembly_in_float, everything = (
        quantised_operators(work / f"pyramid_int8_{number}.onnx") for number in range(3)
    )
    graph = onnx.load(work / "pyramid.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert everything.count("Conv") == reassembly_in_float.count("Conv") == kinds.count("Conv")
    assert everything.count("MatMul") == kinds.count("MatMul") > 0
    assert in_float.count("MatMul") == reassembly_in_float.count("MatMul") == 0
    assert 0 < in_float.count("Conv") < kinds.count("Conv")
