"""The campaign of kills: a training is killed at random moments, resumed after each, and nothing is lost.

Every form in which MMEngine's hook can keep checkpoints has its turn. A process is forked from one that has imported
everything, so that a training takes a second.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from campaign import SEED, count
from mmengine.config import Config
from tiny_models import KILL_MODULE, write_toy
from tool_runs import run_in_process

from carafe_plugin.engine.checkpoint import CheckpointPlace, read_checkpoint

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL on this system")

HOOK = "default_hooks.checkpoint."
#: Settings of a training; FOLDER is the test's.
FORMS = {
    "as the tools have it": [],
    "a name behind the number": [f"{HOOK}filename_tmpl=epoch_{{}}_carafe.pth"],
    "another ending, padded": [f"{HOOK}filename_tmpl=toy-{{:04d}}.pt"],
    "another folder": [f"{HOOK}out_dir=FOLDER/elsewhere", f"{HOOK}filename_tmpl=epoch_{{}}_carafe.pth"],
    "the work dir as out_dir": [f"{HOOK}out_dir=FOLDER/run"],
    "by iterations": [f"{HOOK}by_epoch=False", f"{HOOK}interval=2"],
    "a loop of iterations": [
        *("train_cfg._delete_=True", "train_cfg.by_epoch=False", "train_cfg.max_iters=10", "train_cfg.val_interval=2"),
        *("train_dataloader.sampler.type=InfiniteSampler", "param_scheduler.by_epoch=False"),
        *(f"{HOOK}by_epoch=False", f"{HOOK}interval=2", f"{HOOK}filename_tmpl=step_{{}}.pth"),
    ],
    "all of them kept": [f"{HOOK}max_keep_ckpts=-1"],
    "not the last one": [f"{HOOK}interval=2", f"{HOOK}save_last=False", f"{HOOK}max_keep_ckpts=2"],
    "the last one out of turn": [f"{HOOK}interval=2", f"{HOOK}save_last=True"],
    "published": [f"{HOOK}published_keys=['meta','state_dict']"],
    "published, none of the bests": [f"{HOOK}published_keys=['state_dict']", f"{HOOK}save_best=None"],
}


def settings(form: str, folder: Path) -> list[str]:
    return [setting.replace("FOLDER", str(folder)) for setting in FORMS[form]]


class Training:
    """One training and all its processes, in a folder of its own."""

    def __init__(self, form: str, folder: Path) -> None:
        self.folder, self.options = folder, settings(form, folder)
        folder.mkdir(parents=True)
        self.config = write_toy(folder, imports=("toy", "kill"))
        (folder / "kill.py").write_text(KILL_MODULE)
        # The work dir with a slash is another text than the out_dir, and so it is an out_dir for MMEngine.
        self.work_dir = f"{folder}/run/" if form != "the work dir as out_dir" else f"{folder}/run"
        cfg = Config.fromfile(self.config, import_custom_modules=False)
        cfg.merge_from_dict(dict(setting.split("=", 1) for setting in self.options))
        cfg.work_dir = self.work_dir
        place = CheckpointPlace.of(cfg)
        assert place is not None
        self.place, self.runs = place, 0

    def start(self, kill_at: str = "", resume: str = "") -> multiprocessing.process.BaseProcess:
        self.runs += 1
        options = ["--cfg-options", *self.options] if self.options else []
        resumes = ["--resume", *filter(None, [resume])] if self.runs > 1 else []
        arguments = [self.config, "--work-dir", self.work_dir, *resumes, *options]
        return run_in_process("train", *arguments, path=self.folder, log=self.log, KILL_AT=kill_at)

    @property
    def log(self) -> Path:
        return self.folder / f"process_{self.runs}.log"

    def reached(self) -> int:
        """The iterations that can be resumed from."""
        left = self.place.newest()
        return read_checkpoint(left, training=True)["meta"]["iter"] if left else 0

    def bests(self) -> dict[str, dict]:
        folders = {self.place.folder, Path(self.work_dir)}
        paths = [path for folder in folders for path in folder.glob("best_*") if path.suffix != ".tmp"]
        return {path.name: read_checkpoint(str(path)) for path in paths if path.name == without_digest(path.name)}

    def finish(self) -> None:
        process = self.start()
        process.join(120)
        if self.starts_anew():
            return self.finish()
        assert process.exitcode == 0, self.log.read_text()[-3000:]

    def starts_anew(self) -> bool:
        """Whether the last process refused to resume, for a reason, which is then taken away.

        Where states are kept more seldom than the training is validated, a kill can leave the first best alone.
        """
        refused = "no state of a training" in self.log.read_text()
        if refused:
            for path in [*self.place.folder.glob("best_*"), *Path(self.work_dir).glob("best_*")]:
                path.unlink()
            assert self.place.newest() is None, "there was a state to resume from"
        return refused

    def files(self) -> set[str]:
        """The names in its folders; a published one's without the digest, which is of a file with times in it."""
        names = {path.name for folder in (self.place.folder, Path(self.work_dir)) for path in folder.glob("*.p*t*")}
        return set(map(without_digest, names))


