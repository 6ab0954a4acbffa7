"""MMDetection's zoo checkpoints: files of exactly their layout load strictly, compute the same and are evaluated.

The two files themselves cannot be had here. Ours come from MMDetection's own classes, with weights under which the
models find something and their CARAFE kernels are far from an average, and with the meta of 2020.
"""

import json
import re
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet", reason="MMDetection is not installed")

import cv2
from mmdet.datasets import CocoDataset
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.registry import DefaultScope
from pycocotools import mask as coco_mask
from tool_runs import last_metrics, run_in_process
from zoo_models import ZOO, carafe_keys, stock_model, textbook, zoo_config

from carafe_plugin.engine.checkpoint import read_checkpoint
from studies.demo import generate_scenes

MMCV_CARAFE = sys.modules["mmcv.ops.carafe"]
FASTER, MASK = "faster-rcnn_r50_fpn-carafe_1x_coco.py", "mask-rcnn_r50_fpn-carafe_1x_coco.py"
SIZE, IMAGES = 128, 3
META = dict(
    env_info="sys.platform: linux\nPython: 3.7.7\nPyTorch: 1.5.0\nMMCV: 0.5.1\nMMDetection: 2.0.0+d9c7c6b",
    mmdet_version="2.0.0+d9c7c6b",
    mmcv_version="0.5.1",
    CLASSES=CocoDataset.METAINFO["classes"],
    config="model = dict(type='MaskRCNN', pretrained='torchvision://resnet50', num_stages=3)\n",
    hook_msgs=dict(best_score=np.float64(0.393)),  # what torch >= 2.6 does not read by default
    epoch=12,
    iter=87960,
    time="Mon May  4 17:57:33 2020",
    seed=None,
)


def own_model(name):
    """MMDetection's model on MMCV's own class, whose operator has no CPU half: the textbook's takes its place."""
    register_all_modules(init_default_scope=False)
    torch.manual_seed(0)
    model = MODELS.build(zoo_config(name).model)
    packs = [m for m in model.modules() if type(m) is MMCV_CARAFE.CARAFEPack]
    assert len(packs) == (5 if name == MASK else 4)
    model.init_weights()
    for pack in packs:
        torch.nn.init.normal_(pack.content_encoder.weight, std=0.1)
        pack.forward = textbook.__get__(pack)
    for module in model.backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # else the last of each block is zero
            torch.nn.init.uniform_(module.weight, 0.2, 0.6)
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
    torch.nn.init.normal_(model.roi_head.bbox_head.fc_cls.weight, std=3)  # so that it is sure of what it finds
    if name == MASK:
        torch.nn.init.normal_(model.roi_head.mask_head.conv_logits.weight)
    return model.eval()


def save(model, path, zipped):
    state = OrderedDict((key, value.clone()) for key, value in model.state_dict().items())
    torch.save(dict(meta=META, state_dict=state), path, _use_new_zipfile_serialization=zipped)
    return path


