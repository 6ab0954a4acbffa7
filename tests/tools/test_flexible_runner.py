"""mmengine's FlexibleRunner, which leaves the model to a strategy: all that holds with Runner holds with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import write_toy
from tool_runs import call_tool, last_metrics, one_line, run_in_two_processes, weights
from toolkit import TORCH

from carafe_plugin.engine.atomic import move_into_place, restore_superseded

FLEXIBLE = "\nrunner_type = 'FlexibleRunner'\n"
SCHEDULE = ("param_scheduler.end=5",)  # mmengine's ends with the training, and a checkpoint keeps that end


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Write the toy's configuration with more in it: ``toy('strategy = ...')``."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(more: str = "", name: str = "flexible.py", **settings: object) -> Path:
        config = write_toy(tmp_path, **settings).rename(tmp_path / name)
        config.write_text(config.read_text() + FLEXIBLE + more)
        return config

    return write


def test_trains_tests_and_resumes_as_runner_does(toy: Callable, tmp_path: Path) -> None:
    config = toy()
    runner = ("--cfg-options", "runner_type=Runner")
    assert call_tool("train", config, "--work-dir", tmp_path / "runner", *runner) == 0
    for epochs in (2, 5):  # the best is saved in every epoch: the parent's count goes wrong with it
        command = ("--work-dir", tmp_path / "flexible", "--resume", "--cfg-options", *SCHEDULE)
        assert call_tool("train", config, *command, f"train_cfg.max_epochs={epochs}") == 0
    folders = [tmp_path / "runner", tmp_path / "flexible"]
    names, again = ({path.name for path in folder.iterdir() if path.is_file()} for folder in folders)
    kept = {"epoch_5.pth", "best_toy_error_epoch_5.pth"}
    assert names == again == {*kept, "last_checkpoint", "last_validated", "flexible.py"}
    for name in kept:
        expected, got = (torch.load(folder / name, weights_only=False) for folder in folders)
        torch.testing.assert_close(got["state_dict"], expected["state_dict"], rtol=0, atol=0)
        assert [got["meta"][key] for key in ("epoch", "iter")] == [expected["meta"][key] for key in ("epoch", "iter")]
        assert got.keys() == expected.keys()
    command = ("--work-dir", tmp_path / "test", "--out", tmp_path / "out.pkl")
    assert call_tool("test", config, tmp_path / "flexible/epoch_5.pth", *command) == 0
    assert last_metrics(tmp_path / "test") == last_metrics(tmp_path / "runner")
    assert (tmp_path / "out.pkl").is_file()


def test_what_mmengines_flexible_runner_forgets(toy: Callable, tmp_path: Path) -> None:
    """A hook that must be ready for the checkpoint, where logs go, torch.compile, scaling of the learning rate."""
    config = toy(
        "custom_hooks = [dict(type='EMAHook')]\ncompile = dict(backend='eager')\n"
        "auto_scale_lr = dict(base_batch_size=2)\n"
        f"default_hooks['logger'] = dict(type='LoggerHook', interval=1, out_dir='{tmp_path / 'logs'}')\n"
    )
    for epochs in (1, 2):
        command = ("--work-dir", tmp_path / "run", "--resume", "--auto-scale-lr", "--cfg-options", *SCHEDULE)
        assert call_tool("train", config, *command, f"train_cfg.max_epochs={epochs}") == 0
    checkpoint = torch.load(tmp_path / "run/epoch_2.pth", weights_only=False)
    assert checkpoint["ema_state_dict"]["steps"] == 4, "resumed, not begun anew"
    first = json.loads(min((tmp_path / "run").glob("*/vis_data/scalars.json")).read_text().splitlines()[0])
    assert first["lr"] == pytest.approx(0.4), "batches of 8 where the configuration's rate of 0.1 is for 2"
    assert list((tmp_path / "logs").rglob("*.log"))
    assert 'Model has been "compiled"' in max((tmp_path / "run").glob("*/*.log")).read_text()
    assert call_tool("test", config, tmp_path / "run/epoch_2.pth", "--work-dir", tmp_path / "test") == 0
    assert last_metrics(tmp_path / "test") == pytest.approx(last_metrics(tmp_path / "run"))


SHARDED = "strategy = dict(type='FSDPStrategy', {})\n"


@pytest.mark.parametrize(
    ("more", "launcher", "expected"),
    [
        ("runner_type = 'Walker'", "none", "must be Runner, FlexibleRunner or one of your own, got Walker"),
        ("strategy = dict(type='Plan')", "none", ", got Plan"),
        ("strategy = dict(type='DDPStrategy')", "none", "DDPStrategy needs several processes: start with --launcher"),
        ("strategy = dict(type='SingleDeviceStrategy')", "pytorch", "SingleDeviceStrategy is for one process; "),
        (
            "strategy = dict(type='DeepSpeedStrategy')",
            "pytorch",
            "DeepSpeedStrategy needs the package absent_deepspeed: ",
        ),
        ("efficient_conv_bn_eval = ['linear']", "none", "does not read efficient_conv_bn_eval; runner_type Runner"),
        (SHARDED.format("state_dict_cfg='local'"), "pytorch", "of which nothing can be loaded: set state_dict_cfg="),
        (SHARDED.format("") + "custom_hooks = [dict(type='EMAHook')]", "pytorch", "EMAHook averages whole weights"),
        (SHARDED.format("") + "default_hooks['checkpoint']['published_keys'] = ['meta']", "pytorch", "published_keys"),
        (SHARDED.format("") + "model = dict(type='Own')", "pytorch", "by their forward alone, and Own has its train_"),
        ("optim_wrapper['type'] = 'AmpOptimWrapper'", "none", "AmpOptimWrapper in the configuration needs a GPU"),
    ],
)
def test_what_does_not_go_together(
    more: str,
    launcher: str,
    expected: str,
    toy: Callable,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Found out before the processes meet, the datasets are read or anything is written."""
    from mmengine.registry import MODELS

    class Own(torch.nn.Module):
        def train_step(self) -> None: ...

    MODELS.register_module(module=Own, force=True)
    monkeypatch.setattr("carafe_plugin.engine.processes.get_device", lambda: "cpu")
    monkeypatch.setattr("carafe_plugin.engine.runners._PACKAGES", {"DeepSpeedStrategy": "absent_deepspeed"})
    config = toy(more)
    assert call_tool("train", config, "--launcher", launcher, "--work-dir", tmp_path / "run") == 2
    assert expected in one_line(capsys)
    assert not (tmp_path / "run").exists()


