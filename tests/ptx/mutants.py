"""Changes the kernels' PTX by rule, a fault at a time, and says what catches each: a check of the executor, or a result
that differs from the reference.

Only what runs is changed: an instruction that the call executes, and that then gives another value for some lane. (A
kernel that computes both values, and counts the lanes where they differ, says which ones do.) What nothing catches
although the result differs is a fault that the tests would let pass.

    python tests/ptx/mutants.py [--write docs/mutants.md] [--only RULE] [--case CALL]
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
sys.path.insert(0, str(Path(__file__).parent))
import executor
import ptx
import torch
from test_ptx import CASE, MORE, call, check, choose, machine, tensors_of
from test_ptx import CASES as PAIRS
from torch import Tensor

from carafe_plugin.testing import TOLERANCES, relative_error

HALF, BFLOAT16 = torch.float16, torch.bfloat16

# The kernels that are changed are those of these calls; the fewest that reach every kind of kernel and of staging.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "up": ("reassemble", dict(size=(5, 9), channels=72)),
    "up, float16, channels_last": (
        "reassemble",
        dict(size=(5, 9), channels=136, dtype=HALF, layout="channels_last"),
    ),
    "down": ("reassemble", dict(size=(9, 18), channels=36, ratio=(1, 2), crop=(1, 1))),
    "gradient to features, up": ("grad_features", dict(size=(5, 18), channels=72, crop=(1, 1))),
    "gradient to features, up, bfloat16": (
        "grad_features",
        dict(size=(5, 18), channels=72, crop=(0, 0), dtype=BFLOAT16),
    ),
    "gradient to features, down": ("grad_features", dict(size=(9, 18), channels=36, ratio=(1, 2))),
    "gradient to kernels, up": ("grad_kernels", dict(size=(5, 9), channels=136, batch=1)),
    "gradient to kernels, up, float16": ("grad_kernels", dict(size=(5, 9), channels=136, batch=1, dtype=HALF)),
    "gradient to kernels, down, bfloat16": (
        "grad_kernels",
        dict(size=(9, 18), channels=136, ratio=(1, 2), dtype=BFLOAT16, normalizer="sigmoid_normalized", batch=1),
    ),
    "k = 9": ("reassemble", dict(size=(4, 5), channels=6, kernel=9)),
    "k = 9, gradient to features": ("grad_features", dict(size=(4, 5), channels=6, kernel=9)),
    "k = 9, gradient to kernels": ("grad_kernels", dict(size=(4, 5), channels=6, kernel=9)),
    "any scale": ("reassemble", dict(size=(4, 5), channels=6, ratio=(3, 2), normalizer="none")),
}

# What the calls are tried with besides, until a mutant is caught: other numbers of columns and channels, so that every
# bound is met, a map that fills its tiles, logits that overflow without their largest one, and addresses that are not
# aligned.
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    dict(crop=(0, 1), channels=76),
    dict(crop=(1, 2), channels=84),
    dict(crop=(0, 3), channels=68, batch=1),
    dict(size=(8, 16), channels=68, batch=1, crop=(0, 0)),
    dict(spread=300.0),
    dict(offset=1),
    dict(size=(8, 16), layout="channels_last", channels=64, crop=(0, 0)),
)

Statements = list[ptx.Statement]
Change = Callable[[str], str | None]


@dataclass(frozen=True)
class Rule:
    name: str
    change: Change  # of a statement: what it becomes, or None where the rule does not apply
    always: bool = False  # in every kernel; the others take turns


def _regex(pattern: str, new: str | Callable[[re.Match[str]], str]) -> Change:
    compiled = re.compile(pattern)

    def change(text: str) -> str | None:
        return compiled.sub(new, text, count=1) if compiled.search(text) else None

    return change


def _shift(by: int) -> Callable[[re.Match[str]], str]:
    return lambda match: f"{match.group(1)}{int(match.group(2)) + by}{match.group(3)}"


def _invert(match: re.Match[str]) -> str:
    return "@" if match.group(1) else "@!"


_INDEX = r"^((?:@!?%p\d+\s+)?{}[\w.:]*\s.*?\[%\w+)(?:\+(-?\d+))?(\].*)$"


def _offset(opcode: str, by: int) -> Change:
    compiled = re.compile(_INDEX.format(opcode), re.DOTALL)

    def change(text: str) -> str | None:
        match = compiled.match(text)
        return f"{match.group(1)}+{int(match.group(2) or 0) + by}{match.group(3)}" if match else None

    return change


def _swapped(first: str, second: str) -> Change:
    return _regex(rf"^((?:@!?%p\d+\s+)?){first}\b", rf"\g<1>{second}")


_BOUND = r"^((?:@!?%p\d+\s+)?setp\.(?:lt|ge|le|gt)\.[su]32.*, )(-?\d+)($)"

RULES = (
    Rule("a barrier dropped", _regex(r"^(bar|barrier)\.sync.*$", "membar.cta"), True),
    Rule("a warp's barrier dropped", _regex(r"^bar\.warp\.sync.*$", "membar.cta"), True),
    Rule("a copy is not waited for", _regex(r"^cp\.async\.wait_(group|all).*$", "membar.cta"), True),
    Rule("a write to shared memory dropped", _regex(r"^(@!?%p\d+\s+)?st\.shared.*$", "membar.cta"), True),
    Rule("a write to global memory dropped", _regex(r"^(@!?%p\d+\s+)?st\.global.*$", "membar.cta"), True),
    Rule("a product is not summed up", _regex(r"^fma\.rn\.(f\d+)(\s+%\w+, %\w+, %\w+), %.*$", r"mul.\1\2"), True),
    Rule(
        "a product of matrices is not summed up",
        _regex(r"^(mma\.sync.*\},\s*)\{[^}]*\}$", r"\1{0f00000000, 0f00000000, 0f00000000, 0f00000000}"),
        True,
    ),
    Rule("a branch inverted", _regex(r"^@(!?)(?=%p\d+\s+bra)", _invert)),
    Rule("a bound one more", _regex(_BOUND, _shift(1))),
    Rule("a bound one less", _regex(_BOUND, _shift(-1))),
    Rule("less becomes at most", _regex(r"^(setp\.)lt(\.[su]32)", r"\1le\2")),
    Rule("at least becomes more", _regex(r"^(setp\.)ge(\.[su]32)", r"\1gt\2")),
    Rule("a write to shared memory shifted by 4 bytes", _offset(r"st\.shared", 4)),
    Rule("a read of shared memory shifted by 4 bytes", _offset(r"ld\.shared", 4)),
    Rule("a read of shared memory shifted by 16 bytes", _offset(r"ld\.shared", 16)),
    Rule("a read of global memory shifted by 4 bytes", _offset(r"ld\.global", 4)),
    Rule("a write to global memory shifted by 4 bytes", _offset(r"st\.global", 4)),
    Rule("a copy to 16 bytes further", _regex(r"^(cp\.async\.c[ag]\S* \[%\w+)(\])", r"\1+16\2")),
    Rule("a copy without zeros", _regex(r"^(cp\.async\.c[ag]\S* .*, )(\d+), %r\d+$", r"\1\2, \2")),
    Rule("a matrix from 16 bytes further", _offset("ldmatrix", 16)),
    Rule(
        "a matrix transposed",
        _regex(r"^(ldmatrix\S*?x\d)(\.trans)?(?=\.)", lambda match: match[1] + ("" if match[2] else ".trans")),
    ),
    Rule("two matrices swapped", _regex(r"^(mma\.sync[^}]*\},\s*\{)(%\w+), (%\w+)", r"\1\3, \2")),
    Rule("a sum becomes a difference", _swapped(r"add\.f32", "sub.f32")),
    Rule("maximum becomes minimum", _swapped(r"max\.(?=[fsu]\d)", "min.")),
    Rule("minimum becomes maximum", _swapped(r"min\.(?=[fsu]\d)", "max.")),
    Rule("choices swapped", _regex(r"^(selp\.\w+\s+%\w+, )([^,]+), ([^,]+)(, %p\d+)$", r"\1\3, \2\4")),
    Rule(
        "an exchange with another lane",
        _regex(r"^(shfl\.sync\.bfly\.b32\s+[^,]+, [^,]+, )(?:1|%r\d+)(,)", r"\g<1>3\2"),
    ),
    Rule("rounded towards zero", _regex(r"^\{?\s*(cvt)\.rn(\.bf16|\.f16)(x2)?(\.f32)", r"\1.rz\2\3\4")),
    Rule("an index one more", _regex(r"^(add\.s32\s+%r\d+, %r\d+, )(-?\d+)($)", _shift(1))),
    Rule("a stride doubled", _regex(r"^(shl\.b32\s+%r\d+, %r\d+, )(\d+)($)", _shift(1))),
    Rule("a stride halved", _regex(r"^(shl\.b32\s+%r\d+, %r\d+, )([2-9])($)", _shift(-1))),
    Rule("a product one more", _regex(r"^(mad\.lo\.s32\s+%r\d+, %r\d+, )(\d+)(, .*)$", _shift(1))),
    Rule("a divisor one more", _regex(r"^((?:div|rem)\.[su]32\s+%r\d+, %r\d+, )(\d+)($)", _shift(1))),
    Rule("the thread's neighbour", _regex(r"^(mov\.u32\s+%r\d+, %)tid\.x$", r"\1laneid")),
    Rule("the block's neighbour", _regex(r"^(mov\.u32\s+%r\d+, %)ctaid\.x$", r"\1nctaid.x")),
)  # fmt: skip
TURNS = 4  # of the rules that take turns, a kernel is changed by every fourth

# Why a change shows in no bit of any result, by the rule and the source's line.
SPARED: dict[tuple[str, str], str] = {
    ("a bound one less", "if (done > 0) __syncthreads();"): "a barrier more, before the first chunk of channels",
    (
        "a bound one less",
        "kernel < Transfer::kCount && Transfer::pointer",
    ): "computed where no kernel is, and not written",
}


@dataclass(frozen=True)
class Mutant:
    rule: Rule
    case: str
    kernel: str
    line: int
    before: str
    after: str
    caught: str  # by what, or ''
    same: bool  # nothing caught it, and the results are the same, to the last bit
    place: str

    @property
    def outcome(self) -> str:
        if self.caught:
            return self.caught
        if not self.same:
            return "**nothing**"
        why = next((why for (rule, text), why in SPARED.items() if rule == self.rule.name and text in self.place), "")
        return f"no bit of {len(VARIANTS)} results changes" + f": {why}" * bool(why)


def statements_of(module: ptx.Module, name: str) -> Statements:
    line, _, body = module.spans[name]
    return list(ptx._statements(list(enumerate(body.split("\n"), line)), module.files))


def source_of(statement: ptx.Statement) -> str:
    """The file and the line's text, which other changes of the file leave as they are."""
    for file, line in statement.location[:1]:
        lines = Path(file).read_text().splitlines() if Path(file).is_file() else []
        text = lines[line - 1].strip() if 0 < line <= len(lines) else ""
        text = text.partition("  //")[0]
        return f"{Path(file).name}: `{text[:60] + '...' * (len(text) > 60)}`".replace("|", "\\|")
    return ""


