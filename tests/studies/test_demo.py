"""Both demos: from nothing to a table, killed in the middle, run again, and with a further model."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmdet", reason="the demo trains detectors: mmdet is not installed")
pytest.importorskip("mmseg", reason="the demo trains segmentation models: mmseg is not installed")

from mmdet.registry import DATASETS
from mmengine.dataset import pseudo_collate
from tiny_demos import COMMANDS, COMPARISONS, ITERATIONS, arguments, demo_in, is_alive, wait_for
from tool_runs import ROOT, run_in_process

from studies.common import console
from studies.demo import run as demo_run
from studies.demo.generate_scenes import generate


@dataclass(frozen=True)
class Run:
    """A demo in a folder of its own."""

    tool: str
    folder: Path
    training: int = 0  # the process id of the one that was killed

    @property
    def work_dir(self) -> Path:
        return self.folder / "work"

    @property
    def summary(self) -> dict[str, dict[str, float]]:
        return json.loads((self.work_dir / "summary.json").read_text())

    def call(self, *flags: str) -> int:
        """Run the demo in this process, its tools in theirs."""
        return demo_run.main(COMPARISONS[self.tool], None, [*arguments(self.tool, self.folder), *flags])


def run_forked(title: str, command: Sequence[str], log: Path) -> None:
    """What run_tool does, without a progress bar."""
    tool, *arguments = command
    process = run_in_process(Path(tool).stem, *arguments, path=ROOT, log=log)
    process.join(300)
    assert process.exitcode == 0, f"{title}\n{log.read_text()[-3000:]}"


@pytest.fixture(scope="module", params=list(COMPARISONS))
def killed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A demo killed with SIGKILL during the first training."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads the process table of Linux")
    folder = tmp_path_factory.mktemp(request.param)
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", COMMANDS[request.param], "--no-minimum", *arguments(request.param, folder)],
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
    # The segmentation models' tools run as a user's; the detectors' are forked, without the imports.
    with mock.patch.object(demo_run, "run_tool", run_forked) if request.param == "demo" else nullcontext():
        yield Run(request.param, folder, int(children[0]))
    shutil.rmtree(folder)  # checkpoints are large


@pytest.fixture(scope="module")
def finished(killed: Run) -> Run:
    """The same demo after the same command was given again."""
    wait_for(lambda: not is_alive(killed.training), 30, "the end of the training whose demo was killed")
    demo = demo_in(killed.tool, killed.folder)
    assert not demo.checkpoint(demo.models[0]).exists(), "it was killed too late to show anything"
    assert killed.call("--no-minimum") == 0
    return killed


def upsampler(channels: int) -> int:
    """The parameters of a CARAFE++ that upsamples: channel compressor to 64, content encoder 3x3 to 4 times 5x5."""
    return (channels * 64 + 64) + (64 * 9 * 100 + 100)


def downsampler(channels: int) -> int:
    """The parameters of one that downsamples: compressor to 16, its batch norm, encoder 3x3 to 5x5."""
    return (channels * 16 + 16) + 2 * 16 + (16 * 9 * 25 + 25)


#: A ResNet-18 has one in the stem, and two in each stage that follows on 64, 128 and 256 channels.
BACKBONE = downsampler(64) + 2 * (downsampler(64) + downsampler(128) + downsampler(256))


def test_killed_demo_resumes_from_its_checkpoint(finished: Run) -> None:
    sessions = []
    for log in sorted((finished.work_dir / "baseline").glob("*/vis_data/scalars.json")):
        sessions.append([json.loads(line)["step"] for line in log.read_text().splitlines()])
    assert len(sessions) == 2
    assert sessions[0][0] == 1
    assert 1 < sessions[1][0] <= sessions[0][-1] + 2  # no checkpoint was thrown away
    assert sessions[1][-1] == ITERATIONS
    assert len(list((finished.work_dir / "carafe").glob("*/vis_data/scalars.json"))) == 1


def test_summary(finished: Run) -> None:
    metrics = {"demo": ["bbox_mAP", "bbox_mAP_50", "segm_mAP", "segm_mAP_50"], "demo_seg": ["mIoU", "aAcc"]}
    schema = dict.fromkeys(metrics[finished.tool], float) | {"parameters": int, "seconds_per_iter": float}
    assert list(finished.summary) == ["baseline", "carafe"]
    for result in finished.summary.values():
        assert {name: type(value) for name, value in result.items()} == schema
        assert all(0 <= result[name] <= 1 for name in metrics[finished.tool])
        assert 0 < result["seconds_per_iter"] < 60
    added = finished.summary["carafe"]["parameters"] - finished.summary["baseline"]["parameters"]
    if finished.tool == "demo":
        # Three upsamplers in the FPN and one in the mask head; there a deconvolution goes.
        assert added == 4 * upsampler(64) - (64 * 64 * 2 * 2 + 64)
    else:
        # Four after the pyramid pooling, three in the top-down path, three in the fusion, which concatenates.
        assert added == BACKBONE + 7 * upsampler(64) + upsampler(64) + upsampler(128) + upsampler(192)


def test_metrics_are_those_of_the_evaluation(finished: Run) -> None:
    for name, result in finished.summary.items():
        log = (finished.work_dir / f"test_{name}.log").read_text()
        for key, metric in COMPARISONS[finished.tool].metrics.items():
            printed = float(re.findall(rf"\b{metric.logged}: (-?[\d.]+)", log)[-1])
            assert result[key] == pytest.approx(printed * metric.unit, abs=1e-4)
            assert metric.unit == (0.01 if finished.tool == "demo_seg" else 1)  # mmseg prints per cent


def test_label_maps_score_what_the_summary_says(finished: Run) -> None:
    """The pixel accuracy, counted again from the files that the picture shows."""
    if finished.tool == "demo":
        return  # a detector's predictions are no label maps
    truths = sorted((finished.folder / "data" / "annotations" / "validation").glob("*.png"))
    assert len(truths) == 4
    for name, result in finished.summary.items():
        files = [finished.work_dir / name / "predictions" / path.name for path in truths]
        hits = [np.asarray(Image.open(a)) == np.asarray(Image.open(b)) for a, b in zip(files, truths, strict=True)]
        assert np.mean(hits) == pytest.approx(result["aAcc"], abs=1e-4)


def test_table_and_pictures(finished: Run, capsys: pytest.CaptureFixture[str]) -> None:
    comparison = COMPARISONS[finished.tool]
    console.print(comparison.table(demo_in(finished.tool, finished.folder), finished.summary))
    printed = capsys.readouterr().out
    for model in comparison.models:
        assert model.title in printed
        assert f"{finished.summary[model.name]['parameters']:,}" in printed
    assert max(map(len, printed.splitlines())) <= 80
    width, height = Image.open(finished.work_dir / "predictions.png").size
    assert min(width, height) > 500


def test_second_run_does_nothing_again_and_weak_models_fail(
    finished: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four iterations teach nothing: without --no-minimum that is an error, after all results were written."""

    def unexpected(title: str, *_: object) -> None:
        raise AssertionError(f"{title} was run again")

    monkeypatch.setattr(demo_run, "run_tool", unexpected)
    (finished.work_dir / "summary.json").unlink()
    assert finished.call() == 1
    printed = capsys.readouterr().out
    minimum = {"demo": {"bbox_mAP_50": "0.40", "segm_mAP_50": "0.25"}, "demo_seg": {"mIoU": "0.30"}}
    for name in ("baseline", "carafe"):
        for metric, least in minimum[finished.tool].items():
            assert re.search(rf"error: {name}: {metric} is 0\.\d+, at least {least} was expected", printed)
    assert list(finished.summary) == ["baseline", "carafe"]
    assert finished.call("--no-minimum") == 0


