"""An operator that is not CARAFE++ in CARAFE++'s places: a user's own by one file and one line, and the peers."""

import importlib
import re
import sys

import pytest
import torch
from config_table import CONFIGS

pytest.importorskip("mmengine", reason="MMEngine is not installed")
pytest.importorskip("mmdet", reason="mmdet is not installed")

from mmengine.model import BaseModule
from mmengine.registry import MODELS, DefaultScope, Registry

from carafe_plugin.engine.config import load_config
from carafe_plugin.engine.errors import UsageError
from carafe_plugin.modules import peers
from carafe_plugin.openmmlab import layers
from carafe_plugin.openmmlab.mmdet import CARAFEFPN, CARAFEFCNMaskHead, CARAFEResNet

pytestmark = pytest.mark.usefixtures("one_thread")
CHANNELS = [8, 16, 32]


@pytest.fixture
def operator_file(tmp_path, monkeypatch):
    """The file of the example in CONTRIBUTING.md, in the current folder, which Python does not search by itself."""
    blocks = re.findall(r"```python\n(.*?)```", (CONFIGS.parent / "CONTRIBUTING.md").read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "class MyUpsample" in block]
    (tmp_path / "my_upsample.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])  # "" is the current folder, too
    importlib.invalidate_caches()
    yield tmp_path / "my_upsample.py", [block for block in blocks if "my_upsample" in block]
    sys.modules.pop("my_upsample", None)


def fpn_of(config):
    """A small FPN with the neck's operators of a configuration."""
    from mmdet.registry import MODELS

    neck = dict(config.model.neck, in_channels=CHANNELS, out_channels=16)
    with DefaultScope.overwrite_default_scope("mmdet"):
        return MODELS.build(neck)


def check(neck, kind):
    """It stands in both places, is run, and learns."""
    assert [type(module).__name__ for module in neck.upsample_modules] == [kind] * 2
    sizes = [(13, 19), (7, 10), (4, 5)]
    outs = neck([torch.rand(1, channels, *size) for channels, size in zip(CHANNELS, sizes, strict=True)])
    assert [tuple(out.shape[2:]) for out in outs[:3]] == sizes
    sum(out.sum() for out in outs).backward()
    assert all(parameter.grad.any() for parameter in neck.upsample_modules.parameters())


def test_one_file_and_one_line(operator_file, tmp_path):
    """The example: the line names the file and the class."""
    _, lines = operator_file
    (line,) = [block for block in lines if "class" not in block]
    config = tmp_path / "config.py"
    config.write_text(f'_base_ = "{CONFIGS}/mmdet/faster-rcnn_r50_carafe-fpn_1x_coco.py"\n{line}')
    check(fpn_of(load_config(str(config))), "MyUpsample")


def test_by_a_registered_name(operator_file, tmp_path):
    """The same by a short name, which custom_imports makes known."""
    path, _ = operator_file
    text = path.read_text().replace("class MyUpsample", "@MODELS.register_module()\nclass MyShortUpsample")
    path.write_text("from mmengine.registry import MODELS\n" + text)
    config = tmp_path / "config.py"
    config.write_text(
        f'_base_ = "{CONFIGS}/mmdet/faster-rcnn_r50_carafe-fpn_1x_coco.py"\n'
        'custom_imports = dict(imports=["my_upsample"])\n'
        'model = dict(neck=dict(carafe_cfg=dict(type="MyShortUpsample")))\n'
    )
    check(fpn_of(load_config(str(config))), "MyShortUpsample")


@pytest.mark.parametrize(
    ("first", "lines", "reason"),
    [
        ("import absent_a", 'custom_imports = dict(imports=["my_upsample"])', "No module named 'absent_a'"),
        ("", 'custom_imports = dict(imports=["my_absent"])', "No module named 'my_absent'"),
        ("import absent_b", "", "cannot import my_upsample of carafe_cfg's {}: No module named 'absent_b'"),
        ("def", "", "cannot import my_upsample of carafe_cfg's {}: invalid syntax (my_upsample.py, line 1)"),
    ],
)
def test_a_file_that_cannot_be_imported(operator_file, tmp_path, first, lines, reason):
    path, _ = operator_file
    path.write_text(f"{first}\n{path.read_text()}")
    config = tmp_path / "config.py"
    config.write_text(lines + '\nmodel = dict(necks=[dict(carafe_cfg=dict(type="my_upsample.MyUpsample"))])\n')
    with pytest.raises(UsageError) as error:
        load_config(str(config))
    assert reason.format("my_upsample.MyUpsample") in str(error.value)


def test_an_import_that_may_fail_says_why(operator_file, tmp_path, capsys):
    operator_file[0].write_text("import absent_c\n")
    config = tmp_path / "config.py"
    config.write_text('custom_imports = dict(imports=["my_upsample", "re"], allow_failed_imports=True)\n')
    with pytest.warns(UserWarning, match="my_upsample failed to import"):
        load_config(str(config))
    expected = "warning: custom_imports continues without my_upsample: No module named 'absent_c'\n"
    assert capsys.readouterr().err == expected


def test_types_with_a_scope_are_no_modules(operator_file, tmp_path, monkeypatch):
    """And the current folder is the last to be searched, so that it hides nothing."""
    config = tmp_path / "config.py"
    monkeypatch.setitem(MODELS.children, "own_scope", Registry("model", scope="own_scope"))
    config.write_text('model = dict(carafe_cfg=dict(type="own_scope.Operator", act_cfg=dict(type="ReLU")))\n')
    assert load_config(str(config)).model.carafe_cfg.type == "own_scope.Operator"
    assert sys.path[-1] == str(tmp_path)


@pytest.mark.parametrize("kind", peers.UPSAMPLERS)
def test_peers_upsample_in_neck_and_mask_head(kind):
    neck = CARAFEFPN(in_channels=CHANNELS, out_channels=16, num_outs=4, carafe_cfg=dict(type=kind.__name__))
    neck.init_weights()
    assert all(isinstance(module, kind) for module in neck.upsample_modules)
    for module in neck.upsample_modules:
        if kind is peers.GUMUpsample:  # Xavier for every convolution came by
            assert not module.guidance.weight.any()
    head = CARAFEFCNMaskHead(
        num_convs=1, in_channels=16, conv_out_channels=16, num_classes=3, carafe_cfg=dict(type=kind.__name__)
    )
    head.init_weights()
    head(torch.rand(2, 16, 14, 14)).sum().backward()
    assert isinstance(head.upsample, kind)
    assert head(torch.rand(2, 16, 14, 14)).shape == (2, 3, 28, 28)
    assert all(parameter.grad is not None for parameter in head.upsample.parameters())


@pytest.mark.parametrize("kind", peers.DOWNSAMPLERS)
def test_peers_downsample_in_a_backbone(kind):
    cfg = dict(type=kind.__name__)
    if kind is peers.LIPDownsample:
        cfg.update(stem=dict(bottleneck=None), pointwise=True)
    backbone = CARAFEResNet(18, carafe_cfg=cfg, frozen_stages=-1)
    backbone.init_weights()
    backbone.train()
    places = [backbone.get_submodule(name) for name in backbone.downsampler_names]
    assert [type(place).__mro__.count(kind) for place in places] == [1] * 7
    outs = backbone(torch.rand(1, 3, 70, 100))
    assert [tuple(out.shape[2:]) for out in outs] == [(18, 25), (9, 13), (5, 7), (3, 4)]
    sum(out.square().sum() for out in outs).backward()
    assert all(parameter.grad is not None for place in places for parameter in place.parameters())
    convs = [backbone.layer2[0].conv1, backbone.layer2[0].downsample[0]]
    assert [conv.kernel_size[0] for conv in convs] == [1 if kind is peers.LIPDownsample else 3, 1]
    if kind is peers.LIPDownsample:
        assert len(places[0].logits) == 2
        assert len(places[1].logits) == 8
        last = [place.logits[-2] for place in places]
        assert not any(conv.weight.any() for conv in last), "Kaiming for every convolution came by"


@pytest.mark.parametrize(("kind", "last"), [(peers.GUMUpsample, "guidance"), (peers.LIPDownsample, "logits.6")])
def test_their_start_survives_in_plain_containers(kind, last):
    """Where init_weights does not arrive, while the enclosing module's init_cfg does."""
    network = BaseModule(init_cfg=dict(type="Kaiming", layer="Conv2d"))
    network.layers = torch.nn.Sequential(kind(4), torch.nn.Conv2d(4, 4, 1))
    network.init_weights()
    assert not network.layers[0].get_submodule(last).weight.any()


def test_a_stem_of_its_own_arguments():
    """Given as a dictionary, the stem changes some of what holds for all places."""
    backbone = CARAFEResNet(18, carafe_cfg=dict(compressed_channels=8, stem=dict(down_kernel=3)))
    places = [backbone.get_submodule(name) for name in backbone.downsampler_names]
    assert [place.kernel_size for place in places] == [3] + [5] * 6
    assert {place.compressed_channels for place in places} == {8}


@pytest.mark.parametrize("kind", [*(kind.__name__ for kind in peers.DOWNSAMPLERS), "CARAFEDownsample"])
def test_a_downsampler_does_not_upsample(kind):
    """Its map would silently be completed by repeating rows and columns."""
    with pytest.raises(ValueError, match=f"carafe_cfg must describe an upsampler, got type='{kind}'"):
        layers.build_upsampler(dict(type=kind), 16)


@pytest.mark.parametrize("kind", [kind.__name__ for kind in peers.UPSAMPLERS])
def test_an_upsampler_does_not_downsample(kind):
    with pytest.raises(ValueError, match=f"carafe_cfg must describe a downsampler, got type='{kind}'"):
        layers.build_downsampler(dict(type=kind), 16)


@pytest.mark.parametrize(
    ("cfg", "error", "message"),
    [
        (dict(type="GUMUpsample", offsets=2), TypeError, "unexpected keyword argument 'offsets'"),
        (
            dict(type="DeconvUpsample", kernel_size=1),
            ValueError,
            "kernel_size must be at least the scale factor 2, got 1",
        ),
        ("GUMUpsample", TypeError, "carafe_cfg must be a dictionary or None, got 'GUMUpsample'"),
    ],
)
def test_bad_upsamplers(cfg, error, message):
    with pytest.raises(error, match=message):
        CARAFEFPN(in_channels=CHANNELS, out_channels=16, num_outs=4, carafe_cfg=cfg)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (dict(stem="yes"), "'stem' must be True or False, got 'yes' \\(or a dictionary of arguments\\)"),
        (dict(pointwise=1), "'pointwise' must be True or False, got 1"),
        ([], "carafe_cfg must be a dictionary or None, got \\[\\]"),
    ],
)
def test_bad_places(cfg, message):
    with pytest.raises(TypeError, match=message):
        CARAFEResNet(18, carafe_cfg=cfg)
