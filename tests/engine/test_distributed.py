"""Two processes on the CPU (gloo), started as a user does; Slurm through a stand-in for srun."""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from tiny_models import write_toy
from tool_runs import ROOT, call_tool, free_port, last_metrics, run, run_in_two_processes, weights

from carafe_plugin.engine import processes
from carafe_plugin.engine.cli import run_tool
from carafe_plugin.engine.errors import ProcessError, UsageError

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="the launch scripts are for a Unix shell"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo"),
]


def test_training_in_two_processes_is_training_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same global batch, SyncBN as BN, resumed on the way: the weights agree but for the order of a sum."""
    single = write_toy(tmp_path / "single", batch=8)
    double = write_toy(tmp_path / "double", batch=4, norm="SyncBatchNorm")
    monkeypatch.syspath_prepend(single.parent)
    assert call_tool("train", single, "--work-dir", tmp_path / "one") == 0

    two = tmp_path / "two"
    path = os.pathsep.join([str(double.parent), str(ROOT)])
    command = ("dist_train.sh", double, 2, "--work-dir", two, "--resume", "--cfg-options")
    for epochs in (2, 5):
        # mmengine's schedule ends with the training, and a checkpoint keeps that end
        schedule = (f"train_cfg.max_epochs={epochs}", "param_scheduler.end=5")
        done = run(*command, *schedule, PYTHONPATH=path, PORT=free_port())
        assert done.returncode == 0, done.stderr[-3000:]
    log = max(two.glob("*/*.log")).read_text()
    assert "WARNING - SyncBN needs a GPU: 1 layers run as BN" in log
    assert "resumed epoch: 2, iter: 4" in log

    expected, got = weights(tmp_path / "one/epoch_5.pth"), weights(two / "epoch_5.pth")
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)
    assert last_metrics(two)["toy/images"] == 16, "every image evaluated once"
    assert last_metrics(two)["toy/error"] == pytest.approx(last_metrics(tmp_path / "one")["toy/error"], 1e-4)


def test_testing_a_detector_in_two_processes(trained: Callable, tmp_path: Path) -> None:
    """Seven images on two processes: one image is dealt twice and must count once."""
    model = trained("mmdet")
    one, two = tmp_path / "one.pkl", tmp_path / "two.pkl"
    assert call_tool("test", model.config, model.checkpoint, "--work-dir", tmp_path / "one", "--out", one) == 0
    options = ("--work-dir", tmp_path / "two", "--out", two)
    done = run("dist_test.sh", model.config, model.checkpoint, 2, *options, PORT=free_port())
    assert done.returncode == 0, done.stderr[-3000:]
    assert last_metrics(tmp_path / "two") == last_metrics(tmp_path / "one")
    single, double = (pickle.loads(path.read_bytes()) for path in (one, two))
    assert [sample["img_id"] for sample in double] == list(range(7))
    for expected, sample in zip(single, double, strict=True):
        torch.testing.assert_close(sample["pred_instances"]["bboxes"], expected["pred_instances"]["bboxes"])


def test_training_a_detector_in_two_processes(trained: Callable, tmp_path: Path) -> None:
    model = trained("mmdet")
    options = ("--cfg-options", "train_cfg.max_epochs=1", "val_cfg=None", "val_dataloader=None", "val_evaluator=None")
    done = run("dist_train.sh", model.config, 2, "--work-dir", tmp_path, *options, PORT=free_port())
    assert done.returncode == 0, done.stderr[-3000:]
    checkpoint = torch.load(tmp_path / "epoch_1.pth", weights_only=False)
    assert checkpoint["meta"]["iter"] == 1, "seven images in two processes with batches of 4"
    assert not any(name.startswith("module.") for name in checkpoint["state_dict"])


def test_training_an_inpainting_gan_in_two_processes(tmp_path: Path) -> None:
    """Two networks, each a distributed module of its own; a second run resumes from the first's checkpoint."""
    pytest.importorskip("skimage", reason="the metrics of inpainting need scikit-image")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for index in range(4):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / split / f"{index}.png")
    options = [f"{split}_dataloader.dataset.data_root={tmp_path / 'data'}" for split in ("train", "val", "test")]
    options += [f"{split}_dataloader.dataset.size=32" for split in ("train", "val", "test")]
    options += [
        "model.generator.base_channels=4",
        "model.discriminator.base_channels=4",
        "train_dataloader.batch_size=1",
    ]
    options += ["default_hooks.checkpoint.interval=1", "train_cfg.val_interval=2"]
    config = ROOT / "configs/inpainting/partial-conv-carafe_scenes-64x64.py"
    found = []
    for iterations in (1, 2):
        command = (config, "--launcher", "pytorch", "--work-dir", tmp_path / "run", "--resume", "--cfg-options")
        command += (*options, f"train_cfg.max_iters={iterations}")
        codes, said = run_in_two_processes("train", *command, path=tmp_path, folder=tmp_path)
        assert codes == [0, 0], said[-3000:]
        found.append(weights(tmp_path / "run" / f"iter_{iterations}.pth"))
    before, after = found
    assert not any("module." in name for name in after)
    for network in ("generator", "discriminator"):
        names = [name for name in after if name.startswith(network) and after[name].is_floating_point()]
        assert sum(not torch.equal(before[name], after[name]) for name in names) > len(names) / 2, network
    assert last_metrics(tmp_path / "run")["inpainting/psnr"] > 0


