"""Classes of the model, of the datasets and of the checkpoint: in number and in order, found before a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import write_config
from tool_runs import call_tool, one_line

pytest.importorskip("mmdet", reason="tools: mmdet is not installed")
pytest.importorskip("mmseg", reason="tools: mmseg is not installed")
pytest.importorskip("mmpretrain", reason="tools: mmpretrain is not installed")

from mmengine.registry import MODELS, init_default_scope

from carafe_plugin.engine import bare_models
from carafe_plugin.engine.classes import checkpoint_meta, compare_classes, config_meta, dataset_meta, head_fault
from carafe_plugin.engine.config import toolbox

ROI = "model.roi_head"


@pytest.mark.parametrize(
    ("tool", "scope", "option", "message"),
    [
        ("train", "mmdet", f"{ROI}.bbox_head.num_classes=1", "roi_head.bbox_head (Shared2FCBBoxHead) has"),
        ("test", "mmdet", f"{ROI}.bbox_head.num_classes=3", "roi_head.bbox_head (Shared2FCBBoxHead) has"),
        ("train", "mmdet", f"{ROI}.mask_head.num_classes=80", "roi_head.mask_head (CARAFEFCNMaskHead) has"),
        ("train", "mmseg", "model.decode_head.num_classes=2", "decode_head (FCNHead) has"),
        ("test", "mmseg", "model.decode_head.num_classes=19", "decode_head (FCNHead) has"),
        ("train", "mmpretrain", "model.head.num_classes=1", "head (LinearClsHead) has"),
        ("test", "mmpretrain", "model.head.num_classes=1000", "head (LinearClsHead) has"),
    ],
)
def test_another_number_of_classes(
    tool: str, scope: str, option: str, message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """One too few is an IndexError in a training, too many are noticed by nobody."""
    config = write_config(tmp_path / "tiny.py", scope, data)
    torch.save(dict(state_dict=dict(a=torch.ones(1))), tmp_path / "never_loaded.pth")
    checkpoint = [tmp_path / "never_loaded.pth"] if tool == "test" else []
    command = (tool, config, *checkpoint, "--work-dir", tmp_path / "run", "--cfg-options", option)
    assert call_tool(*command) == 2
    named = dict(mmdet="2 classes: red, blue", mmseg="3 classes: ground, red, blue", mmpretrain="2 classes: blue, red")
    dataset = dict(mmdet="CocoDataset", mmseg="BaseSegDataset", mmpretrain="CustomDataset")[scope]
    number = option.partition("=")[2]
    expected = f"error: {message} num_classes={number}, and {tool}_dataloader ({dataset}) {named[scope]}"
    assert one_line(capsys) == expected


STOCK = {
    "mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py": "roi_head.bbox_head.1",
    "mmdet::htc/htc_r50_fpn_1x_coco.py": "roi_head.mask_head.2",
    "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py": "bbox_head",
    "mmdet::detr/detr_r50_8xb2-150e_coco.py": "bbox_head",
    "mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py": "bbox_head",
    "mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py": "panoptic_head",
    "mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py": "semantic_head",
    "mmdet::ssd/ssd300_coco.py": "bbox_head",
    "mmdet::cascade_rpn/cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco.py": "roi_head.bbox_head",
    "mmdet::point_rend/point-rend_r50-caffe_fpn_ms-1x_coco.py": "roi_head.point_head",
    "mmseg::upernet/upernet_r50_4xb4-80k_ade20k-512x512.py": "auxiliary_head",
    "mmseg::stdc/stdc1_4xb12-80k_cityscapes-512x1024.py": "auxiliary_head.0",
    "mmseg::icnet/icnet_r50-d8_4xb2-80k_cityscapes-832x832.py": "auxiliary_head.1",
    "mmpretrain::resnet/resnet50_8xb32_in1k.py": "head",
}


@pytest.mark.parametrize("name", STOCK)
def test_stock_models_fit_their_datasets_and_no_other(name: str) -> None:
    """Heads in lists, of region proposals, of stuff and of edges: each model as it is; and one head changed."""
    cfg = bare_models.read_config(name)
    scope = toolbox(cfg)
    __import__(f"{scope}.models"), __import__(f"{scope}.datasets")
    init_default_scope(scope)
    meta = config_meta(cfg, "train")
    with torch.device("cpu" if scope == "mmpretrain" else "meta"):  # whose models look at numbers as they are built
        model = MODELS.build(cfg.model)
    assert head_fault(model, "it", meta) is None
    changed = dict(meta, classes=(*meta["classes"], "another"))
    assert f"and it {len(meta['classes']) + 1} classes: " in (head_fault(model, "it", changed) or "")
    part = model.get_submodule(STOCK[name])
    part.num_classes += 2
    assert (head_fault(model, "it", meta) or "").startswith(f"{STOCK[name]} ({type(part).__name__}) has num_classes=")


@pytest.mark.parametrize(
    "name", ["rpn/rpn_r50_fpn_1x_coco.py", "sort/sort_faster-rcnn_r50_fpn_8xb2-4e_mot17halftrain_test-mot17halfval.py"]
)
def test_models_of_other_outputs_than_classes(name: str) -> None:
    """Proposals; one kind of object to be followed, in a dataset that knows thirteen."""
    cfg = bare_models.read_config(f"mmdet::{name}")
    __import__("mmdet.models")
    init_default_scope("mmdet")
    try:
        with torch.device("meta"):
            model = MODELS.build(cfg.model)
    except RuntimeError as error:  # of trackers, before onedl's
        if "motmetrics is not installed" not in str(error):
            raise
        pytest.skip("motmetrics, which this MMDetection's trackers need, is not installed")
    numbers = {part.num_classes for part in model.modules() if hasattr(part, "num_classes")}
    assert numbers == {1}
    assert head_fault(model, "it", dict(classes=("a", "b"))) is None


def test_one_class_without_its_comma() -> None:
    model = torch.nn.Module()
    model.num_classes = 3
    message = "the classes of it must be a tuple of names, got the text 'red' (one alone: ('red',))"
    assert head_fault(model, "it", dict(classes="red")) == message
    assert head_fault(model, "it", {}) is None


@pytest.mark.parametrize("labels", ["classes/red/00.png 0\nclasses/blue/01.png 2\n", "classes/red/00.png -1\n"])
def test_labels_that_no_output_has(labels: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A list of files with labels says no classes: the head does."""
    config = write_config(tmp_path / "tiny.py", "mmpretrain", data)
    (tmp_path / "train.txt").write_text(labels)
    settings = dict(ann_file=f"{tmp_path}/train.txt", data_prefix=data)
    options = [f"train_dataloader.dataset.{name}={value}" for name, value in settings.items()]
    assert call_tool("train", config, "--work-dir", tmp_path / "run", "--cfg-options", *options) == 2
    last = labels.split()[-1]
    assert f"has the label {last}, and the 2 classes are 0 to 1" in one_line(capsys)


