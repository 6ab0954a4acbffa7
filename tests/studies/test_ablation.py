"""studies.ablation: which models the rows become, runs that are done once, what is written of them."""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from tool_runs import call_tool, forget_runs, load_tool

pytest.importorskip("mmdet", reason="the ablation trains detectors: mmdet is not installed")
pytest.importorskip("mmseg", reason="the ablation trains segmentation models: mmseg is not installed")

from mmengine.config import Config, utils

from carafe_plugin.engine.cli import run_tool
from studies.ablation import report as ablation_report
from studies.ablation import runs as ablation_runs
from studies.ablation.runs import Run, Setup, fingerprint, plan
from studies.demo import run as demo_run
from studies.paper_tables.rows import Row, read_tables

TINY = ("--train=8", "--val=4", "--size=96", "--iterations=2", "--seeds=3")


def call(folder: Path, *arguments: str) -> int:
    """Run the tool in this process; its trainings are processes of their own."""
    forget_runs()
    tool = load_tool("studies.ablation.__main__")
    places = (f"--work-dir={folder / 'work'}", f"--data-root={folder / 'data'}", f"--results={folder / 'results'}")
    return run_tool(tool.ablation, tool.parse_args([*places, *arguments]))


@pytest.fixture(scope="module", autouse=True)
def metafiles_read_once() -> Iterator[None]:
    """MMEngine reads a toolbox's hundred metafiles anew for each configuration that comes by the toolbox's name."""
    with mock.patch.object(utils, "load", functools.cache(utils.load)):
        yield


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path / "work", tmp_path / "data", tmp_path / "results")