def test_a_mistake_is_reported_once(tmp_path: Path) -> None:
    done = run("dist_train.sh", tmp_path / "absent.py", 2, PORT=free_port())
    assert done.returncode != 0
    assert done.stderr.count("error: no such configuration file") == 1
    assert "carafe_plugin" not in done.stderr, "no traceback of ours (torchrun adds its own summary)"


@pytest.mark.parametrize("launcher", ["pytorch", "slurm", "mpi"])
def test_a_launcher_that_did_not_start_us(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names, _ = processes.LAUNCHERS[launcher]
    for name in names:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match=f"--launcher {launcher} needs {names[0]}.*start with"):
        processes.prepare_processes(Config(dict(launcher=launcher)))


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in dict(RANK="2", WORLD_SIZE="4", LOCAL_RANK="2").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "get_device", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match=r"process 2 .* no GPU of its own \(2 found\)"):
        processes.prepare_processes(Config(dict(launcher="pytorch")))


def test_the_group_ends_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that outlived its run would keep gloo's threads until the interpreter's end, where they may abort."""
    for name, value in dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_PORT=free_port()).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(processes, "get_device", lambda: "cpu")
    models = []

    def main(args: argparse.Namespace) -> None:
        processes.prepare_processes(Config(dict(launcher="pytorch")))
        runner = [processes.CPUDistributedDataParallel(torch.nn.Linear(2, 2))]
        runner.append(runner)  # as mmengine's runner, which its loops and hooks refer to
        models.append(weakref.ref(runner[0]))

    assert run_tool(main, argparse.Namespace()) == 0
    assert not torch.distributed.is_initialized()
    assert models[0]() is None


def test_a_wrapper_of_the_configuration_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_PORT=free_port()).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "get_device", lambda: "cpu")
    started = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend: started.append(backend))
    cfg = Config(dict(launcher="pytorch", model_wrapper_cfg=dict(type="Own", find_unused_parameters=True)))
    processes.prepare_processes(cfg)
    assert started == ["gloo"]
    assert cfg.model_wrapper_cfg == dict(type="Own", find_unused_parameters=True, broadcast_buffers=False)
    cfg = Config(dict(launcher="pytorch"))
    processes.prepare_processes(cfg)
    assert cfg.model_wrapper_cfg.type == "mmengine.CPUDistributedDataParallel"


@pytest.mark.parametrize(("launcher", "expected"), [("none", 0), (None, 0), ("pytorch", 0), ("slurm", 3), ("mpi", 1)])
def test_the_environment_counts_under_its_own_launcher_alone(
    launcher: str | None, expected: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A shell inside a Slurm job has SLURM_PROCID, whatever is started in it."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    assert processes.process_rank(launcher) == expected

    def mistaken(args: argparse.Namespace) -> None:
        raise UsageError("a mistake")

    given = argparse.Namespace() if launcher is None else argparse.Namespace(launcher=launcher)
    assert run_tool(mistaken, given) == 2
    assert capsys.readouterr().err == ("" if expected else "error: a mistake\n")


def test_what_one_process_alone_finds_it_says_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacking(args: argparse.Namespace) -> None:
        raise ProcessError("process 2 of this machine has no GPU of its own")

    monkeypatch.setenv("RANK", "2")
    assert run_tool(lacking, argparse.Namespace(launcher="pytorch")) == 2
    assert capsys.readouterr().err == "error: process 2 of this machine has no GPU of its own\n"


def test_the_process_group_knows_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 2)
    assert processes.process_rank("none") == 2


FAKE_SRUN = """#!/usr/bin/env bash
# Record the arguments, then do what srun does for one task.
printf '%s\\n' "$@" > "$SRUN_LOG"
while [ "$1" != "$PYTHON" ]; do shift; done
SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_LOCALID=0 exec "$@"
"""


@pytest.fixture
def srun(tmp_path: Path) -> dict[str, str]:
    """Put a stand-in for srun on the path; gives the environment to run in."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "srun").write_text(FAKE_SRUN)
    (folder / "srun").chmod(0o755)
    return dict(
        PATH=f"{folder}{os.pathsep}{os.environ['PATH']}",
        SRUN_LOG=str(tmp_path / "srun.log"),
        PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]),
        MASTER_PORT=free_port(),
    )


