"""Every configuration in configs/mmdet parses, builds, and has the CARAFE++ modules that its name promises."""

from pathlib import Path

import pytest

pytest.importorskip("mmdet", reason="MMDetection is not installed")

import yaml
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.config import Config
from mmengine.registry import DefaultScope

from carafe_plugin.modules import CARAFEUpsample

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "mmdet"
NECK = [f"neck.upsample_modules.{i}" for i in range(3)]
MASK_HEAD = ["roi_head.mask_head.upsample"]
MODULES = {
    "faster-rcnn_r50_carafe-fpn_1x_coco": NECK,
    "mask-rcnn_r50_carafe-fpn_1x_coco": NECK,
    "mask-rcnn_r50_fpn_carafe-mask-head_1x_coco": MASK_HEAD,
    "mask-rcnn_r50_carafe-fpn_carafe-mask-head_1x_coco": NECK + MASK_HEAD,
}


def test_no_configuration_is_left_out():
    assert {path.stem for path in FOLDER.glob("*.py")} == MODULES.keys()


@pytest.mark.parametrize("name", MODULES)
def test_builds_with_the_right_modules(name):
    config = Config.fromfile(FOLDER / f"{name}.py")
    assert config.default_scope == "mmdet"
    with DefaultScope.overwrite_default_scope(config.default_scope):
        detector = MMDET_MODELS.build(config.model)
    found = [key for key, module in detector.named_modules() if isinstance(module, CARAFEUpsample)]
    assert found == MODULES[name]


@pytest.mark.parametrize("name", MODULES)
def test_differs_from_its_base_in_types_alone(name):
    config = Config.fromfile(FOLDER / f"{name}.py")
    base = "faster_rcnn/faster-rcnn" if name.startswith("faster") else "mask_rcnn/mask-rcnn"
    stock = base_config(f"{base}_r50_fpn_1x_coco.py")
    parts = [(config.model.neck, stock.model.neck)]
    if "mask_head" in stock.model.roi_head:
        parts.append((config.model.roi_head.mask_head, stock.model.roi_head.mask_head))
    changed = 0
    for part, stock_part in parts:
        if part.type != stock_part.type:
            assert part.type == f"carafe_plugin.openmmlab.mmdet.CARAFE{stock_part.type}"
            part.type = stock_part.type
            changed += 1
    assert changed == (NECK[0] in MODULES[name]) + (MASK_HEAD[0] in MODULES[name])
    assert without_scope(config) == without_scope(stock)


def base_config(name):
    import mmdet

    return Config.fromfile(Path(mmdet.__file__).parent / ".mim" / "configs" / name)


def without_scope(part):
    """Plain data, less the scope that MMEngine notes in each dictionary that came from another package's file."""
    if isinstance(part, Config):
        part = part.to_dict()
    if isinstance(part, dict):
        return {key: without_scope(value) for key, value in part.items() if key != "_scope_"}
    return [without_scope(value) for value in part] if isinstance(part, (list, tuple)) else part


def test_metafile_lists_every_configuration():
    metafile = yaml.safe_load((FOLDER / "metafile.yml").read_text())
    collections = {collection["Name"] for collection in metafile["Collections"]}
    assert {model["Name"] for model in metafile["Models"]} == MODULES.keys()
    for model in metafile["Models"]:
        assert model["In Collection"] in collections
        assert model["Config"] == f"configs/mmdet/{model['Name']}.py"
        assert (ROOT / model["Config"]).exists()
    for collection in metafile["Collections"]:
        assert (ROOT / collection["README"]).exists()


def test_readme_names_every_configuration():
    text = (FOLDER / "README.md").read_text()
    assert all(f"({name}.py)" in text for name in MODULES)
