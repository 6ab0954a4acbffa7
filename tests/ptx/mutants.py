"""Changes the kernels' PTX by rule, a fault at a time, and says what catches each: a check of the executor, or a result
that differs from the reference. One that nothing catches is a fault that the tests would let pass.

    python tests/ptx/mutants.py [--write docs/mutants.md] [--only RULE]
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
sys.path.insert(0, str(Path(__file__).parent))
import executor
import ptx
import torch
from test_ptx import CASE, call, check, machine, tensors_of

# The kernels that are changed are those of these calls; the fewest that reach every kind of kernel and of staging.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "up": ("reassemble", dict(size=(5, 9), channels=72)),
    "up, float16, channels_last": (
        "reassemble",
        dict(size=(5, 9), channels=136, dtype=torch.float16, layout="channels_last"),
    ),
    "down": ("reassemble", dict(size=(9, 18), channels=36, ratio=(1, 2), crop=(1, 1))),
    "gradient to features, up": ("grad_features", dict(size=(5, 18), channels=72, crop=(1, 1))),
    "gradient to features, down": ("grad_features", dict(size=(9, 18), channels=36, ratio=(1, 2))),
    "gradient to kernels, up": ("grad_kernels", dict(size=(5, 9), channels=136, batch=1)),
    "gradient to kernels, down, bfloat16": (
        "grad_kernels",
        dict(size=(9, 18), channels=136, ratio=(1, 2), dtype=torch.bfloat16, normalizer="sigmoid_normalized", batch=1),
    ),
    "any scale": ("reassemble", dict(size=(4, 5), channels=6, ratio=(3, 2), normalizer="none")),
}

# What the calls are tried with besides, until a mutant is caught: other numbers of columns and channels, so that every
# bound is met, logits that overflow without their largest one, and addresses that are not aligned.
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    dict(crop=(0, 1), channels=76),
    dict(crop=(1, 2), channels=84),
    dict(crop=(0, 3), channels=68, batch=1),
    dict(spread=300.0),
    dict(offset=1),
)

TRIES = 12  # places where a loose rule is tried, until a mutant is caught

Statements = list[ptx.Statement]
Change = Callable[[str], str | None]


@dataclass(frozen=True)
class Rule:
    name: str
    change: Change  # of a statement: what it becomes, or None where the rule does not apply
    each: int = 1  # mutants of it for a kernel, spread over the statements that it applies to
    # Often such a change is none: a bound that no number meets, what lies outside and is multiplied by nothing, a
    # largest logit where any number would do that keeps e^x finite. Then the next place is tried.
    loose: bool = False


def _regex(pattern: str, new: str | Callable[[re.Match[str]], str]) -> Change:
    compiled = re.compile(pattern)

    def change(text: str) -> str | None:
        return compiled.sub(new, text, count=1) if compiled.search(text) else None

    return change


def _shift(by: int) -> Callable[[re.Match[str]], str]:
    return lambda match: f"{match.group(1)}{int(match.group(2)) + by}{match.group(3)}"


def _invert(match: re.Match[str]) -> str:
    return "@" if match.group(1) else "@!"


_INDEX = r"^((?:@!?%p\d+\s+)?{}\.v?\d?\.?\w+\s.*?\[%\w+)(?:\+(-?\d+))?(\].*)$"


def _offset(kind: str, by: int) -> Change:
    compiled = re.compile(_INDEX.format(kind), re.DOTALL)

    def change(text: str) -> str | None:
        match = compiled.match(text)
        return f"{match.group(1)}+{int(match.group(2) or 0) + by}{match.group(3)}" if match else None

    return change


def _swapped(first: str, second: str) -> Change:
    return _regex(rf"^((?:@!?%p\d+\s+)?){first}\b", rf"\g<1>{second}")


RULES = (
    Rule("a barrier dropped", _regex(r"^(bar|barrier)\.sync.*$", "membar.cta"), 2),
    Rule("a copy is not waited for", _regex(r"^cp\.async\.wait_(group|all).*$", "membar.cta")),
    Rule("a branch inverted", _regex(r"^@(!?)(?=%p\d+\s+bra)", _invert), 3, loose=True),
    Rule("a bound one more", _regex(r"^(setp\.(?:lt|ge|le|gt)\.[su]32.*, )(-?\d+)($)", _shift(1)), 2, loose=True),
    Rule("a bound one less", _regex(r"^(setp\.(?:lt|ge|le|gt)\.[su]32.*, )(-?\d+)($)", _shift(-1)), 2, loose=True),
    Rule("less becomes at most", _regex(r"^(setp\.)lt(\.[su]32)", r"\1le\2"), 2, loose=True),
    Rule("at least becomes more", _regex(r"^(setp\.)ge(\.[su]32)", r"\1gt\2"), 2, loose=True),
    Rule("a write to shared memory shifted by 4 bytes", _offset(r"st\.shared", 4)),
    Rule("a read of shared memory shifted by 4 bytes", _offset(r"ld\.shared", 4), 2),
    Rule("a read of shared memory shifted by 16 bytes", _offset(r"ld\.shared", 16), loose=True),
    Rule("a read of global memory shifted by 4 bytes", _offset(r"ld\.global(?:\.nc)?", 4), loose=True),
    Rule("a write to global memory shifted by 4 bytes", _offset(r"st\.global", 4)),
    Rule("a write to shared memory dropped", _regex(r"^(@!?%p\d+\s+)?st\.shared.*$", "membar.cta")),
    Rule("a write to global memory dropped", _regex(r"^(@!?%p\d+\s+)?st\.global.*$", "membar.cta")),
    Rule("a product is not summed up", _regex(r"^fma\.rn\.(f\d+)(\s+%\w+, %\w+, %\w+), %.*$", r"mul.\1\2"), 2),
    Rule("a sum becomes a difference", _swapped(r"add\.f32", "sub.f32"), 1, loose=True),
    Rule("maximum becomes minimum", _swapped(r"max\.(?=[fsu]\d)", "min."), 1, loose=True),
    Rule("minimum becomes maximum", _swapped(r"min\.(?=[fsu]\d)", "max."), 1, loose=True),
    Rule("choices swapped", _regex(r"^(selp\.\w+\s+%\w+, )([^,]+), ([^,]+)(, %p\d+)$", r"\1\3, \2\4"), 1, loose=True),
    Rule(
        "zero becomes one",
        _regex(r"^(mov\.(?:b32|f32)\s+%(?:f|r)\d+, )(?:0f00000000|0)$", r"\g<1>0f3F800000"),
        loose=True,
    ),
    Rule(
        "an exchange with another lane",
        _regex(r"^(shfl\.sync\.bfly\.b32\s+[^,]+, [^,]+, )(?:1|%r\d+)(,)", r"\g<1>3\2"),
        loose=True,
    ),
    Rule("rounded towards zero", _regex(r"^\{?\s*(cvt)\.rn(\.bf16|\.f16)(x2)?(\.f32)", r"\1.rz\2\3\4")),
    Rule("an index one more", _regex(r"^(add\.s32\s+%r\d+, %r\d+, )(-?\d+)($)", _shift(1)), 2, loose=True),
    Rule("a stride doubled", _regex(r"^(shl\.b32\s+%r\d+, %r\d+, )(\d+)($)", _shift(1)), 1, loose=True),
    Rule("a stride halved", _regex(r"^(shl\.b32\s+%r\d+, %r\d+, )([2-9])($)", _shift(-1)), 1, loose=True),
    Rule("a product one more", _regex(r"^(mad\.lo\.s32\s+%r\d+, %r\d+, )(\d+)(, .*)$", _shift(1)), 1, loose=True),
    Rule("a divisor one more", _regex(r"^((?:div|rem)\.[su]32\s+%r\d+, %r\d+, )(\d+)($)", _shift(1)), 1, loose=True),
    Rule("the thread's neighbour", _regex(r"^(mov\.u32\s+%r\d+, %)tid\.x$", r"\1laneid"), loose=True),
    Rule("the block's neighbour", _regex(r"^(mov\.u32\s+%r\d+, %)ctaid\.x$", r"\1nctaid.x")),
)  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    rule: Rule
    case: str
    kernel: str
    line: int
    before: str
    after: str
    caught: str  # by what, or ''
    place: str


def statements_of(module: ptx.Module, name: str) -> Statements:
    line, _, body = module.spans[name]
    return list(ptx._statements(list(enumerate(body.split("\n"), line)), module.files))


def what_catches(host: executor.Executor, kernel: str, number: int, op: str, case: dict[str, Any]) -> str:
    """The first check that fails with another kernel in the place of one."""
    own = host.numbers[kernel]
    host.numbers[kernel] = number
    try:
        for variant in VARIANTS:
            if caught := what_catches_with(host, op, {key: v for key, v in (case | variant).items() if key != "spread"},
                                           variant.get("spread", 1.0)):  # fmt: skip
                return caught
        return ""
    finally:
        host.numbers[kernel] = own


def what_catches_with(host: executor.Executor, op: str, case: dict[str, Any], spread: float) -> str:
    features, kernels, grad = tensors_of(case)
    tensors = (features, kernels * spread, grad)
    run = call(host, op, case, tensors, limit=LIMIT, counting=False)
    if run.findings:
        return min(run.findings, key=lambda finding: finding.launch).problem
    if run.error:
        return f"error {run.error}"
    if run.unwritten:
        return "elements not written"
    if spread != 1:  # a gradient that vanishes has no relative error
        return "" if bool(run.result.isfinite().all()) else "wrong result"
    try:
        check(host, case, (op,), tensors, limit=LIMIT)
    except AssertionError as error:
        return "order of threads" if "order of blocks" in str(error) else "wrong result"
    return ""


LIMIT = 400_000  # instructions of a warp: a loop that takes more does not end


def spread(count: int, wanted: int) -> list[int]:
    return sorted({(2 * k + 1) * count // (2 * wanted) for k in range(min(count, wanted))})


def mutants(
    host: executor.Executor, only: str | None = None, cases: Sequence[str] | None = None, each: int | None = None,
    rules: Sequence[Rule] | None = None,
) -> Iterator[Mutant]:  # fmt: skip
    """``each``: mutants of a rule for a kernel, where that is fewer than the rule's."""
    for label, (op, changes) in CASES.items():
        if cases is not None and label not in cases:
            continue
        case = CASE | changes
        run = call(host, op, case, tensors_of(case))
        if run.error or run.findings:
            raise RuntimeError(f"{label}: error {run.error}, {[str(finding) for finding in run.findings]}")
        for launch in run.launches:
            # Only what the case executes, each place once: the compiler unrolls loops.
            counts = {i.statement.line: 0 for i in launch.program.code}
            for record in launch.records():
                counts[record["ptx_line"]] += record["issued"]
            statements = statements_of(host.module, launch.kernel)
            header = host.module.spans[launch.kernel][:2]
            for rule in rules or RULES:
                if only and rule.name != only:
                    continue
                places = [
                    n
                    for n, s in enumerate(statements)
                    if counts.get(s.line) and rule.change(s.text) not in (None, s.text)
                ]
                wanted = TRIES if rule.loose else min(rule.each, each or rule.each)
                for at in (places[n] for n in spread(len(places), wanted)):
                    before = statements[at]
                    after = rule.change(before.text)
                    assert after is not None
                    changed = [*statements[:at], replace(before, text=after), *statements[at + 1 :]]
                    program = ptx._Builder(launch.kernel, *header, host.module).build(changed)
                    number = executor.add_program(host.module, program)
                    caught = what_catches(host, launch.kernel, number, op, case)
                    executor.drop_program(number)
                    place = " < ".join(f"{Path(file).name}:{line}" for file, line in before.location[:2])
                    name = launch.name.split("(")[0].replace("void ", "").replace("carafe::gpu::", "")
                    yield Mutant(rule, label, name, before.line, before.text, after, caught, place)
                    if rule.loose and caught:
                        break