def test_slurm(tmp_path: Path, srun: dict[str, str]) -> None:
    config, work_dir = write_toy(tmp_path), tmp_path / "run"
    variables = dict(srun, GPUS="1", GPUS_PER_NODE="0", CPUS_PER_TASK="3", SRUN_ARGS="--quiet --time=10")
    options = ("--cfg-options", "train_cfg.max_epochs=1")
    done = run("slurm_train.sh", "cpu", "a name", config, work_dir, *options, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (work_dir / "epoch_1.pth").is_file()
    arguments = Path(srun["SRUN_LOG"]).read_text().splitlines()
    expected = ["-p", "cpu", "--job-name=a name", "--ntasks=1", "--ntasks-per-node=1", "--cpus-per-task=3"]
    expected += ["--kill-on-bad-exit=1", "--quiet", "--time=10", sys.executable, "-u"]
    assert arguments[: len(expected)] == expected
    tail = [str(config), "--launcher", "slurm", "--work-dir", str(work_dir), *options]
    assert arguments[-len(tail) :] == tail

    options = ("--work-dir", tmp_path / "test")
    done = run("slurm_test.sh", "cpu", "job", config, work_dir / "epoch_1.pth", *options, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    assert last_metrics(tmp_path / "test")["toy/images"] == 16


def test_slurm_asks_for_gpus(tmp_path: Path, srun: dict[str, str]) -> None:
    """With the defaults, and without a work dir: options follow the configuration directly."""
    (tmp_path / "bin/srun").write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@" > "$SRUN_LOG"\n')
    assert run("slurm_train.sh", "gpu", "job", "config.py", "--amp", **srun).returncode == 0
    arguments = Path(srun["SRUN_LOG"]).read_text().splitlines()
    assert {"--gres=gpu:8", "--ntasks=8", "--ntasks-per-node=8", "--cpus-per-task=5"} <= set(arguments)
    assert arguments[-4:] == ["config.py", "--launcher", "slurm", "--amp"]


@pytest.mark.parametrize("script", ["dist_train.sh", "dist_test.sh", "slurm_train.sh", "slurm_test.sh"])
def test_scripts(script: str) -> None:
    path = ROOT / "tools" / script
    assert os.access(path, os.X_OK)
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    done = run(script, "too few")
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")
    linter = shutil.which("shellcheck")
    if linter is None:
        print("shellcheck is not installed: syntax alone was checked")
    else:
        assert subprocess.run([linter, str(path)]).returncode == 0