def rebuilt(host: executor.Executor, kernel: str, statements: Statements) -> int:
    """The number of a kernel of the same name, of these statements."""
    header = host.module.spans[kernel][:2]
    return executor.add_program(host.module, ptx._Builder(kernel, *header, host.module).build(statements))


# --------------------------------------------------------------------------------------------------- where it matters

_RESULTS = re.compile(r"^(@!?%p\d+\s+)?([a-z][\w.:]*\s+)(\{[^}]*\}|%\w+)(,.*)$", re.DOTALL)
_TYPES = {"p": "pred", "rs": "b16", "rd": "b64", "fd": "b64", "r": "b32", "f": "b32"}  # by the names of registers
MARKS = 1 << 28  # lines beyond any PTX's, of the marks


def results_of(text: str) -> tuple[str, str, dict[str, str], str] | None:
    """Guard, opcode, results with their types, and the rest of an instruction; None where it writes no register."""
    match = _RESULTS.match(text)
    if match is None or match[2].startswith(("st", "bar", "cp", "bra")):
        return None
    names = re.findall(r"%\w+", match[3])
    types = {name: _TYPES.get(re.sub(r"\d", "", name[1:]), "") for name in names}
    return (match[1] or "", match[2], types, match[4]) if names and all(types.values()) else None


