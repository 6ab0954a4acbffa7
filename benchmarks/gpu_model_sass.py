"""What a kernel's machine code does, counted without a GPU: its instructions, and how often a warp issues each.

nvcc with `-lineinfo` writes into a cubin of which line of the PTX every instruction was made (`nvdisasm -gp` shows it).
Where the PTX has been executed, how often a warp issues each of its lines is known; the machine code is cut into basic
blocks, and each block's count is what its instructions' lines say: loads, stores, barriers, branches and multiply-adds,
of which one line makes one instruction and which stay where they are, before others; of the others the majority wins,
because an instruction that was hoisted out of a loop says too much. Where ptxas has unrolled a loop, several blocks
share its lines, and the trips are shared out among them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from carafe_plugin.engine.errors import UsageError

# Machine instructions of which a PTX instruction makes exactly one, and how the latter begins.
ANCHORS = {
    "FFMA": "fma.rn.f32",
    "DFMA": "fma.rn.f64",
    "HFMA2": "fma.rn.",
    "LDS": "ld.shared",
    "STS": "st.shared",
    "LDG": "ld.global",
    "STG": "st.global",
    "LDGSTS": "cp.async.c",
    "BAR": "bar",
    "BRA": "bra",
    "MUFU": "ex2",
    "SHFL": "shfl",
    "HMMA": "mma.sync",
    "LDSM": "ldmatrix",
    "STSM": "stmatrix",
    "MOVM": "movmatrix",
}


# ------------------------------------------------------------------------------------------------------- tools


def find_tool(name: str) -> str | None:
    """nvcc, or nvdisasm, which comes with some toolkits and with torch's triton: its path, or None."""
    homes = [os.environ.get(variable) for variable in ("CUDA_HOME", "CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    homes += [str(Path(nvcc).resolve().parents[1]), "/usr/local/cuda"] if nvcc else ["/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    if name != "nvcc" and (found := find_spec("triton")) and found.submodule_search_locations:
        folders += [str(Path(place) / "backends/nvidia/bin") for place in found.submodule_search_locations]
    return shutil.which(name, path=os.pathsep.join(folders))


def missing_tool() -> str | None:
    """Why nothing can be counted on this machine; None where it can."""
    for name in ("nvcc", "nvdisasm"):
        if find_tool(name) is None:
            return f"{name} is not installed"
    return None


def call(command: Sequence[str]) -> str:
    """A tool's output and messages; UsageError with its first complaint where it fails."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = [line for line in (result.stderr or result.stdout).splitlines() if line.strip()]
        detail = next((line for line in lines if "error" in line), lines[-1] if lines else "no message")
        raise UsageError(f"{Path(command[0]).name} failed with exit code {result.returncode}: {detail}")
    return result.stdout + result.stderr


# --------------------------------------------------------------------------------------------------------- PTX


@dataclass
class Statement:
    """An instruction of the PTX."""

    line: int  # its last
    opcode: str  # with its suffixes
    predicated: bool
    block: int = 0


_STATEMENT = re.compile(r"\s*(@!?%\w+\s+)?([a-z][\w.:]*)\b")
_LABEL = re.compile(r"\s*([$\w]+):")


def ptx_statements(text: str) -> dict[str, list[Statement]]:
    """The instructions of each kernel, in order, with the number of their basic block in it."""
    kernels: dict[str, list[Statement]] = {}
    current: list[Statement] | None = None
    begun: re.Match[str] | None = None  # on a line before
    depth = block = 0
    for number, line in enumerate(text.splitlines(), 1):
        code = line.partition("//")[0]
        if entry := re.match(r"\s*(?:\.\w+\s+)*\.(?:entry|func)\s+(?:\([^)]*\)\s*)?([$\w]+)", code):
            current = kernels.setdefault(entry[1], [])
            depth = block = 0
        depth += code.count("{") - code.count("}") if "%" not in code else 0
        if current is None or depth == 0:
            continue
        if begun is None and _LABEL.match(code):
            block += 1
        elif found := begun or _STATEMENT.match(code):
            begun = None if ";" in code else found
            if begun is None:
                current.append(Statement(number, found[2], bool(found[1]), block))
                block += found[2].startswith(("bra", "ret", "exit", "brx"))
    return kernels


# -------------------------------------------------------------------------------------------------------- SASS


@dataclass
class Instruction:
    """One machine instruction."""

    address: int
    opcode: str  # with its modifiers
    predicated: bool
    operands: str
    line: int  # of the PTX it was made of; 0 where that is not said
    encoding: int = 0  # 128 bits, where they were printed

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def kind(self) -> str:
        """What it is counted as: a product of matrices by its shape ('HMMA.16816'), anything else by its base."""
        return ".".join(self.opcode.split(".")[:2]) if self.base == "HMMA" else self.base


@dataclass
class Block:
    """Instructions of which a warp issues all or none."""

    instructions: list[Instruction]
    successors: list[int] = field(default_factory=list)
    predecessors: list[int] = field(default_factory=list)
    count: float | None = None  # times that a warp issues it
    how: str = ""  # the count was found: 'voted', 'unrolled', 'flow' or 'guessed'


@dataclass
class Code:
    """A kernel's machine code."""

    name: str
    instructions: list[Instruction]
    labels: Mapping[str, int]  # addresses
    registers: int = 0
    shared: int = 0  # bytes, static
    stack: int = 0
    spills: int = 0  # bytes, stored and loaded

    @cached_property
    def blocks(self) -> list[Block]:
        return _cut(self.instructions, self.labels)


_FILE = re.compile(r'//## File "([^"]*)", line (\d+)')
_INSTRUCTION = re.compile(
    r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);(?:\s*/\* 0x([0-9a-f]+) \*/)?"
)
_UPPER = re.compile(r"\s+/\* 0x([0-9a-f]+) \*/\s*$")
_ENDS = ("BRA", "EXIT", "BRX", "RET", "CALL", "BSYNC", "BREAK", "JMP", "WARPSYNC", "YIELD")


def parse_sass(text: str) -> dict[str, Code]:
    """Reads what `nvdisasm -gp -hex -c` prints; a subroutine belongs to the kernel in whose section it lies."""
    kernels: dict[str, Code] = {}
    labels: dict[str, int] = {}
    waiting: list[str] = []
    current: list[Instruction] = []
    line = 0
    for row in text.splitlines():
        if row.startswith(".text."):
            name = row[len(".text.") :].rstrip().rstrip(":")
            current, labels, waiting, line = [], {}, [], 0
            kernels[name] = Code(name, current, labels)
        elif found := _FILE.search(row):
            line = int(found[2]) if "ptx" in found[1] else line
        elif found := _INSTRUCTION.match(row):
            address = int(found[1], 16)
            labels.update(dict.fromkeys(waiting, address))
            waiting = []
            low = int(found[5], 16) if found[5] else 0
            current.append(Instruction(address, found[3], bool(found[2]), found[4].strip(), line, low))
        elif (found := _UPPER.match(row)) and current:
            current[-1].encoding |= int(found[1], 16) << 64
        elif found := re.match(r"([.$\w]+):", row):
            waiting.append(found[1])
    for code in kernels.values():
        while code.instructions and (code.instructions[-1].base == "NOP" or _is_trap(code)):  # what fills the section
            code.instructions.pop()
    return kernels


def _is_trap(code: Code) -> bool:
    """Whether the last instruction is a branch to itself, which nothing leads to."""
    last = code.instructions[-1]
    targets = re.findall(r"`\(([^)]*)\)", last.operands)
    return last.base == "BRA" and not last.predicated and [code.labels.get(each) for each in targets] == [last.address]


def _cut(instructions: Sequence[Instruction], labels: Mapping[str, int]) -> list[Block]:
    starts = {instructions[0].address, *labels.values()} if instructions else set()
    for before, after in itertools.pairwise(instructions):
        if before.base in _ENDS:
            starts.add(after.address)
    blocks: list[Block] = []
    for instruction in instructions:
        if instruction.address in starts:
            blocks.append(Block([]))
        blocks[-1].instructions.append(instruction)
    index = {block.instructions[0].address: number for number, block in enumerate(blocks)}
    for number, block in enumerate(blocks):
        last = block.instructions[-1]
        if last.base in ("BRA", "BRX", "JMP"):
            for target in re.findall(r"`\(([^)]*)\)", last.operands):
                if labels.get(target) in index:
                    block.successors.append(index[labels[target]])
        falls = last.predicated or last.base not in ("BRA", "EXIT", "BRX", "RET", "JMP")
        # A branch may also depend on a predicate among its operands.
        falls = falls or (last.base == "BRA" and bool(re.match(r"!?U?P\w", last.operands)))
        if falls and number + 1 < len(blocks):
            block.successors.append(number + 1)
        block.successors = list(dict.fromkeys(block.successors))
    for number, block in enumerate(blocks):
        for successor in block.successors:
            blocks[successor].predecessors.append(number)
    return blocks


# -------------------------------------------------------------------------------------------------- compilation


def disassemble(cubin: Path) -> str:
    """The machine code as text, with lines of PTX and encodings."""
    tool = find_tool("nvdisasm")
    assert tool is not None
    return call([tool, "-gp", "-hex", "-c", str(cubin)])


def assemble(ptx: str, architecture: str) -> dict[str, Code]:
    """Machine code of PTX for such an architecture ('sm_90'), with what ptxas says of its resources.

    ptxas may take minutes: what it has made of the same text is kept in the user's cache.
    """
    nvcc = find_tool("nvcc")
    assert nvcc is not None
    text = f"{call([nvcc, '--version'])}{architecture}\n{ptx}"
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "carafe_plugin" / "gpu_model"
    folder = root / hashlib.sha256(text.encode()).hexdigest()[:24]
    if not folder.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as temporary:
            source, made = Path(temporary) / "kernels.ptx", Path(temporary) / "made"
            made.mkdir()
            source.write_text(ptx)
            command = [nvcc, "-cubin", f"-arch={architecture}", "-lineinfo", "-Xptxas=-v", str(source)]
            (made / "ptxas.txt").write_text(call([*command, "-o", str(made / "kernels.cubin")]))
            with contextlib.suppress(OSError):  # another process was faster
                made.rename(folder)
    kernels = parse_sass(disassemble(folder / "kernels.cubin"))
    add_resources(kernels, (folder / "ptxas.txt").read_text())
    return kernels


def add_resources(kernels: Mapping[str, Code], messages: str) -> None:
    """What `ptxas -v` says of registers, spills and shared memory."""
    code = None
    for row in messages.splitlines():
        if found := re.search(r"Function properties for (\S+)|entry function '([^']+)'", row):
            code = kernels.get(found[1] or found[2])
        if code is None:
            continue
        if found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", row):
            code.stack, code.spills = int(found[1]), int(found[2]) + int(found[3])
        if found := re.search(r"Used (\d+) registers", row):
            code.registers = int(found[1])
        if found := re.search(r"(\d+) bytes smem", row):
            code.shared = int(found[1])


@functools.cache
def short_name(mangled: str) -> str:
    """A kernel's name for people: no namespaces, no parameters."""
    name = mangled
    if tool := shutil.which("c++filt"):
        name = call([tool, mangled]).strip()
    name = re.sub(r"\((anonymous|unnamed)[^)]*\)::|\bcarafe::|\bgpu::|\bgeneral::|^void ", "", name)
    depth = 0
    for place, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:place]
    return name