@pytest.mark.parametrize("scope", ["mmseg", "mmpretrain"])
def test_datasets_in_different_orders(scope: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """mmseg would measure red as blue; so would mmpretrain, which numbers folders by their names."""
    config = write_config(tmp_path / "tiny.py", scope, data)
    names = {"mmseg": ("ground", "red", "blue"), "mmpretrain": ("blue", "red")}[scope]
    mixed = ",".join(reversed(names))
    options = [f"val_dataloader.dataset.metainfo.classes=[{mixed}]"]
    assert call_tool("train", config, "--work-dir", tmp_path / "run", "--cfg-options", *options) == 2
    line = one_line(capsys)
    assert f" has the classes {', '.join(names)}, val_dataloader (" in line
    assert (
        f") {', '.join(reversed(names))} (the first to differ: {names[0]}, {names[-1]}): labels would be mixed up"
        in line
    )


def test_differences_are_named() -> None:
    same = ("a", ["x", "y"])
    assert compare_classes(same, ("b", ("x", "y"))) is None
    assert compare_classes(same, ("b", None)) is None
    message = "a has the classes x, y, b x, z (the first to differ: y, z)"
    assert compare_classes(same, ("b", ["x", "z"])) == (message, False)
    assert compare_classes(same, ("b", ["x"])) == ("a has the classes x, y, b x (2 and 1)", False)
    assert compare_classes(same, ("b", ["y", "x"]))[1]


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        (dict(dataset_meta=dict(classes=("a",), thing_classes=["a"])), dict(classes=("a",), thing_classes=["a"])),
        (dict(dataset_meta=dict(CLASSES=["a"])), dict(classes=["a"])),
        (dict(CLASSES=("a",), PALETTE=None, epoch=3), dict(classes=("a",), palette=None)),
        (dict(dataset_meta=None), {}),
        (dict(dataset_meta=dict(classes=None)), {}),
        (None, {}),
    ],
)
def test_classes_of_checkpoints_old_and_new(meta: dict | None, expected: dict) -> None:
    assert checkpoint_meta(dict(meta=meta, state_dict={})) == expected


def test_datasets_that_differ_in_more_than_classes() -> None:
    """mmdet's ConcatDataset has a list of what its parts say, where they differ."""
    first, second = dict(classes=("cat", "dog"), palette=[1]), dict(classes=("cat", "dog"), palette=[2])
    assert dataset_meta(SimpleNamespace(metainfo=[first, second]))["classes"] == ("cat", "dog")
    assert dataset_meta(SimpleNamespace(metainfo=[first, dict(classes=("cat",))])) == {}
    assert dataset_meta(SimpleNamespace(metainfo=first)) == first
    assert dataset_meta([1, 2]) == {}
