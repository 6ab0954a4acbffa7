"""tools/convert_checkpoint.py: plain-PyTorch CARAFE modules, written out here as others write them, become this one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tool_runs import call_tool, one_line
from torch import nn

from carafe_plugin import CARAFEUpsample
from carafe_plugin.engine.checkpoint_layouts import LAYOUTS, Fork, LayoutError, convert_layout, find_modules

pytestmark = pytest.mark.usefixtures("one_thread")

C, CM = 8, 6
RECORD = "carafe_layout"


class Block(nn.Module):
    """Convolution, BatchNorm and activation, as the YOLO family has it."""

    def __init__(self, c1, c2, k=1, act=None, eps=1e-5):
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, padding=k // 2, bias=False)
        self.bn = nn.BatchNorm2d(c2, eps=eps)
        self.act = act or nn.Identity()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class ShuffleFirst(nn.Module):
    """Pixel shuffle, softmax, nearest interpolation, dilated unfold."""

    def __init__(self, comp, enc, k=5, s=2, bn=None):
        super().__init__()
        self.comp, self.enc = comp, enc
        if bn is not None:
            self.bn = bn
        self.k, self.s = k, s

    def forward(self, x):
        logits = self.enc(self.comp(x))
        if hasattr(self, "bn"):
            logits = self.bn(logits)
        kernels = F.pixel_shuffle(logits, self.s).softmax(1)
        larger = x.repeat_interleave(self.s, 2).repeat_interleave(self.s, 3)
        patches = F.unfold(larger, self.k, dilation=self.s, padding=self.k // 2 * self.s)
        patches = patches.view(len(x), x.shape[1], self.k**2, *larger.shape[2:])
        return torch.einsum("nkhw,nckhw->nchw", kernels, patches)


class ShuffleLast(ShuffleFirst):
    """The logits as (s^2, k^2): softmax, reassembly at every low-resolution location, pixel shuffle of the result."""

    def forward(self, x):
        n, c, h, w = x.shape
        logits = self.enc(self.comp(x)).view(n, self.s**2, self.k**2, h * w)
        patches = F.unfold(x, self.k, padding=self.k // 2).view(n, c, self.k**2, h * w)
        result = torch.einsum("nskl,nckl->ncsl", logits.softmax(2), patches)
        return F.pixel_shuffle(result.reshape(n, -1, h, w), self.s)


class DownEncoder(nn.Module):
    """Tensor.unfold and a matrix product for every location; a convolution to other channels behind."""

    def __init__(self, k=3, s=2):
        super().__init__()
        self.down, self.encoder = nn.Conv2d(C, CM, 1), nn.Conv2d(CM, k * k * s * s, k, padding=k // 2)
        self.out = nn.Conv2d(C, 5, 1)
        self.k, self.s = k, s

    def forward(self, x):
        n, c, h, w = x.shape
        k, s = self.k, self.s
        kernels = F.pixel_shuffle(self.encoder(self.down(x)), s).softmax(1)
        kernels = kernels.unfold(2, s, s).unfold(3, s, s).reshape(n, k * k, h, w, s * s).permute(0, 2, 3, 1, 4)
        windows = F.pad(x, (k // 2,) * 4).unfold(2, k, 1).unfold(3, k, 1).reshape(n, c, h, w, k * k)
        result = (windows.permute(0, 2, 3, 1, 4) @ kernels).reshape(n, h, w, -1).permute(0, 3, 1, 2)
        return self.out(F.pixel_shuffle(result, s))


def seq(*layers):
    return nn.Sequential(*layers)


def conv(c1, c2, k=1, bias=True):
    return nn.Conv2d(c1, c2, k, padding=k // 2, bias=bias)


# name -> (module, layout, what its names do not tell)
FORKS = {
    "yolo": (
        lambda: ShuffleFirst(Block(C, CM, 1, nn.SiLU(), 1e-3), Block(CM, 100, 3, eps=1e-3)),
        "conv-bn",
        Fork("silu", 1e-3),
    ),
    "relu": (lambda: ShuffleFirst(Block(C, CM, 1, nn.ReLU()), Block(CM, 100, 3)), "conv-bn", Fork("relu")),
    "no act": (lambda: ShuffleFirst(Block(C, CM, eps=1e-3), Block(CM, 100, 3, eps=1e-3)), "conv-bn", Fork(eps=1e-3)),
    "norm beside": (
        lambda: ShuffleFirst(Block(C, CM, 1, nn.ReLU()), conv(CM, 100, 3), bn=nn.BatchNorm2d(100)),
        "conv-bn-split",
        Fork("relu"),
    ),
    "sequential": (
        lambda: ShuffleFirst(
            seq(conv(C, CM), nn.BatchNorm2d(CM), nn.ReLU()), seq(conv(CM, 81, 1), nn.BatchNorm2d(81)), 3, 3
        ),
        "sequential",
        Fork("relu", scale=3),
    ),
    "plain encoder": (
        lambda: ShuffleFirst(seq(conv(C, CM, bias=False), nn.BatchNorm2d(CM), nn.LeakyReLU(0.1)), conv(CM, 100, 3)),
        "sequential-conv",
        Fork("leaky_relu"),
    ),
    "convolutions": (lambda: ShuffleFirst(conv(C, CM, bias=False), conv(CM, 36, 5), 3), "comp-enc", Fork()),
    "positions": (lambda: ShuffleLast(conv(C, CM), conv(CM, 100, 3)), "comp-enc", Fork(order="positions")),
    "down-encoder": (DownEncoder, "down-encoder", Fork()),
}


def trained(module: nn.Module) -> nn.Module:
    """Values far from an initialisation: kernels that differ, norms that do something."""
    torch.manual_seed(0)
    for name, value in module.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.01, 2)
        elif value.is_floating_point():
            value.normal_(std=1.0 if value.dim() == 1 else 2 / value[0].numel() ** 0.5)
    return module.eval()


def upsampler(state: dict, act: str, scale: int = 2) -> CARAFEUpsample:
    """This package's module for converted weights, built from their shapes."""
    weight = state["content_encoder.weight"]
    acts = dict(identity=None, relu=nn.ReLU, silu=nn.SiLU, leaky_relu=lambda: nn.LeakyReLU(0.1))
    norm = nn.BatchNorm2d if "compressor_norm.weight" in state else None
    k = int((len(weight) / scale**2) ** 0.5)
    module = CARAFEUpsample(
        C, scale, k, encoder_kernel=weight.shape[-1], compressed_channels=CM, norm=norm, act=acts[act]
    )
    module.load_state_dict(state, strict=True)
    return module.eval()


