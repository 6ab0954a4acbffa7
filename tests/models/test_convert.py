"""convert() on models with every kind of place: what it replaces, what it leaves, and that nothing else changes."""

import copy
import importlib.util
import inspect
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from toolkit import needs_torch
from torch import nn

from carafe_plugin import CARAFEDownsample, CARAFEUpsample, convert, export

pytestmark = pytest.mark.usefixtures("one_thread")

# Weights of a millionth go elsewhere, and sums are in another order.
TOLERANCE = dict(rtol=1e-5, atol=1e-5)


class Pyramid(nn.Module):
    """A top-down path whose interpolations are calls, in a loop; one of them does not resize."""

    def __init__(self, mode="nearest"):
        super().__init__()
        self.mode = mode
        self.laterals = nn.ModuleList(nn.Conv2d(channels, 16, 1) for channels in (8, 16, 32))

    def forward(self, features):
        maps = [lateral(each) for lateral, each in zip(self.laterals, features, strict=True)]
        for i in (1, 0):
            maps[i] = maps[i] + F.interpolate(maps[i + 1], size=maps[i].shape[2:], mode=self.mode)
        return [F.interpolate(maps[0], size=maps[0].shape[2:]), *maps[1:]]


class Model(nn.Module):
    """A backbone that strides and pools, the pyramid, a layer that upsamples, a deconvolution, a bicubic resizing."""

    def __init__(self, mode="nearest"):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.stages = nn.ModuleList([nn.Conv2d(8, 16, 1, 2), nn.Conv2d(16, 32, 3, 2, 1)])
        self.pyramid = Pyramid(mode)
        self.deconvolution = nn.ConvTranspose2d(16, 12, 2, 2)
        self.head = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Upsample(scale_factor=2, mode=mode), nn.Conv2d(16, 4, 1))
        self.dropout = nn.Dropout()

    def forward(self, image):
        maps = [self.pool(self.stem(image))]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        fused = self.dropout(self.pyramid(maps)[0])
        scores = self.head(fused)
        return dict(
            scores=F.interpolate(scores, size=image.shape[2:], mode="bicubic"), more=[self.deconvolution(fused)]
        )


@pytest.fixture
def image():
    torch.manual_seed(0)
    return torch.randn(2, 3, 64, 96)


def outputs(model, image):
    with torch.no_grad():
        return copy.deepcopy(model).eval()(image)


def names(report):
    return [place.name for place in report.replaced]


UPSAMPLERS = ["pyramid.carafe_upsamplers.0", "pyramid.carafe_upsamplers.1", "deconvolution", "head.1"]
DOWNSAMPLERS = ["pool", "stages.0", "stages.1"]


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_outputs_stay(mode, image):
    """Up to the borders, which bilinear interpolation repeats and so do its kernels."""
    model = Model(mode)
    before = outputs(model, image)
    report = convert(model, image, names=["pyramid.*", "head.*"])
    torch.testing.assert_close(outputs(model, image), before, **TOLERANCE)
    assert names(report) == [UPSAMPLERS[0], UPSAMPLERS[1], UPSAMPLERS[3]]
    assert all(place.keeps and place.init == mode for place in report.replaced)
    assert report.difference < 1e-5
    assert [name for name, part in model.named_modules() if isinstance(part, CARAFEUpsample)] == names(report)


def test_every_place_is_named_and_counted(image):
    model = Model()
    parameters = sum(p.numel() for p in model.parameters())
    report = convert(model, image, downsample=True)
    assert names(report) == ["pool", "stages.0", "stages.1", *UPSAMPLERS]
    assert report.parameters == sum(p.numel() for p in model.parameters()) - parameters
    assert {place.name: place.keeps for place in report.replaced if not place.keeps} == dict.fromkeys(
        ("pool", "stages.1", "deconvolution"), False
    )
    reasons = {kept.names: kept.reason for kept in report.kept}
    assert "mode='bicubic' is not one whose place CARAFE++ takes" in reasons[("carafe_upsamplers.0",)]
    assert "it reads the image" in reasons[("stem",)]
    text = str(report)
    assert all(
        name in text for name in (*names(report), "stem (Conv2d): it reads the image", "average (changes outputs)")
    )
    assert f"{report.parameters:+,}" in text


