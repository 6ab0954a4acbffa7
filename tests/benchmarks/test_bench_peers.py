"""What the benchmarks compare: every peer computes what it says, ours in its variants too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import comparison, mmcv_operator, peers
from benchmarks.comparison import Call, Inputs, Problem
from carafe_plugin.ops import reference
from carafe_plugin.ops.reference import masks_from_logits

pytestmark = pytest.mark.usefixtures("one_thread")
EAGER = ("unfold-einsum", "upsample-unfold", "shifted-madd")
FROM_LOGITS = ("fused", "steps-carafe")
ALL = {peer.name: peer for peer in (*peers.OURS, *peers.PEERS)}


@pytest.mark.parametrize(
    "problem",
    [
        Problem(4, 5, 6),
        Problem(6, 1, 1, group_size=3),
        Problem(8, 7, 3, batch=2, kernel_size=3, group_size=4, up=3),
        Problem(2, 2, 9, kernel_size=7, up=1),
        Problem(4, 5, 8, batch=2, group_size=2, up=1, down=2),
        Problem(2, 7, 1, kernel_size=3, up=1, down=3),
    ],
    ids=lambda problem: "-".join(map(str, list(vars(problem).values())[:8])),
)
@pytest.mark.parametrize("name", ["carafe", *EAGER, *FROM_LOGITS])
def test_peer_computes_the_definition(name: str, problem: Problem) -> None:
    problem = Problem(**{**vars(problem), "dtype": torch.float64})
    peer = ALL[name]
    if reason := peer.unavailable(problem):
        assert (name, reason) == ("upsample-unfold", "it only upsamples")
        assert problem.down > 1
        return
    inputs = Inputs.random(problem)
    call = peer.setup(problem, inputs)
    geometry = problem.kernel_size, problem.group_size, problem.up, problem.down
    features, kernels = (tensor.detach().requires_grad_() for tensor in (inputs.features, inputs.masks))
    masks = kernels
    if name in FROM_LOGITS:
        kernels = inputs.logits.detach().requires_grad_()
        masks = masks_from_logits(kernels, *geometry, "softmax")
    expected = reference.reassemble(features, masks, *geometry)
    gradients = torch.autograd.grad(expected, (features, kernels), inputs.grad_output)
    (output,) = comparison.run_pass(call, "forward")
    assert not output.requires_grad
    results = (output, *comparison.run_pass(call, "forward_backward"))
    for result, value in zip(results, (expected.detach(), *gradients), strict=True):
        # Sums of at most a few hundred products of order 1, in float64; masks are drawn in float32.
        torch.testing.assert_close(result, value, rtol=1e-11, atol=1e-12)


def test_masks_and_logits_are_the_same_kernels() -> None:
    for scale in ((2, 1), (1, 2)):
        problem = Problem(4, 6, 5, group_size=2, up=scale[0], down=scale[1])
        inputs = Inputs.random(problem)
        masks = masks_from_logits(inputs.logits, 5, 2, *scale, "softmax")
        torch.testing.assert_close(inputs.masks, masks)
        assert inputs.grad_output.shape[2:] == inputs.masks.shape[2:] == problem.output_size


@pytest.mark.parametrize("name", [peer.name for peer in peers.PEERS if peer.compiles])
def test_compiled_peers_compute_the_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Traced and differentiated as torch.compile does it, but run op by op: generating code is torch's part, and takes
    # half a minute.
    compiled = []

    def traced(function: Callable[..., torch.Tensor], **settings: object) -> Callable[..., torch.Tensor]:
        compiled.append(settings)
        return compile_(function, **settings, backend="aot_eager")

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", traced)
    problem = Problem(2, 3, 5, kernel_size=3)
    inputs = Inputs.random(problem)
    call, ours = (ALL[each].setup(problem, inputs) for each in (name, ALL[name].reference))
    for each in comparison.PASSES:
        found, wanted = (comparison.run_pass(which, each) for which in (call, ours))
        for result, value in zip(found, wanted, strict=True):
            torch.testing.assert_close(result, value)
    assert compiled == [{"fullgraph": True, "dynamic": False}]


@pytest.mark.parametrize("name", [peer.name for peer in peers.VARIANTS])
def test_variants_are_what_they_say(name: str) -> None:
    problem = Problem(8, 5, 6, batch=2)
    inputs = Inputs.random(problem)
    call = ALL[name].setup(problem, inputs)
    original = (inputs.features, inputs.logits if name.startswith("fused") else inputs.masks)
    for tensor, usual in zip((*call.wrt, call.grad_output), (*original, inputs.grad_output), strict=True):
        assert tensor.dtype == getattr(torch, name.rpartition("-")[2], torch.float32)
        assert tensor.is_contiguous(memory_format=torch.channels_last) == ("channels-last" in name)
        torch.testing.assert_close(tensor.float(), usual, rtol=2**-8, atol=0)
    (result,) = comparison.run_pass(call, "forward")
    assert result.dtype == call.wrt[0].dtype


@pytest.mark.parametrize("scale", [(3, 1), (1, 3)], ids=["up", "down"])
def test_other_functions_return_the_size_and_differentiate_what_they_use(scale: tuple[int, int]) -> None:
    problem = Problem(6, 3, 5, up=scale[0], down=scale[1])
    inputs = Inputs.random(problem)
    others = [peer for peer in peers.OTHERS if peer.unavailable(problem) is None]
    up = {"nearest", "bilinear", "deconvolution", "pixel-shuffle", "grid-sample"}
    assert {peer.name for peer in others} == (up if scale[0] > 1 else {"max-pool", "average-pool", "strided-conv"})
    for peer in others:
        call = peer.setup(problem, inputs)
        assert call.forward().shape == inputs.grad_output.shape
        gradients = comparison.run_pass(call, "forward_backward")
        assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in call.wrt]
        assert all(gradient.abs().sum() > 0 for gradient in gradients)
        assert call.parameters == call.wrt[1:]


def test_learnt_points_start_as_bilinear_interpolation_and_move() -> None:
    features = torch.randn(2, 4, 5, 7)
    sampler = peers.PointSampler(4, 2, groups=2)
    torch.nn.init.zeros_(sampler.offset.weight)
    usual = torch.nn.functional.interpolate(features, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(sampler(features), usual)
    # The first group's points move by one source pixel to the right, the second's by two down.
    offsets = sampler.offset.bias.data.view(2, 2, 4)
    offsets[0, 0], offsets[1, 1] = 4.0, 8.0
    moved = sampler(features)
    torch.testing.assert_close(moved[:, :2, :, :-2], usual[:, :2, :, 2:])
    torch.testing.assert_close(moved[:, 2:, :-4], usual[:, 2:, 4:])


def test_bound_counts_what_the_design_counts() -> None:
    sizes = Problem(256, 50, 84)
    assert sizes.flop(backward=False) == 2 * 256 * 100 * 168 * 25  # 0.215 GFLOP
    assert sizes.flop(backward=True) == 3 * sizes.flop(backward=False)
    features, masks, logits, output = (tensor.nbytes for tensor in vars(Inputs.random(sizes)).values())
    assert masks == logits
    assert sizes.traffic(backward=False) == features + masks + output
    assert sizes.traffic(backward=True) == 3 * features + 3 * masks + 2 * output
    assert sizes.needed_memory(backward=False) == output + masks
    assert sizes.needed_memory(backward=True) == output + masks + features
    halved = Problem(64, 25, 42, up=1, down=2)
    assert halved.flop(backward=False) == 2 * 64 * 13 * 21 * 25


# ------------------------------------------------------------------------------------------------ mmcv


@pytest.mark.parametrize("below", ["", "csrc", "ops/csrc", "mmcv/ops/csrc"])
def test_mmcv_source_is_found_in_package_repository_and_itself(below: str, tmp_path: Path) -> None:
    assert mmcv_operator.find_source(tmp_path) is None
    file = tmp_path / below / mmcv_operator.LAUNCHERS
    file.parent.mkdir(parents=True)
    file.touch()
    assert mmcv_operator.find_source(tmp_path) == tmp_path / below


def test_mmcv_launchers_get_what_they_expect(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(features: torch.Tensor, masks: torch.Tensor, *rest: torch.Tensor | int) -> None:
        rearranged, wide, rearranged_masks, output, k, g, up = rest
        for scratch, like in ((rearranged, features), (wide, output), (rearranged_masks, masks)):
            assert scratch.numel() == like.numel()
        rearranged.copy_(features)
        output.copy_(reference.reassemble(features, masks, k, g, up, 1))

    def backward(grad_output: torch.Tensor, rearranged: torch.Tensor, masks: torch.Tensor, *rest: object) -> None:
        *scratch, grad_features, grad_masks, k, g, up = rest
        assert grad_output.is_contiguous()
        sizes = [grad_output.numel()] * 2 + [rearranged.numel(), masks.numel()]
        assert [tensor.numel() for tensor in scratch] == sizes
        size = grad_features.shape[2:]
        grad_features.copy_(reference.grad_features(grad_output, masks, *size, k, g, up, 1))
        grad_masks.copy_(reference.grad_masks(grad_output, rearranged, k, g, up, 1))

    fake = SimpleNamespace(forward=forward, backward=backward)
    monkeypatch.setattr(mmcv_operator, "compile_source", lambda csrc: fake)
    problem = Problem(4, 5, 6, batch=2, kernel_size=3, group_size=2, dtype=torch.float64)
    inputs = Inputs.random(problem)
    monkeypatch.setattr(peers.mmcv, "source", Path("somewhere"))
    for name, ours in (("mmcv", "carafe"), ("steps-mmcv", "fused")):
        assert ALL[name].reference == ours
        call, expected = ALL[name].setup(problem, inputs), ALL[ours].setup(problem, inputs)
        for results in zip(*(comparison.run_pass(each, "forward_backward") for each in (call, expected)), strict=True):
            torch.testing.assert_close(*results)
        torch.testing.assert_close(call.forward(), expected.forward())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cpu"}, "for CUDA only"),
        ({"up": 1, "down": 2}, "only upsamples"),
        ({"kernel_size": 7, "group_size": 8}, "past its shared memory"),
        ({"dtype": torch.bfloat16}, "does not support bfloat16"),
        ({}, None),
    ],
)
def test_mmcv_is_not_asked_for_what_it_cannot(
    change: dict[str, object], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers.mmcv, "source", Path("somewhere"))
    problem = Problem(**{"channels": 8, "height": 4, "width": 4, "device": "cuda", **change})  # type: ignore[arg-type]
    said = peers.mmcv.unavailable(problem)
    assert said is None if reason is None else reason in said


# --------------------------------------------------------------------------------------- what autograd keeps


def test_saved_memory_counts_each_allocation_once_and_no_parameter() -> None:
    features, weight = torch.randn(10, requires_grad=True), torch.randn(10, requires_grad=True)

    def forward() -> torch.Tensor:
        scaled = features * weight  # keeps both
        return (scaled.exp() * scaled.view(2, 5).view(10)).sum()  # exp's result, and `scaled` once

    call = Call(forward, (features, weight), torch.ones(()), parameters=(weight,))
    assert comparison.saved_memory(call) == {"saved_tensors": 3, "saved_bytes": 3 * 40}