# ----------------------------------------------------------------------------------------------------- counting


def is_anchor(instruction: Instruction, statement: Statement | None) -> bool:
    """Whether the statement makes one such instruction, and a warp issues it as often as the statement."""
    start = ANCHORS.get(instruction.base)
    if start is None or statement is None or not statement.opcode.startswith(start):
        return False
    # What ptxas has predicated itself is issued more often than the statement, whose branch is gone.
    return instruction.base == "BRA" or not instruction.predicated or statement.predicated


def count_blocks(code: Code, statements: Sequence[Statement], issued: Mapping[int, float]) -> None:
    """Finds each block's count, `issued` being how often a warp issues each line of the PTX."""
    blocks, by_line = code.blocks, {statement.line: statement for statement in statements}
    where: dict[tuple[int, str], Counter[int]] = defaultdict(Counter)  # blocks of (line, kind)
    for number, block in enumerate(blocks):
        for instruction in block.instructions:
            if instruction.line in issued:
                where[instruction.line, instruction.base][number] += 1
    for number, block in enumerate(blocks):
        block.count, block.how = None, ""
        if _leads_to_slow_path(block):
            block.count, block.how = 0.0, "flow"
            continue
        if any(
            is_anchor(one, by_line.get(one.line)) and one.base != "BRA" and len(where[one.line, one.base]) > 1
            for one in block.instructions
        ):
            continue  # one of several copies
        anchors: Counter[float] = Counter()
        others: Counter[float] = Counter()
        for instruction in block.instructions:
            line, base = instruction.line, instruction.base
            if line not in issued or len(where[line, base]) > 1:
                continue
            if is_anchor(instruction, by_line.get(line)):
                anchors[issued[line] / where[line, base][number]] += 1
            elif not instruction.predicated:
                others[issued[line]] += 1
        if anchors:
            # Lanes that parted issue the PTX of both ways one after the other, where ptxas may have made one way of it.
            block.count, block.how = min(anchors), "voted"
        elif others:
            block.count, block.how = max(others, key=lambda value: (others[value], -value)), "voted"
    _share_unrolled(blocks, statements, issued, where)
    _follow_flow(blocks)
    for block in blocks:
        if block.count is None:
            values = [issued[one.line] for one in block.instructions if one.line in issued]
            block.count, block.how = (min(values) if values else 0.0), "guessed"