@pytest.fixture
def two_rows(monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """Tables 4 and 5 with one row each, of the same config, trained and tested in this process."""

    def run_here(title: str, command: Sequence[str], log: Path) -> None:
        tool, *arguments = command
        assert call_tool(Path(tool).stem, *arguments) == 0

    monkeypatch.setattr(demo_run, "run_tool", run_here)
    tables = read_tables()
    carafe = tables[4].rows[-1]
    assert carafe.config == tables[5].rows[0].config
    for number in (4, 5):
        tables[number].rows[:] = [row for row in tables[number].rows if row.config == carafe.config]
    monkeypatch.setattr(ablation_runs, "read_tables", lambda: tables)
    return [tables[4].rows[0], tables[5].rows[0]]


def test_forty_eight_runs_of_as_many_models(setup: Setup) -> None:
    runs = plan((4, 6), (0, 1, 2))
    assert len(runs) == 48
    assert len({run.name for run in runs}) == 48
    assert len({fingerprint(run, setup) for run in runs}) == 48
    assert [run.seed for run in runs[:27]] == [0] * 9 + [1] * 9 + [2] * 9, "every row before the next seed"
    assert all(run.config.randomness.seed == run.seed for run in runs)


def composed(table: int, method: str) -> Any:
    (row,) = [row for row in read_tables()[table].rows if row.method == method]
    return Run(table, row, 0, ablation_runs.RECIPES[table]).config


@pytest.mark.parametrize(
    ("table", "method", "place", "expected"),
    [
        (3, "LIP", "backbone", dict(type="LIPDownsample", stem=dict(bottleneck=None), pointwise=True)),
        (3, "CARAFE++", "backbone", {}),
        (4, "GUM", "neck", dict(type="GUMUpsample")),
        (6, "Bilinear", "roi_head.mask_head", dict(type="bilinear")),
        (9, "PPM, FUSE", "decode_head", dict(ppm=True, fpn=False, fuse=True)),
        (11, "no compressor", "neck", dict(compressed_channels=None)),
        (12, "Cm = 4", "backbone", dict(compressed_channels=4)),
        (13, "encoder 5, reassembly 7", "neck", dict(encoder_kernel=5, up_kernel=7)),
        (14, "Sigmoid", "neck", dict(normalizer="sigmoid")),
    ],
)
def test_operators_of_a_row(table: int, method: str, place: str, expected: dict[str, Any]) -> None:
    config = composed(table, method)
    scope = "mmseg" if table == 9 else "mmdet"
    for part in ("backbone", "neck", "roi_head.mask_head", "decode_head"):
        found = config.model
        for name in part.split("."):
            found = (found or {}).get(name)
        ours = str((found or {}).get("type")).startswith(f"carafe_plugin.openmmlab.{scope}.CARAFE")
        assert ours == (part == place), part
        if ours:
            assert dict(found.get("carafe_cfg") or {}) == expected
    assert config.model.backbone.depth == 18
    assert config.model.backbone.get("init_cfg") is None
    assert config.train_cfg.max_iters == config.param_scheduler[-1].end == (200 if table == 9 else 320)


def test_baselines_are_the_plain_models() -> None:
    for table, method in ((4, "Nearest"), (6, "Deconv")):
        config = composed(table, method)
        assert "carafe" not in config.pretty_text.lower()
    faster, mask = composed(4, "Nearest"), composed(6, "Deconv")
    assert faster.model.roi_head.mask_head is None
    assert faster.test_evaluator.metric == "bbox"
    assert mask.model.roi_head.mask_head.type == "FCNMaskHead"
    assert faster.train_dataloader.dataset.data_root == mask.train_dataloader.dataset.data_root == "data/scenes-128/"


def test_a_run_is_done_once(tmp_path: Path, two_rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted between its steps it resumes; another table's row of the same model needs none."""
    steps = []
    train, evaluate = demo_run.train, demo_run.evaluate

    def interrupted(demo: Any, model: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_run, "train", lambda *args: steps.append("train") or train(*args))
    monkeypatch.setattr(demo_run, "evaluate", interrupted)
    assert call(tmp_path, "--table=4", *TINY) == 130
    assert not (tmp_path / "results").exists()
    monkeypatch.setattr(demo_run, "evaluate", lambda *args: steps.append("evaluate") or evaluate(*args))
    # Two iterations teach nothing: mmdet logs -1 or 0 where a model finds nothing.
    assert call(tmp_path, "--table=4", *TINY) == 0
    assert call(tmp_path, "--table=4", "--table=5", *TINY) == 0
    assert steps == ["train", "evaluate"]
    (result,) = (tmp_path / "results").glob("*.json")
    assert result.name == "table-04_carafe_seed-3.json"
    kept = json.loads(result.read_text())
    assert kept["metrics"].keys() == {"bbox_mAP", "bbox_mAP_50"}
    assert (kept["seed"], kept["iterations"], kept["config"]) == (3, 2, two_rows[0].path)
    assert kept["parameters"] > 10_000_000
    assert kept["seconds_per_iteration"] > 0
    for table in (4, 5):
        assert "| 3 |" in (tmp_path / "results" / f"table-{table:02}.md").read_text()
        assert (tmp_path / "results" / f"table-{table:02}.png").read_bytes().startswith(b"\x89PNG")


def test_written_config_is_the_composed_one(setup: Setup) -> None:
    """The file for tools/train.py says what changes; read back it is what the fingerprint is of."""
    for table, index in ((3, 4), (9, 4), (6, 2)):
        run = plan((table,), (5,))[index]
        path = setup.demo(run).models[0].config
        assert Config.fromfile(path).to_dict() == run.config.to_dict()


def test_another_configuration_is_another_run(setup: Setup) -> None:
    (run, *_) = plan((4,), (0,))
    changed = Run(run.table, run.row, 1, run.recipe)
    smaller = Setup(setup.work_dir, setup.data_root, setup.results, setup.scenes, iterations=3)
    elsewhere = Setup(setup.work_dir / "x", setup.data_root / "x", setup.results, setup.scenes)
    assert len({fingerprint(run, setup), fingerprint(changed, setup), fingerprint(run, smaller)}) == 3
    assert fingerprint(run, setup) == fingerprint(run, elsewhere)


@pytest.fixture
def results(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Table 4 with four rows, three of them with made-up results: AP50 of seed s in row r is 0.28 + 0.01 r + 0.02 s."""
    tables = read_tables()
    del tables[4].rows[4:]
    monkeypatch.setattr(ablation_runs, "read_tables", lambda: tables)
    runs = plan((4,), (0, 1, 2))
    setup.results.mkdir()
    for run in runs:
        row = read_tables()[4].rows.index(run.row)
        if row < 3 and (row, run.seed) != (2, 2):
            ap50 = 0.28 + 0.01 * row + 0.02 * run.seed
            content = dict(
                fingerprint=fingerprint(run, setup),
                seed=run.seed,
                metrics=dict(bbox_mAP=ap50 / 2, bbox_mAP_50=ap50),
                parameters=1000 + row,
                seconds_per_iteration=0.5,
                threads=2,
                recipe=run.recipe.models[0].config,
                iterations=200,
                scenes=dict(train=600, val=120, size=128),
            )
            (setup.results / f"{run.name}.json").write_text(json.dumps(content))
    return runs


def test_report(setup: Setup, results: list[Run]) -> None:
    found = ablation_report.collect(read_tables()[4], results, setup)
    _, lines = ablation_report.texts(found)
    assert [line[:4] for line in lines] == [
        ["Nearest", "0 1 2", "15.0 ± 1.0", "30.0 ± 2.0"],
        ["Bilinear", "0 1 2", "15.5 ± 1.0", "31.0 ± 2.0"],
        ["Nearest + Conv", "0 1", "15.5 ± 0.7", "31.0 ± 1.4"],
    ]
    assert [line[-1] for line in lines] == ["36.5", "36.7", "36.6"]
    page, plot = ablation_report.write(found, setup.results)
    assert "| Bilinear | 0 1 2 | 15.5 ± 1.0 |" in page.read_text()
    assert plot.stat().st_size > 5000


def test_weak_baseline_is_said(setup: Setup, results: list[Run], capsys: pytest.CaptureFixture[str]) -> None:
    folder = setup.results.parent
    assert call(folder, "--table=4", "--report") == 0
    for path in setup.results.glob("table-04_nearest_*.json"):
        path.write_text(path.read_text().replace('"bbox_mAP_50": 0.3', '"bbox_mAP_50": 0.29'))
    assert call(folder, "--table=4", "--report") == 1
    assert "Table 4, Nearest: the baseline's box AP50 is 0.2" in capsys.readouterr().out.replace("\n", " ")


def test_report_interrupted_or_not_writable(
    setup: Setup, results: list[Run], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = OSError(errno.ENOSPC, "disk full")
    for error, code, said in ((KeyboardInterrupt(), 130, "Interrupted"), (full, 1, "disk full")):
        monkeypatch.setattr(ablation_report, "write", mock.Mock(side_effect=error))
        assert call(setup.results.parent, "--table=4", "--report") == code
        assert said in capsys.readouterr().out


def test_plan_says_what_is_left(setup: Setup, results: list[Run], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(setup.results.parent, "--table=4", "--table=6", "--plan") == 0
    out = capsys.readouterr().out
    assert "Table 4: 12 runs, 8 done, 4 to do" in out
    assert "Table 6: 21 runs, 0 done, 21 to do" in out
    assert not setup.work_dir.exists()


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], two_rows: list[Row]) -> None:
    with pytest.raises(SystemExit) as error:
        call(tmp_path, "--table=8")
    assert error.value.code == 2
    choices = re.escape("3, 4, 5, 6, 7, 9, 11, 12, 13, 14")
    assert re.search(rf"error: argument --table: invalid choice: 8 \(choose from {choices}\)", capsys.readouterr().err)
    (tmp_path / "work").mkdir()
    with (tmp_path / "work" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert call(tmp_path, "--table=4", *TINY) == 1
    assert "another ablation is running" in capsys.readouterr().out
    (tmp_path / "data" / "scenes-96").mkdir(parents=True)
    (tmp_path / "data" / "scenes-96" / "mine").touch()
    assert call(tmp_path, "--table=4", *TINY) == 1
    assert "was not written by this script" in capsys.readouterr().out.replace("\n", " ")


def test_a_failed_training_is_said_and_the_others_go_on(
    tmp_path: Path, two_rows: list[Row], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = []

    def fails(demo: Any, model: Any) -> None:
        tried.append(model.name)
        raise demo_run.StepError("Train: failed with exit code 7")

    monkeypatch.setattr(demo_run, "train", fails)
    assert call(tmp_path, "--table=4", *TINY[:-1], "--seeds", "3", "4") == 1
    assert [name[-6:] for name in tried] == ["seed-3", "seed-4"]
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("failed: Train: failed with exit code 7") == 2
