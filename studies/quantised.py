r"""Quantise the demo's detector and compare its precision: what CARAFE++ loses in 8-bit integers.

The demo's model with CARAFE++ everywhere (python -m studies.demo.detection --all) is trained where it is not yet. Its
backbone and neck, of which CARAFE++ is a part, are exported to ONNX and quantised by onnxruntime, activations and
weights, calibrated on training images; the heads stay in PyTorch. The demo's own evaluation then judges each variant on
the demo's validation images. The work folder gets the files and quantised.json.

Example:
    $ python -m studies.quantised
    $ python -m studies.quantised --work-dir /tmp/tiny --data-root /tmp/tiny/data --train 8 --val 4 --iterations 2
"""

from __future__ import annotations

import contextlib
import copy
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.runner import Runner
from mmengine.runner.checkpoint import load_checkpoint
from torch import Tensor, nn

from carafe_plugin import export
from carafe_plugin._require import require
from carafe_plugin.engine.console import text_table
from studies.common import alone_in, console, shown, write_json
from studies.demo.comparison import Demo
from studies.demo.detection import COMPARISON
from studies.demo.generate_scenes import generate
from studies.demo.run import build, complete, discard_stale, guarded, parse_demo

CALIBRATION_IMAGES = 100
METRICS = ("bbox_mAP", "bbox_mAP_50", "segm_mAP")
VARIANTS = {  # which nodes of CARAFE++ stay in float32, by their kind
    "int8, CARAFE++ in float": lambda kind: True,
    "int8, its reassembly in float": lambda kind: kind != "Conv",
    "int8, everything": lambda kind: False,
}


class Pyramid(nn.Module):
    """A detector's backbone and neck: an image, normalised and padded, in; the levels out."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone, self.neck = detector.backbone, detector.neck

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """(N, 3, H, W) -> a map for each level."""
        return self.neck(self.backbone(image))


def calibration_images(config: Config, detector: Any) -> Iterator[np.ndarray]:
    """Training images as the pyramid is given them."""
    settings = copy.deepcopy(config.test_dataloader)
    dataset = config.train_dataloader.dataset
    settings.dataset.update(ann_file=dataset.ann_file, data_prefix=dataset.data_prefix)
    for batch in islice(Runner.build_dataloader(settings), CALIBRATION_IMAGES):
        yield detector.data_preprocessor(batch, False)["inputs"].numpy()


def precision(config: Config, detector: Any) -> dict[str, float]:
    """The detector's metrics on the validation images."""
    loader = Runner.build_dataloader(config.test_dataloader)
    evaluator = Evaluator(config.test_evaluator)
    evaluator.dataset_meta = loader.dataset.metainfo
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():  # COCO reports its progress with print
        for batch in loader:
            evaluator.process(data_samples=detector.test_step(batch), data_batch=batch)
        found = evaluator.evaluate(len(loader.dataset))
    return {name: round(float(found[f"coco/{name}"]), 4) for name in METRICS}


def levels(path: Path) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """The exported pyramid in onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of what it cannot fuse
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda image: tuple(torch.from_numpy(level) for level in session.run(None, {"image": image.numpy()}))


def quantise(path: Path, target: Path, images: Sequence[np.ndarray], left: Sequence[str]) -> None:
    """A copy of an ONNX file in 8-bit integers, but for the nodes that are to be left."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.rest, None)
            return None if image is None else {"image": image}

    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)  # all sizes are known
    quantization.quantize_static(str(prepared), str(target), Reader(), per_channel=True, nodes_to_exclude=list(left))
    prepared.unlink()


def compare(demo: Demo) -> dict[str, Any]:
    """The precision of each variant."""
    import onnx

    model = COMPARISON.more_models[0]
    generate(demo.data_root, demo.request)
    discard_stale(demo, model)
    complete(demo, model)
    config, built = build(demo, model)
    detector: Any = built  # whose extract_feat changes
    load_checkpoint(detector, str(demo.checkpoint(model)), map_location="cpu", logger="silent")
    detector.eval()
    results = {"PyTorch": precision(config, detector)}

    images = list(calibration_images(config, detector))
    pyramid = Pyramid(detector).eval()
    path = export.to_onnx(pyramid, (torch.from_numpy(images[0]),), demo.work_dir / "pyramid.onnx")
    kinds = {node.name: node.op_type for node in onnx.load(path).graph.node}
    carafe = export.carafe_nodes(pyramid, path)
    files = {"onnxruntime, float32": path}
    for number, (title, stays) in enumerate(VARIANTS.items()):
        files[title] = demo.work_dir / f"pyramid_int8_{number}.onnx"
        quantise(path, files[title], images, [name for name in carafe if stays(kinds[name])])
    for title, file in files.items():
        detector.extract_feat = levels(file)
        results[title] = precision(config, detector) | {"megabytes": round(file.stat().st_size / 1e6, 2)}
    versions = {package: version(package) for package in ("torch", "onnx", "onnxscript", "onnxruntime")}
    of_carafe = {"nodes": len(kinds), "of CARAFE++": len(carafe)}
    return {"config": model.config, "seed": demo.seed, "versions": versions, "pyramid": of_carafe, "results": results}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study; returns the exit code."""
    demo = parse_demo(COMPARISON, __doc__, argv)

    def work() -> int:
        for package in ("onnxscript", "onnxruntime"):
            require(package, "the study of quantised models")
        with alone_in(demo.work_dir):
            found = compare(demo)
            write_json(demo.work_dir / "quantised.json", found)
        titles = ["box AP", "AP50", "mask AP", "MB"]
        lines = [
            [
                title,
                *(f"{each[name]:.3f}" for name in METRICS),
                f"{each['megabytes']:.1f}" if "megabytes" in each else "",
            ]
            for title, each in found["results"].items()
        ]
        heading = f"{demo.request.val} generated scenes; backbone and neck exported, heads in PyTorch"
        console.print(text_table(heading, ["model", *titles], lines, left=("model",)))
        console.print(f"Written: {shown(demo.work_dir / 'quantised.json')}")
        return 0

    return guarded(work, demo.work_dir, demo.data_root)


if __name__ == "__main__":
    sys.exit(main())