def test_flops_are_those_that_are_counted(image):
    """By PyTorch's counter, which counts a multiply-add twice and the reassembly by this package's rule."""
    from torch.utils.flop_counter import FlopCounterMode

    def count(model):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(image)
        return counter.get_total_flops()

    model = Model()
    before = count(model)
    report = convert(model, image, downsample=True)
    assert count(model) - before == 2 * report.flops


def test_dry_run_and_failure_leave_the_model_as_it_was(image, monkeypatch):
    model = Model()
    state, kinds = copy.deepcopy(model.state_dict()), [type(part) for part in model.modules()]
    generator = torch.get_rng_state()

    def unchanged():
        assert [type(part) for part in model.modules()] == kinds
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(part.training for part in model.modules())
        assert "carafe_calls" not in vars(model.pyramid)

    planned = convert(model, image, downsample=True, dry_run=True)
    unchanged()
    assert planned.dry_run
    assert planned.difference is None
    assert "dry run: the model is as it was" in str(planned)

    def fail(*_):
        raise RuntimeError("the second forward pass")

    monkeypatch.setattr("carafe_plugin.models.conversion.largest_difference", fail)
    with pytest.raises(RuntimeError, match="the second forward pass"):
        convert(model, image, downsample=True)
    unchanged()
    monkeypatch.undo()
    # What is drawn for new modules does not count; the passes through the model, with its dropout, would.
    torch.set_rng_state(generator)
    report = convert(model, image, downsample=True)
    assert names(report) == names(planned)
    assert report.parameters == planned.parameters
    assert report.flops == planned.flops
    assert all(part.training for part in model.modules())


def test_options_reach_every_module(image):
    model = Model()
    convert(
        model,
        image,
        upsample=dict(up_kernel=3, up_group=2, compressed_channels=8, normalizer="sigmoid_normalized", init_spread=0.1),
        downsample=dict(down_kernel=7, norm=nn.BatchNorm2d, act=nn.ReLU, init="stride"),
    )
    for module in model.modules():
        if isinstance(module, CARAFEUpsample):
            assert module.settings[:2] + module.settings[4:] == (3, 2, "sigmoid_normalized")
            assert (module.compressed_channels, module.init_spread) == (8, 0.1)
        elif isinstance(module, CARAFEDownsample):
            assert (module.kernel_size, module.init) == (7, "stride")
            assert isinstance(module.compressor_norm, nn.BatchNorm2d)


@pytest.mark.parametrize(
    ("pool", "start", "size"),
    [
        (nn.AvgPool2d(2), "average2", (12, 8)),
        (nn.AvgPool2d(3, 2, 1), "average3", (13, 9)),
        (nn.Conv2d(8, 8, 1, 2), "stride", (13, 9)),
        (nn.Conv2d(8, 8, 1, 3, bias=False), "stride", (13, 9)),
        (nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False), "average2", (12, 8)),
        (nn.AvgPool2d(2, ceil_mode=True), "average2", (13, 9)),
    ],
)
def test_downsampling_that_can_keeps_outputs(pool, start, size):
    model, features = nn.Sequential(nn.Conv2d(8, 8, 1), pool), torch.randn(2, 8, *size)
    before = outputs(model, features)
    report = convert(model, features, upsample=False, downsample=True)
    assert [(place.init, place.keeps) for place in report.replaced] == [(start, True)]
    torch.testing.assert_close(outputs(model, features), before, **TOLERANCE)


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(2),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d(3, 3),
        nn.AvgPool2d(4, 2, 1),
    ],
)
def test_sizes_are_those_of_the_pooling(pool):
    model = nn.Sequential(nn.Conv2d(8, 8, 1), copy.deepcopy(pool))
    convert(model, torch.randn(1, 8, 24, 24), upsample=False, downsample=True)
    for length in range(12, 20):
        features = torch.randn(1, 8, length, length + 1)
        assert model(features).shape == pool(features).shape


def test_deconvolution_becomes_its_mean():
    """As 'nearest', every 2x2 block of outputs has the deconvolution's mean; groups stay apart."""
    for groups in (1, 4):
        model = nn.Sequential(nn.Identity(), nn.ConvTranspose2d(8, 12, 2, 2, groups=groups))
        features = torch.randn(2, 8, 5, 6)
        before = F.avg_pool2d(outputs(model, features), 2)
        report = convert(model, features, upsample=dict(init="nearest"))
        assert report.replaced[0].becomes == "Conv2d 1x1, CARAFEUpsample(12, 2)"
        torch.testing.assert_close(F.avg_pool2d(outputs(model, features), 2), before, **TOLERANCE)


