"""Checkpoints survive kill -9 at any moment, and resuming finds the newest one that can be read."""

from __future__ import annotations

import datetime
import os
import re
import signal
import sys
import threading
import time
import types
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader, load_checkpoint
from tiny_models import KILL_MODULE, write_toy
from tool_runs import call_tool, forget_runs, run_in_process

from carafe_plugin import CARAFEUpsample
from carafe_plugin.engine.atomic import AtomicLocalBackend
from carafe_plugin.engine.checkpoint import (
    CheckpointPlace,
    checkpoint_types,
    find_mismatch,
    read_checkpoint,
    use_safe_loading,
)
from carafe_plugin.engine.errors import CheckpointError

POINTS = ("writing", "renaming", "writing the pointer", "deleting", "writing the best")


def train(
    folder: Path, work_dir: Path, *options: str, hook: str = "CheckpointHook", kill_at: str = ""
) -> tuple[int | None, str]:
    """The exit code of a training in a process of its own, and what it said."""
    config, log = write_toy(folder, hook=hook, imports=("toy", "kill")), folder / "process.log"
    (folder / "kill.py").write_text(KILL_MODULE)
    process = run_in_process("train", config, "--work-dir", work_dir, *options, path=folder, log=log, KILL_AT=kill_at)
    process.join(120)
    return process.exitcode, log.read_text()


