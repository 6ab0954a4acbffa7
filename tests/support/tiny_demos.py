"""Demos that take seconds, and how to follow the processes that they start."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from studies.demo import detection as demo
from studies.demo import run as demo_run
from studies.demo import segmentation as demo_seg
from studies.demo.comparison import Comparison, Demo

#: By the name of the tool.
COMPARISONS: dict[str, Comparison] = {"demo": demo.COMPARISON, "demo_seg": demo_seg.COMPARISON}
COMMANDS = {"demo": "studies.demo.detection", "demo_seg": "studies.demo.segmentation"}
SIZES = {"demo": 96, "demo_seg": 64}  # images smaller than 96 have too few detections
ITERATIONS = 4


def arguments(tool: str, folder: Path, **changes: int) -> list[str]:
    """The command line of a demo in ``folder``."""
    options = {"train": 8, "val": 4, "size": SIZES[tool], "iterations": ITERATIONS} | changes
    return [
        f"--work-dir={folder / 'work'}",
        f"--data-root={folder / 'data'}",
        *(f"--{name}={value}" for name, value in options.items()),
    ]


def demo_in(tool: str, folder: Path, *flags: str, **changes: int) -> Demo:
    """The demo that :func:`arguments` describe."""
    return demo_run.parse_demo(COMPARISONS[tool], None, [*arguments(tool, folder, **changes), *flags])


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.05)
