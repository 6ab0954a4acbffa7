"""The steps of `benchmarks.gpu_check` that are not a benchmark or test; each runs in a process of its own.

    python -m benchmarks.gpu_probes NAME [--json FILE]

Exit code: 0, or 1 when the check fails.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import itertools
import json
import sys
from collections import OrderedDict
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import carafe_plugin
from benchmarks import measure
from benchmarks.comparison import Inputs, Problem
from carafe_plugin import CARAFEUpsample
from carafe_plugin.ops import carafe
from carafe_plugin.ops.fused import reassemble_logits
from carafe_plugin.ops.reference import NORMALIZERS, masks_from_logits
from carafe_plugin.testing import TOLERANCES, random_case, relative_error

Result = dict[str, Any]  # 'ok', and what was found
SMALL_SCALES: tuple[Fraction, ...] = (Fraction(2), Fraction(3), Fraction(1, 2), Fraction(3, 2))
# Channels, height, width, up and down of what the profiler counts: levels of a detector's FPN, and a backbone's stem.
COUNTED = ((256, 25, 42, 2, 1), (256, 100, 168, 2, 1), (64, 200, 336, 1, 2))
MOST_SLOWER = 1.02  # of a detector with our upsampler, against nearest


def environment(device: str) -> Result:
    """The machine and the versions of what runs here."""
    found: Result = {"machine": measure.machine(device), "revision": measure.revision()}
    found["version"] = carafe_plugin.__version__
    for package in ("torchvision", "triton", "mmcv", "hypothesis", "pytest"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return {"ok": True, **found}


def compiled(device: str) -> Result:
    """Whether the compiled operators serve the device, and what they refuse comes back as an error."""
    types = [kind for kind in ("cpu", "cuda") if carafe_plugin.is_compiled(kind)]
    result: Result = {"ok": torch.device(device).type in types, "compiled for": types}
    for kind in dict.fromkeys(("cpu", torch.device(device).type)):
        if kind not in types:
            continue
        print(f"an error from C++ on {kind}:", flush=True)  # a toolchain whose unwinder fails ends the process here
        features, masks = torch.zeros(1, 4, 6, 5, device=kind), torch.zeros(1, 9, 3, 3, device=kind)
        try:
            torch.ops.carafe_plugin.carafe(features, masks, 3, 1, 2, 1)
            result["ok"] = False
        except RuntimeError as error:
            print(error)
    return result


def small(device: str) -> Result:
    """Every operator on small odd sizes, forward and backward, for the sanitizer to watch."""
    worst: dict[str, float] = {}
    kernels = ((5, 1, torch.contiguous_format), (3, 2, torch.channels_last), (7, 8, torch.contiguous_format))
    dtypes = (torch.float32, torch.float16)
    for dtype, scale, (k, g, layout) in itertools.product(dtypes, SMALL_SCALES, kernels):
        tensors = random_case((9, 13), 16, k, g, scale, dtype=dtype, device=device)
        features, masks, grad_output = (tensor.contiguous(memory_format=layout) for tensor in tensors)
        output = carafe(features.requires_grad_(), masks.requires_grad_(), k, g, scale)
        output.backward(grad_output)
        expected = carafe(_on_host(features), _on_host(masks), k, g, scale)
        worst[f"{dtype}, {scale}, k {k}, {g} groups"] = relative_error(output, expected) / TOLERANCES[dtype]
    for dtype, (up, down), normalizer in itertools.product(dtypes, ((2, 1), (1, 2)), NORMALIZERS):
        features = torch.randn(2, 16, 9, 13, device=device, dtype=dtype, requires_grad=True)
        logits = torch.randn(2, 25 * up**2, -(-9 // down), -(-13 // down), device=device, dtype=dtype)
        output = reassemble_logits(features, logits.requires_grad_(), 5, 1, up, down, normalizer)
        output.backward(torch.ones_like(output))
        masks = masks_from_logits(_on_host(logits), 5, 1, up, down, normalizer)
        expected = carafe(_on_host(features), masks, 5, 1, Fraction(up, down))
        # Where it is done in steps, the kernels are rounded to the dtype too: twice the tolerance.
        error = relative_error(output, expected) / (2 * TOLERANCES[dtype])
        worst[f"{dtype}, fused, {up}/{down}, {normalizer}"] = error
    return {"ok": all(error <= 1 for error in worst.values()), "errors over tolerance": worst}


def counters(device: str) -> Result:
    """One pass of every kernel at the shapes and dtypes that count, for the profiler to watch."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    calls = []
    for (channels, height, width, up, down), dtype in itertools.product(COUNTED, dtypes):
        inputs = Inputs.random(Problem(channels, height, width, up=up, down=down, dtype=dtype, device=device))
        for layout in (torch.contiguous_format, torch.channels_last):
            features, grad_output = (
                tensor.detach().contiguous(memory_format=layout) for tensor in (inputs.features, inputs.grad_output)
            )
            output = reassemble_logits(features.requires_grad_(), inputs.logits, 5, 1, up, down, "softmax")
            torch.autograd.grad(output, (features, inputs.logits), grad_output)
            calls.append(f"{channels}x{height}x{width} {up}/{down} {dtype} {layout}")
    return {"ok": True, "forward and both gradients of": calls}


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().double().cpu()


