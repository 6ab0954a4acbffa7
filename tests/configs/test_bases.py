"""A configuration differs from the one that it builds on where CARAFE++ comes in, and nowhere else."""

import pytest

pytest.importorskip("mmengine", reason="MMEngine is not installed")

from config_models import load, toolbox_config
from config_table import BASIC_BLOCKS, BOTTLENECKS, CONFIGS, FPN, MASK_HEAD, MODULES, UPERNET
from mmengine.config import Config

WEIGHTS = {"model.backbone.init_cfg.checkpoint"}
DCN = {f"model.backbone.dcn.{key}" for key in ("type", "deform_groups", "fallback_on_stride")}
DCN |= {"model.backbone.stage_with_dcn"}
SWITCHES = {f"model.decode_head.carafe_cfg.{key}" for key in ("ppm", "fpn", "fuse")}
HELPERS = "carafe_resnet"  # what _base_/backbones.py offers to all configurations of its folder


def leaves(part, path=""):
    """``{"model.neck.type": "FPN", ...}`` of a configuration's dictionary."""
    if not isinstance(part, dict):
        return {path: part}
    items = [(f"{path}.{key}" if path else key, value) for key, value in part.items()]
    return {key: leaf for name, value in items for key, leaf in leaves(value, name).items()}


def without_scopes(part):
    """Plain data, less the scope that MMEngine notes in each dictionary that came by the name of its package."""
    if isinstance(part, dict):
        return {key: without_scopes(value) for key, value in part.items() if key != "_scope_"}
    return [without_scopes(value) for value in part] if isinstance(part, (list, tuple)) else part


def differences(config, base):
    """Dotted path -> (value in config, value in base), None where there is none."""
    ours, theirs = (leaves(without_scopes(part.to_dict())) for part in (config, base))
    paths = [path for path in {**theirs, **ours} if not path.startswith(HELPERS)]
    return {path: (ours.get(path), theirs.get(path)) for path in paths if ours.get(path) != theirs.get(path)}


def check(found, types, others=()):
    """``found`` are changes of the ``type`` of exactly these parts into our subclass of it, and the others."""
    assert found.keys() == {f"model.{part}.type" for part in types} | set(others)
    for part in types:
        ours, theirs = found[f"model.{part}.type"]
        assert ours.startswith("carafe_plugin.openmmlab.")
        assert ours.rpartition(".")[2] == f"CARAFE{theirs}"


def parts_of(name):
    """The parts of the model that ``name`` has CARAFE++ in."""
    modules = set(MODULES[name])
    places = {
        "backbone": BOTTLENECKS + BASIC_BLOCKS,
        "neck": FPN,
        "roi_head.mask_head": MASK_HEAD,
        "decode_head": UPERNET,
    }
    return [part for part, place in places.items() if modules & set(place)]


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("mmdet/")])
def test_mmdet(name):
    config = load(name)
    kind = name.partition("/")[2].partition("-")[0]
    depth, schedule = (101, "2x") if "_r101" in name else (50, "1x")
    base = toolbox_config("mmdet", f"{kind}_rcnn/{kind}-rcnn_r{depth}_fpn_{schedule}_coco.py")
    others = set()
    if "backbone" in parts_of(name):
        others |= WEIGHTS | {"model.backbone.carafe_cfg.norm_eval"}
    check(differences(config, base), parts_of(name), others | (DCN if "mdconv" in name else set()))


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("mmseg/") and "_20e_" in name])
def test_mmseg_at_the_papers_settings(name):
    config = load(name)
    depth = 101 if "/r101" in name else 50
    found = differences(config, load(f"mmseg/r{depth}_upernet_20e_ade20k"))
    others = WEIGHTS if "backbone" in parts_of(name) else set()
    some = "decode_head" in parts_of(name) and set(UPERNET) - set(MODULES[name])
    check(found, parts_of(name), others | (SWITCHES if some else set()))


def test_mmseg_baseline_is_the_toolboxs_model():
    baseline = load("mmseg/r50_upernet_20e_ade20k")
    found = differences(baseline, toolbox_config("mmseg", "_base_/models/upernet_r50.py"))
    auxiliary_head = {path for path in found if path.startswith("model.auxiliary_head")}
    assert {path for path in found if path.startswith("model.")} - auxiliary_head == {
        "model.data_preprocessor.size_divisor",
        "model.pretrained",
        "model.backbone.type",
        "model.backbone.init_cfg.type",
        "model.backbone.init_cfg.checkpoint",
        "model.decode_head.num_classes",
    }
    assert baseline.model.auxiliary_head is None
    deeper = differences(load("mmseg/r101_upernet_20e_ade20k"), baseline)
    assert deeper.keys() == WEIGHTS | {"model.backbone.depth"}


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("mmseg/") and "512x512" in name])
def test_mmseg_at_its_own_settings(name):
    config = load(name)
    depth = 101 if "/r101" in name else 50
    iterations = "160k" if "160k" in name else "80k"
    base = toolbox_config("mmseg", f"upernet/upernet_r{depth}_4xb4-{iterations}_ade20k-512x512.py")
    weights = {*WEIGHTS, "model.backbone.init_cfg.type", "model.pretrained"}  # elsewhere, in the base
    check(differences(config, base), ["backbone", "decode_head"], weights)


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("mmpretrain/")])
def test_mmpretrain(name):
    stem = name.partition("/")[2].partition("-")[0]  # resnet50, resnetv1c101, ...
    found = differences(load(name), toolbox_config("mmpretrain", f"resnet/{stem}_8xb32_in1k.py"))
    check({path: values for path, values in found.items() if path.startswith("model.")}, ["backbone"])


REAL = {
    "camvid": "upernet_r18_camvid",
    "dsb2018": "mask-rcnn_r18_fpn_dsb2018",
    "bccd": "faster-rcnn_r18_fpn_bccd",
}


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("real/") and MODULES[name]])
def test_real(name):
    check(differences(load(name), load(f"real/{REAL[name.rpartition('_')[2]]}")), parts_of(name))


@pytest.mark.parametrize("name", [f"real/{name}" for name in REAL.values()])
def test_real_backbones_take_weights_by_an_option(name):
    config = load(name)
    config.merge_from_dict({"model.backbone.init_cfg.type": "Pretrained", "model.backbone.init_cfg.checkpoint": "r18"})
    assert config.model.backbone.init_cfg == dict(type="Pretrained", checkpoint="r18")


@pytest.mark.parametrize("name", [f"real/{name}" for name in REAL.values()])
def test_real_data_lie_where_the_environment_says(name, monkeypatch):
    data = name.rpartition("_")[2]
    file = CONFIGS / f"{name}.py"
    load(name)  # or skip
    monkeypatch.delenv("CARAFE_DATA_ROOT", raising=False)
    for root, places in (("data", {}), ("/mnt/sets", {"CARAFE_DATA_ROOT": "/mnt/sets"})):
        for variable, value in places.items():
            monkeypatch.setenv(variable, value)
        found = leaves(Config.fromfile(file).to_dict())
        roots = {value for key, value in found.items() if key.endswith("data_root") and value}
        assert roots == {f"{root}/{data}/"}
        files = [value for key, value in found.items() if key.endswith("evaluator.ann_file")]
        assert all(value.startswith(f"{root}/{data}/annotations/") for value in files)


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("demo/") and MODULES[name]])
def test_demo(name):
    baseline = "upernet_r18_scenes" if "upernet" in name else "mask-rcnn_r18_fpn_scenes"
    check(differences(load(name), load(f"demo/{baseline}")), parts_of(name))
