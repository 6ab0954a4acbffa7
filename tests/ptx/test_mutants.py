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

PAGE = Path(__file__).parents[2] / "docs" / "mutants.md"


@pytest.mark.parametrize("number", range(len(mutants.CASES)), ids=list(mutants.CASES))
def test_mutants_are_caught(number):
    """A twelfth of the rules for each kernel, others for each; `python tests/ptx/mutants.py` tries more."""
    found = list(mutants.mutants(machine(), cases=[list(mutants.CASES)[number]], turns=12))
    lost = mutants.lost(found)
    assert not lost, "nothing caught\n" + "\n".join(
        f"{m.rule.name}: {m.kernel}, {m.place}, line {m.line}: {m.before} -> {m.after}" for m in lost
    )
    assert found, "no rule has something to change in these kernels"
    spared = [m for m in found if m.same]
    assert len(spared) <= 1, "changes that change nothing: " + ", ".join(f"{m.rule.name}, {m.place}" for m in spared)


def test_the_page_names_what_there_is():
    """The kernels that are executed, and a fault in each kind, by every rule and call."""
    again = "python tests/ptx/mutants.py --write docs/mutants.md"
    text = PAGE.read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    for (kind, geometry), counts in mutants.coverage(machine()).items():
        row = next((row for row in rows if row.startswith(f"| `{kind}` | {geometry} |")), None)
        assert row is not None, f"{kind}, {geometry}: {again}"
        shown = dict(zip(mutants.DTYPES.values(), row.split("|")[3:], strict=False))
        assert {name for name, field in shown.items() if field.strip()} == set(counts), f"{kind}, {geometry}: {again}"
    for name in mutants.CASES:
        assert f"| {name} |" in text, f"{name}: {again}"
    kinds = {mutants.kind_of(kernel)[0] for kernel in machine().module.spans}
    changed = {row.split("`")[1].split("<")[0] for row in rows if " caught by " not in row and row.count("|") == 6}
    assert {kind for kind in kinds if not any(kind in row for row in rows if row.count("|") == 6)} == set(), changed
    caught, spared, lost = (int(text.split(word)[0].split()[-1]) for word in (" caught,", " without a trace", " lost."))
    assert lost == 0
    assert spared <= caught / 20
