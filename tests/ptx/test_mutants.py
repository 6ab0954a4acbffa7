"""Faults in the kernels' PTX, made by rule, are caught: otherwise the executor's silence would prove nothing."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import executor

if executor.missing_tools() is not None:
    pytest.skip(str(executor.missing_tools()), allow_module_level=True)
import mutants
from test_ptx import machine

FEWEST = 20  # mutants of the cases together, or the rules have nothing to change in these kernels


@pytest.fixture(scope="module")
def counts():
    return {}


@pytest.mark.parametrize("case", mutants.CASES)
def test_mutants_are_caught(case, counts):
    found = list(mutants.mutants(machine(), cases=[case], each=1))
    counts[case] = len(found)
    alive = [f"{m.rule}: {m.kernel}, line {m.line}, {m.place}: {m.before} -> {m.after}" for m in found if not m.caught]
    assert not alive, "nothing caught\n" + "\n".join(alive)
    assert len({m.rule for m in found}) >= 8, f"{len(found)} mutants of too few kinds"


def test_there_are_enough_mutants(counts):
    if len(counts) < len(mutants.CASES):
        pytest.skip("not all cases have run in this process")
    assert sum(counts.values()) >= FEWEST