def instrumented(statements: Statements, changes: Sequence[tuple[int, str]]) -> Statements:
    """With, for each (place, what it becomes) that has results, both computed, and a mark that lanes come to where they
    differ: at line ``MARKS`` + its number."""
    before: dict[int, Statements] = collections.defaultdict(list)
    after: dict[int, Statements] = collections.defaultdict(list)
    registers = {"%differs": "pred"}
    for number, (at, text) in enumerate(changes):
        if found := results_of(text):
            guard, opcode, types, rest = found
            location = statements[at].location
            others = {name: f"%changed{number}_{k}" for k, name in enumerate(types)}
            registers |= {others[name]: type_ for name, type_ in types.items()}
            written = "{" + ", ".join(others.values()) + "}" if len(others) > 1 else "".join(others.values())
            before[at].append(ptx.Statement(f"{guard}{opcode}{written}{rest}", 0, location))
            after[at].append(ptx.Statement("mov.pred %differs, 0", 0, location))
            for name, other in others.items():
                differ = f"xor.pred %differs, {name}, {other}"
                if types[name] != "pred":
                    differ = f"setp.ne.or.{types[name]} %differs, {name}, {other}, %differs"
                after[at].append(ptx.Statement(f"{guard}{differ}", 0, location))
            after[at].append(ptx.Statement("@%differs membar.cta", MARKS + number, location))
    made = [ptx.Statement(f".reg .{type_} {name}", 0, ()) for name, type_ in registers.items()]
    for at, statement in enumerate(statements):
        made += [*before[at], statement, *after[at]]
    return made


