"""Exported models in the runtimes that they are for, on one thread of a CPU and in float32.

Without torch, so that a process of its own shows what a runtime alone takes: run as a file with a runtime's name, a
model's file and its inputs' (.npy), it prints the bytes that predictions hold beyond the loaded model.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]]


def onnxruntime(path: Path) -> Run:
    """A model (.onnx) in onnxruntime."""
    import onnxruntime as runtime

    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return lambda inputs: session.run(None, dict(zip(names, inputs, strict=True)))


def openvino(path: Path) -> Run:
    """A model (.xml, .onnx) in OpenVINO."""
    import openvino as runtime

    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = runtime.Core().compile_model(path, "CPU", settings)
    return lambda inputs: list(compiled(list(inputs)).values())


RUNTIMES: dict[str, Callable[[Path], Run]] = {"onnxruntime": onnxruntime, "openvino": openvino}


def _resident(key: str) -> int:
    return 1024 * int(re.findall(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[0])


def peak_bytes(runtime: str, path: Path, inputs: Sequence[np.ndarray]) -> int | None:
    """The most memory that three predictions hold beyond the loaded model, as Linux counts it; elsewhere None."""
    run = RUNTIMES[runtime](path)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    except OSError:
        return None
    before = _resident("VmRSS")
    for _ in range(3):
        run(inputs)
    return _resident("VmHWM") - before


if __name__ == "__main__":
    print(json.dumps(peak_bytes(sys.argv[1], Path(sys.argv[2]), [np.load(file) for file in sys.argv[3:]])))