def _leads_to_slow_path(block: Block) -> bool:
    """Whether it calls what divisions and roots need for denormal numbers alone."""
    last = block.instructions[-1]
    return last.base == "CALL" and "slowpath" in last.operands


def _share_unrolled(
    blocks: Sequence[Block],
    statements: Sequence[Statement],
    issued: Mapping[int, float],
    where: Mapping[tuple[int, str], Counter[int]],
) -> None:
    """Shares a line's trips out among the blocks that have copies of it: most copies first, whole passes only."""
    order = {statement.line: place for place, statement in enumerate(statements)}
    lines = sorted(where.items(), key=lambda item: (item[0][1] == "BRA", -len(item[1]), -max(item[1].values())))
    for (line, base), copies in lines:
        statement = statements[order[line]] if line in order else None
        open_blocks = [number for number in copies if blocks[number].count is None]
        if not open_blocks or statement is None or not statement.opcode.startswith(ANCHORS.get(base, "no such")):
            continue
        total = max(0.0, issued[line] - sum(copies[each] * (blocks[each].count or 0) for each in copies))
        entries = _entries(statements, order[line], issued)
        trips = total / entries if entries else 0.0
        for number in sorted(open_blocks, key=lambda each: -copies[each]):
            block = blocks[number]
            passes = trips // copies[number] if len(open_blocks) > 1 else trips / copies[number]
            if number not in _reached(blocks, number) and len(open_blocks) > 1:
                passes = min(passes, 1)  # no loop
            trips -= passes * copies[number]
            block.count, block.how = passes * entries, "unrolled"