def without_digest(name: str) -> str:
    return re.sub(r"-[0-9a-f]{8}(\.pth?)$", r"-DIGEST\1", name)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    trainings: dict[str, tuple[Training, float]] = {}

    def get(form: str) -> tuple[Training, float]:
        if form not in trainings:
            training = Training(form, tmp_path_factory.mktemp("whole") / "training")
            started = time.monotonic()
            training.finish()
            trainings[form] = training, time.monotonic() - started
        return trainings[form]

    return get


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_lost(form, tmp_path, uninterrupted, campaign):
    """Killed before or in the middle of a random access to a file, or after a random time."""
    tally = campaign("kills")
    whole, seconds = uninterrupted(form)
    draw = random.Random(f"{SEED} {form}")
    kills, trainings = -(-count("kills", len(FORMS), 5 * len(FORMS)) // len(FORMS)), 0
    while kills > 0:
        training, trainings = Training(form, tmp_path / str(trainings)), trainings + 1
        done, bests = 0, {}
        for _ in range(draw.choice((1, 1, 2, 3))):
            moment = f"event {draw.randint(1, 64)}" if draw.random() < 0.5 else ""
            delay = draw.uniform(0, seconds)
            print(f"{form}, training {trainings}: kill at {moment or f'{delay:.2f} s'}")
            process = training.start(kill_at=moment)
            process.join(120 if moment else delay)
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
            if training.starts_anew():
                assert done == 0
                bests = {}
                continue
            log = training.log.read_text()
            killed = process.exitcode != 0  # else the end came first
            assert not killed or process.exitcode == -signal.SIGKILL, log[-3000:]
            kills -= killed
            tally(kills=int(killed))
            check_resumed(log, done)
            now = training.reached()
            assert now >= done, f"{done} iterations had been kept, {now} are left"
            left = training.bests()
            assert left or not bests, f"{sorted(bests)} is lost"
            if now > 4 and f"{HOOK}save_best=None" not in training.options:
                assert left, "the second epoch was kept after the first one's validation, whose best is missing"
            done, bests = now, left
        training.finish()
        check_resumed(training.log.read_text(), done)
        tally(trainings=1, resumed=training.runs - 1)
        check_same(form, training, whole)


@pytest.mark.parametrize("point", ["naming the best", "deleting the best"])
def test_a_kill_beside_the_best_leaves_one_best(point, tmp_path):
    """The new one was written, the state that tells of it, or the deletion of the old one, was not."""
    training = Training("as the tools have it", tmp_path / "training")
    process = training.start(kill_at=point)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, training.log.read_text()[-3000:]
    assert sorted(training.bests()) == ["best_toy_error_epoch_2.pth", "best_toy_error_epoch_3.pth"]
    training.options.append("train_cfg.max_epochs=3")  # nothing more to train
    training.finish()
    assert sorted(training.bests()) == ["best_toy_error_epoch_3.pth"]
    left = read_checkpoint(training.place.newest())["message_hub"]["runtime_info"]
    assert Path(left["best_ckpt"]).name == "best_toy_error_epoch_3.pth"


@pytest.mark.parametrize("validation", [3, 5])
@pytest.mark.parametrize("form", ["as the tools have it", "a loop of iterations", "published, none of the bests"])
def test_a_validation_that_was_killed_comes_first(form, validation, tmp_path, uninterrupted):
    """The last one too, after which there is nothing to train; one that was done does not come again."""
    whole, _ = uninterrupted(form)
    training = Training(form, tmp_path / "training")
    process = training.start(kill_at=f"validation {validation}")
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, training.log.read_text()[-3000:]
    assert training.reached() == 2 * validation
    training.finish()
    log = training.log.read_text()
    assert len(re.findall("There is no record of a validation of .*: it comes first", log)) == 1
    assert len(re.findall(r"toy/error: ", log)) == 6 - validation
    check_same(form, training, whole)
    training.finish()
    assert "toy/error: " not in training.log.read_text()


def test_the_record_of_a_validation_goes_with_its_checkpoint(tmp_path):
    """Where an earlier state is resumed from, the later one is written anew, and has to be validated anew."""
    training = Training("all of them kept", tmp_path / "training")
    for kill_at, resume, validations in (("validation 4", "", 3), ("validation 1", "epoch_2", 0), ("", "epoch_3", 3)):
        process = training.start(kill_at, str(training.place.folder / f"{resume}.pth"))
        process.join(120)
        log = training.log.read_text()
        assert process.exitcode == (-signal.SIGKILL if kill_at else 0), log[-3000:]
        assert len(re.findall("toy/error: ", log)) == validations


def check_resumed(log: str, done: int) -> None:
    """A process that got as far as that began where the one before it ended, never from the start."""
    said = re.findall(r"resumed epoch: \d+, iter: (\d+)", log)
    trained = re.findall(r"Epoch\(train\)|Iter\(train\)|Saving checkpoint", log)
    fresh = not said and (done == 0 or not trained)
    assert fresh or said == [str(done)], f"{done} iterations were kept, {log[-2000:]}"


def check_same(form: str, training: Training, whole: Training) -> None:
    """The end is that of the training which nobody killed."""
    assert not [*training.place.folder.glob("*.tmp"), *Path(training.work_dir).glob("*.tmp")]
    if form == "by iterations":  # MMEngine's epochs repeat the one that an iteration's checkpoint came in
        return
    assert training.reached() == whole.reached()
    assert training.files() == whole.files()
    last = [torch.load(each.place.newest(), weights_only=False) for each in (training, whole)]
    assert_same_weights(*last)
    bests = [each.bests() for each in (training, whole)]
    assert bests[0].keys() == bests[1].keys()
    for name, best in bests[0].items():
        assert_same_weights(best, bests[1][name])
    scores = [json.dumps(each["message_hub"]["runtime_info"].get("best_score")) for each in last]
    assert scores[0] == scores[1]


def assert_same_weights(got: dict, expected: dict) -> None:
    assert got["state_dict"].keys() == expected["state_dict"].keys()
    assert all(torch.equal(got["state_dict"][name], value) for name, value in expected["state_dict"].items())
