"""Every configuration's model: its CARAFE++ modules, what it starts from, one prediction, one training step.

Each model is built once, at its real depth; the heads are narrower, see ``load_reduced``.
"""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("mmengine", reason="MMEngine is not installed")

from config_models import HEIGHT, WIDTH, batch, build, carafe_modules, load_reduced
from config_table import MODULES
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=MODULES)
def built(request, weights):
    """One configuration with its model, after ``init_weights`` from a local file."""
    config = load_reduced(request.param)
    init_cfg = config.model.backbone.get("init_cfg") or {}
    path = weights(init_cfg["checkpoint"]) if "checkpoint" in init_cfg else None
    if path:
        init_cfg.checkpoint = str(path)
    torch.manual_seed(0)
    model = build(config.model, config.default_scope)
    model.init_weights()
    return SimpleNamespace(name=request.param, config=config, model=revert_sync_batchnorm(model), path=path)


def test_has_the_right_modules(built):
    assert carafe_modules(built.model).keys() == set(MODULES[built.name])


def test_starts_from_the_checkpoint(built):
    """Every key of the file is the backbone's; what the file lacks starts as CARAFE++ should."""
    loaded = {}
    if built.path:
        loaded = torch.load(str(built.path), mmap=True)["state_dict"]
        loaded = {key: value for key, value in loaded.items() if not key.startswith("fc.")}  # torchvision's classifier
    state = built.model.backbone.state_dict()
    assert loaded.keys() <= state.keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())
    missing = state.keys() - loaded.keys()
    if loaded:  # offsets of DCNv2 are learnt from zero
        assert missing == {key for key in state if "mdconv" in built.name and ".conv_offset." in key}
    fresh = {name: module for name, module in carafe_modules(built.model).items() if not name.startswith("backbone.")}
    for module in (fresh if loaded else carafe_modules(built.model)).values():
        assert 0.0009 < module.content_encoder.weight.std() < 0.0011
        assert not module.content_encoder.bias.any()


def test_predicts(built):
    model = built.model.eval()
    with torch.no_grad():
        results = model.test_step(batch(built.config, size=1, labelled=False))
    assert len(results) == 1
    if built.config.default_scope == "mmdet":
        instances = results[0].pred_instances
        assert len(instances) == 5
        assert instances.bboxes.isfinite().all()
        if built.config.model.roi_head.get("mask_head"):
            assert instances.masks.shape == (5, HEIGHT, WIDTH)
    elif built.config.default_scope == "mmseg":
        logits = results[0].seg_logits.data
        assert logits.shape == (built.config.model.decode_head.num_classes, HEIGHT, WIDTH)
        assert logits.isfinite().all()
        assert logits[0].std() > 0
    else:
        assert results[0].pred_score.shape == (1000,)
        assert results[0].pred_score.sum().item() == pytest.approx(1, abs=1e-4)


def test_trains_a_step(built):
    """A finite loss, a gradient in every parameter of CARAFE++, and a step of the configuration's own optimizer."""
    model = built.model.train()
    modules = carafe_modules(model)
    frozen = {name for name, module in modules.items() if not all(p.requires_grad for p in module.parameters())}
    assert frozen == ({"backbone.maxpool"} & modules.keys() if model.backbone.frozen_stages >= 0 else set())
    for name in frozen:  # frozen with the pretrained stem; the gradient must be able to get there all the same
        modules[name].requires_grad_()
    for module in model.backbone.modules():
        if isinstance(module, _BatchNorm) and not module.weight.any():
            nn.init.ones_(module.weight)  # from scratch, a residual branch that starts at zero learns from step two on
    keeps_statistics = bool((built.config.model.backbone.get("carafe_cfg") or {}).get("norm_eval"))
    for name, module in modules.items():
        if name.startswith("backbone."):
            assert module.compressor_norm.training != keeps_statistics

    optim_wrapper = build_optim_wrapper(model, built.config.optim_wrapper)
    data = model.data_preprocessor(batch(built.config, size=2), True)
    loss, _ = model.parse_losses(model(**data, mode="loss"))
    assert loss.isfinite()
    optim_wrapper.backward(loss)
    for name, module in modules.items():
        for key, parameter in module.named_parameters():
            assert parameter.grad is not None, f"{name}.{key}"
            assert parameter.grad.isfinite().all(), f"{name}.{key}"
            if key == "channel_compressor.bias" and name.startswith("backbone.") and not keeps_statistics:
                continue  # a norm that takes its statistics from the batch subtracts the bias
            assert parameter.grad.any(), f"{name}.{key}"
    before = {name: module.content_encoder.weight.clone() for name, module in modules.items()}
    optim_wrapper.step()
    for name, module in modules.items():
        assert not torch.equal(module.content_encoder.weight, before[name]), name