def test_checkpoints_that_do_not_fit(toy: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config, run = toy(), tmp_path / "run"
    assert call_tool("train", config, "--work-dir", run, "--cfg-options", "train_cfg.max_epochs=1") == 0
    content = torch.load(run / "epoch_1.pth", weights_only=False)
    del content["state_dict"]["linear.bias"]
    torch.save(content, tmp_path / "partial.pth")
    (tmp_path / "parts.pth").mkdir()
    for name, expected in {
        "partial.pth": "lacks 1 of the 6 parameters of Toy, the first: linear.bias",
        "parts.pth": f"{tmp_path}/parts.pth is a folder; those of FSDP's and DeepSpeed's strategies",
    }.items():
        capsys.readouterr()
        assert call_tool("test", config, tmp_path / name, "--work-dir", tmp_path / "test") == 2
        assert expected in one_line(capsys)
    assert call_tool("test", config, tmp_path / "partial.pth", "--work-dir", tmp_path, "--allow-mismatch") == 0
    capsys.readouterr()
    assert call_tool("train", config, "--work-dir", run, "--resume", run / "best_toy_error_epoch_1.pth") == 2
    assert "best_toy_error_epoch_1.pth: it holds no 'optimizer'" in one_line(capsys)


@pytest.mark.parametrize("moment", ["rename", "replace", None])
def test_a_folder_survives_a_kill_between_its_renames(
    moment: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, path = tmp_path / "epoch_1.pth.tmp", tmp_path / "epoch_1.pth"
    for folder, text in ((path, "old"), (new, "new")):
        folder.mkdir()
        (folder / "rank0.pth").write_text(text)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment:
            patch.setattr(Path, moment, killed)
            with pytest.raises(KeyboardInterrupt):
                move_into_place(new, path)
        else:
            move_into_place(new, path)
    restore_superseded(tmp_path)
    assert (path / "rank0.pth").read_text() == ("old" if moment else "new")
    assert not list(tmp_path.glob("*.old*"))


STRATEGIES = {
    "DDP": "custom_hooks = [dict(type='EMAHook')]\n",  # which looks for the names of one process
    "FSDP": "strategy = dict(type='FSDPStrategy')\n",
    "FSDP in parts": SHARDED.format("state_dict_cfg='local', model_wrapper=dict(use_orig_params=False)"),
}


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes(toy: Callable, tmp_path: Path) -> None:
    """As many as a CPU can prove: every strategy trains to the weights of one process, resumed on the way."""
    clipped = "optim_wrapper['clip_grad'] = dict(max_norm=1.0)\n"
    config = toy(clipped, "single.py")
    assert call_tool("train", config, "--work-dir", tmp_path / "single", "--cfg-options", "train_cfg.max_epochs=3") == 0
    expected = last_metrics(tmp_path / "single")["toy/error"]
    for name, strategy in STRATEGIES.items():
        config, folder = toy(clipped + strategy, f"{name}.py", batch=4), tmp_path / name
        if name != "DDP" and TORCH < (2, 4):
            command = (config, "--launcher", "pytorch", "--work-dir", folder)
            codes, said = run_in_two_processes("train", *command, path=tmp_path, folder=tmp_path)
            assert all(codes)
            assert "error: strategy FSDPStrategy runs on a CPU from torch 2.4 on, this is torch 2." in said
            continue
        for epochs in (1, 3):
            command = (config, "--launcher", "pytorch", "--work-dir", folder, "--resume", "--cfg-options", *SCHEDULE)
            command += (f"train_cfg.max_epochs={epochs}",)
            codes, said = run_in_two_processes("train", *command, path=tmp_path, folder=tmp_path)
            assert codes == [0, 0], said[-3000:]
        assert "resumed epoch: 1, iter: 2" in max(folder.glob("*/*.log")).read_text()
        if name != "DDP":  # which measures the averaged weights
            assert last_metrics(folder)["toy/error"] == pytest.approx(expected, 1e-4), name
        if name != "FSDP in parts":
            checkpoint = torch.load(folder / "epoch_3.pth", weights_only=False)
            averaged = checkpoint.get("ema_state_dict", {})
            for key, value in weights(tmp_path / "single/epoch_3.pth").items():
                got = averaged.get(f"module.{key}", checkpoint["state_dict"][key])  # EMAHook swaps the two
                torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-5)
    if TORCH < (2, 4):
        print(f"no parts of a sharded checkpoint: torch {torch.__version__} makes none on a CPU")
        return
    parts = folder / "epoch_3.pth"
    assert {part.name for part in parts.iterdir()} == {"rank0.pth", "rank1.pth"}
    (parts / "rank1.pth").unlink()
    command = (folder / config.name, parts, "--launcher", "pytorch", "--work-dir", tmp_path / "test")
    codes, said = run_in_two_processes("test", *command, path=tmp_path, folder=tmp_path)
    assert all(codes)
    assert f"error: checkpoint {parts} holds the parts of 1 processes, and this run has 2" in said
