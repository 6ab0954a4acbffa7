"""The campaign over the operators (fuzz_operators.py), on each instruction set of this processor."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from campaign import FORM, SEED, count

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
    calls, faults = (-(-number // share) for number in (count("operators", 300, 3000), count("faults", 300, 3000)))
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
