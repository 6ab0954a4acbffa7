"""PTX, as nvcc writes it, into the flat programs that the executor (machine.h) takes: an instruction is an operation by
its number, rows of registers, and numbers. What is not known is an error that names it and its line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

OPERANDS = 14  # of an instruction in machine.h
PLAIN, BRANCH, BRANCH_INDEXED, EXIT, BARRIER = range(5)

WIDTHS = {
    **dict.fromkeys(("b8", "u8", "s8"), 1),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), 2),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2"), 4),
    **dict.fromkeys(("b64", "u64", "s64", "f64"), 8),
}
SPECIALS = {
    **{f"%{name}.{axis}": 3 * n + a for n, name in enumerate(("tid", "ntid", "ctaid", "nctaid"))
       for a, axis in enumerate("xyz")},
    **{"%laneid": 12, "%warpid": 13, "%lanemask_eq": 14, "%lanemask_lt": 15, "%lanemask_le": 16, "%lanemask_gt": 17,
       "%lanemask_ge": 18, "%dynamic_smem_size": 19, "%total_smem_size": 20},
}  # fmt: skip
ROUNDINGS = {"rn": 0, "rz": 1, "rm": 2, "rp": 3, "rni": 0, "rzi": 1, "rmi": 2, "rpi": 3}


class PtxError(Exception):
    pass


@dataclass(frozen=True)
class Statement:
    text: str
    line: int
    location: tuple[tuple[str, int], ...]  # file and line, then where that was inlined


@dataclass
class Instruction:
    statement: Statement
    operation: str = "nop"
    kind: int = PLAIN
    predicate: int = -1
    negate: int = 0
    hidden: int = 0
    n: int = 0
    size: int = 0
    sign: int = 0
    wide: int = 0
    target: int = 0
    imm: int = 0
    meets: int = -1  # where the lanes that a branch parts are together again; -1: nowhere
    x: list[int] = field(default_factory=list)
    label: str | None = None
    tables: list[str] = field(default_factory=list)


@dataclass
class Kernel:
    name: str
    line: int
    parameters: list[tuple[str, int, int]] = field(default_factory=list)  # name, offset, size
    parameter_bytes: int = 0
    max_threads: int = 1024
    min_blocks: int = 1
    static_shared: int = 0
    local_bytes: int = 0
    granule: int = 2
    rows: int = 0
    predicates: int = 2
    code: list[Instruction] = field(default_factory=list)
    constants: list[tuple[int, int, int | str]] = field(default_factory=list)  # row, kind, value
    specials: list[tuple[int, int]] = field(default_factory=list)
    tables: list[int] = field(default_factory=list)
    checked: list[int] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------------------- reading

_COMMENT = re.compile(r"//.*$")


def _statements(lines: Sequence[tuple[int, str]], files: Mapping[int, str]) -> Iterator[Statement]:
    """Statements, labels ending in a colon, and the braces of scopes."""
    known: dict[tuple[int, int, int], tuple[tuple[str, int], ...]] = {}
    location: tuple[tuple[str, int], ...] = ()
    text = ""
    for number, raw in lines:
        line = _COMMENT.sub("", raw).strip()
        if not line:
            continue
        if re.match(r"\.loc\s", line):
            words = line.replace(",", " ").split()
            file, row, column = (int(word) for word in words[1:4])
            outer: tuple[tuple[str, int], ...] = ()
            if "inlined_at" in words:
                at = words.index("inlined_at")
                place = tuple(int(word) for word in words[at + 1 : at + 4])
                outer = known.get(place, ((files.get(place[0], "?"), place[1]),))  # type: ignore[call-overload]
            if row == 0:  # of no line: what stands nearby
                continue
            location = ((files.get(file, "?"), row), *outer)
            known[file, row, column] = location
            continue
        if line.startswith((".pragma", ".file", ".section")) and not text:
            continue
        for part in re.findall(r"[^;{}]+|[;{}]", line):
            if part == ";":
                if text.strip():
                    yield Statement(text.strip(), number, location)
                text = ""
            elif part in "{}" and not text.strip():
                yield Statement(part, number, location)
            else:
                text += part if part in "{}" else part + " "
                while match := re.match(r"\s*([$\w]+):(?!:)", text):
                    yield Statement(match.group(1) + ":", number, location)
                    text = text[match.end() :]


def _number(text: str) -> int | None:
    """The bits of a literal; None where it is none."""
    if match := re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", text):
        digits = match.group(2)
        value = int(digits, 8) if re.fullmatch(r"0[0-7]+", digits) else int(digits, 0)
        return -value if match.group(1) else value
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", text):
        return int(text[2:], 16)
    return {"WARP_SZ": 32}.get(text)


def _operands(text: str) -> list[str]:
    return [part.strip() for part in re.split(r",(?![^{\[(]*[}\])])", text)] if text.strip() else []


def _aligned(offset: int, alignment: int) -> int:
    return (offset + alignment - 1) // alignment * alignment


_VARIABLE = re.compile(
    r"(?:\.(?:visible|extern|weak|common)\s+)*\.(shared|local|global|const)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([$\w]+)"
    r"(\[\d*\])?(?:\s*=\s*(.*))?$",
    re.DOTALL,
)


def _initial(width: int, count: int, text: str | None, where: str) -> bytes:
    values = [part.strip() for part in (text or "").strip("{} ").split(",") if part.strip()]
    numbers = [_number(value) for value in values]
    if None in numbers or "{" in (text or "").strip("{}"):
        raise PtxError(f"{where}: an initial value that is not a list of numbers")
    data = b"".join((n % (1 << (8 * width))).to_bytes(width, "little") for n in numbers if n is not None)
    return data.ljust(width * count, b"\0")


_FUNCTION = re.compile(r"^[ \t]*(?:\.(?:visible|weak|extern)\s+)*\.(entry|func)\b", re.MULTILINE)
_DECLARATION = re.compile(
    r"^[ \t]*(?:\.(?:visible|extern|weak|common)\s+)*\.(?:shared|global|const)\b[^;]*;", re.MULTILINE
)


class Module:
    """A PTX file. Its kernels are read when they are asked for: there are many, and a run launches few."""

    def __init__(self, text: str) -> None:
        cut = re.search(r"^\s*\.section", text, re.MULTILINE)  # the names of functions, for debuggers
        end = cut.start() if cut else len(text)
        target = re.search(r"^\.target\s+(\w+)", text, re.MULTILINE)
        self.target = target.group(1) if target else "?"
        self.files = {int(n): name for n, name in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.MULTILINE)}
        self.spans: dict[str, tuple[int, str, str]] = {}  # of kernels: line, header, body
        self.variables: dict[str, bytes] = {}  # of .global and .const
        self.dynamic: set[str] = set()
        self.shared: list[tuple[str, int, int]] = []
        self._kernels: dict[str, Kernel] = {}
        at = 0
        for match in _FUNCTION.finditer(text, 0, end):
            if match.start() < at:
                continue
            self._declare(text[at : match.start()])
            opening, semicolon = text.find("{", match.start()), text.find(";", match.start())
            if semicolon >= 0 and (opening < 0 or semicolon < opening):  # a declaration
                at = semicolon + 1
                continue
            at = text.index("\n}", opening) + 2
            if match.group(1) == "entry":  # a function is an error where it is called
                header = "\n".join(_COMMENT.sub("", line) for line in text[match.end() : opening].split("\n"))
                name = re.match(r"\s*([$\w]+)", header)
                assert name is not None
                line = text.count("\n", 0, opening) + 1
                self.spans[name.group(1)] = (line, header, text[opening + 1 : at - 1])
        self._declare(text[at:end])

    def _declare(self, text: str) -> None:
        for match in _DECLARATION.finditer(text):
            declaration = match.group().strip().rstrip(";").strip()
            parts = _VARIABLE.match(declaration)
            if not parts:
                raise PtxError(f"a declaration that is not understood: {declaration}")
            space, alignment, type_, name, count, initial = parts.groups()
            width, size = WIDTHS[type_], int((count or "[1]").strip("[]") or 0)
            if space != "shared":
                if ".extern" not in declaration:
                    self.variables[name] = _initial(width, size, initial, name)
            elif ".extern" in declaration or count == "[]":
                self.dynamic.add(name)
            else:
                self.shared.append((name, int(alignment or width), width * size))

    def kernel(self, name: str) -> Kernel:
        if name not in self._kernels:
            line, header, body = self.spans[name]
            statements = list(_statements(list(enumerate(body.split("\n"), line)), self.files))
            self._kernels[name] = _Builder(name, line, header, self).build(statements)
        return self._kernels[name]


# ------------------------------------------------------------------------------------------------------------ building

Register = tuple[int, int]  # row and width; a predicate's width is 0


def _registers(i: Instruction, predicates: int) -> tuple[int, int]:
    """What an instruction reads and writes, as bits: of rows, and from ``predicates`` on of predicates."""
    name, x = i.operation, i.x
    to: list[int] = []
    of: list[int] = []
    p_to: list[int] = []
    p_of = [i.predicate] if i.predicate >= 0 else []
    if i.kind == BARRIER:
        of = x[1:3]
        if i.sign:
            p_of.append(x[3])
            (to if i.sign == 3 else p_to).append(x[0])
    elif i.kind == BRANCH_INDEXED:
        of = x[:1]
    elif name in ("nop", "trap") or i.kind != PLAIN:
        pass
    elif name.startswith("ld."):
        to, of = x[: i.n], x[i.n :]
    elif name.startswith(("st.", "stmatrix", "bar.warp")):
        of = x
    elif name == "cp.async":
        of = x[: 2 + i.sign]
    elif name.startswith("cp.async"):
        pass
    elif name.startswith("mov.unpack"):
        to, of = x[:-1], x[-1:]
    elif name.startswith("mma."):
        to, of = x[:4], x[4:]
    elif name == "ldmatrix":
        to, of = x[: i.n], x[i.n :]
    elif name.startswith(("setp", "testp", "isspacep")):
        p_to, of = x[:1], x[1:]
    elif name == "set.b32.pred":
        to, p_of = x[:1], [*p_of, x[1]]
    elif name.endswith(".pred"):
        p_to, p_of = x[:1], [*p_of, *x[1:]]
    elif name.startswith("selp"):
        to, p_of = x[:1], [*p_of, x[3]]  # of its two numbers one is not used, and compilers select nothing from nothing
    elif name == "vote.sync":
        of, p_of = x[2:], [*p_of, x[1]]
        (to if i.sign == 3 else p_to).append(x[0])
    else:
        to, of = x[:1], x[1:]
        if name == "shfl.sync" and i.target >= 0:
            p_to = [i.target]

    def bits(rows: Sequence[int], numbers: Sequence[int]) -> int:
        found = 0
        for row in rows:
            found |= 1 << row
        for number in numbers:
            found |= 1 << (predicates + number)
        return found

    return bits(of, p_of), bits(to, p_to)


def _find_meetings(kernel: Kernel) -> None:
    """Where the lanes that each branch parts meet: the first instruction that every way from it to the end comes by.

    Ways on which lanes leave early are left out: the others meet without them.
    """
    code = kernel.code
    starts = {0} | {n + 1 for n, i in enumerate(code) if i.kind in (BRANCH, BRANCH_INDEXED, EXIT)}
    starts |= {i.target for i in code if i.kind == BRANCH} | set(kernel.tables)
    order = sorted(start for start in starts if start < len(code))
    ends = dict(zip(order, [*order[1:], len(code)], strict=True))
    final = order[-1]  # the exit after the last instruction, and what leads to it
    leaves = [n for n, i in enumerate(code[:-1]) if i.kind == EXIT]
    last_leave = leaves[-1] if leaves else -1

    def after(start: int) -> list[int]:
        end = ends[start]
        last = code[end - 1]
        goes_on = last.predicate >= 0 or last.kind not in (BRANCH, BRANCH_INDEXED, EXIT)
        found = [end] if goes_on and end < len(code) else []
        if last.kind == BRANCH:
            found.append(last.target)
        elif last.kind == BRANCH_INDEXED:
            found += kernel.tables[last.target : last.target + last.n]
        elif last.kind == EXIT and end - 1 == last_leave and not found:
            found.append(final)
        return found

    next_ = {start: after(start) for start in order}
    before: dict[int, list[int]] = {start: [] for start in order}
    for start, followers in next_.items():
        for follower in followers:
            before[follower].append(start)
    # Blocks from the end backwards, so that what comes after a block is numbered before it (Cooper, Harvey, Kennedy).
    numbers: dict[int, int] = {}
    stack, seen, finished = [(final, iter(before[final]))], {final}, []
    while stack:
        block, rest = stack[-1]
        for other in rest:
            if other not in seen:
                seen.add(other)
                stack.append((other, iter(before[other])))
                break
        else:
            finished.append(block)
            stack.pop()
    numbers = {block: n for n, block in enumerate(finished)}
    meeting = {final: final}
    changed = True
    while changed:
        changed = False
        for block in reversed(finished[:-1]):
            found = -1
            for follower in next_[block]:
                if follower not in meeting:
                    continue
                if found < 0:
                    found = follower
                    continue
                other = follower
                while found != other:
                    while numbers[found] < numbers[other]:
                        found = meeting[found]
                    while numbers[other] < numbers[found]:
                        other = meeting[other]
            if found >= 0 and meeting.get(block) != found:
                meeting[block] = found
                changed = True
    for start in order:
        branch = code[ends[start] - 1]
        if branch.kind in (BRANCH, BRANCH_INDEXED) and start in meeting and meeting[start] != final:
            branch.meets = meeting[start]


class _Builder:
    """One kernel."""

    def __init__(self, name: str, line: int, header: str, module: Module) -> None:
        self.kernel = kernel = Kernel(name, line)
        self.module = module
        self.dynamic = module.dynamic
        self.scopes: list[dict[str, Register]] = [{}]
        self.constant_rows: dict[tuple[int, int | str], int] = {}
        self.special_rows: dict[str, int] = {}
        self.labels: dict[str, int] = {}
        self.tables: dict[str, list[str]] = {}
        self.symbols: dict[str, tuple[str, int]] = {}  # name -> space, offset
        self.trash = self.row(8)
        self.smallest = 4
        offset = 0
        inside = re.search(r"[$\w]+\s*\((.*)\)", header, re.DOTALL)
        for part in _operands(inside.group(1)) if inside else []:
            match = re.search(
                r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)(?:\s+\.ptr(?:\s+\.\w+)*(?:\s+\.align\s+\d+)?)?\s+"
                r"([$\w]+)(?:\[(\d+)\])?",
                part,
            )
            if not match:
                raise PtxError(f"line {line}: a parameter that is not understood: {part}")
            alignment, type_, parameter, count = match.groups()
            size = WIDTHS[type_] * int(count or 1)
            offset = _aligned(offset, int(alignment or WIDTHS[type_]))
            kernel.parameters.append((parameter, offset, size))
            self.symbols[parameter] = ("param", offset)
            offset += size
        kernel.parameter_bytes = offset
        if match := re.search(r"\.maxntid\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?", header):
            kernel.max_threads = 1
            for extent in match.groups():
                kernel.max_threads *= int(extent or 1)
        if match := re.search(r"\.minnctapersm\s+(\d+)", header):
            kernel.min_blocks = int(match.group(1))

    # Registers

    def row(self, width: int) -> int:
        kernel = self.kernel
        if width == 8 and kernel.rows % 2:
            kernel.rows += 1  # 64-bit rows begin at a multiple of 256 bytes
        row = kernel.rows
        kernel.rows += 2 if width == 8 else 1
        return row

    def predicate(self) -> int:
        self.kernel.predicates += 1
        return self.kernel.predicates - 1

    def error(self, what: str) -> PtxError:
        return PtxError(f"line {self.statement.line}: {what}: {self.statement.text}")

    def declare(self, text: str) -> None:
        match = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", text, re.DOTALL)
        if not match or (match.group(1) != "pred" and match.group(1) not in WIDTHS):
            raise self.error("registers of an unknown type")
        type_, names = match.groups()
        for name in _operands(names):
            many = re.fullmatch(r"(%?[$\w]+)<(\d+)>", name)
            for each in [f"{many.group(1)}{k}" for k in range(int(many.group(2)))] if many else [name]:
                # Rows are given out when a register is first named: of most there are none.
                self.scopes[-1][each] = (-1, 0 if type_ == "pred" else WIDTHS[type_])

    def register(self, name: str) -> Register:
        for scope in reversed(self.scopes):
            if name in scope:
                row, width = scope[name]
                if row < 0:
                    row = self.row(width) if width else self.predicate()
                    scope[name] = (row, width)
                return row, width
        raise self.error(f"the unknown register or symbol {name}")

    def constant(self, width: int, value: int | str) -> int:
        wide = 8 if width == 8 else 4
        if not isinstance(value, str):
            value %= 1 << (8 * wide)
        key = (wide, value)
        if key not in self.constant_rows:
            row = self.constant_rows[key] = self.row(wide)
            if isinstance(value, str):
                self.kernel.constants.append((row, 3 if value in self.module.variables else 2, value))
            else:
                self.kernel.constants.append((row, 1 if wide == 8 else 0, value))
        return self.constant_rows[key]

    def address_of(self, symbol: str, offset: int = 0) -> tuple[int, str] | None:
        """The row of a symbol's address, and its space."""
        if symbol in self.symbols:
            space, at = self.symbols[symbol]
            if space == "param":
                return self.constant(8, f"param+{at + offset}"), space
            return self.constant(8, at + offset), space
        if symbol in self.dynamic:
            return self.constant(8, self.dynamic_offset() + offset), "shared"
        if symbol in self.module.variables:
            return self.constant(8, symbol), "global"
        return None

    def dynamic_offset(self) -> int:
        return _aligned(self.kernel.static_shared, 16)

    def source(self, text: str, type_: str) -> int:
        """The row of a source operand."""
        width = WIDTHS[type_]
        if text in SPECIALS:
            if text not in self.special_rows:
                row = self.special_rows[text] = self.row(4)
                self.kernel.specials.append((row, SPECIALS[text]))
            row = self.special_rows[text]
            if width != 8:
                return row
            wide = self.row(8)
            self.emit("cvt.u64.u32", [wide, row], hidden=1)
            return wide
        value = _number(text)
        if value is not None:
            return self.constant(width, value % (1 << (8 * width)))
        match = re.fullmatch(r"([$\w]+)(?:\+(-?\d+))?", text)
        if match and (found := self.address_of(match.group(1), int(match.group(2) or 0))):
            if width == 8:
                return found[0]
            return self.constant(4, next(v for r, _, v in self.kernel.constants if r == found[0]))
        row, has = self.register(text)
        if has == 0 or (has < 8) != (width < 8):
            if has == 8:  # the lower half
                narrow = self.row(4)
                self.emit("cvt.u32.u64", [narrow, row], hidden=1)
                return narrow
            raise self.error(f"{text} is not of type {type_}")
        return row

    def destination(self, text: str) -> int:
        return self.trash if text == "_" else self.register(text)[0]

    def predicate_source(self, text: str) -> int:
        value = _number(text)
        if value is not None:
            return 1 if value else 0
        if text.startswith("!"):
            inverse = self.predicate()
            self.emit("not.pred", [inverse, self.predicate_source(text[1:])], hidden=1)
            return inverse
        return self.register(text)[0]

    def address(self, text: str) -> tuple[int, int, int, str]:
        """Row, whether it is 64 bits wide, offset and, where a symbol tells it, space of ``[base+offset]``."""
        match = re.fullmatch(r"\[\s*(%?[$\w]+(?:\.\w+)?)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if not match:
            raise self.error(f"an address that is not understood: {text}")
        base, offset = match.group(1), _number(match.group(2) or "0")
        assert offset is not None
        if found := self.address_of(base):
            return found[0], 1, offset, found[1]
        value = _number(base)
        if value is not None:
            return self.constant(8, value), 1, offset, ""
        row, width = self.register(base)
        return row, int(width == 8), offset, ""

    # Instructions

    def emit(self, operation: str, x: Sequence[int], **rest: int) -> Instruction:
        instruction = Instruction(self.statement, operation, x=list(x), **rest)  # type: ignore[arg-type]
        if not rest.get("hidden"):
            instruction.predicate, instruction.negate = self.guard
        self.kernel.code.append(instruction)
        return instruction

    def build(self, statements: Sequence[Statement]) -> Kernel:
        kernel = self.kernel
        for name, alignment, size in self.module.shared:
            if any(re.search(rf"(?<![\w$]){re.escape(name)}(?![\w$])", s.text) for s in statements):
                self.place_shared(name, alignment, size)
        for self.statement in statements:
            if _VARIABLE.match(self.statement.text):
                self.variable(self.statement.text)
        for self.statement in statements:
            text = self.statement.text
            self.guard = (-1, 0)
            if text == "{":
                self.scopes.append({})
            elif text == "}":
                if len(self.scopes) > 1:
                    self.scopes.pop()
            elif text.endswith(":"):
                self.labels[text[:-1]] = len(kernel.code)
            elif text.startswith(".reg"):
                self.declare(text)
            elif text.startswith(".branchtargets"):
                label = next(name for name, at in reversed(self.labels.items()) if at == len(kernel.code))
                self.tables[label] = _operands(text.split(None, 1)[1])
            elif text.startswith((".pragma", ".shared", ".local")):
                pass
            elif text.startswith("."):
                raise self.error("an unknown directive")
            else:
                self.instruction(text)
        self.guard = (-1, 0)
        self.emit("nop", [], kind=EXIT, hidden=1)
        self.check_registers()
        for instruction in kernel.code:
            if instruction.tables:
                instruction.target = len(kernel.tables)
                kernel.tables += [self.labels[name] for name in instruction.tables]
            elif instruction.label is not None:
                if instruction.label not in self.labels:
                    raise PtxError(f"line {instruction.statement.line}: the unknown label {instruction.label}")
                instruction.target = self.labels[instruction.label]
        _find_meetings(kernel)
        kernel.granule = {1: 0, 2: 1, 4: 2}[self.smallest]
        kernel.rows = _aligned(kernel.rows, 2)
        return kernel

    def check_registers(self) -> None:
        """Lets the executor watch the registers that on some way through are read before they are written."""
        kernel, code = self.kernel, self.kernel.code
        given = {row for row, *_ in (*kernel.constants, *kernel.specials)} | {self.trash}
        count = kernel.rows  # predicates are numbered after the rows
        used = [_registers(i, count) for i in code]
        known = sum(1 << row for row in given) | 3 << count
        starts = {0, *self.labels.values()}
        starts |= {n + 1 for n, i in enumerate(code[:-1]) if i.kind in (BRANCH, BRANCH_INDEXED, EXIT)}
        order = sorted(start for start in starts if start < len(code))
        ends = dict(zip(order, [*order[1:], len(code)], strict=True))

        def after(start: int) -> list[int]:
            last = code[ends[start] - 1]
            found = [self.labels[name] for name in last.tables]
            if last.label is not None and last.label in self.labels:
                found.append(self.labels[last.label])
            goes_on = last.kind not in (BRANCH, BRANCH_INDEXED, EXIT) or last.predicate >= 0
            return found + ([ends[start]] if goes_on and ends[start] in ends else [])

        written = {}
        for start in order:
            written[start] = 0
            for n in range(start, ends[start]):
                if code[n].predicate < 0:
                    written[start] |= used[n][1]
        at: dict[int, int] = {0: known}  # what is written for sure where a block begins
        queue = [0]
        while queue:
            start = queue.pop()
            out = at[start] | written[start]
            for next_ in after(start):
                if next_ not in at or at[next_] & ~out:
                    at[next_] = at.get(next_, out) & out
                    queue.append(next_)
        watched = 0
        for start, state in at.items():
            for n in range(start, ends[start]):
                watched |= used[n][0] & ~state
                if code[n].predicate < 0:
                    state |= used[n][1]
        if not watched:
            return
        kernel.checked = [n for n in range(watched.bit_length()) if watched >> n & 1]
        new: list[Instruction] = []
        moved = []
        for i, (reads, writes) in zip(code, used, strict=True):
            moved.append(len(new))
            guard = dict(predicate=i.predicate, negate=i.negate, hidden=1)
            for which, name in ((reads, "check.written"), (writes, "mark.written")):
                if name == "mark.written":
                    new.append(i)
                new += [
                    Instruction(i.statement, name, x=[n], **guard)
                    for n in kernel.checked
                    if which >> n & 1  # type: ignore[arg-type]
                ]
        moved.append(len(new))
        kernel.code = new
        self.labels = {name: moved[n] for name, n in self.labels.items()}

    def variable(self, text: str) -> None:
        match = _VARIABLE.match(text)
        assert match is not None
        space, alignment, type_, name, count, _ = match.groups()
        size = WIDTHS[type_] * int((count or "[1]").strip("[]") or 0)
        if space == "shared":
            self.place_shared(name, int(alignment or WIDTHS[type_]), size)
        elif space == "local":
            kernel = self.kernel
            at = _aligned(kernel.local_bytes, int(alignment or WIDTHS[type_]))
            self.symbols[name] = ("local", at)
            kernel.local_bytes = _aligned(at + size, 16)
        else:
            raise self.error("a variable in an unexpected place")

    def place_shared(self, name: str, alignment: int, size: int) -> None:
        at = _aligned(self.kernel.static_shared, alignment)
        self.symbols[name] = ("shared", at)
        self.kernel.static_shared = at + size

    def instruction(self, text: str) -> None:
        match = re.match(r"(?:@(!?)(%?[$\w]+)\s+)?([a-z][\w.:]*)\s*(.*)$", text, re.DOTALL)
        if not match:
            raise self.error("not an instruction")
        negate, guard, opcode, rest = match.groups()
        if guard:
            self.guard = (self.register(guard)[0], int(bool(negate)))
        words = opcode.replace("::", "__").split(".")
        operands = _operands(rest)
        handler = getattr(self, "op_" + words[0], None)
        if handler is None:
            raise self.error(f"the unknown opcode {opcode}")
        self.opcode = opcode
        try:
            handler(words[1:], operands)
        except (ValueError, KeyError, IndexError) as error:  # types or operands that no handler knows
            raise self.unknown() from error

    def unknown(self) -> PtxError:
        return self.error(f"the unknown opcode {self.opcode}")

    @staticmethod
    def types(words: Sequence[str]) -> list[str]:
        return [word for word in words if word in WIDTHS or word == "pred"]

    def simple(self, name: str, operands: Sequence[str], type_: str, **rest: int) -> None:
        sources = [self.source(text, type_) for text in operands[1:]]
        self.emit(name, [self.destination(operands[0]), *sources], **rest)

    def arithmetic(self, name: str, words: list[str], operands: Sequence[str]) -> None:
        """Of integers, floats and halves; float32's rounding and flushing have operations of their own."""
        (type_,) = self.types(words)
        flags = [word for word in words if word != type_]
        base = type_.removesuffix("x2")
        if base in ("f16", "bf16"):
            if set(flags) - {"rn", "NaN", "relu", "approx", "ftz"}:
                raise self.unknown()
            middle = "".join(f".{word}" for word in flags if word in ("NaN", "relu", "approx"))
            x = [self.destination(operands[0]), *(self.source(text, type_) for text in operands[1:])]
            self.emit(f"{name}{middle}.{type_}", x + [self.trash] * (4 - len(x)))
        elif type_ in ("f32", "f64"):
            if set(flags) - {"rn", "rz", "rm", "rp", "ftz", "sat", "NaN", "approx", "full"}:
                raise self.unknown()
            rounding = next((ROUNDINGS[word] for word in flags if word in ROUNDINGS), 0)
            sign = ("ftz" in flags) + 2 * ("sat" in flags)
            approximate = "approx" in flags or "full" in flags
            x = [self.destination(operands[0]), *(self.source(text, type_) for text in operands[1:])]
            if "NaN" in flags:
                self.emit(f"{name}.NaN.{type_}", x)
            elif approximate and type_ == "f32":
                x += [x[-1]] * (4 - len(x))
                self.emit(f"{name}.approx.f32" if "approx" in flags else f"{name}.x.f32", x, sign=sign)
            elif (rounding or sign) and type_ == "f32":
                x += [x[-1]] * (4 - len(x))
                self.emit(f"{name}.x.f32", x, sign=sign, imm=rounding)
            elif rounding and name == "fma":
                self.emit("fma.ru.f64", x)  # of the slow path of a division; a unit in the last place more or less
            elif rounding or approximate:
                raise self.unknown()
            else:
                self.emit(f"{name}.{type_}", x)
        else:
            if flags:
                raise self.unknown()
            bits = {"add", "sub", "neg"}
            type_ = f"b{8 * WIDTHS[type_]}" if name in bits else type_
            self.simple(f"{name}.{type_}", operands, type_)

    def _arithmetic(name: str):  # type: ignore[no-untyped-def, misc]
        return lambda self, words, operands: self.arithmetic(name, words, operands)

    op_add, op_sub, op_div, op_min, op_max, op_neg, op_abs, op_fma, op_rcp, op_sqrt, op_rsqrt = map(
        _arithmetic, ("add", "sub", "div", "min", "max", "neg", "abs", "fma", "rcp", "sqrt", "rsqrt")
    )
    op_ex2, op_lg2, op_sin, op_cos, op_tanh, op_rem, op_sad, op_copysign = map(
        _arithmetic, ("ex2", "lg2", "sin", "cos", "tanh", "rem", "sad", "copysign")
    )

    def op_mul(self, words: list[str], operands: list[str]) -> None:
        how = words[0]
        if how not in ("lo", "hi", "wide"):
            return self.arithmetic("mul", words, operands)
        type_ = words[1]
        name = f"mul.lo.b{8 * WIDTHS[type_]}" if how == "lo" else f"mul.{how}.{type_}"
        self.simple(name, operands, type_)
        return None

    def op_mad(self, words: list[str], operands: list[str]) -> None:
        how = words[0]
        if how not in ("lo", "hi", "wide"):
            return self.arithmetic("fma", words, operands)
        if len(words) != 2:
            raise self.unknown()
        type_ = words[1]
        if how == "wide":
            wide = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}[type_]
            x = [self.source(text, t) for text, t in zip(operands[1:], (type_, type_, wide), strict=True)]
            self.emit(f"mad.wide.{type_}", [self.destination(operands[0]), *x])
        else:
            self.simple(f"mad.lo.b{8 * WIDTHS[type_]}" if how == "lo" else f"mad.hi.{type_}", operands, type_)
        return None

    def op_mul24(self, words: list[str], operands: list[str]) -> None:
        if words[0] != "lo" or words[1] != "u32":
            raise self.unknown()
        self.simple("mul24.lo.b32", operands, "u32")

    def op_mad24(self, words: list[str], operands: list[str]) -> None:
        if words[0] != "lo" or words[1] != "u32":
            raise self.unknown()
        self.simple("mad24.lo.b32", operands, "u32")

    def bitwise(self, name: str, words: list[str], operands: list[str]) -> None:
        if words[0] == "pred":
            x = [self.register(operands[0])[0], *(self.predicate_source(text) for text in operands[1:])]
            self.emit(f"{name}.pred", x)
        else:
            self.simple(f"{name}.{words[0]}", operands, words[0])

    def _bitwise(name: str):  # type: ignore[no-untyped-def, misc]
        return lambda self, words, operands: self.bitwise(name, words, operands)

    op_and, op_or, op_xor, op_not, op_cnot = map(_bitwise, ("and", "or", "xor", "not", "cnot"))

    def shift(self, name: str, words: list[str], operands: list[str]) -> None:
        type_ = words[0]
        target = f"b{8 * WIDTHS[type_]}" if name == "shl" else type_.replace("b", "u")
        x = [self.destination(operands[0]), self.source(operands[1], type_), self.source(operands[2], "u32")]
        self.emit(f"{name}.{target}", x)

    def op_shl(self, words: list[str], operands: list[str]) -> None:
        self.shift("shl", words, operands)

    def op_shr(self, words: list[str], operands: list[str]) -> None:
        self.shift("shr", words, operands)

    def op_shf(self, words: list[str], operands: list[str]) -> None:
        self.simple("shf." + ".".join(words), operands, "b32")

    def op_prmt(self, words: list[str], operands: list[str]) -> None:
        modes = {"b32": 0, "f4e": 1, "b4e": 2, "rc8": 3, "ecl": 4, "ecr": 5, "rc16": 6}
        self.simple("prmt.b32", operands, "b32", imm=modes[words[-1]])

    def op_lop3(self, words: list[str], operands: list[str]) -> None:
        table = _number(operands[4])
        if words != ["b32"] or table is None:
            raise self.unknown()
        self.simple("lop3.b32", operands[:4], "b32", imm=table)

    def op_dp4a(self, words: list[str], operands: list[str]) -> None:
        self.simple("dp.b32", operands, "b32", imm=4, sign=(words[0] == "s32") + 2 * (words[1] == "s32"))

    def op_dp2a(self, words: list[str], operands: list[str]) -> None:
        half = {"lo": 2, "hi": 3}[words[0]]
        self.simple("dp.b32", operands, "b32", imm=half, sign=(words[1] == "s32") + 2 * (words[2] == "s32"))

    def op_bfe(self, words: list[str], operands: list[str]) -> None:
        x = [self.source(text, t) for text, t in zip(operands[1:], (words[0], "u32", "u32"), strict=True)]
        self.emit(f"bfe.{words[0]}", [self.destination(operands[0]), *x])

    def op_bfi(self, words: list[str], operands: list[str]) -> None:
        types = (words[0], words[0], "u32", "u32")
        x = [self.source(text, t) for text, t in zip(operands[1:], types, strict=True)]
        self.emit(f"bfi.{words[0]}", [self.destination(operands[0]), *x])

    def op_bfind(self, words: list[str], operands: list[str]) -> None:
        self.simple("bfind." + ".".join(words), operands, words[-1])

    def op_popc(self, words: list[str], operands: list[str]) -> None:
        self.simple(f"popc.{words[0]}", operands, words[0])

    def op_clz(self, words: list[str], operands: list[str]) -> None:
        self.simple(f"clz.{words[0]}", operands, words[0])

    def op_brev(self, words: list[str], operands: list[str]) -> None:
        self.simple(f"brev.{words[0]}", operands, words[0])

    def op_selp(self, words: list[str], operands: list[str]) -> None:
        type_ = words[0]
        x = [self.destination(operands[0]), self.source(operands[1], type_), self.source(operands[2], type_)]
        self.emit(f"selp.b{8 * WIDTHS[type_]}", [*x, self.predicate_source(operands[3])])

    def op_setp(self, words: list[str], operands: list[str]) -> None:
        comparison, type_ = words[0], words[-1]
        combine = next((word for word in words[1:-1] if word in ("and", "or", "xor")), None)
        if set(words[1:-1]) - {"and", "or", "xor", "ftz"} or "ftz" in words:
            raise self.unknown()
        if type_.startswith("b") and type_ != "bf16":
            type_ = type_.replace("b", "u")
        comparison = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(comparison, comparison)
        if type_ in ("f16x2", "bf16x2"):
            raise self.unknown()
        targets = [name.strip() for name in operands[0].split("|")]
        x = [self.source(text, type_) for text in operands[1:3]]
        third = self.predicate_source(operands[3]) if combine else None
        to = [self.predicate() if name == "_" else self.register(name)[0] for name in targets]
        first = self.predicate() if combine or len(to) > 1 else to[0]
        self.emit(f"setp.{comparison}.{type_}", [first, *x])
        if first is to[0]:
            return
        parts = []
        if len(to) > 1:
            opposite = self.predicate()
            parts.append(("not.pred", [opposite, first]))
            parts.append((f"{combine}.pred", [to[1], opposite, third]) if combine else ("mov.pred", [to[1], opposite]))
        parts.append((f"{combine}.pred", [to[0], first, third]) if combine else ("mov.pred", [to[0], first]))
        for name, operand in parts:
            instruction = self.emit(name, operand, hidden=1)  # type: ignore[arg-type]
            instruction.predicate, instruction.negate = self.guard

    def op_set(self, words: list[str], operands: list[str]) -> None:
        comparison, to, type_ = words[0], words[-2], words[-1]
        if len(words) != 3 or to not in ("u32", "s32", "b32", "f32"):
            raise self.unknown()
        predicate = self.predicate()
        type_ = type_ if type_ == "bf16" else type_.replace("b", "u")
        x = [self.source(text, type_) for text in operands[1:3]]
        self.emit(f"setp.{comparison}.{type_}", [predicate, *x])
        value = 0x3F800000 if to == "f32" else 0xFFFFFFFF
        instruction = self.emit("set.b32.pred", [self.destination(operands[0]), predicate], hidden=1, imm=value)
        instruction.predicate, instruction.negate = self.guard

    def op_testp(self, words: list[str], operands: list[str]) -> None:
        self.emit(f"testp.{words[0]}.{words[1]}", [self.register(operands[0])[0], self.source(operands[1], words[1])])

    def op_mov(self, words: list[str], operands: list[str]) -> None:
        type_ = words[0]
        if type_ == "pred":
            self.emit("mov.pred", [self.register(operands[0])[0], self.predicate_source(operands[1])])
            return
        bits = 8 * WIDTHS[type_]
        if operands[0].startswith("{"):
            to = [self.destination(name) for name in _operands(operands[0].strip("{} "))]
            self.emit(f"mov.unpack{len(to)}.b{bits}", [*to, self.source(operands[1], type_)])
        elif operands[1].startswith("{"):
            parts = _operands(operands[1].strip("{} "))
            part = f"b{bits // len(parts)}"
            sources = [self.source(name, part) for name in parts]
            self.emit(f"mov.pack{len(parts)}.b{bits}", [self.destination(operands[0]), *sources])
        else:
            self.simple(f"mov.b{bits}", operands, type_)

    def op_cvta(self, words: list[str], operands: list[str]) -> None:
        space = next((word for word in words if word in ("global", "shared", "local", "const", "param")), "global")
        if words[-1] not in ("u64", "s64", "b64"):
            raise self.unknown()
        if space in ("shared", "local"):
            to = "to." if words[0] == "to" else ""
            self.simple(f"cvta.{to}{space}.b64", operands, "u64")
        else:
            self.simple("mov.b64", operands, "u64")

    def op_isspacep(self, words: list[str], operands: list[str]) -> None:
        if words != ["shared"]:
            raise self.unknown()
        self.emit("isspacep.shared", [self.register(operands[0])[0], self.source(operands[1], "u64")])

    def op_cvt(self, words: list[str], operands: list[str]) -> None:
        to, from_ = self.types(words)
        flags = [word for word in words if word not in (to, from_) or word not in WIDTHS]
        if set(flags) - {*ROUNDINGS, "ftz", "sat", "relu", "satfinite"}:
            raise self.unknown()
        rounding = next((word for word in flags if word in ROUNDINGS), "rn")
        sign = ("ftz" in flags) + 2 * ("sat" in flags) + 4 * ("relu" in flags) + 8 * ("satfinite" in flags)
        x = [self.destination(operands[0]), *(self.source(text, from_) for text in operands[1:])]
        floats = {"f16", "bf16", "f32", "f64", "f16x2", "bf16x2"}
        to_float, from_float = to in floats, from_ in floats
        if not to_float and not from_float:
            to, from_ = (type_.replace("b", "u") for type_ in (to, from_))
            # Into a register that is wider, the result is extended by its own sign.
            name = f"cvt.sat.{to}.{from_}" if "sat" in flags else f"cvt.{to}.{from_}"
            wide = operands[0] != "_" and self.register(operands[0])[1] == 8
            if wide and WIDTHS[to] < 8:
                narrow = self.row(4)
                self.emit(name, [narrow, x[1]])
                instruction = self.emit(f"cvt.{'s' if to[0] == 's' else 'u'}64.{to}", [x[0], narrow], hidden=1)
                instruction.predicate, instruction.negate = self.guard
            elif to in ("u8", "u16"):
                self.emit(f"cvt.u32.{from_}" if "sat" not in flags else name, x)
                width = 255 if to == "u8" else 65535
                instruction = self.emit("and.b32", [x[0], x[0], self.constant(4, width)], hidden=1)
                instruction.predicate, instruction.negate = self.guard
            else:
                self.emit(name, x)
        elif to == from_ and to in ("f32", "f64") and any(word in ROUNDINGS and word.endswith("i") for word in flags):
            self.emit(f"cvt.whole.{to}.{to}", x, sign=sign, imm=ROUNDINGS[rounding])
        elif not from_float and to in ("f32", "f64") and (rounding != "rn" or "sat" in flags):
            raise self.unknown()
        else:
            # Between floats of one type, and to wider ones, nothing is rounded.
            self.emit(f"cvt.{to}.{from_}", x, sign=sign, imm=ROUNDINGS[rounding])

    # Memory

    def access(self, store: bool, words: list[str], operands: list[str]) -> None:
        type_ = words[-1]
        spaces = {"global", "shared", "local", "param", "const"}
        space = next((w.split("__")[0] for w in words if w.split("__")[0] in spaces), "generic")
        vector = next((int(w[1:]) for w in words if re.fullmatch(r"v[248]", w)), 1)
        if type_ not in WIDTHS or "sys" in words or "mmio" in words:
            raise self.unknown()
        if "L2__cache_hint" in words:
            operands = operands[:-1]
        place, value = (operands[0], operands[1]) if store else (operands[1], operands[0])
        row, wide, offset, symbol = self.address(place)
        if space == "const" or (space == "generic" and symbol == "global"):
            space = "global"
        if symbol and symbol != space and space != "global":
            raise self.error(f"an address in {symbol}")
        if not wide and space != "shared":
            raise self.error("a 32-bit address")
        names = _operands(value.strip("{} "))
        if len(names) != vector:
            raise self.error(f"{len(names)} elements")
        size = WIDTHS[type_]
        if space in ("shared", "generic"):
            self.smallest = min(self.smallest, size)
        sign = int(type_[0] == "s")
        if store:
            x = [self.source(name, type_) for name in names]
        else:
            x = [self.destination(name) for name in names]
            widths = {self.register(name)[1] for name in names if name != "_"}
            if size < 8 and 8 in widths:
                if len(widths) > 1:
                    raise self.unknown()
                sign |= 2
        name = f"{'st' if store else 'ld'}.{space}.{size}"
        self.emit(name, [*x, row], n=vector, size=size, sign=sign, wide=wide, imm=offset)

    def op_ld(self, words: list[str], operands: list[str]) -> None:
        self.access(False, words, operands)

    def op_st(self, words: list[str], operands: list[str]) -> None:
        self.access(True, words, operands)

    def op_ldu(self, words: list[str], operands: list[str]) -> None:
        self.access(False, words, operands)

    def op_prefetch(self, words: list[str], operands: list[str]) -> None:
        self.emit("nop", [])

    op_prefetchu = op_discard = op_prefetch

    def op_membar(self, words: list[str], operands: list[str]) -> None:
        self.emit("nop", [])  # every access is seen at once; order between threads is what barriers make

    op_fence = op_membar

    def op_cp(self, words: list[str], operands: list[str]) -> None:
        if words[0] != "async" or "bulk" in words or "mbarrier" in words:
            raise self.unknown()
        self.needs(80)
        if words[1:2] == ["commit_group"]:
            self.emit("cp.async.commit_group", [])
        elif words[1:2] == ["wait_group"]:
            self.emit("cp.async.wait_group", [], imm=_number(operands[0]) or 0)
        elif words[1:2] == ["wait_all"]:
            self.emit("cp.async.wait_group", [], sign=1)
        else:
            if "L2__cache_hint" in words:
                operands = operands[:-1]
            to, to_wide, to_offset, _ = self.address(operands[0])
            row, wide, offset, _ = self.address(operands[1])
            size = _number(operands[2])
            if size not in (4, 8, 16) or (words[1] == "cg" and size != 16) or not wide:
                raise self.unknown()
            given, sized = self.trash, 0
            if len(operands) > 3:
                if operands[3].lstrip("!") in self.scopes[0] and self.register(operands[3].lstrip("!"))[1] == 0:
                    given = self.row(4)  # ignore-src: nothing is read where the predicate holds
                    zero, whole = self.constant(4, 0), self.constant(4, size)
                    self.emit("selp.b32", [given, zero, whole, self.predicate_source(operands[3])], hidden=1)
                else:
                    given = self.source(operands[3], "u32")
                sized = 1
            self.emit("cp.async", [to, row, given], size=size, sign=sized, wide=to_wide, imm=to_offset, target=offset)

    # Matrices

    def needs(self, architecture: int) -> None:
        has = re.match(r"sm_(\d+)", self.module.target)
        if not has or int(has.group(1)) < architecture:
            raise self.error(f"{self.module.target} has no {self.opcode}, which begins with sm_{architecture}")

    def tuple_of(self, text: str, count: int) -> list[str]:
        names = _operands(text.strip("{} "))
        if len(names) != count:
            raise self.error(f"{len(names)} registers of {count}")
        return names

    def op_mma(self, words: list[str], operands: list[str]) -> None:
        shape, type_ = words[2], words[6]
        steps = {"m16n8k8": 1, "m16n8k16": 2}[shape]
        types = ["f32", type_, type_, "f32"]
        if type_ not in ("f16", "bf16") or words != ["sync", "aligned", shape, "row", "col", *types]:
            raise self.unknown()
        self.needs(75 if (shape, type_) == ("m16n8k8", "f16") else 80)
        to, a, b, c = map(self.tuple_of, operands, (4, 2 * steps, steps, 4))
        x = [self.destination(name) for name in to]
        x += [self.source(name, "b32") for name in (*a, *b)] + [self.source(name, "f32") for name in c]
        self.emit(f"mma.{shape}.{type_}", x)

    def matrices(self, words: list[str], registers: str, place: str, architecture: int) -> tuple[list[str], int, Any]:
        """The registers, the row of the addresses, and what else there is to say of ldmatrix and stmatrix."""
        count = {"x1": 1, "x2": 2, "x4": 4}[words[3]]
        transposed = words[4] == "trans"
        space = words[4 + transposed].split("__")[0]
        if words[:3] != ["sync", "aligned", "m8n8"] or space != "shared" or words[5 + transposed :] != ["b16"]:
            raise self.unknown()
        self.needs(architecture)
        row, wide, offset, _ = self.address(place)
        return self.tuple_of(registers, count), row, dict(n=count, sign=int(transposed), wide=wide, imm=offset)

    def op_ldmatrix(self, words: list[str], operands: list[str]) -> None:
        to, row, rest = self.matrices(words, operands[0], operands[1], 75)
        self.emit("ldmatrix", [*map(self.destination, to), row], **rest)

    def op_stmatrix(self, words: list[str], operands: list[str]) -> None:
        of, row, rest = self.matrices(words, operands[1], operands[0], 90)
        self.emit("stmatrix", [*(self.source(name, "b32") for name in of), row], **rest)

    def op_movmatrix(self, words: list[str], operands: list[str]) -> None:
        if words != ["sync", "aligned", "m8n8", "trans", "b16"]:
            raise self.unknown()
        self.needs(75)
        self.simple("movmatrix", operands, "b32")

    # Control

    def op_bra(self, words: list[str], operands: list[str]) -> None:
        self.emit("nop", [], kind=BRANCH).label = operands[0]

    def op_brx(self, words: list[str], operands: list[str]) -> None:
        index = self.source(operands[0], "u32")
        instruction = self.emit("nop", [index], kind=BRANCH_INDEXED)
        if operands[1] not in self.tables:
            raise self.error(f"the unknown table {operands[1]}")
        instruction.tables = self.tables[operands[1]]
        instruction.n = len(instruction.tables)

    def op_ret(self, words: list[str], operands: list[str]) -> None:
        self.emit("nop", [], kind=EXIT)

    op_exit = op_ret

    def op_trap(self, words: list[str], operands: list[str]) -> None:
        self.emit("trap", [])

    def op_bar(self, words: list[str], operands: list[str]) -> None:
        if words[0] in ("cta", "warp"):
            scope, words = words[0], words[1:]
        else:
            scope = "cta"
        if scope == "warp":
            self.emit("bar.warp.sync", [self.source(operands[0], "b32")])
            return
        what = words[0]
        zero = self.constant(4, 0)
        if what in ("sync", "arrive"):
            number = self.source(operands[0], "u32")
            count = self.source(operands[1], "u32") if len(operands) > 1 else zero
            self.emit("nop", [zero, number, count], kind=BARRIER, n=int(what == "arrive"))
        elif what == "red":
            kind = {"and": 1, "or": 2, "popc": 3}[words[1]]
            to = self.destination(operands[0]) if kind == 3 else self.register(operands[0])[0]
            number = self.source(operands[1], "u32")
            count = self.source(operands[2], "u32") if len(operands) > 3 else zero
            predicate = operands[-1]
            x = [to, number, count, self.predicate_source(predicate.lstrip("!"))]
            self.emit("nop", x, kind=BARRIER, sign=kind, size=int(predicate.startswith("!")))
        else:
            raise self.unknown()

    def op_barrier(self, words: list[str], operands: list[str]) -> None:
        if words[0] == "cluster":
            raise self.unknown()
        self.op_bar([word for word in words if word != "aligned"], operands)

    def op_shfl(self, words: list[str], operands: list[str]) -> None:
        if words[0] != "sync" or words[-1] != "b32":
            raise self.unknown()
        to, *predicate = (name.strip() for name in operands[0].split("|"))
        target = self.register(predicate[0])[0] if predicate and predicate[0] != "_" else -1
        x = [self.source(text, "b32") for text in operands[1:]]
        how = ("up", "down", "bfly", "idx").index(words[1])
        self.emit("shfl.sync", [self.destination(to), *x], sign=how, target=target)

    def op_vote(self, words: list[str], operands: list[str]) -> None:
        if words[0] != "sync":
            raise self.unknown()
        kind = ("all", "any", "uni", "ballot").index(words[1])
        to = self.destination(operands[0]) if kind == 3 else self.register(operands[0])[0]
        predicate = operands[1]
        x = [to, self.predicate_source(predicate.lstrip("!")), self.source(operands[2], "b32")]
        self.emit("vote.sync", x, sign=kind, target=int(predicate.startswith("!")))

    def op_activemask(self, words: list[str], operands: list[str]) -> None:
        self.emit("activemask", [self.destination(operands[0])])

    def op_redux(self, words: list[str], operands: list[str]) -> None:
        names = ("add", "min", "max", "and", "or", "xor")
        kind = names.index(words[1])
        if words[-1] == "u32" and kind in (1, 2):
            kind += 5
        self.simple("redux.sync", operands, "b32", sign=kind)

    def refused(self, words: list[str], operands: list[str]) -> None:
        raise self.error("atomic operations make results depend on the order of threads, and are refused")

    op_atom = op_red = refused


