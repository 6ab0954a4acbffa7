"""The drop-in as a fixture: what it changes in the process is undone afterwards."""

import importlib
import importlib.util
import sys

import pytest


@pytest.fixture
def drop_in(monkeypatch):
    """The module, freshly imported under MMDetection's scope; what it changes is undone afterwards."""
    pytest.importorskip("mmdet", reason="MMDetection is not installed")
    import mmcv.ops
    from mmdet.registry import MODELS
    from mmengine.registry import DefaultScope
    from zoo_models import NAME

    mmcv_carafe = sys.modules["mmcv.ops.carafe"]
    registries = [MODELS]
    if importlib.util.find_spec("mmseg"):
        registries.append(importlib.import_module("mmseg.registry").MODELS)
    monkeypatch.setattr(mmcv_carafe, "carafe", mmcv_carafe.carafe)
    monkeypatch.setattr(mmcv.ops, "carafe", mmcv.ops.carafe)
    for registry in registries:
        monkeypatch.setitem(registry.module_dict, "carafe", None)  # so that the key is put back as it was
        del registry.module_dict["carafe"]
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    with DefaultScope.overwrite_default_scope("mmdet"):
        yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)
