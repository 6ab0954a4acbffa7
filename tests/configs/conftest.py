import functools
import shutil
from unittest import mock

import pytest


@pytest.fixture(scope="session", autouse=True)
def metafiles_read_once():
    """MMEngine reads a toolbox's hundred metafiles anew for each configuration that comes by the toolbox's name."""
    try:
        from mmengine.config import utils
    except ImportError:
        yield
        return
    with mock.patch.object(utils, "load", functools.cache(utils.load)):
        yield


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Files in the place of those that configurations name for their backbones: ``weights(source)`` is a path."""
    from config_models import write_weights

    folder = tmp_path_factory.mktemp("weights")

    def find(source):
        path = folder / (source.rpartition("/")[2].removesuffix(".pth") + ".pth")
        if not path.exists():
            write_weights(source, path)
        return path

    yield find
    shutil.rmtree(folder)  # hundreds of megabytes, which pytest would keep for three runs