def test_other_sizes(image):
    """Sizes of a pyramid that are rounded up, and a size that this scale does not give."""
    model = Model()
    convert(model, image)
    assert model(torch.randn(1, 3, 50, 70))["scores"].shape[2:] == (50, 70)
    upsampler = model.pyramid.carafe_upsamplers["0"]
    with pytest.raises(ValueError, match=r"size must be about 2 times the input's \(4, 4\).*got \(4, 8\)"):
        upsampler(torch.randn(1, 16, 4, 4), size=(4, 8))
    with pytest.raises(ValueError, match=r"scale_factor must be 2, .* got 3"):
        upsampler(torch.randn(1, 16, 4, 4), scale_factor=3)
    with pytest.raises(ValueError, match=r"mode and align_corners must be 'nearest', False.*got 'bilinear', True"):
        upsampler(torch.randn(1, 16, 4, 4), scale_factor=2, mode="bilinear", align_corners=True)
    with pytest.raises(ValueError, match=r"input must have shape \(N, 16, H, W\).*got \(1, 8, 4, 4\)"):
        upsampler(torch.randn(1, 8, 4, 4), scale_factor=2)


def test_training_step_saving_and_loading(image, tmp_path):
    model = Model("bilinear")
    convert(model, image, downsample=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    output = model(image)
    (output["scores"].square().mean() + output["more"][0].square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    optimizer.step()

    other = Model("bilinear")
    convert(other, image, downsample=True)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(outputs(other, image), outputs(model, image), rtol=0, atol=0)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert type(loaded.pyramid) is type(model.pyramid)
    torch.testing.assert_close(outputs(loaded, image), outputs(model, image), rtol=0, atol=0)
    assert isinstance(loaded.pyramid, Pyramid)
    calls = pickle.loads(pickle.dumps(model.pyramid)).carafe_calls
    assert [key for key, _ in calls] == ["0", "1", None]


@needs_torch(2, 6, "function modes that torch.compile traces")
def test_compiled_and_exported(image):
    model = Model("bilinear").eval()
    convert(model, image, downsample=True)
    expected = outputs(model, image)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(image), expected, **TOLERANCE)
    exported = torch.export.export(model, (image,)).module()
    torch.testing.assert_close(exported(image), expected, **TOLERANCE)


class Strided(nn.Module):
    """A pyramid of maps whose sizes are rounded up, so that twice the coarser one can be too large."""

    def __init__(self, mode):
        super().__init__()
        channels = (3, 8, 16, 32)
        self.stages = nn.ModuleList(nn.Conv2d(*pair, 3, 2, 1) for pair in itertools.pairwise(channels))
        self.pyramid = Pyramid(mode)

    def forward(self, image):
        maps = [image]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return self.pyramid(maps[1:])[0]


@needs_torch(2, 7, "torch.compiler.is_exporting")
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_exported_for_any_size(mode, tmp_path):
    """With sizes that are not the example's in how they round, by both of PyTorch's exporters."""
    image, others = torch.randn(2, 3, 64, 96), [torch.randn(1, 3, 70, 101), torch.randn(3, 3, 56, 63)]
    model = Strided(mode).eval()
    convert(model, image, upsample=dict(up_kernel=3))
    axes = {axis: torch.export.Dim.DYNAMIC for axis in (0, 2, 3)}
    program = export.standard_program(model, (image,), {"image": axes}).module()
    runs = [program]
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        names = dict(input_names=["image"], dynamic_axes={"image": {0: "n", 2: "h", 3: "w"}})
        torch.onnx.export(model, (image,), tmp_path / "model.onnx", dynamo=False, **names)
        session = importlib.import_module("onnxruntime").InferenceSession(tmp_path / "model.onnx")
        runs.append(lambda features: torch.from_numpy(session.run(None, {"image": features.numpy()})[0]))
    for features in (image, *others):
        with torch.no_grad():
            expected = model(features)
        for run in runs:
            torch.testing.assert_close(run(features).detach(), expected, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_mode_of_what_is_replaced(dtype, image):
    model = Model().to(dtype)
    model.head.eval()
    convert(model, image.to(dtype))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not model.head[1].training
    assert model.pyramid.carafe_upsamplers["0"].training


class Nested(nn.Module):
    """Interpolates before and after modules that do as well."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleList([nn.Upsample(scale_factor=2), Pyramid()])

    def forward(self, features):
        features = F.interpolate(self.inner[0](F.interpolate(features, scale_factor=3.0)), scale_factor=0.5)
        maps = [features[:, :8], F.avg_pool2d(features, 2), F.avg_pool2d(features.repeat(1, 2, 1, 1), 4)]
        return F.interpolate(self.inner[1](maps)[0], None, 2, "nearest")


@pytest.mark.parametrize(
    "patterns",
    [None, "carafe_upsamplers.?", "inner.0", ["inner.1.*", "carafe_upsamplers.2"], "inner.1.carafe_upsamplers.1"],
)
def test_calls_are_told_apart(patterns):
    """Whatever is converted inside of a module, its own calls are answered by the right CARAFE++."""
    torch.manual_seed(0)
    features = torch.randn(1, 16, 4, 8)
    model = Nested()
    before = outputs(model, features)
    report = convert(model, features, names=patterns)
    torch.testing.assert_close(outputs(model, features), before, **TOLERANCE)
    ran = []
    for name, module in model.named_modules():
        if isinstance(module, CARAFEUpsample):
            module.register_forward_hook(lambda module, inputs, output, name=name: ran.append(name))
    model(features)
    assert sorted(ran) == sorted(names(report))


class Mood(nn.Module):
    """Interpolates once more in training."""

    def forward(self, features):
        if self.training:
            features = F.interpolate(features, scale_factor=2)
        return F.interpolate(features, scale_factor=2)


def test_another_number_of_calls_is_an_error():
    model, features = Mood(), torch.randn(1, 8, 4, 4)
    convert(model.train(), features)
    assert model.eval()(features).shape == (1, 8, 8, 8)
    with pytest.raises(RuntimeError, match=r"CARAFEMood.forward does not call F.interpolate as when.*of the 1 calls"):
        model.train()(features)


class DeeplySupervised(nn.Module):
    """A second output in training, whose scores are known by their channels."""

    def __init__(self):
        super().__init__()
        self.scores = nn.Conv2d(8, 5, 1)

    def forward(self, features):
        output = F.interpolate(features, scale_factor=2)
        return (output, F.interpolate(self.scores(features), scale_factor=2)) if self.training else output


def test_calls_of_another_kind_may_come_in_training():
    model, features = DeeplySupervised(), torch.randn(1, 8, 4, 4)
    convert(model, features)
    output, scores = model.train()(features)
    assert torch.equal(scores, F.interpolate(model.scores(features), scale_factor=2))
    output.sum().backward()
    assert model.carafe_upsamplers["0"].content_encoder.weight.grad is not None


def test_signature_is_the_models_own():
    """A root's, by which its sizes are said to be dynamic and others fill its arguments."""
    model, features = DeeplySupervised().eval(), torch.randn(2, 8, 4, 4)
    convert(model, features, upsample=dict(up_kernel=3))
    assert list(inspect.signature(model.forward).parameters) == ["features"]
    axes = {axis: torch.export.Dim.DYNAMIC for axis in (0, 2, 3)}
    program = torch.export.export(model, (features,), dynamic_shapes=dict(features=axes)).module()
    other = torch.randn(3, 8, 5, 7)
    torch.testing.assert_close(program(other), model(other))


class Checkpointed(nn.Module):
    def resize(self, features):
        return F.interpolate(features, scale_factor=2)

    def forward(self, features):
        if not self.training:
            return self.resize(features)
        return torch.utils.checkpoint.checkpoint(self.resize, features, use_reentrant=True)


def test_parts_without_gradients_are_refused_in_training():
    """What a checkpoint of an inner function runs again in the backward pass would find no CARAFE++."""
    model, features = Checkpointed(), torch.randn(1, 8, 4, 4, requires_grad=True)
    convert(model, features)
    with pytest.raises(RuntimeError, match=r"CARAFE\+\+ would not learn here.*torch.utils.checkpoint"):
        model.train()(features)
    model.eval()(features)


def test_a_second_conversion_inside_leaves_the_first(image):
    features = torch.randn(1, 16, 4, 8)
    model = Nested()
    before = outputs(model, features)
    convert(model, features, names="carafe_upsamplers.?")
    convert(model, features, names=["inner.0", "inner.1.*"])
    torch.testing.assert_close(outputs(model, features), before, **TOLERANCE)


def test_autocast_does_not_change_what_is_there():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, 2), nn.Upsample(scale_factor=2))
    weights = copy.deepcopy(model.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        convert(model, torch.randn(1, 3, 8, 8), downsample=True, dry_run=True)
        convert(model, torch.randn(1, 3, 8, 8), downsample=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())


class Stranger(nn.Upsample):
    def forward(self, features):
        return super().forward(features).relu() - 1


class Hidden(nn.Module):
    """Calls a layer behind its name's back."""

    def __init__(self):
        super().__init__()
        self.up = nn.Upsample(scale_factor=2)
        self.parts = [self.up]

    def forward(self, features):
        return self.parts[0](features)


def test_layers_that_are_more_than_they_seem(image):
    """A subclass is converted by the call in its forward; what nothing calls by its name is refused, and undone."""
    model, features = nn.Sequential(nn.Conv2d(3, 8, 1), Stranger(scale_factor=2)), torch.randn(1, 3, 4, 4)
    before = outputs(model, features)
    report = convert(model, features)
    assert names(report) == ["1.carafe_upsamplers.0"]
    torch.testing.assert_close(outputs(model, features), before, **TOLERANCE)
    hidden = Hidden()
    with pytest.raises(ValueError, match="up is not what the forward calls"):
        convert(hidden, torch.randn(1, 8, 4, 4))
    assert type(hidden.up) is nn.Upsample


class Exclusive(nn.Module):
    def __init_subclass__(cls, *, tag):
        pass

    def forward(self, features):
        return F.interpolate(features, scale_factor=2)


def test_a_class_that_cannot_be_inherited_from_leaves_all_as_it_was():
    model = nn.Sequential(nn.Upsample(scale_factor=2), Exclusive())
    with pytest.raises(TypeError, match="tag"):
        convert(model, torch.randn(1, 8, 4, 4))
    assert [type(part) for part in model] == [nn.Upsample, Exclusive]


def test_what_wraps_a_model_comes_after(image):
    with pytest.raises(ValueError, match="must be converted before it is wrapped, got a OptimizedModule"):
        convert(torch.compile(Model()), image)


def test_nan_is_not_hidden():
    class Bad(nn.Module):
        def forward(self, features):
            up = F.interpolate(features, scale_factor=2)
            return up, up * torch.nan

    assert math.isnan(convert(Bad(), torch.randn(1, 8, 4, 4)).difference)


class Shared(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.up = nn.Upsample(scale_factor=2)
        self.again = self.up
        self.between = nn.Conv2d(8, channels, 1)

    def forward(self, features):
        return self.again(self.between(self.up(features)))


def test_a_layer_with_two_places():
    features = torch.randn(1, 8, 4, 4)
    model = Shared(8)
    before = outputs(model, features)
    convert(model, features)
    assert model.up is model.again
    torch.testing.assert_close(outputs(model, features), before, **TOLERANCE)
    with pytest.raises(ValueError, match=r"nothing to convert; up \(Upsample.*it serves maps of 8, 16 channels"):
        convert(Shared(16), features)


def test_hooks_stay():
    model, seen = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Upsample(scale_factor=2)), []
    model[1].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    model[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    convert(model, torch.randn(1, 3, 4, 4))
    seen.clear()
    model(torch.randn(1, 3, 4, 4))
    assert seen == [(1, 8, 4, 4), (1, 8, 8, 8)]


def test_twice(image):
    model = Model()
    convert(model, image)
    with pytest.raises(ValueError, match="Model has nothing to convert and 4 CARAFE"):
        convert(model, image)
    report = convert(model, image, upsample=False, downsample=True)
    assert names(report) == DOWNSAMPLERS


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), "align_corners=True: no kernels start as"),
        (nn.Upsample(scale_factor=2, mode="bicubic"), "mode='bicubic' is not one whose place"),
        (nn.Upsample(scale_factor=1.5), r"its scale is not an integer above 1 \(8x8 to 12x12\)"),
        (nn.Upsample(scale_factor=(2, 3)), r"its scale is not an integer above 1 \(8x8 to 16x24\)"),
        (nn.ConvTranspose2d(8, 8, 4, 2, 1), "only those of 2x2 with stride 2 have a counterpart"),
        (nn.PixelShuffle(2), "there is no CARAFE.. for a PixelShuffle"),
        (nn.MaxPool2d(2, 2, dilation=2), "its window is dilated"),
        (nn.MaxPool2d(2, (2, 1)), "its stride is 2 x 1, not the same both ways"),
        (nn.MaxPool2d(3, 2), "its output is not H / 2, rounded up or down"),
        (nn.Conv2d(8, 8, 2, 2), "without its stride it would not keep the size of a map"),
        (nn.MaxPool2d(2, return_indices=True), "it returns indices as well"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, 2, 1)), "no CARAFE.. for a ParametrizedConv2d"),
        (nn.FractionalMaxPool2d(3, output_ratio=0.5), "there is no CARAFE.. for a FractionalMaxPool2d"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Upsample(scale_factor=8)), "it spreads a single location"),
    ],
)
def test_what_cannot_be_converted_is_named(layer, reason):
    model = nn.Sequential(nn.Conv2d(8, 8, 1), layer)
    with pytest.raises(ValueError, match=f"Sequential has nothing to convert; 1.*{reason}"):
        convert(model, torch.randn(1, 8, 8, 8), downsample=True)