def lanes_that_differ(
    host: executor.Executor, kernel: str, statements: Statements, changes: Sequence[tuple[int, str]], op: str,
    case: dict[str, Any],
) -> dict[int, int]:  # fmt: skip
    """For how many lanes each change gives another value, in all calls together; for those of no result, -1."""
    found = {number: 0 if results_of(text) else -1 for number, (_, text) in enumerate(changes)}
    number = rebuilt(host, kernel, instrumented(statements, changes))
    with replaced(host, kernel, number):
        for variant in VARIANTS:
            run = call(host, op, *call_of(case, variant), limit=LIMIT, checks=False)
            for launch in run.launches:
                if launch.kernel == kernel:
                    for record in launch.records():
                        if record["ptx_line"] >= MARKS:
                            found[record["ptx_line"] - MARKS] += record["lanes"]
    executor.drop_program(number)
    return found


# ------------------------------------------------------------------------------------------------------- what catches


@contextlib.contextmanager
def replaced(host: executor.Executor, kernel: str, number: int) -> Iterator[None]:
    """Another kernel in the place of one."""
    own = host.numbers[kernel]
    host.numbers[kernel] = number
    try:
        yield
    finally:
        host.numbers[kernel] = own


def call_of(case: dict[str, Any], variant: dict[str, Any]) -> tuple[dict[str, Any], tuple[Tensor, Tensor, Tensor]]:
    changed = {key: value for key, value in (case | variant).items() if key != "spread"}
    features, kernels, grad = tensors_of(changed)
    return changed, (features, kernels * variant.get("spread", 1.0), grad)


@functools.cache
def _right_result(label: str, number: int) -> Tensor:
    """Of the kernels as they are, for a variant."""
    op, changes = CASES[label]
    case, tensors = call_of(CASE | changes, VARIANTS[number])
    run = call(machine(), op, case, tensors, counting=False)
    if run.error or run.findings:
        raise RuntimeError(f"{label}, {VARIANTS[number]}: error {run.error}, {[str(each) for each in run.findings]}")
    return run.result


def what_catches(host: executor.Executor, kernel: str, number: int, label: str) -> tuple[str, bool]:
    """The first check that fails with another kernel in the place of one, or ''; and whether no bit differed."""
    op, changes = CASES[label]
    right = [_right_result(label, n) for n in range(len(VARIANTS))]
    same = True
    with replaced(host, kernel, number):
        for variant, wanted in zip(VARIANTS, right, strict=True):
            case, tensors = call_of(CASE | changes, variant)
            run = call(host, op, case, tensors, limit=LIMIT, counting=False)
            if run.findings:
                return min(run.findings, key=lambda finding: finding.launch).problem, False
            if run.error:
                return f"error {run.error}", False
            if run.unwritten:
                return "elements not written", False
            if torch.equal(run.result, wanted):
                continue
            same = False
            if is_wrong(host, op, case, tensors, run.result, wanted):
                return "wrong result", False
        case, tensors = call_of(CASE | changes, {})
        other = call(host, op, case, tensors, limit=LIMIT, descending=True, fill=0x3F, counting=False)
        if not torch.equal(other.result, right[0]):
            return "order of threads", False
    return "", same