@pytest.fixture
def x():
    return torch.randn(2, C, 6, 7, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", FORKS)
def test_to_mmcv_and_back(name: str, x: torch.Tensor) -> None:
    build, layout, fork = FORKS[name]
    module = trained(build())
    original = {f"model.11.{key}": value for key, value in module.state_dict().items()}
    before, after = {"a.weight": torch.ones(1)}, {"z.weight": torch.ones(1)}
    conversion = convert_layout({**before, **original, **after}, "mmcv", fork)
    (info,) = conversion.modules
    assert (info.source, info.layout, info.channels, info.compressed_channels) == ("model.11", layout, C, CM)
    keys = list(conversion.state_dict)
    assert (keys[0], keys[-1]) == ("a.weight", "z.weight")
    state = {key.removeprefix("model.11."): conversion.state_dict[key] for key in keys[1:-1]}
    out = {key: state.pop(key) for key in list(state) if key.startswith("out.")}
    assert ("compressor_norm.weight" in state) == (fork.act != "identity"), "folded unless an activation follows"
    with torch.no_grad():
        expected, result = module(x), upsampler(state, fork.act, fork.scale)(x)
        if out:
            result = F.conv2d(result, out["out.weight"], out["out.bias"])
        torch.testing.assert_close(result, expected, atol=2e-5, rtol=1e-5)

        back = convert_layout(conversion.state_dict, layout, fork).state_dict
        assert find_modules(back) == {"model.11.": layout}
        again = build().eval()
        missing, unexpected = again.load_state_dict(
            {key.removeprefix("model.11."): v for key, v in back.items() if key.startswith("model.11.")}, strict=False
        )
        # Where the fork left out a bias, or has one before its norm, the layout's usual form has it the other way.
        assert all(key.endswith(".bias") for key in (*missing, *unexpected)), (missing, unexpected)
        for key in missing:
            again.get_parameter(key).zero_()
        for key in unexpected:
            assert not back[f"model.11.{key}"].any()
        torch.testing.assert_close(again(x), expected, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "mmcv"])
