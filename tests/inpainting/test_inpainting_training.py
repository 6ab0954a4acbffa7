"""Training two networks: each learns from its own loss, and an interrupted run goes on as if it had not been."""

import copy
import random
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("mmengine", reason="mmengine is not installed")

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict, build_optim_wrapper
from mmengine.registry import MODEL_WRAPPERS, MODELS, DefaultScope
from mmengine.runner import Runner
from mmengine.runner.checkpoint import get_state_dict, load_state_dict
from PIL import Image

from carafe_plugin.engine.checkpoint import use_safe_loading
from carafe_plugin.inpainting import ExactResumeHook

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = Path(__file__).parents[2] / "configs/inpainting/partial-conv-carafe_scenes-64x64.py"


class Interruption(Exception):
    """Stands for a kill."""


class Numbers(Hook):
    """Draws numbers of every kind in each step, as a network with dropout would, and stops where it is told to."""

    def __init__(self, stop=None, stop_validation=None):
        self.stop, self.stop_validation, self.drawn = stop, stop_validation, []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        paths = tuple(data_batch["paths"])
        self.drawn.append((torch.rand(()).item(), np.random.rand(), random.random(), paths))
        if batch_idx + 1 == self.stop:
            raise Interruption

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        torch.rand(()), np.random.rand(), random.random()
        if runner.iter == self.stop_validation:
            raise Interruption


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for index in range(5):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((36, 32)).save(folder / f"{index}.png")
    return folder


def train(images, work_dir, workers, stop=None, resume=False, load_from=None, validated=False, stop_validation=None):
    cfg = Config.fromfile(CONFIG)
    cfg.model.generator.base_channels = cfg.model.discriminator.base_channels = 4
    loader = dict(num_workers=workers, persistent_workers=workers > 0, batch_size=2)
    loader["dataset"] = dict(cfg.train_dataloader.dataset, data_root=str(images), data_prefix="", size=32)
    cfg.merge_from_dict(dict(train_dataloader=loader, work_dir=str(work_dir), resume=resume, load_from=load_from))
    cfg.train_cfg.max_iters = 6
    cfg.default_hooks.checkpoint.interval = 2
    if validated:
        cfg.train_cfg.val_interval = 2
        cfg.default_hooks.checkpoint.update(
            type="carafe_plugin.engine.checkpoint_hook.AtomicCheckpointHook",
            save_best="inpainting/psnr",
            rule="greater",
        )
        dataset = dict(data_root=str(images), data_prefix="", size=32)
        cfg.merge_from_dict(dict(val_dataloader=dict(num_workers=0, dataset=dataset)))
    else:
        cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.test_dataloader = cfg.test_evaluator = cfg.test_cfg = None
    cfg.experiment_name = f"{work_dir.name}-{resume}"
    runner = Runner.from_cfg(cfg)
    numbers = Numbers(stop, stop_validation)
    runner.register_hook(numbers)
    if stop or stop_validation:
        with pytest.raises(Interruption):
            runner.train()
    else:
        runner.train()
    return runner, numbers.drawn


def assert_same(found, expected, where=""):
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            assert_same(found[index], value, f"{where}[{index}]")
    else:
        assert found == expected, where


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """A run that nothing interrupts, and what it drew; on one thread, as the others: the sums are the same then."""
    use_safe_loading()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with mock.patch("mmengine.runner.runner.get_device", return_value="cpu"):  # a GPU adds in any order
        yield train(images, tmp_path_factory.mktemp("whole"), workers=0)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_is_the_uninterrupted_one(workers, whole, images, tmp_path):
    """Weights and buffers of both networks, both optimisers, all random numbers, and the images: bit for bit.

    With any number of workers: they have no part in what is drawn.
    """
    runner, expected = whole
    _, before = train(images, tmp_path, workers, stop=5)  # the fifth step is lost
    assert before == expected[:5]
    resumed, after = train(images, tmp_path, workers, resume=True)
    assert after == expected[4:]
    assert resumed.iter == runner.iter == 6
    assert_same(resumed.model.state_dict(), runner.model.state_dict(), "model")
    assert_same(resumed.optim_wrapper.state_dict(), runner.optim_wrapper.state_dict(), "optimisers")
    names = set(runner.model.state_dict())
    assert {name.partition(".")[0] for name in names} == {"generator", "discriminator"}
    assert any(name.startswith("discriminator") and name.endswith("running_mean") for name in names)


@pytest.mark.parametrize(("kept", "stops"), [(4, dict(stop=5)), (2, dict(stop_validation=2))])
def test_validations_have_no_part_in_what_is_drawn(kept, stops, whole, images, tmp_path):
    """Where they are made up for on resuming too: with the numbers and weights of the run that has none."""
    runner, expected = whole
    _, before = train(images, tmp_path, 0, validated=True, **stops)
    assert before == expected[: len(before)]
    _, between = train(images, tmp_path, 0, resume=True, validated=True, stop=kept + 1)  # after a best one is written
    assert between == expected[kept : kept + 1]
    resumed, after = train(images, tmp_path, 0, resume=True, validated=True)
    assert after == expected[kept:]
    assert_same(resumed.model.state_dict(), runner.model.state_dict(), "model")
    again, none = train(images, tmp_path, 0, resume=True, validated=True)
    assert (again.iter, none) == (6, [])


def test_weights_for_a_new_run_bring_no_state(whole, images, tmp_path):
    """``load_from`` starts anew: with its own random numbers, from the first draw."""
    runner, expected = whole
    _, drawn = train(images, tmp_path, 0, load_from=f"{runner.work_dir}/iter_6.pth")
    assert drawn == expected