def expected_layout(masks):
    keys = carafe_keys(masks)
    for key, value in MODELS.build(stock_model(masks)).state_dict().items():
        if not key.startswith("neck.") and not key.startswith("roi_head.mask_head.upsample."):
            keys[key] = tuple(value.shape)
    return keys


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("name", "zipped"), [(FASTER, True), (MASK, False)])
def test_checkpoints_of_the_zoos_layout(name, zipped, tmp_path, request):
    """``zipped`` is the format of torch >= 1.6; the files of May 2020 are in the older one."""
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = own_model(name)
        layout = expected_layout(masks=name == MASK)
        path = save(model, tmp_path / "zoo.pth", zipped)
    assert path.read_bytes()[:2] == (b"PK" if zipped else b"\x80\x02")
    x = torch.randn(1, 3, 128, 192)
    with torch.no_grad():
        expected = model.extract_feat(x)
        rois = torch.randn(3, 256, 14, 14)
        masks = model.roi_head.mask_head(rois) if name == MASK else None
    del model

    drop_in = request.getfixturevalue("drop_in")
    checkpoint = read_checkpoint(str(path))
    path.unlink()  # hundreds of megabytes
    assert {key: tuple(value.shape) for key, value in checkpoint["state_dict"].items()} == layout
    assert checkpoint["meta"]["CLASSES"] == META["CLASSES"]
    ours = MODELS.build(zoo_config(name).model).eval()
    ours.load_state_dict(checkpoint["state_dict"], strict=True)
    assert all(isinstance(module, drop_in.CARAFEPack) for module in ours.neck.upsample_modules)
    with torch.no_grad():
        features = ours.extract_feat(x)
        for level, (out, reference) in enumerate(zip(features, expected, strict=True)):
            assert (out - reference).abs().max() <= 1e-5 * reference.abs().max(), level
        # And the comparison means something: without CARAFE the levels above the coarsest are others.
        for module in ours.neck.upsample_modules:
            module.forward = torch.nn.Upsample(scale_factor=2).forward
        assert all(
            (out - reference).abs().max() > 1e-2 * reference.abs().max()
            for out, reference in zip(ours.extract_feat(x)[:4], expected[:4], strict=True)
        )
        if masks is not None:
            torch.testing.assert_close(ours.roi_head.mask_head(rois), masks, atol=1e-5, rtol=1e-5)


def detect(model, image):
    """The model's own detections in an image of the size at which it is tested: no resizing."""
    shape = image.shape[:2]
    sample = DetDataSample(metainfo=dict(img_id=0, img_shape=shape, ori_shape=shape, scale_factor=(1.0, 1.0)))
    inputs = torch.from_numpy(image.transpose(2, 0, 1).copy())
    with torch.no_grad():
        return model.test_step(dict(inputs=[inputs], data_samples=[sample]))[0].pred_instances


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Generated scenes, and as their ground truth what the model of the checkpoint finds, shifted by a few pixels.

    So a model without training has an AP between nothing and everything, which moves with its features.
    """
    root = tmp_path_factory.mktemp("zoo")
    generate_scenes.generate(root / "data", generate_scenes.Request(seed=0, train=1, val=IMAGES, size=SIZE))
    file = root / "data" / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    names = CocoDataset.METAINFO["classes"]
    content["categories"] = [dict(id=index + 1, name=name) for index, name in enumerate(names)]
    content["annotations"] = []
    rng = np.random.default_rng(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = own_model(MASK)
        model.test_cfg.rpn.update(nms_pre=50, max_per_img=20)
        model.rpn_head.test_cfg.update(nms_pre=50, max_per_img=20)
        for image in content["images"]:
            found = detect(model, cv2.imread(str(root / "data" / "val" / image["file_name"])))
            for index in range(len(found)):
                x1, y1, x2, y2 = found.bboxes[index].tolist()
                shift = rng.uniform(-0.25, 0.25, 2) * (x2 - x1, y2 - y1)
                mask = np.roll(found.masks[index].numpy(), shift.round().astype(int)[::-1], (0, 1))
                rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
                if min(x2 - x1, y2 - y1) < 8 or not mask.any() or rng.random() < 0.2:
                    continue
                annotation = dict(
                    id=len(content["annotations"]) + 1,
                    image_id=image["id"],
                    category_id=int(found.labels[index]) + 1,
                    bbox=[x1 + shift[0], y1 + shift[1], x2 - x1, y2 - y1],
                    area=float(coco_mask.area(rle)),
                    segmentation=dict(size=list(rle["size"]), counts=rle["counts"].decode()),
                    iscrowd=0,
                )
                content["annotations"].append(annotation)
    torch.set_num_threads(threads)
    file.write_text(json.dumps(content))
    path = save(model, root / "mask_rcnn_r50_fpn_carafe_1x_coco-8687f195.pth", zipped=False)
    yield path, root / "data", file
    path.unlink()


def test_evaluation_through_the_tool(zoo, tmp_path):
    """``tools/test.py --drop-in`` on MMDetection's own configuration: the same AP by our operator and the reference."""
    checkpoint, data, file = zoo
    options = [
        f"test_dataloader.dataset.data_root={data}",
        f"test_dataloader.dataset.ann_file={file}",
        "test_dataloader.dataset.data_prefix.img=val",
        f"test_dataloader.dataset.pipeline.1.scale=({SIZE},{SIZE})",
        "test_dataloader.num_workers=0",
        "test_dataloader.persistent_workers=False",
        f"test_evaluator.ann_file={file}",
        "model.test_cfg.rpn.nms_pre=50",
        "model.test_cfg.rpn.max_per_img=20",
    ]
    metrics = {}
    for backend in ("auto", "reference"):
        work_dir = tmp_path / backend
        command = (ZOO / MASK, checkpoint, "--drop-in", "--work-dir", work_dir, "--cfg-options", *options)
        log = tmp_path / f"{backend}.log"
        process = run_in_process("test", *command, path=ROOT, log=log, CARAFE_BACKEND=backend)
        process.join(300)
        assert process.exitcode == 0, log.read_text()[-3000:]
        metrics[backend] = last_metrics(work_dir)
    ours, reference = metrics["auto"], metrics["reference"]
    print({key: (ours[key], reference[key]) for key in ours})
    assert ours.keys() == reference.keys()
    for key in ("coco/bbox_mAP", "coco/bbox_mAP_50", "coco/segm_mAP", "coco/segm_mAP_50"):
        assert 0.05 < reference[key] < 0.95, key
        assert ours[key] == pytest.approx(reference[key], abs=1e-3), key