@pytest.mark.parametrize(("channels", "kind"), [(1, "a mask or a depth"), (3, "an image")])
def test_what_looks_like_no_features_is_asked_for_by_name(channels, kind):
    model, features = nn.Sequential(nn.Conv2d(8, channels, 1), nn.Upsample(scale_factor=2)), torch.randn(1, 8, 4, 4)
    with pytest.raises(ValueError, match=rf"1 \(Upsample.*it is taken for {kind}, with {channels} channels"):
        convert(model, features)
    assert names(convert(model, features, names="1")) == ["1"]


def test_pooling_by_function_is_named():
    class Pools(nn.Module):
        def forward(self, features):
            return F.max_pool2d(features, 2) + F.avg_pool2d(features, 2)

    with pytest.raises(ValueError, match=r"F.max_pool2d by a function call cannot be.*F.avg_pool2d by a"):
        convert(nn.Sequential(Pools()), torch.randn(1, 8, 8, 8), downsample=True)


def test_aligned_corners_on_request():
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.UpsamplingBilinear2d(scale_factor=2))
    features = torch.randn(1, 8, 8, 8)
    (place,) = convert(model, features, upsample=dict(init="bilinear")).replaced
    assert not place.keeps
    assert model(features).shape == (1, 8, 16, 16)