def test_mmcvs_class_to_every_layout(layout: str, x: torch.Tensor) -> None:
    pack = trained(CARAFEUpsample(C, compressed_channels=CM))
    state = convert_layout({f"neck.up.{k}": v for k, v in pack.state_dict().items()}, layout, Fork()).state_dict
    assert find_modules(state) == {"neck.up.": layout}
    back = convert_layout(state, "mmcv", Fork(), rename={"neck.up": "up"}).state_dict
    again = CARAFEUpsample(C, compressed_channels=CM)
    again.load_state_dict({key.removeprefix("up."): value for key, value in back.items()}, strict=True)
    torch.testing.assert_close(again(x), pack(x), atol=1e-5, rtol=1e-5)


def test_what_the_names_do_not_tell_matters(x: torch.Tensor) -> None:
    """The check of the tests above: with a wrong statement about the fork the outputs are others."""
    for name, wrong in (("positions", Fork()), ("relu", Fork("silu")), ("no act", Fork(eps=1e-1))):
        build, _, _ = FORKS[name]
        module = trained(build())
        state = convert_layout(module.state_dict(), "mmcv", wrong).state_dict
        with torch.no_grad():
            assert (upsampler(state, wrong.act)(x) - module(x)).abs().max() > 1e-3, name


def test_the_check_finds_a_wrong_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where all kernels are alike, as they are at the start of a training."""
    import carafe_plugin.engine.checkpoint_layouts as layouts

    fresh = ShuffleLast(conv(C, CM), conv(CM, 100, 3))
    nn.init.normal_(fresh.enc.weight, std=1e-3)
    nn.init.zeros_(fresh.enc.bias)
    monkeypatch.setattr(layouts, "_reorder", lambda convolution, fork, to_taps: convolution)
    with pytest.raises(LayoutError, match=r"the outputs differ by .* from comp-enc to mmcv"):
        convert_layout(fresh.state_dict(), "mmcv", Fork(order="positions"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("up.enc.conv.weight"), r"no CARAFE module.*matched none: up\.comp\.conv\.weight"),
        (
            lambda s: s.update({"up.att.weight": s["up.enc.bn.weight"]}),
            r"up looks like the layout conv-bn, but .*Unexpected key.*\"att\.weight\"",
        ),
        (
            lambda s: s.update({k: v[:90] for k, v in s.items() if "enc" in k and v.dim()}),
            r"has 90 channels.*the scale s = 2",
        ),
        (lambda s: s.update({"up.enc.conv.weight": torch.zeros(100, CM, 2, 2)}), r"odd square kernel"),
        (
            lambda s: s.update({"up.comp.conv.weight": torch.zeros(CM, C, 3, 3)}),
            r"up\.comp\.conv\.weight and .* shapes \(Cm, C, 1, 1\)",
        ),
        (lambda s: s.pop("up.comp.bn.bias"), r"up looks .*Missing key.*\"comp\.bn\.bias\""),
        (
            lambda s: s.update({"up.comp.bn.weight": torch.zeros(3)}),
            r"up looks .*mismatch for comp\.bn\.weight: .*\[3\].*\[6\]",
        ),
        (lambda s: s["up.enc.bn.running_mean"].fill_(float("nan")), r"the outputs differ by nan"),
    ],
)
def test_refusals(change, message: str) -> None:
    state = {f"up.{key}": value for key, value in trained(FORKS["relu"][0]()).state_dict().items()}
    change(state)
    with pytest.raises(LayoutError, match=message):
        convert_layout(state, "mmcv", Fork("relu"))
    with pytest.raises(ValueError, match=r"the layout must be one of mmcv, .*, got 'nope'"):
        convert_layout(state, "nope", Fork("relu"))


# -------------------------------------------------------------------------------------------------- the tool


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.save(
        dict(
            model={f"m.11.{k}": v for k, v in trained(FORKS["yolo"][0]()).state_dict().items()}, optimizer={}, epoch=3
        ),
        tmp_path / "yolo.pt",
    )
    return tmp_path / "yolo.pt"


YOLO = ["--act", "silu", "--eps", "1e-3"]


def test_tool(checkpoint: Path, tmp_path: Path, x: torch.Tensor, capsys: pytest.CaptureFixture) -> None:
    converted, back = tmp_path / "new" / "carafe.pth", tmp_path / "back.pth"
    rename = ["--rename", "m.11=neck.upsample_modules.0"]
    assert call_tool("convert_checkpoint", checkpoint, converted, "--to", "mmcv", *YOLO, *rename) == 0
    printed = capsys.readouterr().out
    assert "m.11" in printed
    assert "conv-bn" in printed
    assert f"{converted}: 1 modules, 9 tensors" in printed
    content = torch.load(converted)
    assert content["meta"][RECORD] == {
        "neck.upsample_modules.0": dict(layout="mmcv", act="silu", eps=1e-3, order="taps", scale=2)
    }
    state = {k.removeprefix("neck.upsample_modules.0."): v for k, v in content["state_dict"].items()}
    with torch.no_grad():
        expected = trained(FORKS["yolo"][0]())(x)
        torch.testing.assert_close(upsampler(state, "silu")(x), expected, atol=2e-5, rtol=1e-5)
    # The file says what its weights belong to.
    assert "act silu (given), eps 0.001 (given), order taps (default), scale 2 (default)" in printed
    assert "left out: optimizer, epoch" in printed
    assert call_tool("convert_checkpoint", converted, back, "--to", "conv-bn") == 0
    assert "act silu (recorded in SRC), eps 0.001 (recorded in SRC)" in capsys.readouterr().out
    module = FORKS["yolo"][0]().eval()
    module.load_state_dict({k.split("0.", 1)[1]: v for k, v in torch.load(back)["state_dict"].items()}, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected, atol=5e-5, rtol=1e-5)


def test_tool_reads_what_it_recorded(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Also where a given option says something else, and not for other modules than those that it is about."""

    def run(source: str, destination: str, *options: object) -> str:
        assert call_tool("convert_checkpoint", tmp_path / source, tmp_path / destination, *options, "--force") == 0
        return capsys.readouterr().out

    def weights(name: str) -> dict:
        return torch.load(tmp_path / name)["state_dict"]

    pack = trained(CARAFEUpsample(C, 3, 3, compressed_channels=CM)).state_dict()
    torch.save({f"{up}.{key}": value for up in "ab" for key, value in pack.items()}, tmp_path / "mmcv.pth")
    positions = ("--order", "positions", "--scale", 3)
    run("mmcv.pth", "plain.pth", "--to", "comp-enc", *positions)
    printed = run("plain.pth", "back.pth", "--to", "mmcv")
    assert "order positions (recorded in SRC), scale 3 (recorded in SRC)" in printed
    for key, value in weights("back.pth").items():
        torch.testing.assert_close(value, pack[key[2:]])
    printed = run("plain.pth", "other.pth", "--to", "mmcv", "--order", "taps")
    assert "order taps (given, where SRC records positions)" in printed
    assert not torch.equal(weights("other.pth")["a.content_encoder.weight"], pack["content_encoder.weight"])

    # One module at a time: each has its own record, and they must agree where no option is given.
    run("mmcv.pth", "one.pth", "--to", "comp-enc", *positions, "--below", "a", "--rename", "a=c")
    printed = run("one.pth", "both.pth", "--to", "comp-enc", "--scale", 3)
    assert "order taps (default)" in printed, "b has no record"
    assert {
        name: record["order"] for name, record in torch.load(tmp_path / "both.pth")["meta"][RECORD].items()
    } == dict(c="positions", b="taps")
    assert call_tool("convert_checkpoint", tmp_path / "both.pth", tmp_path / "no.pth", "--to", "mmcv") == 2
    assert "SRC records more than one order (c positions, b taps): give --order" in one_line(capsys)
    run("both.pth", "half.pth", "--to", "mmcv", "--below", "c", "--rename", "c=d")
    half = torch.load(tmp_path / "half.pth")
    assert set(half["meta"][RECORD]) == {"b", "d"}
    half["meta"][RECORD]["b"].update(layout="conv-bn", order="positions")
    torch.save(half, tmp_path / "stale.pth")
    assert "order taps (default)" in run("stale.pth", "no.pth", "--to", "mmcv", "--scale", 3), "of another layout"
    run("half.pth", "whole.pth", "--to", "mmcv", "--below", "b")
    for key, value in weights("whole.pth").items():
        torch.testing.assert_close(value, pack[key[2:]])


