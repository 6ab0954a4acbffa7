"""What the tests of the tools share: a tiny dataset, and a model of each toolbox that tools/train.py trained on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import Trained, call_tool, write_config, write_scenes


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven images (odd, so that two processes get unequal shares) in all three layouts."""
    return write_scenes(tmp_path_factory.mktemp("data"), 7)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Callable[[str], Trained]:
    """Train the tiny model of a toolbox, once per session, in this process: ``trained('mmdet')``."""
    done: dict[str, Trained] = {}

    def train(scope: str) -> Trained:
        if scope not in done:
            folder = tmp_path_factory.mktemp(scope)
            epochs = dict(mmdet=16, mmseg=8, mmpretrain=6)[scope]
            config = write_config(folder / f"tiny_{scope}.py", scope, data, epochs=epochs)
            work_dir = folder / "run"
            assert call_tool("train", config, "--work-dir", work_dir) == 0
            done[scope] = Trained(scope, config, work_dir)
        return done[scope]

    return train
