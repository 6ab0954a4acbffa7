"""benchmarks/gpu_check.py: every step runs whatever the others do, and its checks find faults. No GPU is needed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, gpu_probes, mmcv_operator
from benchmarks import module as bench_module
from benchmarks import op as bench_op
from benchmarks.gpu_check import Step

pytestmark = pytest.mark.usefixtures("one_thread")


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-S", "-c", code, *arguments]


FINE = Step("fine", python("import os, sys; print(sys.argv[1], os.environ['PYTHONPATH'])", "{out}"), 60)
BROKEN = Step("broken", python("print('before', flush=True); raise SystemExit('it is broken')"), 60)
SLOW = Step("slow", python("import time; print('start', flush=True); time.sleep(60)"), 3)


# --------------------------------------------------------------------------------------------------- steps


def test_steps_go_on_after_one_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = Step("absent", ["no-such-program"], 60)
    skipped = Step("skipped", [], 60, missing="no such tool")
    monkeypatch.setattr(gpu_check, "all_steps", lambda source: [[BROKEN, SLOW], [absent], [skipped], [FINE]])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mmcv_operator, "architecture", lambda: "9.0")
    out = tmp_path / "out"
    assert gpu_check.main(["--out", str(out)]) == 1
    steps = {step["name"]: step for step in json.loads((out / "summary.json").read_text())["steps"]}
    assert {name: (step["status"], step["code"]) for name, step in steps.items()} == {
        "broken": ("failed", 1),
        "slow": ("timed out", None),
        "absent": ("failed", None),
        "skipped": ("skipped", None),
        "fine": ("ok", 0),
    }
    assert steps["slow"]["seconds"] < 30
    assert steps["broken"]["detail"] == "it is broken"
    assert steps["slow"]["detail"] == "start"
    assert "no-such-program" in steps["absent"]["detail"]
    assert steps["skipped"]["detail"] == "no such tool"
    assert "detail" not in steps["fine"]
    assert (out / "broken.log").read_text().splitlines()[1] == "before"
    last = (out / "fine.log").read_text().splitlines()[-1]
    assert last.startswith(f"{out} {gpu_check.ROOT}")  # {out} is the folder; this checkout's package is found
    assert not (out / "skipped.log").exists()

    assert gpu_check.main(["--out", str(out), "--only", "fine", "skipped"]) == 0
    assert [step["name"] for step in json.loads((out / "summary.json").read_text())["steps"]] == ["skipped", "fine"]


def test_no_step_outlives_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmcv_operator, "architecture", lambda: "9.0")
    record = gpu_check.run_step(FINE, tmp_path, time.monotonic() + 0.5)
    assert (record["status"], record["detail"]) == ("skipped", "no time is left")
    lock = tmp_path / "extensions" / "peer" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()  # as a killed compilation leaves it
    unlimited = Step("slow", SLOW.command, 60)
    record = gpu_check.run_step(unlimited, tmp_path, time.monotonic() + 1.5)
    assert record["status"] == "timed out"
    assert record["seconds"] < 30
    assert not lock.exists()


def test_steps_name_tools_options_and_probes_that_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / mmcv_operator.LAUNCHERS
    source.parent.mkdir(parents=True)
    source.touch()
    steps = {step.name: step for group in gpu_check.all_steps(tmp_path) for step in group}
    assert list(steps)[:2] == ["build", "mmcv"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    parsers: dict[str, Callable] = {tool.__name__: tool.parse_arguments for tool in (bench_op, bench_module)}
    read = []
    for step in steps.values():
        tool = next((word for word in step.command if word in parsers), None)
        if tool:
            asked = parsers[tool]([word.replace("{out}", str(tmp_path)) for word in step.command[3:]])
            names = {peer.name for peer in asked.peers}
            assert asked.device == "cuda"
            assert names & {"mmcv", "pack-mmcv"}
            read.append((step.name, names & {"shifted-madd-compiled", "pack-compiled"}))
        elif "benchmarks.gpu_probes" in step.command:
            assert step.command[step.command.index("benchmarks.gpu_probes") + 1] in gpu_probes.PROBES
    assert read == [("op-float32", {"shifted-madd-compiled"}), ("op-float16", set()), ("module-float32", set())]
    missing = {step.name: step.missing for group in gpu_check.all_steps(None) for step in group}
    assert missing["mmcv"] == "no source of mmcv: --mmcv-source names it"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "everything"], "--only: unknown step 'everything'; known are build, mmcv, environment"),
        (["--budget", "0"], "--budget: expected a positive number of seconds, got 0"),
        (["--mmcv-source", "tools"], "--mmcv-source: no pytorch/cuda/carafe_cuda.cu in tools"),
        (["--out", __file__], "--out: expected a folder"),
        ([], "needs a CUDA device, torch sees none"),
    ],
)
def test_mistakes_and_a_missing_gpu_end_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- probes


def test_small_probe_is_right_on_the_cpu_and_finds_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_probes, "SMALL_SCALES", (Fraction(2), Fraction(1, 2)))
    assert gpu_probes.small("cpu")["ok"]
    right = gpu_probes.reassemble_logits
    monkeypatch.setattr(gpu_probes, "reassemble_logits", lambda *arguments: right(*arguments) * 1.01)
    assert not gpu_probes.small("cpu")["ok"]


def test_detector_neck_is_torchvisions_but_for_the_upsampler() -> None:
    ops = pytest.importorskip("torchvision.ops", reason="torchvision is not installed")
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

    neck = ops.FeaturePyramidNetwork([4, 8, 16], 8, extra_blocks=LastLevelMaxPool())
    ours = gpu_probes.UpsamplingFPN(neck, 8)
    outputs = ours({"a": torch.rand(1, 4, 7, 9), "b": torch.rand(1, 8, 4, 5), "c": torch.rand(1, 16, 2, 3)})
    sizes = {name: tuple(each.shape[1:]) for name, each in outputs.items()}
    assert sizes == {"a": (8, 7, 9), "b": (8, 4, 5), "c": (8, 2, 3), "pool": (8, 1, 2)}
    sum(each.sum() for each in outputs.values()).backward()
    assert all(each.grad is not None for each in ours.upsamplers.parameters())

    for upsampler in ours.upsamplers:
        gpu_probes.as_nearest(upsampler)
    even = {"a": torch.rand(1, 4, 12, 16), "b": torch.rand(1, 8, 6, 8), "c": torch.rand(1, 16, 3, 4)}
    for (name, expected), (own, got) in zip(neck(even).items(), ours(even).items(), strict=True):
        assert name == own
        torch.testing.assert_close(got, expected)


def test_probe_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "environment.json"
    assert gpu_probes.main(["environment", "--device", "cpu", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["machine"]["torch"] == torch.__version__
    assert gpu_probes.main(["compiled", "--device", "meta"]) == 1
    assert '"ok": false' in capsys.readouterr().out