def test_tool_drops_no_activation(tmp_path: Path, x: torch.Tensor, capsys: pytest.CaptureFixture) -> None:
    """Not even in a layout of two convolutions: what follows a compressor's norm must be known."""
    module = trained(CARAFEUpsample(C, compressed_channels=CM, norm=nn.BatchNorm2d, act=nn.ReLU))
    source, out = tmp_path / "ours.pth", tmp_path / "out.pth"
    torch.save({f"up.{key}": value for key, value in module.state_dict().items()}, source)
    for layout in ("comp-enc", "down-encoder"):
        assert call_tool("convert_checkpoint", source, out, "--to", layout) == 2
        message = "up, with its compressor_norm, does not say which activation follows its compressor: give --act"
        assert message in one_line(capsys)
    assert call_tool("convert_checkpoint", source, out, "--to", "comp-enc", "--act", "relu") == 0
    plain = ShuffleFirst(seq(conv(C, CM), nn.ReLU()), conv(CM, 100, 3))
    state = {k.removeprefix("up.").replace("comp.", "comp.0."): v for k, v in torch.load(out)["state_dict"].items()}
    plain.load_state_dict(state, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), module(x), atol=2e-5, rtol=1e-5)


def test_tool_converts_averaged_weights(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """mmengine's EMAHook has them under the names of a wrapper, with a counter."""
    pack = {f"up.{key}": value for key, value in trained(CARAFEUpsample(C)).state_dict().items()}
    ema = {f"module.{key}": 2 * value for key, value in pack.items()} | {"steps": torch.tensor(7)}
    source, out, back = tmp_path / "mmcv.pth", tmp_path / "out.pth", tmp_path / "back.pth"
    torch.save(dict(state_dict=pack, ema_state_dict=ema, meta=dict(epoch=1), optimizer={}), source)
    assert call_tool("convert_checkpoint", source, out, "--to", "comp-enc", "--rename", "up=m.3") == 0
    printed = capsys.readouterr().out
    assert "ema_state_dict: 1 modules likewise, largest difference" in printed
    assert "left out: optimizer\n" in printed
    converted = torch.load(out)
    assert set(converted) == {"meta", "state_dict", "ema_state_dict"}
    assert set(converted["ema_state_dict"]) == {"steps", *(f"module.{name}" for name in converted["state_dict"])}
    assert call_tool("convert_checkpoint", out, back, "--to", "mmcv", "--rename", "m.3=up") == 0
    again = torch.load(back)["ema_state_dict"]
    assert again.keys() == ema.keys()
    for name, value in ema.items():
        torch.testing.assert_close(again[name], value)
    del ema["module.up.channel_compressor.weight"]
    torch.save(dict(state_dict=pack, ema_state_dict=ema), source)
    assert call_tool("convert_checkpoint", source, out, "--to", "comp-enc", "--force") == 2
    assert "ema_state_dict: no CARAFE module" in one_line(capsys)


def test_tool_overwrites_on_request_alone(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "there.pth"
    there.write_text("old")
    command = ("convert_checkpoint", checkpoint, there, "--to", "mmcv", *YOLO)
    assert call_tool(*command) == 2
    assert f"DST exists: {there}; --force overwrites it" in one_line(capsys)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert call_tool(*command, "--force") == 2
    assert f"cannot write {there}" in one_line(capsys)
    assert there.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    assert call_tool(*command, "--force") == 0
    assert "state_dict" in torch.load(there)


def test_tool_mistakes(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, out = tmp_path / "pack.pth", tmp_path / "out.pth"
    torch.save(dict(state_dict={f"up.{k}": v for k, v in CARAFEUpsample(C).state_dict().items()}), pack)
    other = tmp_path / "other.pth"
    torch.save(dict(backbone=torch.zeros(1), neck=torch.zeros(2)), other)
    whole = tmp_path / "whole.pth"
    torch.save(dict(model=nn.Linear(1, 1)), whole)
    for source, options, message in (
        (
            checkpoint,
            ["--to", "mmcv"],
            "layout conv-bn does not say which activation follows its compressor: give --act",
        ),
        (checkpoint, ["--to", "mmcv", *YOLO, "--scale", 3], "100 channels, which is not k^2 * s^2 with an odd k"),
        (checkpoint, ["--to", "mmcv", *YOLO, "--scale", 0], "--scale must be a positive int, got 0"),
        (checkpoint, ["--to", "mmcv", *YOLO, "--rename", "x=y"], "no CARAFE module is called x; found m.11"),
        (checkpoint, ["--to", "mmcv", *YOLO, "--rename", "x"], "--rename takes OLD=NEW, got x"),
        (checkpoint, ["--to", "mmcv", *YOLO, "--below", "n"], "no CARAFE module of the layouts conv-bn"),
        (checkpoint, ["--to", "comp-enc"], "made from the layout mmcv alone: convert --to mmcv first"),
        (pack, ["--to", "conv-bn", "--act", "silu"], "up is MMCV's, without an activation after its compressor"),
        (other, ["--to", "mmcv"], "keys that matched none: backbone, neck"),
        (whole, ["--to", "mmcv"], "(it holds torch.nn.modules.linear.Linear, and may run code: "),
        (tmp_path / "absent.pth", ["--to", "mmcv"], f"no such checkpoint: {tmp_path}/absent.pth"),
    ):
        assert call_tool("convert_checkpoint", source, out, *options) == 2, message
        assert message in one_line(capsys)
    assert not out.exists()
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert call_tool("convert_checkpoint", whole, out, "--to", "mmcv") == 2
    assert "holds a whole model (Linear), not its weights: in the project that it is from, save" in one_line(capsys)
    assert call_tool("convert_checkpoint", pack, pack, "--to", "comp-enc", "--force") == 2
    assert "DST must be another file than SRC" in one_line(capsys)
    assert call_tool("convert_checkpoint", pack, tmp_path, "--to", "comp-enc") == 2
    assert "DST must be a file, and is a folder" in one_line(capsys)


@pytest.mark.parametrize("name", ["CARAFEResNet", "CARAFEResNetV1c", "CARAFEResNetV1d", "CARAFEResNeXt"])
def test_convert_backbone_names_the_type_to_configure(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """``--to`` chooses the toolbox of the line that it prints; the file serves both."""
    pytest.importorskip("mmpretrain", reason="tools: mmpretrain is not installed")
    import carafe_plugin.openmmlab.mmpretrain as toolbox

    few = dict(depth=50, base_channels=8, stem_channels=8) | (dict(groups=4) if name == "CARAFEResNeXt" else {})
    state = {f"backbone.{key}": value for key, value in getattr(toolbox, name)(**few).state_dict().items()}
    torch.save(dict(state_dict=state), tmp_path / "trained.pth")
    out = tmp_path / "backbone.pth"
    assert call_tool("convert_backbone", tmp_path / "trained.pth", out, "--to", "mmseg") == 0
    line = capsys.readouterr().out.splitlines()[-1]
    initial = f'init_cfg=dict(type="Pretrained", checkpoint="{out}")'
    expected = f'backbone=dict(type="carafe_plugin.openmmlab.mmseg.{name}", depth=50, {initial})'
    assert line == f"in a configuration of mmseg: {expected}"