# --------------------------------------------------------------------------------------------- the model index

ROOT = Path(__file__).resolve().parents[2]


def model_index():
    """The index as mim reads it, by the library that it uses."""
    pytest.importorskip("modelindex", reason="model-index is not installed")
    from modelindex.load_model_index import load

    index = load(str(ROOT / "model-index.yml"))
    # OpenMMLab's paths start at the root, the library's at the file; the test below looks them up.
    assert not [fault for fault in index.check(silent=True) or [] if "Path to README" not in fault]
    return index


def test_model_index_lists_every_configuration():
    index = model_index()
    assert {name.parent.name for name in (ROOT / "configs").glob("*/metafile.yml")} == {
        Path(collection.readme).parent.name for collection in index.collections
    }
    collections = {collection.name for collection in index.collections}
    for collection in index.collections:
        assert (ROOT / collection.readme).is_file()
        assert (ROOT / collection.data["Code"]["URL"]).exists()
        assert collection.paper["URL"] == "https://arxiv.org/abs/2012.04733"
    names = [model.name for model in index.models]
    assert len(names) == len(set(names))
    for model in index.models:
        assert model.in_collection in collections
        assert (ROOT / model.config).is_file(), model.config
        assert set(model.metadata.data) & {"Epochs", "Iterations"}
        assert model.weights is None, "there are none yet"
    listed = {model.config for model in index.models}
    for folder in ("mmdet", "mmpretrain", "mmseg", "paper"):
        files = {str(path.relative_to(ROOT)) for path in (ROOT / "configs" / folder).rglob("*.py")}
        assert {file for file in files if "/_base_/" not in file} <= listed


def test_results_in_the_model_index_are_marked_as_the_papers():
    """As mim reads them: it iterates over every model's results, so that there must be a list."""
    fields = {}
    for model in model_index().models:
        for result in model.results:
            assert re.fullmatch(r".+, the paper's figures \(Table \d+\)", result.dataset), model.name
            fields |= {(model.name, metric): value for metric, value in result.metrics.items()}
    assert fields["mask-rcnn_r50-carafe_carafe-fpn_carafe-mask-head_1x_coco", "mask AP"] == 36.8
    assert fields["global-local-carafe_places365-256x256", "l1"] == 5.82
    assert len(fields) > 80