def _entries(statements: Sequence[Statement], place: int, issued: Mapping[int, float]) -> float:
    """How often the block of a statement is entered from above: as often as what falls into it is issued."""
    block = statements[place].block
    while place >= 0 and statements[place].block == block:
        place -= 1
    own = issued.get(statements[place + 1].line, 0.0)
    return min(own, issued.get(statements[place].line, own)) if place >= 0 else own


def _reached(blocks: Sequence[Block], start: int) -> set[int]:
    """Blocks that can follow a block, itself included where it is in a loop."""
    seen: set[int] = set()
    todo = list(blocks[start].successors)
    while todo:
        number = todo.pop()
        if number not in seen:
            seen.add(number)
            todo += blocks[number].successors
    return seen


def _follow_flow(blocks: Sequence[Block]) -> None:
    """Counts blocks that nothing was said of by the blocks before and after them."""
    changed = True
    while changed:
        changed = False
        for number, block in enumerate(blocks):
            if block.count is not None:
                continue
            for neighbours, back in (
                (block.predecessors, "successors"),
                (block.successors, "predecessors"),
            ):
                total = 0.0
                for each in neighbours:
                    other = blocks[each]
                    rest = [blocks[one] for one in getattr(other, back) if one != number]
                    single = all(
                        len(getattr(one, "predecessors" if back == "successors" else "successors")) == 1
                        and one.count is not None
                        for one in rest
                    )
                    if other.count is None or not single:
                        break
                    total += max(0.0, other.count - sum(one.count or 0.0 for one in rest))
                else:
                    if neighbours:
                        block.count, block.how, changed = total, "flow", True
                        break