def is_wrong(
    host: executor.Executor, op: str, case: dict[str, Any], tensors: tuple[Tensor, Tensor, Tensor], got: Tensor,
    right: Tensor,
) -> bool:  # fmt: skip
    """Whether the tests' own comparisons refuse it."""
    if tensors[1] is not tensors_of(case)[1] and not torch.equal(tensors[1], tensors_of(case)[1]):
        # Of logits so far apart the gradient vanishes: it has no relative error.
        return not bool(got.isfinite().all()) or bool(relative_error(got, right) > 4 * TOLERANCES[got.dtype])
    try:
        check(host, case, (op,), tensors, limit=LIMIT)
    except AssertionError:
        return True
    return False


PLACES = 8  # of a rule in a kernel, at most, that are tried
LIMIT = 400_000  # instructions of a warp: a loop that takes more does not end


def its_rules(turn: int, only: str | None, turns: int | None) -> list[Rule]:
    """Those that a kernel is changed by."""
    if only:
        return [rule for rule in RULES if rule.name == only]
    every = turns or TURNS
    return [r for n, r in enumerate(RULES) if (r.always and turns is None) or n % every == turn % every]


def places_of(
    statements: Statements, executed: Mapping[int, int], rules: Sequence[Rule]
) -> list[tuple[Rule, int, str]]:
    """Where the rules have something to change, and what it becomes."""
    return [
        (rule, at, text)
        for rule in rules
        for at, statement in enumerate(statements)
        if executed[statement.line] and (text := rule.change(statement.text)) not in (None, statement.text)
    ]


def mutants(
    host: executor.Executor, only: str | None = None, cases: Sequence[str] | None = None, turns: int | None = None
) -> Iterator[Mutant]:
    """``turns``: each kernel is changed by every so many-th rule, also of those that otherwise are for all."""
    turn = 0
    for label, (op, changes) in CASES.items():
        case = CASE | changes
        if cases is not None and label not in cases:
            turn += len({launch.kernel for launch in choose(host, op, case)[1]})
            continue
        run = call(host, op, case, tensors_of(case))
        if run.error or run.findings:
            raise RuntimeError(f"{label}: error {run.error}, {[str(finding) for finding in run.findings]}")
        for launch in {each.kernel: each for each in run.launches}.values():
            turn += 1
            executed: collections.Counter[int] = collections.Counter()
            for record in launch.records():
                executed[record["ptx_line"]] += record["lanes"]
            statements = statements_of(host.module, launch.kernel)
            places = places_of(statements, executed, its_rules(turn, only, turns))
            for later in range(1, turns or 1):  # a small kernel may have nothing to change by these rules
                places = places or places_of(statements, executed, its_rules(turn + later, only, turns))
            lanes = lanes_that_differ(host, launch.kernel, statements, [(at, text) for _, at, text in places], op, case)
            for rule in RULES:
                choice = [n for n, place in enumerate(places) if place[0] is rule and lanes[n]]
                if not choice:
                    continue
                # One place of each rule, where most lanes differ; the next where no result depends on that.
                for n in sorted(choice, key=lambda n: (-lanes[n], n))[:PLACES]:
                    rule, at, text = places[n]
                    before = statements[at]
                    changed = [*statements[:at], replace(before, text=text), *statements[at + 1 :]]
                    number = rebuilt(host, launch.kernel, changed)
                    caught, same = what_catches(host, launch.kernel, number, label)
                    executor.drop_program(number)
                    name = launch.name.split("(")[0].replace("void ", "").replace("carafe::gpu::", "")
                    found = Mutant(rule, label, name, before.line, before.text, text, caught, same, source_of(before))
                    if caught or not same:
                        break
                yield found


def lost(found: Sequence[Mutant]) -> list[Mutant]:
    """Those that give other results, which the tests would let pass."""
    return [m for m in found if not m.caught and not m.same]


# -------------------------------------------------------------------------------------------------------------- pages


