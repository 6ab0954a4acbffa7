"""Options shared by all tests."""

import os

import pytest
import torch

# Test processes are many and small: two threads are enough, and what CI has.
torch.set_num_threads(min(2, os.cpu_count() or 1))


def device_params():
    """The devices that operator tests run on; the absent ones are skipped with the reason printed."""
    from carafe_plugin.testing import devices

    absent = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device on this machine")
    return [pytest.param(d, marks=[absent, pytest.mark.cuda] if d == "cuda" else []) for d in devices()]


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", device_params())