def totals(code: Code) -> dict[str, float]:
    """Warp instructions issued of each kind, by the blocks' counts."""
    found: dict[str, float] = defaultdict(float)
    for block in code.blocks:
        for instruction in block.instructions:
            found[instruction.kind] += block.count or 0.0
    return dict(found)


@dataclass(frozen=True)
class Check:
    """Whether the counts from the machine code agree with what the PTX was seen to do."""

    kind: str
    sass: float
    ptx: float

    @property
    def difference(self) -> float:
        return abs(self.sass - self.ptx) / max(self.ptx, 1.0)


CHECKED = ("FFMA", "HMMA", "LDS", "LDSM", "STS", "LDG", "LDGSTS", "STG")


def checks(code: Code, statements: Sequence[Statement], issued: Mapping[int, float]) -> list[Check]:
    """Multiply-adds, loads and stores: their number in the machine code against the PTX's.

    What ptxas predicated is left out on both sides: the statement's branch is gone, so that it is issued more often.
    """
    by_line = {statement.line: statement for statement in statements}
    found = []
    for kind in CHECKED:
        sass, lines = 0.0, set()
        for block in code.blocks:
            for instruction in block.instructions:
                statement = by_line.get(instruction.line)
                if instruction.base == kind and is_anchor(instruction, statement):
                    sass += block.count or 0.0
                    lines.add(instruction.line)
        ptx = sum(issued.get(line, 0.0) for line in lines)
        if lines:
            found.append(Check(kind, sass, ptx))
    return found


# ------------------------------------------------------------------------------------------------------ latencies

# Clocks until a result is there, of what has no fixed latency: microbenchmarks of Hopper and Ampere, rounded.
LATENCIES = {
    "LDG": 400.0,  # between a hit in the L2 cache (270) and the memory (800)
    "LDL": 40.0,
    "LDS": 30.0,
    "LDSM": 33.0,
    "LDC": 30.0,
    "ULDC": 30.0,
    "MUFU": 25.0,
    "SHFL": 25.0,
    "MOVM": 25.0,  # nobody has published it: as an exchange between lanes
    "S2R": 30.0,
    "S2UR": 30.0,
    "ATOM": 500.0,
}
OTHER_LATENCY = 20.0  # conversions, products of 64 bits, doubles
# Until the next product of matrices can add to what one has summed up: Hopper's. ptxas sets no barrier for it, and no
# stall where the next one is a product too: the pipe itself waits.
PRODUCT_LATENCIES = {"HMMA.16816": 33.0, "HMMA.1688": 24.0}
COPY_LATENCY = 400.0  # of a group of asynchronous copies
READ_LATENCY = 15.0  # until an instruction has read its operands
BRANCH_CLOCKS = 8.0  # until the next instruction is there, after a branch that is taken
BARRIER_CLOCKS = 20.0


