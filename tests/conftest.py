"""Options shared by all tests."""

import gc
import importlib.util
import os
import sys
from collections import Counter
from importlib.machinery import PathFinder
from pathlib import Path
from unittest import mock

import pytest
import torch
from campaign import campaign, pytest_terminal_summary  # noqa: F401, a fixture and a hook
from toolkit import reason_for_no_cuda_half

if importlib.util.find_spec("mmcv") is not None:
    from carafe_plugin.openmmlab import mmcv_ops

    mmcv_ops.install()  # where it has no compiled operators, torchvision's, in the processes that tests start too

sys.path.append(str(Path(__file__).parent / "support" / "stand_ins"))  # last: a package that is installed comes first

# What the tools would keep for the next tensors (carafe_plugin/engine/memory.py) adds up in a process that runs
# hundreds of them. These are glibc's own values in the end; tests/engine/test_memory.py has processes without them.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**25))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**26))

# Tests are many and small: two threads are enough, and where several processes run them, they share the cores.
_processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, min(2, (os.cpu_count() or 1) // _processes)))


# The files that take longest, which begin first: at the end no process waits for one of them.
LONGEST = (
    *("packaging", "gpu_check", "ptx", "kernels", "gpu_model", "fuzz", "reliability", "distributed", "backends"),
    *(
        "export_tool",
        "flexible_runner",
        "panoptic_models",
        "annotations_fuzz",
        "zoo",
        "kills",
        "libraries",
        "real_data",
        "memory",
        "ablation",
    ),
    *("demo", "train"),
)


def pytest_addoption(parser):
    parser.addoption(
        "--every", type=int, default=1, metavar="N", help="of each test's cases, the first and every N-th after it"
    )


def pytest_collection_modifyitems(config, items):
    counts, left = Counter(), []
    for item in items:
        test = item.nodeid.partition("[")[0]
        if counts[test] % config.option.every:
            left.append(item)
        counts[test] += 1
    ranks = {f"test_{name}.py": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))
    if left:
        config.hook.pytest_deselected(items=left)
        without = set(left)
        items[:] = [item for item in items if item not in without]


def pytest_report_header():
    mmcv = importlib.util.find_spec("mmcv")
    if mmcv is None:
        return "mmcv: not installed"
    compiled = PathFinder.find_spec("mmcv._ext", mmcv.submodule_search_locations)
    return f"mmcv's operators: {'compiled' if compiled else 'torchvision, by mmcv_ops'}"


def device_params():
    """The devices that operator tests run on; the absent ones are skipped with the reason printed."""
    from carafe_plugin.ops import is_compiled

    reason = None if torch.cuda.is_available() else "torch sees no CUDA device on this machine"
    if reason is None and not is_compiled("cuda"):
        reason = reason_for_no_cuda_half()  # None where there should be one: then its absence fails the tests
    absent = pytest.mark.skipif(reason is not None, reason=reason or "")
    return [pytest.param(d, marks=[absent, pytest.mark.cuda] if d == "cuda" else []) for d in ("cpu", "cuda")]


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", device_params())


@pytest.fixture(scope="session", autouse=True)
def plain_texts_of_configurations():
    """MMEngine has yapf lay out a configuration's text five times a run: most of what a small one takes. Tools in
    processes of their own do so here, too.
    """
    if importlib.util.find_spec("yapf") is None:
        yield
        return
    from yapf.yapflib import yapf_api

    with mock.patch.object(yapf_api, "FormatCode", lambda text, **_: (text, True)):
        yield


@pytest.fixture(scope="module", autouse=True)
def no_old_objects_to_look_through():
    """MMEngine collects garbage for every dataset: what imports and files before have left is no garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def no_default_scope():
    """A file begins without MMEngine's default scope and logger, as in a new process: files before leave theirs behind,
    and a logger writes to what was the output when it was made.
    """
    for module, name in (("mmengine.registry", "DefaultScope"), ("mmengine.logging", "MMLogger")):
        if module in sys.modules:
            getattr(sys.modules[module], name)._instance_dict.clear()


@pytest.fixture
def one_thread():
    """For tests on maps of a few pixels, where handing work to a second thread costs far more than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Seven images (odd, so that two processes get unequal shares) in all three layouts."""
    from tiny_models import write_scenes

    return write_scenes(tmp_path_factory.mktemp("data"), 7)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, data):
    """Train the tiny model of a toolbox, once per session, in this process: ``trained('mmdet')``."""
    from tiny_models import write_config
    from tool_runs import Trained, call_tool

    done = {}

    def train(scope):
        if scope not in done:
            folder = tmp_path_factory.mktemp(scope)
            epochs = dict(mmdet=16, panoptic=16, mmseg=8, mmpretrain=6)[scope]
            config = write_config(folder / f"tiny_{scope}.py", scope, data, epochs=epochs)
            work_dir = folder / "run"
            assert call_tool("train", config, "--work-dir", work_dir) == 0
            done[scope] = Trained(scope, config, work_dir)
        return done[scope]

    return train
