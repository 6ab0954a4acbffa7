"""The demo: from nothing to a table, killed in the middle, and what it refuses to reuse or to accept."""

from __future__ import annotations

import fcntl
import json
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

pytest.importorskip("mmdet", reason="the demo trains detectors: mmdet is not installed")

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools"))

import demo as demo_tool  # noqa: E402
import generate_scenes  # noqa: E402
from demo_pictures import draw_comparison  # noqa: E402

ITERATIONS = 4
SCHEMA = {"bbox_mAP": float, "bbox_mAP_50": float, "segm_mAP": float, "segm_mAP_50": float, "parameters": int}
BASELINE, CARAFE = demo_tool.MODELS


def arguments(folder: Path) -> list[str]:
    """A demo that takes seconds."""
    options = {"train": 8, "val": 4, "size": 96, "iterations": ITERATIONS}
    return [
        f"--work-dir={folder / 'work'}",
        f"--data-root={folder / 'data'}",
        *(f"--{name}={value}" for name, value in options.items()),
    ]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: object, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """A demo killed with SIGKILL during the first training: its folder, and the process id of that training."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads the process table of Linux")
    folder = tmp_path_factory.mktemp("demo")
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "tools/demo.py", "--no-minimum", *arguments(folder)],
            cwd=ROOT,
            stdout=output,
            stderr=output,
        )
        checkpoint = folder / "work" / "baseline" / "iter_1.pth"
        wait_for(lambda: checkpoint.exists() or process.poll() is not None, 240, "the first checkpoint")
        assert process.poll() is None, (folder / "output").read_text()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        process.wait()
    assert len(children) == 1
    yield folder, int(children[0])
    shutil.rmtree(folder)  # checkpoints are large


@pytest.fixture(scope="module")
def finished(killed: tuple[Path, int]) -> Path:
    """The same demo after the same command was given again."""
    folder, training = killed
    wait_for(lambda: not is_alive(training), 30, "the end of the training whose demo was killed")
    assert not demo_tool_for(folder).checkpoint(BASELINE).exists(), "it was killed too late to show anything"
    subprocess.run(
        [sys.executable, "tools/demo.py", "--no-minimum", *arguments(folder)], cwd=ROOT, check=True, timeout=500
    )
    return folder


def demo_tool_for(folder: Path, **changes: int) -> demo_tool.Demo:
    options = {"iterations": ITERATIONS, "seed": 0} | changes
    request = generate_scenes.Request(options["seed"], 8, 4, 96)
    return demo_tool.Demo(folder / "work", folder / "data", request, options["iterations"])


def test_killed_demo_goes_on_from_its_checkpoint(finished: Path) -> None:
    sessions = []
    for log in sorted((finished / "work" / "baseline").glob("*/vis_data/scalars.json")):
        sessions.append([json.loads(line)["step"] for line in log.read_text().splitlines()])
    assert len(sessions) == 2
    assert sessions[0][0] == 1
    assert 1 < sessions[1][0] <= sessions[0][-1] + 2  # no checkpoint was thrown away
    assert sessions[1][-1] == ITERATIONS
    assert len(list((finished / "work" / "carafe").glob("*/vis_data/scalars.json"))) == 1


def test_summary(finished: Path) -> None:
    summary = json.loads((finished / "work" / "summary.json").read_text())
    assert list(summary) == ["baseline", "carafe"]
    for result in summary.values():
        assert {name: type(value) for name, value in result.items()} == SCHEMA | {"seconds_per_iter": float}
        assert all(0 <= result[name] <= 1 for name in demo_tool.METRICS)
        assert 0 < result["seconds_per_iter"] < 60
    # Three upsamplers in the FPN and one in the mask head, 64 channels each; there a deconvolution goes.
    upsampler = (64 * 64 + 64) + (64 * 9 * 100 + 100)
    deconvolution = 64 * 64 * 2 * 2 + 64
    assert summary["carafe"]["parameters"] - summary["baseline"]["parameters"] == 4 * upsampler - deconvolution


def test_metrics_are_those_of_the_evaluation(finished: Path) -> None:
    summary = json.loads((finished / "work" / "summary.json").read_text())
    for name, result in summary.items():
        log = (finished / "work" / f"test_{name}.log").read_text()
        for metric in demo_tool.METRICS:
            assert float(re.findall(rf"coco/{metric}: (-?[\d.]+)", log)[-1]) == pytest.approx(result[metric], abs=1e-4)


def test_table_and_pictures(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads((finished / "work" / "summary.json").read_text())
    demo_tool.console.print(demo_tool.result_table(summary, ITERATIONS))
    printed = capsys.readouterr().out
    for model in demo_tool.MODELS:
        assert model.title in printed
        assert f"{summary[model.name]['parameters']:,}" in printed
    assert max(map(len, printed.splitlines())) <= 80
    width, height = Image.open(finished / "work" / "predictions.png").size
    assert min(width, height) > 500


def test_second_run_does_nothing_again_and_weak_models_fail(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four iterations teach nothing: without --no-minimum that is an error, after all results were written."""

    def unexpected(title: str, *_: object) -> None:
        raise AssertionError(f"{title} was run again")

    monkeypatch.setattr(demo_tool, "run_tool", unexpected)
    (finished / "work" / "summary.json").unlink()
    assert demo_tool.main(arguments(finished)) == 1
    printed = capsys.readouterr().out
    for name in ("baseline", "carafe"):
        assert re.search(rf"error: {name}: bbox_mAP_50 is 0\.\d+, at least 0\.40 was expected", printed)
        assert re.search(rf"error: {name}: segm_mAP_50 is 0\.\d+, at least 0\.25 was expected", printed)
    assert (finished / "work" / "summary.json").is_file()
    assert demo_tool.main([*arguments(finished), "--no-minimum"]) == 0


