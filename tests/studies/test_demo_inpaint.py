"""The inpainting demo: from nothing to its table and picture, with the steps' tools run in this process."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tool_runs import ROOT, call_tool

pytest.importorskip("skimage", reason="the demo's metrics need scikit-image")

from studies.demo import run as demo_run
from studies.demo.inpainting import COMPARISON, mean_fill
from studies.demo.scenes import paint_lit_scene, paint_scene, scenes

NAMES = ["mean_fill", "global_local", "global_local_carafe", "partial_conv", "partial_conv_carafe"]
METRICS = ["l1", "psnr", "l1_hole", "psnr_hole", "ssim"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A demo of two iterations; ``call(flags)`` runs it again, ``steps`` are those that ran."""
    folder = tmp_path_factory.mktemp("demo-inpaint")
    steps: list[str] = []

    def run_tool(title: str, command: list[str], log: Path) -> None:
        steps.append(title)
        name, *arguments = command
        assert call_tool(Path(name).stem, *arguments) == 0

    def call(*flags: str) -> int:
        command = [f"--work-dir={folder / 'work'}", f"--data-root={folder / 'data'}", "--train=4", "--val=3"]
        return demo_run.main(COMPARISON, None, [*command, "--iterations=2", *flags])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_run, "run_tool", run_tool)
        patch.chdir(ROOT)
        assert call("--no-minimum") == 0
        yield SimpleNamespace(folder=folder, work=folder / "work", steps=steps, call=call)


def summary(finished: SimpleNamespace) -> dict[str, dict[str, float]]:
    return json.loads((finished.work / "summary.json").read_text())


def test_summary(finished: SimpleNamespace) -> None:
    found = summary(finished)
    assert list(found) == NAMES
    assert list(found["mean_fill"]) == METRICS
    costs = ["generator_parameters", "generator_flops", "parameters", "seconds_per_iter"]
    for name in NAMES[1:]:
        assert sorted(found[name]) == sorted(METRICS + costs)
        assert 0 < found[name]["l1"] < found[name]["l1_hole"]
        assert found[name]["psnr_hole"] < found[name]["psnr"]
        assert found[name]["generator_parameters"] < found[name]["parameters"]
    for kind in ("global_local", "partial_conv"):
        assert found[f"{kind}_carafe"]["generator_flops"] > found[kind]["generator_flops"]


def test_mean_fill_is_of_the_same_holes(finished: SimpleNamespace) -> None:
    errors, shares = [], []
    for sample in pickle.loads((finished.work / "partial_conv" / "predictions.pkl").read_bytes()):
        original, hole = sample["original"].double().numpy() / 2, sample["holes"][0].numpy() > 0
        colour = original[:, ~hole].mean(1, keepdims=True)
        errors.append(100 * np.abs(original[:, hole] - colour).mean())
        shares.append(hole.mean())
    assert summary(finished)["mean_fill"]["l1_hole"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert len(set(shares)) == 3


def test_second_run_does_nothing_again_and_weak_models_fail(
    finished: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two iterations teach nothing: that is an error, after all results were written and printed."""
    assert len(finished.steps) == 8
    (finished.work / "summary.json").unlink()
    assert finished.call() == 1
    assert len(finished.steps) == 8, "nothing was trained or evaluated again"
    found, printed = summary(finished), capsys.readouterr().out
    least = found["mean_fill"]["psnr_hole"] + 1.5
    for name in NAMES[1:]:
        assert f"error: {name}: psnr_hole is {found[name]['psnr_hole']:.2f} dB, at least {least:.2f}" in printed
        difference = found[name]["psnr_hole"] - found["mean_fill"]["psnr_hole"]
        assert f"{name}: {difference:+.2f} dB over the hole against the mean colour" in printed
    table = [line for line in printed.splitlines() if line.startswith(("│", "┃", "┏", "└"))]
    assert {len(line) for line in table[-8:]} <= set(range(60, 81))
    assert re.search(r"│ mean colour +│ +\d+\.\d\d │", printed)
    assert "…" not in printed, "every figure is shown in full"


def test_what_counts_as_learnt() -> None:
    good = {"mean_fill": {"psnr_hole": 14.0}, "a": {"psnr_hole": 15.5}, "b": {"psnr_hole": 15.49}}
    assert COMPARISON.shortfalls(good) == ["b: psnr_hole is 15.49 dB, at least 15.50 was expected"]
    assert COMPARISON.shortfalls({**good, "b": {"psnr_hole": float("nan")}})


def test_picture(finished: SimpleNamespace) -> None:
    """Input, mask, four models and the original, a row for each of the three images."""
    width, height = Image.open(finished.work / "predictions.png").size
    assert width > 1200
    assert 400 < height < width / 1.7
    samples = pickle.loads((finished.work / "global_local" / "predictions.pkl").read_bytes())
    filled = mean_fill(samples[0])
    known = samples[0]["holes"] == 0
    assert bool((filled == samples[0]["original"])[known.expand(3, -1, -1)].all())


def test_another_dataset_is_another_demo(finished: SimpleNamespace) -> None:
    arguments = [f"--work-dir={finished.work}", f"--data-root={finished.folder / 'data'}", "--train=4", "--val=3"]
    demo = demo_run.parse_demo(COMPARISON, None, [*arguments, "--iterations=2"])
    assert demo_run.belongs(demo, demo.models[0])
    other = demo_run.parse_demo(COMPARISON, None, [*arguments, "--iterations=3"])
    assert not demo_run.belongs(other, demo.models[0])
    image = finished.folder / "data" / "val" / "000001.png"
    content = image.read_bytes()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(image)
    assert not demo_run.belongs(demo, demo.models[0])
    image.write_bytes(content)


def test_defaults_are_the_configurations() -> None:
    """Without options nothing changes in the configurations, so that they can be run by hand as well."""
    demo = demo_run.parse_demo(COMPARISON, None, [])
    assert [demo.config_options(model) for model in demo.models] == [{}] * len(demo.models)
    for model in demo.models:
        cfg = demo.load_config(model)
        assert cfg.train_cfg.max_iters == demo.iterations
        assert cfg.train_dataloader.dataset.size == demo.request.size
        assert ROOT / cfg.train_dataloader.dataset.data_root == demo.data_root


def test_lit_scenes() -> None:
    """The same description gives the same bytes; the light differs over the image, the details stay."""
    scene = next(iter(scenes(0, "train", 1, 64)))
    image, plain = paint_lit_scene(scene), paint_scene(scene)[0]
    assert np.array_equal(image, paint_lit_scene(scene))
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.uint8

    def corners(pixels: np.ndarray) -> np.ndarray:
        return pixels.reshape(4, 16, 4, 16, 3).mean((1, 3)).std((0, 1)).mean()

    assert corners(image) > 2 * corners(plain)
    steps = [np.diff(pixels.astype(float), axis=1).ravel() for pixels in (image, plain)]
    assert np.corrcoef(*steps)[0, 1] > 0.8


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    assert torch.get_num_threads() == 1
