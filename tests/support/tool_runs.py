"""How tests run the tools: in processes of their own, forked, or in this one; and what runs leave behind."""

from __future__ import annotations

import importlib
import importlib.util
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("mmengine", reason="tools: mmengine is not installed")

ROOT = Path(__file__).resolve().parents[2]


def environment(**variables: str) -> dict[str, str]:
    """The environment for a tool in a process of its own: this checkout, one thread, no GPU."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own = dict(PYTHONPATH=path, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="-1", PYTHON=sys.executable)
    return {**os.environ, **own, **variables}


def run(*command: object, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess:
    """Run ``command`` (a path below tools/ first) to its end in a process of its own."""
    tool, *arguments = (str(part) for part in command)
    starter = [sys.executable] if tool.endswith(".py") else ["bash"]
    return subprocess.run(
        [*starter, str(ROOT / "tools" / tool), *arguments],
        cwd=cwd,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=300,
    )


def call_tool(name: str, *arguments: object) -> int:
    """Call a tool here, as its last line does, without the 5 s that importing a toolbox takes; returns its exit code.

    For example ``call_tool('train', config, '--amp')``.
    """
    forget_runs()
    module = load_tool(name)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in environment(): the models are too small to share
    try:
        return module.main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse
        return int(stop.code or 0)
    finally:
        torch.set_num_threads(threads)


def load_tool(name: str) -> ModuleType:
    """Import a command: ``"train"`` is tools/train.py, ``"studies.ablation.__main__"`` a module."""
    if "." in name:
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(f"carafe_tools_{name}", ROOT / "tools" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_in_process(tool: str, *arguments: object, path: Path, log: Path, **variables: str) -> ForkServerProcess:
    """Start :func:`call_tool` in a process forked from one that has all imported; ``path`` goes before Python's.

    Output goes to ``log``.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tool_runs", "matplotlib.pyplot", "mmengine.runner", "torchvision", "yapf.yapflib.yapf_api"]
    )
    process = context.Process(target=_process, args=(tool, arguments, str(path), str(log), variables))
    with pytest.MonkeyPatch.context() as patch:  # of the server, which starts with the first process
        for name, value in environment(PYTHONPATH=os.pathsep.join([str(ROOT), str(Path(__file__).parent)])).items():
            patch.setenv(name, value)
        process.start()
    return process


def run_in_two_processes(tool: str, *arguments: object, path: Path, folder: Path) -> tuple[list[int | None], str]:
    """What ``dist_<tool>.sh`` starts for ``--launcher pytorch``, but forked: both exit codes, and what the two said."""
    variables = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    logs = [folder / f"{tool}_{rank}.log" for rank in range(2)]
    processes = [
        run_in_process(tool, *arguments, path=path, log=log, RANK=str(rank), LOCAL_RANK=str(rank), **variables)
        for rank, log in enumerate(logs)
    ]
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes], "".join(log.read_text() for log in logs)


def _process(tool: str, arguments: tuple, path: str, log: str, variables: dict[str, str]) -> None:
    with Path(log).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.path.insert(0, path)
    os.environ |= variables
    # Most of such a run's time goes into what it says of its machine and into the layout of a configuration's text.
    importlib.import_module("mmengine.runner.runner").collect_env = dict
    importlib.import_module("yapf.yapflib.yapf_api").FormatCode = lambda text, **_: (text, True)
    sys.exit(call_tool(tool, *arguments))


def free_port() -> str:
    """A port on which no process listens, for those of one run to meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint."""
    return torch.load(path, weights_only=False)["state_dict"]


def forget_runs() -> None:
    """Drop mmengine's named globals: two runs within one second share a name, and with it loggers and folders."""
    from mmengine.utils import ManagerMixin

    classes = [ManagerMixin]
    while classes:
        classes += (manager := classes.pop()).__subclasses__()
        manager._instance_dict.clear()


@dataclass(frozen=True)
class Trained:
    """A configuration, and the work dir in which tools/train.py trained it."""

    scope: str
    config: Path
    work_dir: Path

    @property
    def checkpoint(self) -> Path:
        return Path((self.work_dir / "last_checkpoint").read_text())

    def recorded_with(self, classes: tuple | None, path: Path) -> Path:
        """Write the checkpoint to ``path`` as if it had been trained with other classes; None: it records nothing."""
        content = torch.load(self.checkpoint, weights_only=False)
        content["meta"] = {} if classes is None else {**content["meta"], "dataset_meta": dict(classes=classes)}
        torch.save(content, path)
        return path

    def metrics(self) -> dict[str, float]:
        """The last metrics that the run logged."""
        return last_metrics(self.work_dir)


def last_metrics(work_dir: Path) -> dict[str, float]:
    """The metrics in the newest JSON log below ``work_dir``, without times."""
    logs = sorted(p for p in work_dir.glob("*/*.json") if p.stem == p.parent.name)
    logs = logs or sorted(work_dir.glob("*/vis_data/scalars.json"))
    line = json.loads(logs[-1].read_text().strip().splitlines()[-1])
    return {key: value for key, value in line.items() if key not in ("time", "data_time", "step")}


def one_line(capsys: pytest.CaptureFixture) -> str:
    """The only line on stderr that starts with 'error:'; there must be no traceback."""
    output = capsys.readouterr().err
    lines = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, output
    assert "Traceback" not in output, output
    return lines[0]