def weights(path: Path) -> dict:
    return torch.load(path, weights_only=False)["state_dict"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    code, said = train(folder, folder / "run")
    assert code == 0, said[-3000:]
    return folder / "run"


def test_an_uninterrupted_run_keeps_the_last_and_the_best(uninterrupted: Path) -> None:
    names = sorted(path.name for path in uninterrupted.iterdir() if path.is_file() and path.suffix != ".py")
    assert names == ["best_toy_error_epoch_5.pth", "epoch_5.pth", "last_checkpoint", "last_validated"]
    best = torch.load(uninterrupted / "best_toy_error_epoch_5.pth", weights_only=False)
    assert "optimizer" not in best
    assert best["meta"]["epoch"] == 5


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL on this system")
@pytest.mark.parametrize(
    ("point", "runner"), [*((point, "Runner") for point in POINTS), ("renaming", "FlexibleRunner")]
)
def test_killed_and_resumed(
    point: str, runner: str, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work_dir, options = tmp_path / "run", ("--cfg-options", f"runner_type={runner}")
    code, said = train(tmp_path, work_dir, *options, kill_at=point)
    assert code == -signal.SIGKILL, said[-3000:]
    left = CheckpointPlace(work_dir).newest()
    # The checkpoint of an epoch is written again when it is the best: the pointer's 4th writing is epoch 2's second.
    epochs = {"writing": 2, "renaming": 2, "writing the pointer": 2, "deleting": 3, "writing the best": 2}
    assert left == str(work_dir / f"epoch_{epochs[point]}.pth")
    assert read_checkpoint(left, training=True)["meta"]["iter"] == 2 * epochs[point]
    best = list(work_dir.glob("best_*.pth"))
    assert best
    assert all(read_checkpoint(str(path)) for path in best)
    if point.startswith("writing"):
        assert list(work_dir.glob("*.tmp")), "the kill was to come in the middle of a write"

    monkeypatch.syspath_prepend(tmp_path)
    assert call_tool("train", tmp_path / "toy_config.py", "--work-dir", work_dir, "--resume", "auto", *options) == 0
    log = max(work_dir.glob("*/*.log")).read_text()
    assert f"resumed epoch: {epochs[point]}, iter: {2 * epochs[point]}" in log
    final = torch.load(work_dir / "epoch_5.pth", weights_only=False)
    assert (final["meta"]["epoch"], final["meta"]["iter"]) == (5, 10)
    expected = weights(uninterrupted / "epoch_5.pth")
    assert all(torch.equal(final["state_dict"][name], value) for name, value in expected.items())
    assert [path.name for path in work_dir.glob("epoch_*")] == ["epoch_5.pth"], "what the killed run left is gone"
    assert not list(work_dir.glob("*.tmp"))


def test_a_folder_that_holds_a_training_is_not_started_in_anew(tmp_path: Path) -> None:
    place = CheckpointPlace(tmp_path)
    assert place.newest() is None
    (tmp_path / "last_checkpoint").write_text("/elsewhere/epoch_3.pth")
    with pytest.raises(CheckpointError, match=r"last_checkpoint names epoch_3\.pth, which is not in .*--resume PATH"):
        place.newest()
    (tmp_path / "last_checkpoint").unlink()
    fake(tmp_path, "best_bbox_mAP_epoch_12.pth", age=0)
    with pytest.raises(CheckpointError, match=r"holds best_bbox_mAP_epoch_12\.pth, and no state of a training"):
        place.newest()


def test_the_pointer_is_believed_whatever_the_name(tmp_path: Path) -> None:
    """Beside the checkpoints or in the work dir; also a folder, as DeepSpeed writes them."""
    fake(tmp_path, "epoch_1.pth", age=10)
    named, work_dir = fake(tmp_path, "final-state.pth", age=20), tmp_path / "run"
    work_dir.mkdir()
    (work_dir / "last_checkpoint").write_text(str(named))
    assert CheckpointPlace(tmp_path, work_dir=work_dir).newest() == str(named)
    (tmp_path / "epoch_2.pth").mkdir()
    (work_dir / "last_checkpoint").write_text("epoch_2.pth")
    assert CheckpointPlace(tmp_path, work_dir=work_dir).newest() == str(tmp_path / "epoch_2.pth")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL on this system")
def test_the_kill_does_hurt_mmengines_own_hook(tmp_path: Path) -> None:
    """The control of the test above: if this fails, the kill hurts nobody and the test shows nothing."""
    code, said = train(tmp_path, tmp_path / "run", hook="StockHook", kill_at="writing")
    assert code == -signal.SIGKILL, said[-3000:]
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        CheckpointPlace(tmp_path / "run").newest()


def fake(folder: Path, name: str, age: float, **meta: int) -> Path:
    path = folder / name
    torch.save(dict(state_dict={}, meta=dict(epoch=1, iter=1) | meta), path)
    os.utime(path, (time.time() - age,) * 2)
    return path


class Detector(torch.nn.Module):
    """A backbone, a neck that upsamples by CARAFE or not, and perhaps a mask head that does."""

    def __init__(self, neck: bool, mask_head: bool) -> None:
        super().__init__()
        self.backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
        self.neck = torch.nn.ModuleDict(dict(lateral=torch.nn.Conv2d(4, 4, 1)))
        if neck:
            self.neck["up"] = CARAFEUpsample(4, compressed_channels=2)
        if mask_head:
            head = torch.nn.ModuleDict(dict(conv=torch.nn.Conv2d(4, 4, 1), up=CARAFEUpsample(4, compressed_channels=2)))
            self.mask_head = head


def test_what_fits_a_model() -> None:
    both, neck, mask, none = (
        Detector(*parts) for parts in ((True, True), (True, False), (False, True), (False, False))
    )
    old = {name: value for name, value in both.state_dict().items() if "num_batches_tracked" not in name}
    assert find_mismatch(both, {f"module.{name}": value for name, value in old.items()}) is None
    assert find_mismatch(neck, both.state_dict()) is None, "a mask head more does no harm"
    assert (
        find_mismatch(both, neck.state_dict())
        == "lacks 6 of the 18 parameters of Detector, the first: mask_head.conv.weight"
    )
    for model in (mask, none):
        stray = "holds CARAFE++ where Detector has none: neck.up.content_encoder.weight"
        assert find_mismatch(model, both.state_dict()) == stray
    other = {**none.state_dict(), "backbone.0.bias": torch.zeros(5), "neck.lateral.bias": torch.zeros(5)}
    assert re.match(
        r"fits Detector in name alone, 2 .* shape: size mismatch for backbone\.0\.bias", find_mismatch(none, other)
    )
    assert (
        find_mismatch(none, {"other.weight": torch.zeros(1)})
        == "holds no parameter of Detector (its first: other.weight)"
    )
    assert find_mismatch(none, dict(model=[1])) == "holds no parameters"


class Private:
    """What a checkpoint of somebody's own project may hold."""


class Code:
    """What a checkpoint of somebody with bad intentions may hold: a function, called as the file is read."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


NEW = hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint")  # torch 2.6: weights_only can be told more types


@pytest.fixture(params=[pytest.param(True, marks=pytest.mark.skipif(not NEW, reason="torch before 2.6")), False])
def new_torch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Reading by torch's weights_only, and as with a torch that is too old for it."""
    monkeypatch.setattr("carafe_plugin.engine.checkpoint._names_of_globals", lambda: request.param)
    return request.param


@pytest.mark.usefixtures("new_torch")
@pytest.mark.parametrize("zipped", [True, False])
def test_reading_what_others_wrote(zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both formats of torch.save. What zoos and projects put beside the weights is loaded, what runs code is not."""
    path, ran = tmp_path / "others.pth", tmp_path / "ran"

    def save(**more: object) -> None:
        torch.save(dict(state_dict=dict(a=torch.ones(2)), meta=more), path, _use_new_zipfile_serialization=zipped)

    plain = dict(
        best=np.float64(0.386), seen=np.int64(7), flag=np.bool_(True), half=np.float16(0.5), letters=np.array(["a"]),
        history=np.arange(3.0), mixed=np.array([1, "a"], dtype=object), names=("a", "b"), cut=slice(3), some={1},
        time=datetime.datetime(2026, 11, 27), took=datetime.timedelta(1), args=Namespace(lr=0.1), raw=b"raw",
        cfg=ConfigDict(model=dict(type="Net")), frozen=frozenset([1]), words=Counter("aab"), kind=torch.bfloat16,
        size=torch.Size([2]), device=torch.device("cpu"), complex=1j, epochs=range(3),
    )  # fmt: skip
    save(**plain)
    meta = read_checkpoint(str(path))["meta"]
    assert all(np.array_equal(meta[name], value) and type(meta[name]) is type(value) for name, value in plain.items())
    assert meta["cfg"].model.type == "Net"
    if not zipped:  # where the other NumPy has them; a zip file would no longer be whole
        here, there = (b"numpy._core", b"numpy.core")[:: 1 if np.lib.NumpyVersion(np.__version__) >= "2.0.0b1" else -1]
        path.write_bytes(path.read_bytes().replace(b"c" + here + b".multiarray\n", b"c" + there + b".multiarray\n"))
        assert read_checkpoint(str(path))["meta"]["best"] == 0.386
    for content, name in (
        (Code(os.system, f"touch {ran}"), r"\w+\.system"),
        (Code(exec, "raise SystemExit"), "exec"),
        (Code(getattr, np.ndarray, "tofile"), "getattr"),
        (Private(), rf"{__name__}\.Private"),
    ):
        save(content=content)
        with pytest.raises(
            CheckpointError, match=rf"others\.pth \(it holds (builtins\.)?{name}, and may run code: .*NO_W"
        ):
            read_checkpoint(str(path))
    assert not ran.exists()

    module = types.ModuleType("their_project")
    module.Private = type("Private", (), dict(__module__="their_project"))
    monkeypatch.setitem(sys.modules, "their_project", module)
    save(config=module.Private())
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert isinstance(read_checkpoint(str(path))["meta"]["config"], module.Private), "who trusts it"
    monkeypatch.delitem(sys.modules, "their_project")
    with pytest.raises(CheckpointError, match=r"a module that is not installed, .*their_project"):
        read_checkpoint(str(path))


@pytest.mark.usefixtures("new_torch")
def test_what_is_not_the_pickle_of_torch_save(tmp_path: Path) -> None:
    for name, content in (("page.pth", b"<html>404</html>"), ("empty.pth", b""), ("bytes.pth", b"garbage " * 99)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            CheckpointError, match=rf"{name} \({len(content)} bytes; truncated or damaged\): (?!.*weights)"
        ):
            read_checkpoint(str(tmp_path / name))


@pytest.mark.skipif(not NEW, reason="torch before 2.6 has no such list")
def test_what_torch_may_load_is_as_before(tmp_path: Path) -> None:
    """What is allowed for one file is allowed for no other, and getattr, which HistoryBuffer pickles, for none."""
    path = fake(tmp_path, "epoch_1.pth", age=0)
    before = set(torch.serialization.get_safe_globals())
    with checkpoint_types():
        allowed = [kind for kind, _ in set(torch.serialization.get_safe_globals()) - before]
        assert HistoryBuffer in allowed
        assert getattr not in allowed
    read_checkpoint(str(path))
    assert set(torch.serialization.get_safe_globals()) == before
    with torch.serialization.safe_globals([np.ndarray]):
        (tmp_path / "damaged.pth").write_text("no checkpoint")
        with pytest.raises(CheckpointError, match="cannot read"):
            read_checkpoint(str(tmp_path / "damaged.pth"))
        assert np.ndarray in torch.serialization.get_safe_globals(), "what the user allowed stays allowed"
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.usefixtures("new_torch")
def test_mmengine_loads_by_our_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own would load anything, with a warning; from a URL too."""
    folder = tmp_path / "served"
    folder.mkdir()
    history = HistoryBuffer([1.0, 3.0], [1, 1])
    torch.save(dict(state_dict=dict(a=torch.ones(2)), message_hub=dict(loss=history)), folder / "a.pth")
    torch.save(dict(state_dict=Code(os.system, f"touch {tmp_path / 'ran'}")), folder / "code.pth")
    monkeypatch.setattr(CheckpointLoader, "_schemes", dict(CheckpointLoader._schemes))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    use_safe_loading()
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for place in (str(folder), f"http://127.0.0.1:{server.server_port}"):
            model = torch.nn.Module()
            model.a = torch.nn.Parameter(torch.zeros(2))
            loss = load_checkpoint(model, f"{place}/a.pth")["message_hub"]["loss"]
            assert (loss.current(), loss.mean(), model.a.sum()) == (3, 2, 2)
            with pytest.raises(CheckpointError, match=r"cannot read checkpoint .*code\.pth \(it holds \w+\.system"):
                load_checkpoint(model, f"{place}/code.pth")
            with pytest.raises(CheckpointError, match=r"(no such|cannot download) checkpoint:? .*absent\.pth"):
                load_checkpoint(model, f"{place}/absent.pth")
        server.shutdown()
    assert not (tmp_path / "ran").exists()


def test_only_the_newest_checkpoint_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(1, 5):
        fake(tmp_path, f"epoch_{step}.pth", age=10 - step)
    (tmp_path / "epoch_4.pth").write_bytes(b"truncated")
    opened, load = {}, torch.load
    monkeypatch.setattr(torch, "load", lambda path, *a, **k: opened.update({Path(path).name: k}) or load(path, *a, **k))
    assert CheckpointPlace(tmp_path).newest() == str(tmp_path / "epoch_3.pth")
    assert list(opened) == ["epoch_4.pth", "epoch_3.pth"]
    assert opened["epoch_3.pth"]["mmap"], "a billion parameters are read once, by mmengine"


def test_newest_checkpoint_order(tmp_path: Path) -> None:
    assert CheckpointPlace(tmp_path).newest() is None
    old_run = fake(tmp_path, "epoch_12.pth", age=1000)
    second, third = fake(tmp_path, "epoch_2.pth", age=20), fake(tmp_path, "epoch_3.pth", age=10)
    fake(tmp_path, "best_bbox_mAP_epoch_12.pth", age=0)
    fake(tmp_path, "epoch_12-01234567.pth", age=0)
    pointer = tmp_path / "last_checkpoint"

    assert CheckpointPlace(tmp_path).newest() == str(third), "no pointer: the one written last"
    pointer.write_text("/moved/from/elsewhere/epoch_2.pth")
    assert CheckpointPlace(tmp_path).newest() == str(third), "a later step, written later: killed before the pointer"
    pointer.write_text(str(third))
    assert CheckpointPlace(tmp_path).newest() == str(third), "not epoch 12 of an earlier run"
    os.utime(second, (time.time() + 5,) * 2)
    assert CheckpointPlace(tmp_path).newest() == str(third), "copied in another order: the pointer says"
    os.utime(second, (time.time() - 20,) * 2)
    pointer.write_text("")
    assert CheckpointPlace(tmp_path).newest() == str(third), "an empty pointer is no pointer"
    third.unlink()
    second.unlink()
    assert CheckpointPlace(tmp_path).newest() == str(old_run)


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "weights", "list"])
def test_unreadable_ones_are_skipped_and_named(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    forget_runs()  # else mmengine's logger writes to the stdout of the test that first used it
    good, bad = fake(tmp_path, "iter_10.pth", age=10), fake(tmp_path, "iter_20.pth", age=0)
    content = bad.read_bytes()
    if damage in ("weights", "list"):
        torch.save(dict(state_dict={}) if damage == "weights" else [1], bad)
    else:
        bad.write_bytes(dict(truncated=content[: len(content) // 2], empty=b"", garbage=b"garbage " * 99)[damage])
    (tmp_path / "last_checkpoint").write_text(str(bad))
    assert CheckpointPlace(tmp_path).newest() == str(good)
    assert str(bad) in capsys.readouterr().out
    good.unlink()
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        CheckpointPlace(tmp_path).newest()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "file"
    backend = AtomicLocalBackend()
    backend.put(b"old", path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        backend.put(b"new", path)
    assert path.read_bytes() == b"old"
    assert [file.name for file in path.parent.iterdir()] == ["file"]
    if sys.platform != "win32":
        assert path.stat().st_mode & 0o777 == 0o666 & ~_umask(), "as open() makes it"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_names_of_distributed_models_are_no_mismatch():
    """DistributedDataParallel around a model, or around each network of a GAN, puts "module." into its names."""

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    networks = torch.nn.ModuleDict(dict(generator=torch.nn.Linear(2, 1), discriminator=torch.nn.Linear(2, 2)))
    wrapped = torch.nn.ModuleDict({name: Wrapper(network) for name, network in networks.items()})
    for source in (networks, Wrapper(networks), wrapped):
        for model in (networks, wrapped):
            assert find_mismatch(model, source.state_dict()) is None
    del networks["discriminator"]
    assert "lacks 2 of the 4 parameters" in find_mismatch(wrapped, networks.state_dict())