def alive(found: Sequence[Mutant]) -> list[Mutant]:
    """Those that nothing caught, and of a loose rule where it caught none of its mutants at all."""
    caught = {m.rule for m in found if m.caught}
    return [m for m in found if not m.caught and (not m.rule.loose or m.rule not in caught)]


def table(found: Sequence[Mutant]) -> str:
    lost = alive(found)
    lines = ["| call | kernel | change | at | caught by |", "|---|---|---|---|---|"]
    for m in found:
        what = m.caught or ("**nothing**" if m in lost else "nothing: it makes no difference there")
        lines.append(f"| {m.case} | `{m.kernel}` | {m.rule.name} | {m.place} | {what} |")
    caught = sum(bool(m.caught) for m in found)
    return f"{len(found)} mutants, {caught} caught, {len(lost)} that should have been.\n\n" + "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="write the table there")
    parser.add_argument("--only", help="of this rule")
    parser.add_argument("--each", type=int, help="mutants of a rule for a kernel, at most")
    parser.add_argument("--case", action="append", choices=CASES, help="of this call")
    options = parser.parse_args()
    found = []
    for mutant in mutants(machine(), options.only, options.case, options.each):
        found.append(mutant)
        where = f"{mutant.case}: {mutant.kernel} {mutant.place}"
        print(f"{mutant.caught or 'nothing':45} {mutant.rule.name:45} {where}", flush=True)
    lost = alive(found)
    print(f"{len(found)} mutants, {sum(bool(m.caught) for m in found)} caught, {len(lost)} that should have been:")
    for mutant in lost:
        print(
            f"  {mutant.rule.name}, {mutant.case}: {mutant.kernel}, {mutant.place}, line {mutant.line}: {mutant.before}"
        )
    if options.write:
        options.write.write_text(table(found))
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main())