def as_nearest(upsampler: CARAFEUpsample) -> None:
    """Puts all of every kernel's weight on its centre: what follows then has the same work as after nearest."""
    encoder = upsampler.content_encoder
    nn.init.zeros_(encoder.weight)
    assert encoder.bias is not None
    phases = int(upsampler.scale_factor) ** 2
    taps = encoder.bias.numel() // phases
    with torch.no_grad():
        encoder.bias[taps // 2 * phases : (taps // 2 + 1) * phases] = 50.0


class UpsamplingFPN(nn.Module):
    """torchvision's FPN, its convolutions shared, with an upsampler of ours in place of nearest interpolation."""

    def __init__(self, fpn: nn.Module, channels: int) -> None:
        super().__init__()
        self.fpn = fpn
        self.upsamplers = nn.ModuleList(CARAFEUpsample(channels) for _ in range(len(fpn.inner_blocks) - 1))  # type: ignore[arg-type]

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        """As the FPN's: named maps, largest first."""
        names = list(maps)
        laterals = [block(each) for block, each in zip(self.fpn.inner_blocks, maps.values(), strict=True)]  # type: ignore[arg-type]
        for level in range(len(laterals) - 1, 0, -1):
            height, width = laterals[level - 1].shape[-2:]
            # Twice an odd size rounded up is one too many: cropped at the bottom and right.
            upsampled = self.upsamplers[level - 1](laterals[level])[..., :height, :width]
            laterals[level - 1] = laterals[level - 1] + upsampled
        outputs = [block(each) for block, each in zip(self.fpn.layer_blocks, laterals, strict=True)]  # type: ignore[arg-type]
        if self.fpn.extra_blocks is not None:
            outputs, names = self.fpn.extra_blocks(outputs, list(maps.values()), names)  # type: ignore[operator]
        return OrderedDict(zip(names, outputs, strict=True))


def detector(device: str) -> Result:
    """Torchvision's Faster R-CNN R50 at 800 x 1333, inference, with our upsampler in its FPN beside nearest."""
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    torch.manual_seed(0)
    # Random weights score every box alike: with a threshold of 0 many go through to the end.
    build = dict(weights=None, weights_backbone=None, min_size=800, max_size=1333, box_score_thresh=0.0)
    nearest, ours = (fasterrcnn_resnet50_fpn(**build).eval().to(device) for _ in range(2))
    ours.load_state_dict(nearest.state_dict())
    ours.backbone.fpn = UpsamplingFPN(ours.backbone.fpn, 256).to(device)
    for upsampler in ours.backbone.fpn.upsamplers:
        as_nearest(upsampler)
    image = [torch.rand(3, 800, 1333, device=device)]
    with torch.inference_mode():
        found = [len(model(image)[0]["boxes"]) for model in (nearest, ours)]

    timings = []
    for model in (nearest, ours):
        predict = torch.inference_mode()(functools.partial(model, image))
        estimate = min(measure.seconds(predict) for _ in range(5))
        timings.append(measure.Timing(predict, max(estimate, measure.SAMPLE_SECONDS), repeats=30))
    measure.interleave(timings)
    ratios = sorted(ours / nearest for nearest, ours in zip(*(timing.samples for timing in timings), strict=True))
    ratio = ratios[len(ratios) // 2]
    summaries = {name: timing.summary() for name, timing in zip(("nearest", "ours"), timings, strict=True)}
    times = {"times nearest": round(ratio, 4), "allowed": MOST_SLOWER, "boxes": found}
    return {"ok": ratio <= MOST_SLOWER and found[0] == found[1], **times, **summaries}


PROBES = {probe.__name__: probe for probe in (environment, compiled, small, counters, detector)}


def main(arguments: list[str] | None = None) -> int:
    """Runs one probe and prints what it found; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_probes")
    parser.add_argument("name", choices=PROBES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    result = PROBES[options.name](options.device)
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
