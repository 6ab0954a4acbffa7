"""The settings of configs/mmseg and configs/mmpretrain that are the paper's (Sec. 5.1), seen at work."""

from itertools import pairwise

import numpy as np
import pytest
import torch

pytest.importorskip("mmengine", reason="MMEngine is not installed")

from config_models import batch, build, load
from mmcv.transforms import Compose
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS, DefaultScope
from mmengine.structures import PixelData
from torch import nn


def learning_rates(config, steps, epoch_length=None):
    """The learning rate of each iteration, as mmengine's runner would set it."""
    optimizer = build_optim_wrapper(nn.Linear(1, 1), config.optim_wrapper).optimizer
    schedulers = []
    for cfg in config.param_scheduler:
        cfg = dict(cfg)
        if cfg.pop("convert_to_iter_based", False):
            cls = PARAM_SCHEDULERS.get(cfg.pop("type"))
            schedulers.append(cls.build_iter_from_epoch(optimizer, epoch_length=epoch_length, **cfg))
        else:
            schedulers.append(PARAM_SCHEDULERS.build(cfg, default_args=dict(optimizer=optimizer)))
    optimizer.step()  # else torch warns that the schedulers came first
    rates = []
    for step in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        for scheduler in schedulers:
            if not scheduler.by_epoch or (step + 1) % epoch_length == 0:
                scheduler.step()
    return rates


@pytest.fixture(scope="module")
def ade20k():
    return load("mmseg/r50-carafe_carafe-upernet_20e_ade20k")


def run(pipeline, shape, tmp_path):
    """What a pipeline of mmseg makes of an image and its annotation of the given size."""
    import cv2

    label = np.arange(shape[0] * shape[1]).reshape(shape) % 151
    cv2.imwrite(str(tmp_path / "image.png"), np.full((*shape, 3), 200, dtype=np.uint8))
    cv2.imwrite(str(tmp_path / "label.png"), label.astype(np.uint8))
    files = dict(img_path=str(tmp_path / "image.png"), seg_map_path=str(tmp_path / "label.png"))
    with DefaultScope.overwrite_default_scope("mmseg"):
        return Compose(pipeline)(dict(**files, seg_fields=[], reduce_zero_label=True, label_map=None))


def test_ade20k_trains_on_five_sizes(ade20k, tmp_path):
    import mmseg.datasets  # noqa: F401  (registers the transforms)

    np.random.seed(0)
    found = set()
    for _ in range(20):
        data = run(ade20k.train_dataloader.dataset.pipeline, (80, 120), tmp_path)
        height, width = data["inputs"].shape[1:]
        assert data["data_samples"].gt_sem_seg.shape == (height, width)
        assert width == pytest.approx(1.5 * height, abs=1)
        found.add(height)
    assert found == {300, 375, 450, 525, 600}
    long = run(ade20k.train_dataloader.dataset.pipeline, (20, 400), tmp_path)
    assert long["inputs"].shape[1:] == (60, 1200)  # the longer edge decides


def test_ade20k_is_tested_at_450(ade20k, tmp_path):
    import mmseg.datasets  # noqa: F401  (registers the transforms)

    assert ade20k.val_dataloader == ade20k.test_dataloader
    pipeline = ade20k.test_dataloader.dataset.pipeline
    data = run(pipeline, (80, 120), tmp_path)
    assert data["inputs"].shape[1:] == (450, 675)
    assert data["data_samples"].gt_sem_seg.shape == (80, 120)  # scored at the image's own size
    assert run(pipeline, (20, 400), tmp_path)["inputs"].shape[1:] == (60, 1200)
    labels = data["data_samples"].gt_sem_seg.data
    assert labels.max() == 255  # 0, "other", is ignored
    assert labels[labels != 255].max() == 149