def pack(kernel: Kernel, operations: Mapping[str, int], variables: Mapping[str, int]) -> dict[str, object]:
    """The kernel as the numbers that runtime.cpp takes."""
    words: list[int] = []
    for i in kernel.code:
        if i.operation not in operations:
            raise PtxError(f"line {i.statement.line}: the unknown operation {i.operation}: {i.statement.text}")
        if len(i.x) > OPERANDS:
            raise PtxError(f"line {i.statement.line}: too many operands: {i.statement.text}")
        words += [operations[i.operation], i.kind, i.predicate, i.negate, i.hidden, i.n, i.size, i.sign, i.wide]
        words += [i.target, i.statement.line, i.imm, i.meets, *i.x, *[-1] * (OPERANDS - len(i.x))]
    constants: list[int] = []
    for row, kind, value in kernel.constants:
        if isinstance(value, str):
            value = int(value.split("+")[1]) if kind == 2 else variables[value]
        constants += [row, kind, value - (1 << 64) if value >= 1 << 63 else value]
    header = [kernel.rows, kernel.predicates, kernel.static_shared, kernel.local_bytes, kernel.max_threads]
    header += [kernel.min_blocks, kernel.granule, kernel.parameter_bytes]
    # Dynamic shared memory begins at a multiple of 16 after the static one.
    header[2] = _aligned(kernel.static_shared, 16) if kernel.static_shared else 0
    return {
        "header": header,
        "code": words,
        "constants": constants,
        "specials": [number for pair in kernel.specials for number in pair],
        "tables": kernel.tables,
        "offsets": [offset for _, offset, _ in kernel.parameters],
        "sizes": [size for *_, size in kernel.parameters],
        "checked": kernel.checked,
    }
