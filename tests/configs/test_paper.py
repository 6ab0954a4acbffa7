"""configs/paper: every row of the paper's tables has a config, and in its model the operator stands where it should."""

import functools
import re
from unittest import mock

import pytest
import torch
import yaml
from config_table import BOTTLENECKS, CONFIGS, MODULES, in_folder

pytest.importorskip("mmengine", reason="MMEngine is not installed")
pytest.importorskip("mmdet", reason="mmdet is not installed")
pytest.importorskip("mmseg", reason="mmseg is not installed")
pytest.importorskip("mmpretrain", reason="mmpretrain is not installed")


from config_models import build, parse
from test_bases import differences

from carafe_plugin.modules import CARAFEDownsample, CARAFEUpsample, peers
from carafe_plugin.openmmlab.layers import Interpolation
from carafe_plugin.openmmlab.resnet import DownsampledConv2d
from carafe_plugin.openmmlab.resnet_checkpoints import extract_backbone
from studies.paper_tables.pages import END, START
from studies.paper_tables.rows import read_tables

PAPER = CONFIGS / "paper"
FILES = sorted(str(path.relative_to(PAPER).with_suffix("")) for path in PAPER.rglob("*.py"))
NECK, MASK_HEAD, BACKBONE = "neck.carafe_cfg", "roi_head.mask_head.carafe_cfg", "backbone.carafe_cfg"

#: A folder of configs -> the config that its files start from.
BASES = {
    "table-03_downsampling": "mmdet/faster-rcnn_r50-carafe_fpn_1x_coco",
    "table-03_downsampling/pretraining": "mmpretrain/resnet50-carafe_16xb64_in1k",
    "table-04_upsampling": "mmdet/faster-rcnn_r50_carafe-fpn_1x_coco",
    "table-06_mask-head": "mmdet/mask-rcnn_r50_fpn_carafe-mask-head_1x_coco",
    "table-11_compressed-channels-up": "mmdet/faster-rcnn_r50_carafe-fpn_1x_coco",
    "table-12_compressed-channels-down": "mmpretrain/resnet50-carafe_16xb64_in1k",
    "table-13_kernel-sizes": "mmdet/faster-rcnn_r50_carafe-fpn_1x_coco",
    "table-14_normalizers": "mmdet/faster-rcnn_r50_carafe-fpn_1x_coco",
}
OPERATORS = {
    "max-pool": peers.MaxPoolDownsample,
    "average-pool": peers.AveragePoolDownsample,
    "dpp": peers.DPPDownsample,
    "lip": peers.LIPDownsample,
    "nearest": Interpolation,
    "bilinear": Interpolation,
    "nearest-conv": peers.NearestConvUpsample,
    "bilinear-conv": peers.BilinearConvUpsample,
    "deconv": peers.DeconvUpsample,
    "pixel-shuffle": peers.PixelShuffleUpsample,
    "gum": peers.GUMUpsample,
    "spatial-attention": peers.SpatialAttentionUpsample,
}


def changes(file):
    """The arguments of CARAFE++ that the name of a file promises to change."""
    folder, _, name = file.rpartition("/")
    if "compressed-channels" in folder:
        return dict(compressed_channels=None if name == "cm-none" else int(name.removeprefix("cm-")))
    if "kernel-sizes" in folder:
        encoder, reassembly = map(int, re.findall(r"\d", name))
        return dict(encoder_kernel=encoder, kernel_size=reassembly)
    return dict(normalizer=name.replace("-", "_"))


def build_part(config, part):
    """A part of a model without memory: the values do not matter here."""
    part = dict(part)
    part.pop("init_cfg", None)
    # mmpretrain's ResNet reads numbers off this one.
    linspace = functools.partial(torch.linspace, device="cpu")
    with torch.device("meta"), mock.patch("torch.linspace", linspace):
        return build(part, config.default_scope)


@pytest.fixture(scope="module")
def tables():
    return read_tables()


