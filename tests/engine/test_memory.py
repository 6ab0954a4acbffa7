"""Memory that the tools keep on a CPU: what glibc does with it, in which processes, and who may say otherwise."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from tiny_models import write_toy
from tool_runs import ROOT, environment

from carafe_plugin.engine import memory

GLIBC = memory._glibc() is not None
needs_glibc = pytest.mark.skipif(not GLIBC, reason="another C library than glibc, whose malloc is left alone")
KEPT, LEFT = "Freed memory is kept", "Freed memory is left to the allocator: "
# How much of a freed block of 256 MB a process still holds, in this process and in one that it forks.
PROBE = """
import multiprocessing, os, sys
from argparse import Namespace
import torch
from carafe_plugin.engine.memory import keep_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def held():
    before = resident()
    block = torch.ones(64 * 2**20)
    assert resident() - before > 250e6
    del block
    return round((resident() - before) / 256e6, 1)

kept = keep_memory(Namespace(keep_memory="keep" in sys.argv), "cpu")
with multiprocessing.get_context("fork").Pool(1) as pool:
    forked = pool.apply(held)
print(kept, held() > 0.9, forked > 0.1)
"""


def probe(*arguments: str, **variables: str) -> tuple[str, str]:
    """The probe's last line, and all that it wrote."""
    own = {name: value for name, value in environment().items() if not name.startswith(("MALLOC_", "GLIBC_TUN"))}
    command = [sys.executable, "-c", PROBE, *arguments]
    done = subprocess.run(command, env={**own, **variables}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1], done.stdout + done.stderr


@needs_glibc
def test_freed_memory_is_kept_but_not_by_forked_processes() -> None:
    line, text = probe("keep")
    assert line == "True True False"
    assert text.count(KEPT) == 1


@needs_glibc
@pytest.mark.parametrize(
    ("arguments", "variables", "reason"),
    [
        ((), {}, "--no-keep-memory"),
        (("keep",), {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"}, "GLIBC_TUNABLES sets mmap_threshold"),
    ],
    ids=["option", "tunables"],
)
def test_memory_is_left_alone_where_the_user_says_so(arguments: tuple, variables: dict, reason: str) -> None:
    line, text = probe(*arguments, **variables)
    assert line == "False False False"
    assert LEFT + reason in text


@needs_glibc
@pytest.mark.parametrize("name", ["MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"])
def test_every_setting_of_the_environment_counts(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    for other in [each for each in os.environ if each.startswith(("MALLOC_", "GLIBC_TUN"))]:
        monkeypatch.delenv(other)
    monkeypatch.setenv(name, "65536")
    monkeypatch.setattr(memory, "_keep", lambda _: pytest.fail("memory is kept"))
    assert memory.keep_memory(Namespace(keep_memory=True), "cpu") is False
    assert f"{LEFT}{name} is set" in "".join(capfd.readouterr())


@needs_glibc
def test_settings_of_something_else_do_not_matter() -> None:
    line, _ = probe("keep", MALLOC_ARENA_MAX="2", GLIBC_TUNABLES="glibc.malloc.tcache_count=3")
    assert line.startswith("True True")


@needs_glibc
@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler for an allocator")
def test_another_allocator_is_left_alone(tmp_path: Path) -> None:
    source, library = tmp_path / "own.c", tmp_path / "libown_malloc.so.1"
    source.write_text(
        "#include <stddef.h>\nvoid *__libc_malloc(size_t);\nvoid *malloc(size_t n) { return __libc_malloc(n); }\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    line, text = probe("keep", LD_PRELOAD=str(library))
    assert line == "False False False"
    assert f"{LEFT}{library.name} has another one" in text


@pytest.mark.parametrize("other", ["cuda", "cuda:1", "npu", "mps"])
def test_nothing_is_said_on_other_devices(other: str, capfd: pytest.CaptureFixture) -> None:
    assert memory.keep_memory(Namespace(keep_memory=True), other) is False
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_nothing_is_said_on_other_systems(
    platform: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(memory.sys, "platform", platform)
    assert memory.keep_memory(Namespace(keep_memory=True), "cpu") is False
    assert capfd.readouterr() == ("", "")


@needs_glibc
def test_the_logs_of_runs_say_it(tmp_path: Path) -> None:
    """In a file of the work dir, once a run."""
    config = write_toy(tmp_path)
    own = {name: value for name, value in environment().items() if not name.startswith(("MALLOC_", "GLIBC_TUN"))}
    own["PYTHONPATH"] = os.pathsep.join([str(tmp_path), own.get("PYTHONPATH", "")])

    def logged(tool: str, *arguments: str) -> str:
        work_dir = tmp_path / tool
        command = [sys.executable, f"tools/{tool}.py", str(config), *arguments, "--work-dir", str(work_dir)]
        done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        (log,) = work_dir.glob("*/*.log")
        return log.read_text()

    text = logged("train", "--cfg-options", "train_dataloader.num_workers=1", "train_cfg.max_epochs=1")
    assert text.count(KEPT) == 1
    text = logged("test", str(tmp_path / "train" / "epoch_1.pth"), "--no-keep-memory")
    assert text.count(LEFT) == 1
    assert KEPT not in text
