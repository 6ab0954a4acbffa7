"""tools/train.py: every toolbox trains, every option does what it says, every mistake is one line and exit code 2."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from tiny_models import write_config, write_toy
from tool_runs import call_tool, one_line, run

from carafe_plugin.engine import config as engine_config
from carafe_plugin.engine import processes
from carafe_plugin.engine.checkpoint import checkpoint_types
from carafe_plugin.engine.checkpoint_hook import AtomicCheckpointHook, use_atomic_checkpoints
from carafe_plugin.engine.errors import UsageError

pytest.importorskip("mmdet", reason="tools: mmdet is not installed")
pytest.importorskip("mmseg", reason="tools: mmseg is not installed")
pytest.importorskip("mmpretrain", reason="tools: mmpretrain is not installed")

SCOPES = ("mmdet", "mmseg", "mmpretrain")


@pytest.mark.parametrize(
    ("scope", "metric", "least"),
    [("mmdet", "coco/bbox_mAP_50", 0.4), ("mmseg", "aAcc", 60), ("mmpretrain", "accuracy/top1", 70)],
)
def test_every_toolbox_trains(scope: str, metric: str, least: float, trained: Callable) -> None:
    model = trained(scope)
    assert model.metrics()[metric] >= least
    epochs = Config.fromfile(model.config).train_cfg.max_epochs
    files = sorted(path.name for path in model.work_dir.glob("*.pth"))
    assert files == sorted(f"epoch_{n}.pth" for n in (epochs - 1, epochs)), "max_keep_ckpts=2 in the configuration"
    assert model.checkpoint.name == f"epoch_{epochs}.pth"


def test_checkpoints_of_training_load_with_torchs_default(trained: Callable) -> None:
    with checkpoint_types():
        content = torch.load(trained("mmdet").checkpoint)  # weights_only=True from torch 2.6 on, as in older mmengine
    assert {"state_dict", "optimizer", "message_hub", "meta"} <= set(content)
    assert any(key.startswith("neck.upsample_modules.0.") for key in content["state_dict"])


def test_our_hook_replaces_only_mmengines() -> None:
    ours = "carafe_plugin.engine.checkpoint_hook.AtomicCheckpointHook"
    cfg = Config(dict(default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=3))))
    use_atomic_checkpoints(cfg)
    assert cfg.default_hooks.checkpoint == dict(type=ours, interval=3)
    cfg = Config({})
    use_atomic_checkpoints(cfg)
    assert cfg.default_hooks.checkpoint.type == ours
    for own in (dict(checkpoint=None), dict(checkpoint=dict(type="EMAHook"))):
        cfg = Config(dict(default_hooks=own))
        use_atomic_checkpoints(cfg)
        assert cfg.default_hooks == own
    assert AtomicCheckpointHook(interval=1).priority == "VERY_LOW"


def test_auto_scale_lr_and_cfg_options(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = write_config(tmp_path / "scaled.py", "mmpretrain", data, epochs=1)
    changed = ("train_dataloader.batch_size=2", "default_hooks.logger.interval=1", "val_cfg=None")
    options = ["--cfg-options", *changed, "val_dataloader=None", "val_evaluator=None"]
    assert call_tool("train", config, "--work-dir", tmp_path / "run", "--auto-scale-lr", *options) == 0
    scalars = next((tmp_path / "run").glob("*/vis_data/scalars.json")).read_text().splitlines()
    first = json.loads(scalars[0])
    assert first["lr"] == pytest.approx(2e-3 * 2 / 8), "batch size 2 with base_batch_size=8"
    assert len(scalars) == 4, "7 images in batches of 2"

    config = write_config(tmp_path / "unscaled.py", "mmseg", data)
    assert call_tool("train", config, "--auto-scale-lr", "--work-dir", tmp_path / "none") == 2
    assert "auto_scale_lr.base_batch_size" in one_line(capsys)


def test_amp_needs_a_gpu(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "get_device", lambda: "cpu")
    config = write_config(tmp_path / "amp.py", "mmdet", data)
    assert call_tool("train", config, "--amp", "--work-dir", tmp_path / "run") == 2
    assert "--amp needs a GPU" in one_line(capsys)
    assert call_tool("train", config, "--cfg-options", "optim_wrapper.type=AmpOptimWrapper") == 2
    assert "AmpOptimWrapper in the configuration needs a GPU" in one_line(capsys)
    assert call_tool("train", config, "--amp", "--cfg-options", "optim_wrapper.type=OtherWrapper") == 2
    assert "OptimWrapper" in one_line(capsys)
    assert not (tmp_path / "run").exists(), "found out before anything was written"


def test_cheap_checks_come_first(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options are refused before a file of the dataset is looked at, and missing files before annotations are read."""
    monkeypatch.setattr(processes, "get_device", lambda: "cpu")
    monkeypatch.setattr(
        "carafe_plugin.engine.dataset_checks.check_annotations", lambda *_, **__: pytest.fail("annotations were read")
    )
    absent = ["train_dataloader.dataset.ann_file=absent.json"]
    config = write_config(tmp_path / "cheap.py", "mmdet", data)
    for options, expected in (
        (["--amp"], "--amp needs a GPU"),
        (["--auto-scale-lr"], "auto_scale_lr.base_batch_size"),
        (["--resume", "absent.pth"], "no such checkpoint"),
    ):
        assert call_tool("train", config, *options, "--cfg-options", *absent) == 2
        assert expected in one_line(capsys)
    assert call_tool("train", config, "--cfg-options", "val_dataloader.dataset.ann_file=absent.json") == 2
    assert "no such annotation file for val_dataloader" in one_line(capsys)