def test_every_row_has_a_config_and_every_config_a_row(tables):
    assert list(tables) == list(range(1, 15))
    assert [len(table.rows) for table in tables.values()] == [8, 4, 6, 9, 3, 7, 6, 8, 9, 4, 6, 5, 8, 3]
    rows = [row for table in tables.values() for row in table.rows]
    for row in rows:
        toolbox, _, path = row.config.partition("::")
        root = CONFIGS
        if path:
            (package,) = __import__(toolbox).__path__
            root = type(CONFIGS)(package) / ".mim" / "configs"
        assert (root / (path or row.config)).is_file(), row
    named = {row.config for row in rows}
    pretraining = {f"paper/{file}.py" for file in FILES if "/pretraining/" in file}
    assert {f"paper/{file}.py" for file in FILES} - pretraining == {name for name in named if name.startswith("paper/")}
    folders = {folder for folder in {file.rpartition("/")[0] for file in FILES} if folder not in BASES}
    assert folders == {"table-01_coco-test-dev", "table-02_imagenet"}
    unlisted = {
        f"{folder}/{name}.py" for folder in ("mmdet", "mmpretrain", "mmseg") for name in in_folder(folder)
    } - named
    assert all("0k_ade20k-512" in name or "resnetv1c" in name for name in unlisted), "at the toolboxes' own settings"


def test_a_row_is_in_the_folder_of_its_table(tables):
    for number, table in tables.items():
        for row in table.rows:
            if row.config.startswith("paper/"):
                assert row.config.startswith(f"paper/table-{number:02}_"), row


def test_every_line_fills_the_columns(tables):
    for table in tables.values():
        for row, line in table.lines:
            assert len(line) == len(table.columns), row
            assert all(figure is None or 0 < figure < 100 for figure in line if not isinstance(figure, str)), row


def test_a_config_has_the_same_figures_in_every_table(tables):
    """A main configuration is a row of several tables: what they have in common agrees, as in the paper."""
    seen, shared = {}, 0
    for table in tables.values():
        for row, line in table.lines:
            for column, value in zip(table.columns, line, strict=True):
                key = row.config, table.task(line), column
                shared += key in seen
                assert seen.setdefault(key, value) == value, (table.table, key)
    assert shared > 50


@pytest.mark.parametrize("folder", ["inpainting", "mmdet", "mmpretrain", "mmseg", "paper"])
def test_every_row_has_its_figures_in_the_metafile(folder, tables):
    """test_paper_tables.py compares the figures; here, that a row's model has results and other models have none."""
    rows = {f"configs/{row.config}" for table in tables.values() for row in table.rows}
    for model in yaml.safe_load((CONFIGS / folder / "metafile.yml").read_text())["Models"]:
        assert bool(model["Results"]) == (model["Config"] in rows), model["Name"]


def test_every_table_of_figures_in_a_readme_is_written_from_the_tables():
    for path in CONFIGS.glob("*/README.md"):
        outside = re.sub(f"{START}.*?{END}", "", path.read_text(), flags=re.DOTALL)
        assert not re.search(r"^\|.*, paper", outside, re.MULTILINE), path


@pytest.mark.parametrize("file", [file for file in FILES if file.rpartition("/")[0] in BASES])
def test_differs_from_its_base_in_the_operator_alone(file):
    config, base = (parse(CONFIGS / f"{name}.py") for name in (f"paper/{file}", BASES[file.rpartition("/")[0]]))
    found = differences(config, base)
    if file.startswith("table-03") and "pretraining" not in file:
        weights, _ = found.pop("model.backbone.init_cfg.checkpoint")
        assert weights == f"checkpoints/mmdet/resnet50-{file.rpartition('/')[2]}.pth"
        assert f"{PAPER / 'table-03_downsampling' / 'pretraining'}/{file.rpartition('/')[2]}.py" in map(
            str, (PAPER / "table-03_downsampling" / "pretraining").iterdir()
        )
    place = NECK if config.model.get("neck", {}).get("carafe_cfg") else BACKBONE
    place = MASK_HEAD if "mask-head" in file else place
    assert found or file.endswith("cm-none")  # None is like nothing there
    assert all(path.startswith(f"model.{place}.") for path in found), found


