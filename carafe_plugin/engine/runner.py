"""mmengine's Runner for a configuration."""

from __future__ import annotations

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from carafe_plugin.engine.errors import reading_named_files


def build_runner(cfg: Config) -> Runner:
    """Build mmengine's Runner (or the ``runner_type`` of ``cfg``), and say so where SyncBN had to become BN. Raises
    UsageError where a file that the configuration names is missing.
    """
    with reading_named_files():
        runner = Runner.from_cfg(cfg) if "runner_type" not in cfg else RUNNERS.build(cfg)
    # The class that SyncBN layers become; mmengine has no public name for it.
    reverted = sum(type(module).__name__ == "_BatchNormXd" for module in runner.model.modules())
    if reverted and get_device() == "cpu":
        runner.logger.warning(
            f"SyncBN needs a GPU: {reverted} layers run as BN, each process with the statistics of its own images."
        )
    return runner
