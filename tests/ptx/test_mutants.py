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


@pytest.mark.parametrize("number", range(len(mutants.CASES)), ids=list(mutants.CASES))
def test_mutants_are_caught(number):
    """A third of the rules for each call, another one for each; `python tests/ptx/mutants.py` tries them all."""
    case = list(mutants.CASES)[number]
    rules = [rule for n, rule in enumerate(mutants.RULES) if n % 3 == number % 3]
    found = list(mutants.mutants(machine(), cases=[case], each=1, rules=rules))
    lost = mutants.alive(found)
    if len({m.rule for m in lost}) == 1 and lost[0].rule.loose:
        lost = []  # one loose rule may have nothing but such changes as are none
    assert not lost, "nothing caught\n" + "\n".join(
        f"{m.rule.name}: {m.kernel}, line {m.line}, {m.place}: {m.before} -> {m.after}" for m in lost
    )
    assert len({m.rule for m in found}) >= 4, "too few rules have something to change in these kernels"