def build(**optimisers):
    cfg = Config.fromfile(CONFIG)
    cfg.model.generator.base_channels = cfg.model.discriminator.base_channels = 4
    with DefaultScope.overwrite_default_scope("mmengine"):
        torch.manual_seed(0)
        model = MODELS.build(cfg.model)
        return model, build_optim_wrapper(model, {**cfg.optim_wrapper, **optimisers})


def batch():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=generator)
    holes = torch.zeros(2, 1, 32, 32, dtype=torch.uint8)
    holes[..., 8:24, 8:24] = 1
    return dict(inputs=list(inputs), holes=list(holes), paths=["a", "b"])


@pytest.mark.parametrize("still", ["generator", "discriminator"])
def test_each_network_learns_from_its_own_loss(still):
    """With one optimiser at a learning rate of 0, only the other network changes; no gradient is left behind."""
    model, optim_wrapper = build(**{still: dict(optimizer=dict(type="SGD", lr=0.0))})
    assert isinstance(optim_wrapper, OptimWrapperDict)
    before = copy.deepcopy(dict(model.named_parameters()))
    model.train()
    logged = model.train_step(batch(), optim_wrapper)
    assert set(logged) == {"loss", "loss_hole", "loss_valid", "loss_adversarial", "loss_discriminator"}
    weighted = 6 * logged["loss_hole"] + logged["loss_valid"] + 0.01 * logged["loss_adversarial"]
    torch.testing.assert_close(logged["loss"], weighted)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith(still), name
        assert parameter.grad is None, name
        assert parameter.requires_grad, name


def test_the_discriminator_tells_completed_from_real():
    """Its loss, on the hole's patches, from what the networks say before the step; and it learns by it."""
    model, optim_wrapper = build()
    model.train()
    data = model.data_preprocessor(batch(), True)
    images, holes = data["inputs"], data["holes"]
    before = copy.deepcopy(model)
    with torch.no_grad():
        completed = torch.where(holes > 0, before.generator(images, holes), images)
        real, fake = (before.discriminator(pictures, holes) for pictures in (images, completed))
        counts = F.adaptive_max_pool2d(holes, real.shape[-2:]) > 0
        expected = (F.softplus(-real[counts]).mean() + F.softplus(fake[counts]).mean()) / 2
    losses = [model.train_step(batch(), optim_wrapper)["loss_discriminator"] for _ in range(8)]
    torch.testing.assert_close(losses[0], expected)
    assert losses[-1] < losses[0]


def test_the_adversary_reaches_the_generator():
    gradients = {}
    for weight in (0.0, 1.0):
        model, optim_wrapper = build()
        model.loss_weights = dict(hole=0.0, valid=0.0, adversarial=weight)
        before = [parameter.clone() for parameter in model.generator.parameters()]
        model.train().train_step(batch(), optim_wrapper)
        changed = [not torch.equal(a, b) for a, b in zip(before, model.generator.parameters(), strict=True)]
        gradients[weight] = sum(changed) / len(changed)
    assert gradients[0.0] == 0
    assert gradients[1.0] > 0.9


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone, on a machine that has no GPU."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    places = ("mmengine.model.wrappers.seperate_distributed", "carafe_plugin.inpainting.training")
    with (
        mock.patch(f"{places[0]}.get_device", return_value="cpu"),
        mock.patch(f"{places[1]}.get_device", return_value="cpu"),
    ):
        yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_distributed_step_is_the_plain_one():
    """Each network in a distributed module of its own: the same weights under the same names after two steps."""
    cfg = Config.fromfile(CONFIG)
    models = [build()[0].train() for _ in range(2)]
    # The Runner adds the local rank as if it were a GPU.
    models[1] = MODEL_WRAPPERS.build({**cfg.model_wrapper_cfg, "module": models[1], "device_ids": [0]})
    for model in models:
        optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
        for _ in range(2):
            model.train_step(batch(), optim_wrapper)
    plain, distributed = (get_state_dict(model) for model in models)
    assert_same(dict(distributed), dict(plain))

    # And so in a checkpoint, whatever the number of processes that write and read it.
    checkpoint = dict(state_dict=models[1].module.state_dict())  # as MMEngine takes it
    sampler = SimpleNamespace(seed=0)
    loader = SimpleNamespace(sampler=sampler)
    ExactResumeHook().before_save_checkpoint(SimpleNamespace(model=models[1], train_dataloader=loader), checkpoint)
    assert_same(dict(checkpoint["state_dict"]), dict(plain))
    fresh = MODEL_WRAPPERS.build({**cfg.model_wrapper_cfg, "module": build()[0], "device_ids": [0]})
    load_state_dict(fresh, checkpoint["state_dict"], strict=True)
    assert_same(dict(get_state_dict(fresh)), dict(plain))


def test_optimisers():
    _, optim_wrapper = build()
    assert set(optim_wrapper.keys()) == {"generator", "discriminator"}
    model, common = build(clip_grad=dict(max_norm=1.0))
    for name, wrapper in common.items():
        assert wrapper.clip_grad_kwargs == dict(max_norm=1.0)
        own = {id(p) for p in getattr(model, name).parameters()}
        assert {id(p) for group in wrapper.param_groups for p in group["params"]} == own
    cases = (
        (dict(constructor="PerNetworkOptimWrapperConstructor"), "must name parts of the model with an 'optimizer'"),
        (dict(generators=dict(optimizer=dict(type="SGD", lr=1))), "'generators', which is not a part of InpaintingGAN"),
        (dict(paramwise_cfg=dict(norm_decay_mult=0)), "paramwise_cfg belongs in"),
    )
    for changes, message in cases:
        cfg = {"constructor": "PerNetworkOptimWrapperConstructor", **changes}
        with pytest.raises(ValueError, match=message):
            build_optim_wrapper(model, cfg)