def test_further_model_is_added_and_stays(
    finished: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``--all`` trains what is missing alone; later runs of the same comparison show it, others do not."""
    if not COMPARISONS[finished.tool].more_models:
        with pytest.raises(SystemExit):
            finished.call("--all")
        return
    trained = []
    run_tool = demo_run.run_tool
    monkeypatch.setattr(demo_run, "run_tool", lambda title, *rest: (trained.append(title), run_tool(title, *rest)))
    before = finished.summary
    assert finished.call("--all", "--no-minimum") == 0
    assert trained == ["Train carafe_all", "Evaluate carafe_all"]
    after = finished.summary
    added = after.pop("carafe_all")
    assert after == before
    assert added["parameters"] - before["carafe"]["parameters"] == BACKBONE
    capsys.readouterr()
    assert finished.call() == 1, "its minimum counts whenever it is shown"
    printed = capsys.readouterr().out
    assert "error: carafe_all: segm_mAP_50 is" in printed
    assert "CARAFE++ everywhere" in printed
    assert trained == ["Train carafe_all", "Evaluate carafe_all"], "nothing was run again"
    assert list(finished.summary) == ["baseline", "carafe", "carafe_all"]
    # Results of another dataset or schedule are not mixed in.
    for changes in ({"seed": 1}, {"iterations": 5}):
        other = demo_in(finished.tool, finished.folder, **changes)
        assert demo_run.compared(other) == list(other.models)
    assert (finished.work_dir / "carafe_all").is_dir(), "what was not asked for is not removed"


@pytest.mark.parametrize(
    ("name", "loss", "gradients"), [("baseline", 3.896347, 7419.822), ("carafe", 3.950336, 7975.713)]
)
def test_the_first_step_is_the_same_with_every_installation(name, loss, gradients, tmp_path):
    """Loss and gradients do not depend on the installed torch, mmcv and mmdet, up to rounding.

    Data and weights come from seeds. The numbers are those of torch 2.11 with onedl-mmdetection 3.5.1; torch 2.1 with
    mmdet 3.3.0 gives the same seven digits.
    """
    demo = demo_in("demo", tmp_path, train=4, val=1, size=160)
    generate(demo.data_root, demo.request)
    (model,) = (each for each in demo.models if each.name == name)
    torch.manual_seed(0)
    config, detector = demo_run.build(demo, model)
    detector.init_weights()
    dataset = config.train_dataloader.dataset
    for transform in dataset.pipeline:
        if transform["type"] == "RandomFlip":
            transform["prob"] = 0.0
    images = DATASETS.build(dataset)
    batch = pseudo_collate([images[index] for index in range(4)])
    detector.train()
    torch.manual_seed(0)
    data = detector.data_preprocessor(batch, True)
    total, _ = detector.parse_losses(detector.loss(data["inputs"], data["data_samples"]))
    total.backward()
    steepness = sum(p.grad.double().abs().sum() for p in detector.parameters() if p.grad is not None)
    assert float(total.detach()) == pytest.approx(loss, rel=1e-3)
    assert float(steepness) == pytest.approx(gradients, rel=5e-3)