def test_sync_bn_becomes_bn_with_a_warning(data: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("SyncBN stays SyncBN where there is a GPU")
    config = write_config(tmp_path / "sync.py", "mmpretrain", data, epochs=1, norm="SyncBN")
    assert call_tool("train", config, "--work-dir", tmp_path / "run") == 0
    log = next((tmp_path / "run").glob("*/*.log")).read_text()
    assert "WARNING - SyncBN needs a GPU: 20 layers run as BN" in log


def test_resume_from_a_path_and_from_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = write_toy(tmp_path)
    work_dir = tmp_path / "run"
    monkey = ["--work-dir", work_dir]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        assert call_tool("train", config, *monkey, "--resume") == 0, "nothing to resume: from the start"
        more = ["--cfg-options", "train_cfg.max_epochs=7", "default_hooks.checkpoint.max_keep_ckpts=9"]
        path = work_dir / "epoch_5.pth"
        assert call_tool("train", config, "--work-dir", tmp_path / "other", "--resume", path, *more) == 0
        assert sorted(p.name for p in (tmp_path / "other").glob("epoch*")) == ["epoch_6.pth", "epoch_7.pth"]
        assert torch.load(tmp_path / "other/epoch_7.pth", weights_only=False)["meta"]["iter"] == 14

        capsys.readouterr()
        assert call_tool("train", config, *monkey, "--resume", tmp_path / "absent.pth") == 2
        assert f"no such checkpoint: {tmp_path}/absent.pth" in one_line(capsys)
        torch.save(dict(state_dict={}), tmp_path / "weights.pth")
        assert call_tool("train", config, *monkey, "--resume", tmp_path / "weights.pth") == 2
        assert "weights alone" in one_line(capsys)


MISSING = {
    "annotation file": (("mmdet", "train_dataloader.dataset.ann_file=absent.json"), "/absent.json"),
    "validation annotations": (("mmdet", "val_dataloader.dataset.ann_file=absent.json"), "/absent.json"),
    "image folder": (("mmdet", "train_dataloader.dataset.data_prefix.img=absent"), "/absent"),
    "data root": (("mmdet", "train_dataloader.dataset.data_root=/no/root"), "/no/root/instances.json"),
    "label folder": (("mmseg", "train_dataloader.dataset.data_prefix.seg_map_path=absent"), "/absent"),
    "class folders": (("mmpretrain", "train_dataloader.dataset.data_prefix=absent"), "/absent"),
}


@pytest.mark.parametrize("what", MISSING)
def test_missing_dataset(what: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (scope, option), named = MISSING[what]
    config = write_config(tmp_path / "missing.py", scope, data)
    assert call_tool("train", config, "--work-dir", tmp_path / "run", "--cfg-options", option) == 2
    message = one_line(capsys)
    assert message.startswith("error: no such"), message
    assert message.endswith(named), message
    assert ("val_dataloader" if option.startswith("val") else "train_dataloader") in message


def test_a_missing_image_is_named(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Where only the loading finds it, in a worker process, whose traceback torch puts into the error."""
    annotations = json.loads((data / "instances.json").read_text())
    for image in annotations["images"]:
        image["file_name"] = f"gone_{image['file_name']}"
    (tmp_path / "gone.json").write_text(json.dumps(annotations))
    config = write_config(tmp_path / "gone.py", "mmdet", data)
    options = [f"train_dataloader.dataset.ann_file={tmp_path}/gone.json", "train_dataloader.num_workers=1"]
    options += ["train_dataloader.dataset.backend_args.backend=local"]  # files of a backend are not looked for
    assert call_tool("train", config, "--work-dir", tmp_path / "run", "--cfg-options", *options) == 2
    message = one_line(capsys)
    assert f"{data}/images/gone_0" in message
    assert "No such file" in message


FAULTS = {
    "missing": (lambda c: c["images"][3].update(file_name="gone.png"), "1 of the 7 images of {file} are missing"),
    "category": (
        lambda c: c["annotations"][0].update(category_id=99),
        "categories (7, 8), got 99",
    ),
    "box": (lambda c: c["annotations"][2].update(bbox=[1, 2, float("nan"), 4]), "bbox must be four finite numbers"),
    "mask": (
        lambda c: c["annotations"][2].pop("segmentation"),
        "annotation 3 of image 2: segmentation must be ",
    ),
}
WRAPPERS = {
    "train_dataloader.dataset.dataset": ("missing", "train"),
    "train_dataloader.dataset.datasets.1.dataset": ("box", "train"),
    "train_dataloader.dataset": ("mask", "train"),
    "val_dataloader.dataset": ("category", "val"),
}


@pytest.mark.parametrize("place", WRAPPERS)
def test_annotations_are_looked_at_first(
    place: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also inside wrappers: nothing is built, and no process group made."""
    (fault, split) = WRAPPERS[place]
    change, expected = FAULTS[fault]
    content = json.loads((data / "instances.json").read_text())
    change(content)
    (tmp_path / "changed.json").write_text(json.dumps(content))
    config = write_config(tmp_path / "faulty.py", "mmdet", data)
    wrapped = dict(
        dataset="dict(type='ClassBalancedDataset', oversample_thr=0.1, dataset={})",
        datasets="dict(type='ConcatDataset', datasets=[{0}, dict(type='RepeatDataset', times=2, dataset={0})])",
    )
    kind = next((key for key in ("datasets", "dataset") if key in place.split(".")[2:]), "")
    inner = "dict(train_dataloader['dataset'])"
    with config.open("a") as file:
        if kind:
            file.write(f"train_dataloader['dataset'] = {wrapped[kind].format(inner)}\n")
    monkeypatch.setattr("mmengine.runner.Runner.from_cfg", lambda cfg: pytest.fail("a run was built"))
    command = ("--work-dir", tmp_path / "run", "--cfg-options", f"{place}.ann_file={tmp_path}/changed.json")
    assert call_tool("train", config, *command) == 2
    message = one_line(capsys)
    assert f"{split}_dataloader (CocoDataset): " in message
    assert expected.format(file=tmp_path / "changed.json") in message


def test_no_images_is_an_error(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = write_config(tmp_path / "empty.py", "mmdet", data)
    empty = json.loads((data / "instances.json").read_text()) | dict(images=[], annotations=[])
    (tmp_path / "empty.json").write_text(json.dumps(empty))
    option = f"train_dataloader.dataset.ann_file={tmp_path}/empty.json"
    assert call_tool("train", config, "--work-dir", tmp_path / "run", "--cfg-options", option) == 2
    message = one_line(capsys)
    assert "no images in train_dataloader (CocoDataset)" in message
    assert f"{tmp_path}/empty.json" in message


def test_bad_configurations(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert call_tool("train", tmp_path / "absent.py") == 2
    assert f"no such configuration file: {tmp_path}/absent.py" in one_line(capsys)

    (tmp_path / "child.py").write_text("_base_ = './parent.py'\n")
    assert call_tool("train", tmp_path / "child.py") == 2
    assert "builds on a file that is missing" in (message := one_line(capsys))
    assert "parent.py" in message

    (tmp_path / "broken.py").write_text("model = dict(\n")
    assert call_tool("train", tmp_path / "broken.py") == 2
    assert "cannot read configuration" in one_line(capsys)

    (tmp_path / "bare.py").write_text("default_scope = 'mmdet'\nmodel = dict()\n")
    assert call_tool("train", tmp_path / "bare.py") == 2
    assert "has no train_dataloader" in one_line(capsys)
    assert call_tool("train", tmp_path / "bare.py", "--cfg-options", "train_dataloader.batch_size=1") == 2
    assert "has no optim_wrapper" in one_line(capsys)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("model.neck", "expected key=value, got 'model.neck'"),
        ("=3", "expected key=value, got '=3'"),
        ("model.neck.carafe_cfg=[1,2", "cannot read 'model.neck.carafe_cfg=[1,2'"),
        ("val_dataloader.dataset.pipeline.99.type=Resize", "--cfg-options do not fit"),
        ("default_scope.name=mmdet", "--cfg-options do not fit"),
    ],
)
def test_bad_cfg_options(option: str, expected: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = write_config(tmp_path / "options.py", "mmdet", data)
    assert call_tool("train", config, "--cfg-options", option) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert "Traceback" not in error


def test_a_missing_toolbox_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engine_config.ADAPTERS, "mmseg", "carafe_plugin.openmmlab.absent")

    def fail(name: str) -> None:
        if name == "carafe_plugin.openmmlab.absent":
            raise ImportError("this needs mmseg, which is not installed", name="mmseg")

    monkeypatch.setattr(engine_config.importlib, "import_module", fail)
    with pytest.raises(UsageError, match="needs mmseg"):
        engine_config.import_adapters("mmseg")
    engine_config.import_adapters("mmdet")


def test_command_line_and_drop_in(data: Path, tmp_path: Path) -> None:
    """In processes of their own: the exit code, and mmcv's 'carafe' on the CPU, which only our operator can do."""
    config = write_config(tmp_path / "zoo.py", "mmdet", data, epochs=1)
    text = config.read_text().replace("CARAFEFPN", "FPN_CARAFE")
    zoo = "upsample_cfg=dict(type='carafe', up_kernel=5, up_group=1, encoder_kernel=3, encoder_dilation=1)"
    config.write_text(text.replace("carafe_cfg=dict(compressed_channels=8)", zoo, 1))
    options = ("--cfg-options", "train_dataloader.batch_size=7")
    done = run("train.py", config, "--work-dir", tmp_path / "run", "--drop-in", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run/epoch_1.pth").is_file()

    done = run("train.py", tmp_path / "absent.py")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"error: no such configuration file: {tmp_path}/absent.py"]


def test_a_bug_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that our own hook does not find, while it writes a checkpoint, is not the user's to mend."""
    config = write_toy(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(os, "fsync", functools.partial(os.open, str(tmp_path / "absent")))
    with pytest.raises(FileNotFoundError):
        call_tool("train", config, "--work-dir", tmp_path / "run")