def test_minimum_is_a_lower_bound_for_each_model() -> None:
    enough = {"bbox_mAP_50": 0.40, "segm_mAP_50": 0.25}
    assert demo_tool.shortfalls({"baseline": enough, "carafe": enough}) == []
    for metric in enough:
        weak = enough | {metric: enough[metric] - 0.001}
        assert [line.split(":")[0] for line in demo_tool.shortfalls({"baseline": enough, "carafe": weak})] == ["carafe"]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A folder that has the dataset and nothing else."""
    assert generate_scenes.generate(tmp_path / "data", demo_tool_for(tmp_path).request)
    (tmp_path / "work").mkdir()
    return tmp_path


def test_results_of_another_configuration_or_dataset_are_removed(dataset: Path) -> None:
    def keeps_results(**changes: int) -> bool:
        result = dataset / "work" / "baseline" / "iter_4.pth"
        result.write_text("trained")
        (dataset / "work" / "summary.json").write_text("{}")
        demo_tool.discard_stale(demo_tool_for(dataset, **changes), BASELINE)
        assert result.exists() == (dataset / "work" / "summary.json").exists()
        return result.exists()

    demo_tool.discard_stale(demo_tool_for(dataset), BASELINE)
    assert keeps_results()
    assert not keeps_results(iterations=5)
    assert keeps_results(iterations=5)
    assert not keeps_results(seed=1)
    assert not keeps_results()
    annotations = dataset / "data" / "annotations" / "instances_val.json"
    annotations.write_text(annotations.read_text() + "\n")
    assert not keeps_results()


def test_folder_of_somebody_else_is_not_touched(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = dataset / "work" / "baseline" / "precious.pth"
    mine.parent.mkdir()
    mine.write_text("weights")
    assert demo_tool.main(arguments(dataset)) == 1
    assert str(mine.parent) in capsys.readouterr().out.replace("\n", "")
    assert mine.read_text() == "weights"


def test_both_models_differ_in_types_alone(tmp_path: Path) -> None:
    demo = demo_tool_for(tmp_path)
    baseline, carafe = (demo_tool.load_config(demo, model).to_dict() for model in (BASELINE, CARAFE))
    assert carafe["model"]["neck"].pop("type") == "carafe_plugin.openmmlab.mmdet.CARAFEFPN"
    assert carafe["model"]["roi_head"]["mask_head"].pop("type") == "carafe_plugin.openmmlab.mmdet.CARAFEFCNMaskHead"
    assert baseline["model"]["neck"].pop("type") == "FPN"
    assert baseline["model"]["roi_head"]["mask_head"].pop("type") == "FCNMaskHead"
    assert carafe == baseline


def test_default_options_change_nothing_in_the_configs() -> None:
    args = demo_tool.parse_args([])
    request = generate_scenes.Request(args.seed, args.train, args.val, args.size)
    demo = demo_tool.Demo(args.work_dir, args.data_root, request, args.iterations)
    assert demo.config_options() == {}
    config = demo_tool.load_config(demo, BASELINE)
    assert ROOT / config.test_evaluator.ann_file == demo.annotations("val")
    assert config.train_cfg.max_iters == demo.iterations
    assert config.randomness.seed == args.seed


def test_failing_tool_is_reported_with_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "tool.log"
    code = "import sys; print('Iter(train) [ 1/20]  loss: 1'); print('a long story'); print('the end'); sys.exit(3)"
    with pytest.raises(demo_tool.StepError) as error:
        demo_tool.run_tool("Train it", ["-c", code], log)
    for part in ("Train it failed with exit code 3", str(log), "a long story\nthe end"):
        assert part in str(error.value)
    assert log.read_text().endswith("the end\n")


def test_missing_checkpoint_after_training_is_an_error(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_tool, "run_tool", lambda *_: None)
    with pytest.raises(demo_tool.StepError, match=r"iter_4\.pth is missing"):
        demo_tool.train(demo_tool_for(dataset), BASELINE)


def test_interrupting_stops_the_tool(tmp_path: Path) -> None:
    """SIGTERM, as from a job scheduler: the demo says how to go on, and its training does not stay behind."""
    code = (
        "import sys, demo\n"
        "def run(_): demo.run_tool('Train', ['-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'],"
        f" demo.Path({str(tmp_path / 'log')!r}))\n"
        "demo.run = run\n"
        f"sys.exit(demo.main({arguments(tmp_path)!r}))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT / "tools", stdout=subprocess.PIPE, text=True)
    log = tmp_path / "log"
    wait_for(lambda: log.exists() and log.read_text().endswith("\n"), 60, "the tool's first line")
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "The same command goes on from here" in printed
    assert not is_alive(int(log.read_text()))


def test_two_demos_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "work").mkdir()
    with (tmp_path / "work" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert demo_tool.main(arguments(tmp_path)) == 1
    assert "another demo is running" in capsys.readouterr().out
    assert not (tmp_path / "data").exists()


def test_iteration_time_is_the_median_without_the_warm_up(tmp_path: Path) -> None:
    for session, times in {"20250101_000000": [9.0, 1.0, 2.0, 7.0], "20250101_000100": [8.0, 3.0]}.items():
        log = tmp_path / session / "vis_data" / "scalars.json"
        log.parent.mkdir(parents=True)
        log.write_text("".join(json.dumps({"time": seconds, "step": i}) + "\n" for i, seconds in enumerate(times)))
    assert demo_tool.seconds_per_iteration(tmp_path) == 2.5
    with pytest.raises(demo_tool.StepError, match="no iteration times"):
        demo_tool.seconds_per_iteration(tmp_path / "20250101_000000")


@pytest.mark.parametrize(("option", "value"), [("--iterations", "0"), ("--iterations", "ten"), ("--val", "0")])
def test_bad_value_is_named(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        demo_tool.main([option, value])
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert option in message
    assert repr(value) in message


def test_pictures_show_what_was_predicted(dataset: Path) -> None:
    """Columns are compared with one another: perfect predictions look like the truth, unsure ones are not drawn."""
    annotations = dataset / "data" / "annotations" / "instances_val.json"
    coco = COCO(str(annotations))
    files = {}
    for title, score in {"sure": 0.9, "unsure": 0.1}.items():
        predictions = []
        for image_id in coco.getImgIds():
            items = [item for item in coco.loadAnns(coco.getAnnIds(image_id)) if not item["iscrowd"]]
            instances = {
                "masks": [item["segmentation"] for item in items],
                "labels": np.array([item["category_id"] - 1 for item in items]),
                "scores": np.full(len(items), score),
            }
            predictions.append({"img_id": image_id, "pred_instances": instances})
        files[title] = dataset / f"{title}.pkl"
        files[title].write_bytes(pickle.dumps(predictions))
    out = dataset / "pictures.png"
    draw_comparison(annotations, dataset / "data" / "val", files, out)
    picture = np.asarray(Image.open(out).convert("RGB")).astype(int)
    colour = np.array([0xE6, 0x9F, 0x00])  # of the first category
    stars = [item for item in coco.dataset["annotations"] if item["category_id"] == 1]
    assert stars, "the dataset of this seed has no star: choose another"
    hits = np.abs(picture - colour).sum(2) < 12
    hits[-40:] = False  # the legend
    truth, sure, unsure = (part.sum() for part in np.array_split(hits, 3, axis=1))
    assert truth > 100
    assert sure == pytest.approx(truth, rel=0.2)
    assert unsure < 0.1 * truth
    assert not list(dataset.glob("*.partial*"))