INTRODUCTION = """# What the executor runs, and what it would notice

Generated by `python tests/ptx/mutants.py --write docs/mutants.md`; a test compares it with the kernels and the rules.
[docs/cuda.md](cuda.md) says what else proves the kernels.

## Kernels that are executed

nvcc's PTX of every CUDA kernel, launched by the project's own launcher, interpreted on a CPU (`tests/ptx`). In a field:
how many of the calls of `tests/ptx/test_ptx.py` launch it. Together they have every pair of the options there: sizes,
channels, groups, normalisers, memory formats, alignments, cropped outputs. Each result is compared with the reference,
and each access is checked.

"""
MUTANTS = """
## Faults that were made

A fault at a time in the PTX, where the call executes the instruction and a lane gets another value by it. "Caught by"
is the first check that fails: of the executor, or the comparison with the reference. Where nothing fails, the results
of all {calls} calls that were tried are the same to the last bit, and beside it stands why.

{count} mutants: {caught} caught, {spared} without a trace in any result, {lost} lost.

"""
DTYPES = {"double": "float64", "float": "float32", "Half": "float16", "BFloat16": "bfloat16"}


def kind_of(kernel: str) -> tuple[str, str]:
    """Of a kernel, by its mangled name: its template (a block kernel's block) and its geometry."""
    name = re.sub(
        r"\b(?:void|carafe::|gpu::|general::|tensor::)\s*|\((?:anonymous|unnamed)[^)]*\)::",
        "",
        executor.demangle(kernel),
    )
    template = re.match(r"(?:run_block<)?(\w+)", name)
    assert template is not None
    found = re.search(r"Geometry<(\d+), (\d+), (\d+)>", name)
    if not found:
        return template[1], "any"
    k, up, down = found.groups()
    return template[1], f"k {k}, {f'up {up}' if up != '1' else f'down {down}'}"


def coverage(host: executor.Executor) -> dict[tuple[str, str], collections.Counter[str]]:
    """Of each kind of kernel and geometry: how many calls of the tests launch it, by dtype."""
    found: dict[tuple[str, str], collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for case, op in itertools.product((*PAIRS, *MORE), executor.OPERATORS):
        _, launches = choose(host, op, case)
        for kernel in {launch.kernel for launch in launches}:
            found[kind_of(kernel)][str(case["dtype"]).removeprefix("torch.")] += 1
    return found


def page(host: executor.Executor, found: Sequence[Mutant]) -> str:
    rows = ["| kernel | geometry | " + " | ".join(DTYPES.values()) + " |", "|---|---|" + "---|" * len(DTYPES)]
    for (kind, geometry), counts in sorted(coverage(host).items()):
        fields = (str(counts[dtype] or "") for dtype in DTYPES.values())
        rows.append(f"| `{kind}` | {geometry} | {' | '.join(fields)} |")
    numbers = dict(calls=len(VARIANTS), count=len(found), caught=sum(bool(m.caught) for m in found))
    text = MUTANTS.format(**numbers, spared=sum(m.same for m in found), lost=len(lost(found)))
    changes = ["| call | kernel | change | where | caught by |", "|---|---|---|---|---|"]
    for m in found:
        changes.append(f"| {m.case} | `{m.kernel}` | {m.rule.name} | {m.place} | {m.outcome} |")
    return INTRODUCTION + "\n".join(rows) + "\n" + text + "\n".join(changes) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="write the page there")
    parser.add_argument("--only", help="of this rule", choices=[rule.name for rule in RULES], metavar="RULE")
    parser.add_argument("--case", action="append", choices=CASES, metavar="CALL", help="of this call")
    options = parser.parse_args()
    found = []
    for mutant in mutants(machine(), options.only, options.case):
        found.append(mutant)
        print(f"{mutant.outcome:45} {mutant.rule.name:45} {mutant.case}: {mutant.kernel} {mutant.place}", flush=True)
    missed = lost(found)
    print(f"{len(found)} mutants, {sum(bool(m.caught) for m in found)} caught, {len(missed)} that should have been:")
    for mutant in missed:
        print(
            f"  {mutant.rule.name}, {mutant.case}: {mutant.kernel}, {mutant.place}, line {mutant.line}: {mutant.before}"
        )
    if options.write:
        options.write.write_text(page(machine(), found))
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
