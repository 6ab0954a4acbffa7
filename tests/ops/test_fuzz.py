"""The campaign over the operators (fuzz_operators.py), on each instruction set of this processor."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from campaign import FORM, SEED, count

from . import fuzz_operators
from .test_backends import supported_paths

PATHS = ("plain", "baseline", "avx2", "avx512")
PARTS = 3 if FORM == "long" else 1  # so that processes can share them


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("path", PATHS)
def test_random_calls_and_random_faults(path, part, campaign):
    tally = campaign("operators")
    paths = supported_paths()
    if path not in paths:
        pytest.skip(f"this processor does not run the {path} path")
    share = len(paths) * PARTS
    calls, faults = (-(-number // share) for number in (count("operators", 120, 3000), count("faults", 300, 3000)))
    seed = SEED * 1000 + PATHS.index(path) * 100 + part
    arguments = [f"--{name}={number}" for name, number in dict(calls=calls, faults=faults, seed=seed).items()]
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("fuzz_operators.py")), *arguments]
    print(f"CARAFE_CPU_PATH={path}", *command)
    environment = {**os.environ, "CARAFE_CPU_PATH": path, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    counted = json.loads(result.stdout)
    tally(**counted)
    assert counted["calls"] >= calls
    assert counted["faults"] >= faults
    assert counted["refused"] > faults / 2


CALL = dict(n=1, channels=5, h=3, w=7, k=3, g=1, scale=2, normalizer="softmax", values="normal", seed=0)
CALL |= dict(layouts=("channels_last", "sliced", "contiguous"), threads=(1, 2))


@pytest.mark.parametrize("dtype", fuzz_operators.DTYPES, ids=str)
def test_one_wrong_element_is_found(dtype, monkeypatch):
    """The control of the above: by eight units in the last place, or a ten-thousandth where sums add up to more."""
    fuzz_operators.check_call(case := dict(CALL, dtype=dtype))
    right = fuzz_operators.by_operators

    def wrong(case, features, kernels):
        output = right(case, features, kernels)
        shift = torch.zeros_like(output)
        shift[0, 3, 2, 5] = max(8 * torch.finfo(dtype).eps, 1e-4)
        return output + shift * output.detach().abs().max()

    monkeypatch.setattr(fuzz_operators, "by_operators", wrong)
    with pytest.raises(AssertionError, match=r"output: 1 of 420 wrong, \(0, 3, 2, 5\)"):
        fuzz_operators.check_call(case)
