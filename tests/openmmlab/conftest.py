"""Fixtures of the adapters' tests."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """For tests on maps of a few pixels, where handing work to a second thread costs far more than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