def test_bad_arguments(image):
    model = Model()
    for arguments, message in [
        (dict(upsample="yes"), r"upsample must be True, False or a mapping of arguments, got 'yes'"),
        (dict(downsample=dict(up_kernel=3)), r"downsample=\{'up_kernel': 3\}, at pool: .*unexpected keyword"),
        (dict(upsample=dict(up_kernel=4)), r"upsample=\{'up_kernel': 4\}, at pyramid.*: up_kernel must be an odd"),
        (dict(upsample=dict(up_group=5)), r"at pyramid.*: channels must be a multiple of up_group=5, got 16"),
        (dict(upsample=dict(channels=4)), "upsample must not set 'channels': each place in the model does"),
        (dict(upsample=False), "upsample or downsample must be asked for, got False for both"),
        (
            dict(names="neck.*"),
            r"names: 'neck.\*' matches no place that resizes maps; they are carafe_upsamplers.0, pyramid.carafe_ups",
        ),
        (dict(upsample=dict(init="cubic")), "init must be one of average, nearest, bilinear, got 'cubic'"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            convert(model, image, **arguments)
    with pytest.raises(ValueError, match=r"inputs must be an example of what the model takes.*got None"):
        convert(model)
    with pytest.raises(
        ValueError, match="inputs must be what Model runs on; on these it ends with RuntimeError: Given"
    ):
        convert(model, image[:, :2])
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got dict"):
        convert({}, image)
    with pytest.raises(ValueError, match="it is the model itself"):
        convert(nn.Upsample(scale_factor=2), image)
    assert not any("carafe" in name for name in model.state_dict())
