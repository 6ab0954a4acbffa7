"""The steps of the demos: what they refuse to reuse or to accept, and what becomes of a tool that fails."""

from __future__ import annotations

import errno
import fcntl
import json
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("mmdet", reason="the demo trains detectors: mmdet is not installed")
pytest.importorskip("mmseg", reason="the demo trains segmentation models: mmseg is not installed")

from tiny_demos import COMPARISONS, arguments, demo_in, is_alive, wait_for
from tool_runs import ROOT

from studies.demo import generate_scenes
from studies.demo import run as demo_run
from studies.demo.comparison import Demo
from studies.demo.run import StepError, discard_stale


@pytest.mark.parametrize("tool", list(COMPARISONS))
def test_minimum_is_a_lower_bound_for_each_model(tool: str) -> None:
    comparison = COMPARISONS[tool]
    enough = dict(comparison.minimum)
    assert comparison.shortfalls({"baseline": enough, "carafe": enough}) == []
    for metric in enough:
        weak = enough | {metric: enough[metric] - 0.001}
        missed = comparison.shortfalls({"baseline": enough, "carafe": weak})
        assert [line.split(":")[0] for line in missed] == ["carafe"]


@pytest.fixture(params=list(COMPARISONS))
def demo(request: pytest.FixtureRequest, tmp_path: Path) -> Demo:
    """A demo that has the dataset and nothing else."""
    demo = demo_in(request.param, tmp_path)
    assert generate_scenes.generate(demo.data_root, demo.request)
    demo.work_dir.mkdir()
    return demo


def test_results_of_another_configuration_or_dataset_are_removed(demo: Demo) -> None:
    def keeps_results(**changes: int) -> bool:
        result = demo.folder(demo.models[0]) / "iter_4.pth"
        result.write_text("trained")
        (demo.work_dir / "summary.json").write_text("{}")
        other = demo_in(demo.comparison.name.replace("-", "_"), demo.work_dir.parent, **changes)
        discard_stale(other, demo.models[0])
        assert result.exists() == (demo.work_dir / "summary.json").exists()
        return result.exists()

    discard_stale(demo, demo.models[0])
    assert keeps_results()
    assert not keeps_results(iterations=5)
    assert keeps_results(iterations=5)
    assert not keeps_results(seed=1)
    assert not keeps_results()
    annotations = generate_scenes.annotation_files(demo.data_root, demo.request)
    assert len(annotations) == (2 if demo.request.format == "coco" else 12)
    annotations[-1].write_bytes(annotations[-1].read_bytes() + b"\n")
    assert not keeps_results()


def test_folder_of_somebody_else_is_not_touched(demo: Demo, capsys: pytest.CaptureFixture[str]) -> None:
    mine = demo.work_dir / "baseline" / "precious.pth"
    mine.parent.mkdir()
    mine.write_text("weights")
    tool = demo.comparison.name.replace("-", "_")
    assert demo_run.main(demo.comparison, None, arguments(tool, demo.work_dir.parent)) == 1
    assert str(mine.parent) in capsys.readouterr().out.replace("\n", "")
    assert mine.read_text() == "weights"


#: By config: where CARAFE++ comes in, and the type that it replaces.
REPLACED = {
    "carafe": {
        "model.neck": ("FPN", "mmdet.CARAFEFPN"),
        "model.roi_head.mask_head": ("FCNMaskHead", "mmdet.CARAFEFCNMaskHead"),
    },
    "carafe_all": {
        "model.neck": ("FPN", "mmdet.CARAFEFPN"),
        "model.roi_head.mask_head": ("FCNMaskHead", "mmdet.CARAFEFCNMaskHead"),
        "model.backbone": ("ResNet", "mmdet.CARAFEResNet"),
    },
    "carafe in demo_seg": {
        "model.backbone": ("ResNet", "mmseg.CARAFEResNet"),
        "model.decode_head": ("UPerHead", "mmseg.CARAFEUPerHead"),
    },
}


@pytest.mark.parametrize("name", list(REPLACED))
def test_models_differ_in_types_alone(name: str, tmp_path: Path) -> None:
    demo = demo_in("demo_seg", tmp_path) if "seg" in name else demo_in("demo", tmp_path, "--all")
    models = {model.name: demo.load_config(model) for model in demo.models}
    baseline, carafe = models["baseline"], models[name.split()[0]]
    for place, (stock, ours) in REPLACED[name].items():
        part, other = baseline, carafe
        for key in place.split("."):
            part, other = part[key], other[key]
        assert (part.pop("type"), other.pop("type")) == (stock, f"carafe_plugin.openmmlab.{ours}")
    assert carafe.to_dict() == baseline.to_dict()


