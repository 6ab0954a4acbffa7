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


EXAMPLES = {
    "a barrier dropped": "barrier.sync 0",
    "a warp's barrier dropped": "bar.warp.sync -1",
    "a copy is not waited for": "cp.async.wait_group 0",
    "a copy to 16 bytes further": "cp.async.cg.shared.global [%r2], [%rd4], 16, %r5",
    "a copy without zeros": "cp.async.cg.shared.global [%r2], [%rd4], 16, %r5",
    "a matrix from 16 bytes further": "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r1, %r2}, [%r9+32]",
    "a matrix transposed": "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r1, %r2}, [%r9+32]",
    "a product of matrices is not summed up": "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%f1, %f2, %f3, %f4},"
    " {%r1, %r2}, {%r3}, {%f1, %f2, %f3, %f4}",
    "two matrices swapped": "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32\n {%f1, %f2, %f3, %f4},\n {%r1, %r2},"
    " {%r3}, {%f1, %f2, %f3, %f4}",
    "a write to global memory shifted by 4 bytes": "@%p1 st.global.v4.f32 [%rd1], {%f1, %f2, %f3, %f4}",
    "a read of global memory shifted by 4 bytes": "ld.global.nc.L1::no_allocate.u16 %rs1, [%rd1+8]",
    "rounded towards zero": "{  cvt.rn.f16x2.f32 %r1, %f1, %f2",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_rules_change_what_they_are_for(name):
    (rule,) = (rule for rule in mutants.RULES if rule.name == name)
    (statement,) = mutants.ptx._statements(list(enumerate(f"{EXAMPLES[name].lstrip('{ ')};".split("\n"))), {})
    changed = rule.change(statement.text)
    assert changed not in (None, statement.text)
    header = ".version 8.4\n.target sm_90\n.visible .entry k()\n{\n"
    registers = ".reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<99>; .reg .f32 %f<99>; .reg .b64 %rd<9>;\n"
    assert mutants.ptx.Module(f"{header}{registers}{changed};\n}}\n").kernel("k")  # it is PTX


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
    changed = [row.split(" | ")[1] for row in rows if "`" in row and not row.startswith("| `")]
    for kind in {mutants.kind_of(kernel)[0] for kernel in machine().module.spans}:
        assert any(kind in kernel for kernel in changed), f"{kind}: a call for it in mutants.CASES, then {again}"
    caught, spared, lost = (int(text.split(word)[0].split()[-1]) for word in (" caught,", " without a trace", " lost."))
    assert lost == 0
    assert spared <= caught / 20