@pytest.mark.parametrize("file", [file for file in FILES if file.rpartition("/")[0] in BASES])
def test_operator_stands_where_it_should(file):
    config = parse(PAPER / f"{file}.py")
    name = file.rpartition("/")[2]
    kind = OPERATORS.get(name)
    if "mask-head" in file:
        head = build_part(config, config.model.roi_head.mask_head)
        if kind is Interpolation:  # the toolbox's own
            assert head.upsample.mode == name
        else:
            assert isinstance(head.upsample, kind)
            assert (head.upsample.channels, head.upsample.scale_factor) == (256, 2)
        return
    if "carafe_cfg" in config.model.get("neck", {}):
        neck = build_part(config, config.model.neck)
        modules = list(neck.upsample_modules)
        assert len(modules) == 3
        expected = CARAFEUpsample
    else:
        backbone = build_part(config, config.model.backbone)
        assert [f"backbone.{place}" for place in backbone.downsampler_names] == BOTTLENECKS
        modules = [backbone.get_submodule(place) for place in backbone.downsampler_names]
        assert [module.channels for module in modules] == [64, 128, 256, 256, 512, 512, 1024]
        check_lip(backbone, name == "lip")
        expected = CARAFEDownsample
    for module in modules:
        assert isinstance(module, kind or expected)
        if kind is Interpolation:
            assert module.mode == name
        elif kind is None:
            assert {key: getattr(module, key) for key in changes(file)} == changes(file)


def check_lip(backbone, is_lip):
    """LIP's own paper: a 1x1 convolution follows; one 3x3 convolution for the stem, bottlenecks 128 wide elsewhere."""
    for stage in (2, 3, 4):
        conv = getattr(backbone, f"layer{stage}")[0].conv2
        assert isinstance(conv, DownsampledConv2d)
        assert (conv.kernel_size, conv.stride) == (((1, 1) if is_lip else (3, 3)), (1, 1))
    if is_lip:
        stem, *others = (backbone.get_submodule(place) for place in backbone.downsampler_names)
        assert [layer.kernel_size for layer in stem.logits if hasattr(layer, "kernel_size")] == [(3, 3)]
        for module in others:
            assert [layer.out_channels for layer in module.logits if hasattr(layer, "kernel_size")] == [
                128,
                128,
                module.channels,
            ]


@pytest.mark.parametrize("name", ["max-pool", "average-pool", "dpp", "lip"])
def test_what_pretraining_leaves_is_what_the_detector_starts_from(name):
    pretraining = parse(PAPER / "table-03_downsampling" / "pretraining" / f"{name}.py")
    detector = parse(PAPER / "table-03_downsampling" / f"{name}.py")
    trained = build_part(pretraining, pretraining.model.backbone).state_dict()
    trained = extract_backbone({f"backbone.{key}": value for key, value in trained.items()})
    wanted = build_part(detector, detector.model.backbone).state_dict()
    assert {key: value.shape for key, value in trained.items()} == {key: value.shape for key, value in wanted.items()}


def test_baselines():
    """DCNv2 in the last three stages; the ResNets of ImageNet at the schedule of those with CARAFE++."""
    for kind in ("faster", "mask"):
        config = parse(PAPER / "table-01_coco-test-dev" / f"{kind}-rcnn_r101-dcnv2.py")
        ours = "mask-rcnn_r101-carafe-mdconv-c3-c5_carafe-fpn_carafe-mask-head_2x_coco"
        ours = ours if kind == "mask" else "faster-rcnn_r101-carafe-mdconv-c3-c5_carafe-fpn_2x_coco"
        assert f"mmdet/{ours}" in MODULES
        for key in ("dcn", "stage_with_dcn", "depth"):
            assert config.model.backbone[key] == parse(CONFIGS / "mmdet" / f"{ours}.py").model.backbone[key]
    for depth in (50, 101):
        baseline = parse(PAPER / "table-02_imagenet" / f"resnet{depth}.py")
        found = differences(parse(CONFIGS / "mmpretrain" / f"resnet{depth}-carafe_16xb64_in1k.py"), baseline)
        assert found == {"model.backbone.type": ("carafe_plugin.openmmlab.mmpretrain.CARAFEResNet", "ResNet")}


def test_readme_names_every_folder():
    text = (PAPER / "README.md").read_text()
    folders = {path.name for path in PAPER.iterdir() if path.is_dir()}
    assert folders == set(re.findall(r"`(table-[\w-]+)/?`", text))
    assert yaml.safe_load((PAPER / "tables.yml").read_text())