@pytest.mark.parametrize("tool", list(COMPARISONS))
def test_default_options_change_nothing_in_the_configs(tool: str) -> None:
    comparison = COMPARISONS[tool]
    demo = demo_run.parse_demo(comparison, None, [])
    assert [demo.config_options(model) for model in demo.models] == [{}] * len(demo.models)
    assert demo.request == comparison.request
    assert demo.models == comparison.models
    for model in (*comparison.models, *comparison.more_models):
        config = demo.load_config(model)
        for loader in (config.train_dataloader, config.test_dataloader):
            assert ROOT / loader.dataset.data_root == demo.data_root
        assert config.train_cfg.max_iters == config.param_scheduler[-1].end == demo.iterations
        assert config.randomness.seed == demo.request.seed


def test_failing_tool_is_reported_with_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "tool.log"
    code = "import sys; print('Iter(train) [ 1/20]  loss: 1'); print('a long story'); print('the end'); sys.exit(3)"
    with pytest.raises(StepError) as error:
        demo_run.run_tool("Train it", ["-c", code], log)
    for part in ("Train it failed with exit code 3", str(log), "a long story\nthe end"):
        assert part in str(error.value)
    assert log.read_text().endswith("the end\n")


def test_missing_checkpoint_after_training_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_run, "run_tool", lambda *_: None)
    demo = demo_in("demo", tmp_path)
    with pytest.raises(StepError, match=r"iter_4\.pth is missing"):
        demo_run.train(demo, demo.models[0])


def test_evaluation_without_the_metric_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = demo_in("demo_seg", tmp_path)
    log = demo.folder(demo.models[0]) / "test" / "20250101_000000" / "20250101_000000.json"

    def write_log(*_: object) -> None:
        log.parent.mkdir(parents=True)
        log.write_text(json.dumps({"aAcc": 50.0}))

    monkeypatch.setattr(demo_run, "run_tool", write_log)
    with pytest.raises(StepError, match="has no metric 'mIoU'"):
        demo_run.evaluate(demo, demo.models[0])
    monkeypatch.setattr(demo_run, "run_tool", lambda *_: None)
    with pytest.raises(StepError, match=r"expected one <time>/<time>\.json"):
        demo_run.evaluate(demo, demo.models[0])


def test_interrupting_stops_the_tool(tmp_path: Path) -> None:
    """SIGTERM, as from a job scheduler: the demo says how to resume, and leaves no training behind."""
    code = (
        "import sys, pathlib\nfrom studies.demo import detection, run\n"
        "tool = 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'\n"
        f"log = pathlib.Path({str(tmp_path / 'log')!r})\n"
        "run.run = lambda _: run.run_tool('Train', ['-c', tool], log)\n"
        f"sys.exit(run.main(detection.COMPARISON, None, {arguments('demo', tmp_path)!r}))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "log"
    wait_for(lambda: log.exists() and log.read_text().endswith("\n"), 60, "the tool's first line")
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "The same command resumes from here" in printed
    assert not is_alive(int(log.read_text()))


def test_whose_os_error_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line where the user's folder or a full disk is the cause; a mistake of the project keeps its traceback."""

    def outcome(error: OSError) -> int:
        monkeypatch.setattr(demo_run, "run", mock.Mock(side_effect=error))
        return demo_run.main(COMPARISONS["demo"], None, arguments("demo", tmp_path))

    for error in (
        PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "work" / "baseline")),
        PermissionError(errno.EACCES, "Permission denied", str(tmp_path)),
        OSError(errno.ENOSPC, "No space left on device"),
    ):
        assert outcome(error) == 1
        assert f"error: {error}" in capsys.readouterr().out.replace("\n", "")
    for error in (
        FileNotFoundError(errno.ENOENT, "absent", str(ROOT / "configs" / "x.py")),
        ConnectionError("refused"),
    ):
        with pytest.raises(type(error)):
            outcome(error)
    (tmp_path / "work").rename(tmp_path / "file")
    (tmp_path / "work").touch()
    assert demo_run.main(COMPARISONS["demo"], None, arguments("demo", tmp_path)) == 1
    assert "error: " in capsys.readouterr().out


def test_two_demos_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "work").mkdir()
    with (tmp_path / "work" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert demo_run.main(COMPARISONS["demo"], None, arguments("demo", tmp_path)) == 1
    assert "another demo is running" in capsys.readouterr().out
    assert not (tmp_path / "data").exists()


def test_iteration_time_is_the_median_without_the_warm_up(tmp_path: Path) -> None:
    for session, times in {"20250101_000000": [9.0, 1.0, 2.0, 7.0], "20250101_000100": [8.0, 3.0]}.items():
        log = tmp_path / session / "vis_data" / "scalars.json"
        log.parent.mkdir(parents=True)
        log.write_text("".join(json.dumps({"time": seconds, "step": i}) + "\n" for i, seconds in enumerate(times)))
    assert demo_run.seconds_per_iteration(tmp_path) == 2.5
    with pytest.raises(StepError, match="no iteration times"):
        demo_run.seconds_per_iteration(tmp_path / "20250101_000000")


@pytest.mark.parametrize(
    ("option", "value"), [("--iterations", "0"), ("--iterations", "ten"), ("--val", "0"), ("--figures", "0")]
)
def test_bad_value_is_named(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        demo_run.main(COMPARISONS["demo"], None, [option, value])
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert option in message
    assert repr(value) in message