def test_ade20k_pads_a_batch_of_two_sizes(ade20k):
    preprocessor = build(ade20k.model.data_preprocessor, "mmseg")
    data = batch(ade20k, size=2)
    data["inputs"][1] = data["inputs"][1][:, :40, :70]
    sample = data["data_samples"][1]
    labels = sample.gt_sem_seg.data
    del sample.gt_sem_seg  # its size is fixed
    sample.gt_sem_seg = PixelData(data=labels[:, :40, :70])
    padded = preprocessor(data, True)
    assert padded["inputs"].shape == (2, 3, 64, 96)  # the larger image's 60 x 90, rounded up to 32
    first, second = (sample.gt_sem_seg.data[0] for sample in padded["data_samples"])
    assert first.shape == second.shape == (64, 96)
    assert (first == 255).sum() == 64 * 96 - 60 * 90  # what the loss ignores
    assert (second == 255).sum() == 64 * 96 - 40 * 70
    assert not padded["inputs"][1, :, 40:].any()


def test_ade20k_schedule(ade20k):
    assert ade20k.train_dataloader.batch_size * 8 == 16
    assert ade20k.train_cfg.max_iters == 20 * 5000
    rates = learning_rates(ade20k, 100_000)
    assert rates[0] == pytest.approx(0.02)
    assert rates[50_000] == pytest.approx(0.02 * 0.5**0.9, rel=1e-4)
    assert rates[-1] < 1e-6
    assert all(rate > following for rate, following in pairwise(rates))
    group = build_optim_wrapper(nn.Linear(1, 1), ade20k.optim_wrapper).optimizer.param_groups[0]
    assert (group["momentum"], group["weight_decay"]) == (0.9, 1e-4)
    assert ade20k.model.backbone.norm_cfg.type == ade20k.model.decode_head.norm_cfg.type == "SyncBN"


def test_imagenet_schedule():
    config = load("mmpretrain/resnet50-carafe_16xb64_in1k")
    assert config.train_dataloader.batch_size * 16 == 1024 == config.auto_scale_lr.base_batch_size
    assert config.train_cfg.max_epochs == 90
    rates = learning_rates(config, 90 * 10, epoch_length=10)
    assert rates[0] == pytest.approx(0.1)
    assert all(rate < following for rate, following in pairwise(rates[:50]))  # five epochs
    for epoch, rate in (
        (5, 0.4),
        (29, 0.4),
        (30, 0.04),
        (59, 0.04),
        (60, 0.004),
        (79, 0.004),
        (80, 0.0004),
        (89, 4e-4),
    ):
        assert rates[10 * epoch] == pytest.approx(rate), epoch
    group = build_optim_wrapper(nn.Linear(1, 1), config.optim_wrapper).optimizer.param_groups[0]
    assert (group["momentum"], group["weight_decay"]) == (0.9, 1e-4)


def test_imagenet_is_tested_on_the_centre_crop(tmp_path):
    """Table 2: top-1 and top-5 of one 224 x 224 crop."""
    config = load("mmpretrain/resnet50-carafe_16xb64_in1k")
    import cv2
    import mmpretrain.datasets
    import mmpretrain.evaluation  # noqa: F401  (both register)
    from mmengine.evaluator import Evaluator
    from mmpretrain.structures import DataSample

    image = np.zeros((256, 356, 3), dtype=np.uint8)
    image[16:-16, 66:-66] = 255
    cv2.imwrite(str(tmp_path / "image.png"), image)
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        pipeline = Compose(config.test_dataloader.dataset.pipeline)
        data = pipeline(dict(img_path=str(tmp_path / "image.png"), gt_label=0))
        evaluator = Evaluator(config.test_evaluator)
    assert data["inputs"].shape == (3, 224, 224)
    assert bool((data["inputs"] == 255).all())
    samples = [
        DataSample().set_gt_label(0).set_pred_score(torch.eye(10)[rank] + torch.eye(10)[0] / 2) for rank in (0, 3)
    ]
    evaluator.process(samples)
    assert evaluator.evaluate(2) == {"accuracy/top1": 50.0, "accuracy/top5": 100.0}