@dataclass(frozen=True)
class Control:
    """What ptxas tells a scheduler of an instruction, from Volta on."""

    stall: int  # clocks until the next one may be issued
    write_barrier: int  # of six, 7 for none: released when the result is there
    read_barrier: int  # likewise, when the operands have been read
    wait: int  # a bit for each barrier that must be free

    @classmethod
    def of(cls, encoding: int) -> Control:
        if encoding == 0:  # not printed
            return cls(1, 7, 7, 0)
        return cls(encoding >> 105 & 15, encoding >> 110 & 7, encoding >> 113 & 7, encoding >> 116 & 63)


@dataclass
class Pending:
    """What a warp may have to wait for, in clocks from the present."""

    barriers: list[float] = field(default_factory=lambda: [0.0] * 6)
    copies: list[float] = field(default_factory=list)  # of each group of asynchronous copies
    sums: dict[str, float] = field(default_factory=dict)  # of products of matrices, by their first register

    def before(self, instruction: Instruction, control: Control) -> float:
        """When the instruction can be issued."""
        times = [self.barriers[number] for number in range(6) if control.wait >> number & 1]
        if instruction.opcode.startswith("DEPBAR.LE") and (found := re.search(r"0x([0-9a-f]+)", instruction.operands)):
            times += self.copies[: len(self.copies) - int(found[1], 16)]  # all groups but so many
        if instruction.kind in PRODUCT_LATENCIES:  # result, A, B, what is added
            times.append(self.sums.get(_registers(instruction)[3], 0.0))
        return max(times, default=0.0)

    def issue(self, instruction: Instruction, control: Control, now: float) -> None:
        if instruction.base == "LDGDEPBAR":  # ends a group
            self.copies = [*self.copies[-8:], now + COPY_LATENCY]
        if instruction.kind in PRODUCT_LATENCIES:
            self.sums[_registers(instruction)[0]] = now + PRODUCT_LATENCIES[instruction.kind]
        result = now + LATENCIES.get(instruction.base, OTHER_LATENCY)
        for number, time in ((control.write_barrier, result), (control.read_barrier, now + READ_LATENCY)):
            if number < 6:
                self.barriers[number] = max(self.barriers[number], time)

    def after(self, clocks: float) -> Pending:
        return Pending(
            [max(0.0, time - clocks) for time in self.barriers],
            [max(0.0, time - clocks) for time in self.copies],
            {register: time - clocks for register, time in self.sums.items() if time > clocks},
        )


def _registers(instruction: Instruction) -> list[str]:
    return [operand.strip().partition(".")[0] for operand in instruction.operands.split(",")]


def latency(code: Code) -> tuple[float, dict[int, float]]:
    """Clocks that all warps together need, each with a scheduler for itself, and how many of them they wait at each
    line of the PTX: the blocks' clocks times their counts, one block after another as they lie.
    """
    pending = Pending()
    total, waits = 0.0, Counter[int]()
    for number, block in enumerate(code.blocks):
        clocks, waited = 0.0, Counter[int]()
        for _ in range(2 if number in block.successors else 1):  # a loop's second pass is the usual one
            clocks, waited = _pass(block, pending)
            pending = pending.after(clocks)
        if block.instructions[-1].base in ("BRA", "BRX") and any(each <= number for each in block.successors):
            clocks += BRANCH_CLOCKS
        total += clocks * (block.count or 0.0)
        for line, each in waited.items():
            waits[line] += each * (block.count or 0.0)  # type: ignore[assignment]
    return total, dict(waits)


def _pass(block: Block, pending: Pending) -> tuple[float, Counter[int]]:
    now, waited = 0.0, Counter[int]()
    for instruction in block.instructions:
        control = Control.of(instruction.encoding)
        ready = max(now, pending.before(instruction, control)) + BARRIER_CLOCKS * (instruction.base == "BAR")
        waited[instruction.line] += ready - now  # type: ignore[assignment]
        pending.issue(instruction, control, ready)
        now = ready + max(control.stall, 1)
    return now, waited
