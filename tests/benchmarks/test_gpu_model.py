"""benchmarks/gpu_model.py: counts follow from machine code and executed PTX, limits from counts. No GPU is needed."""

from __future__ import annotations

import csv
import ctypes
import dataclasses
import json
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_model, gpu_model_compared, gpu_model_counts, gpu_model_limits, gpu_model_sass
from benchmarks.comparison import Problem
from benchmarks.gpu_model_counts import Case, Counts, Issue, Launch
from benchmarks.gpu_model_devices import CAPABILITIES, GPUS, occupancy
from benchmarks.gpu_model_sass import parse_sass
from carafe_plugin.engine.errors import UsageError

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]
COUNTERS = ROOT / "benchmarks/results/2026-11-27_cuda_h200_counters.csv"
needs_tools = pytest.mark.skipif(
    gpu_model_counts.missing(gpu_model.SOURCE) is not None, reason=str(gpu_model_counts.missing(gpu_model.SOURCE))
)


# ------------------------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize(
    ("capability", "threads", "registers", "shared", "blocks", "limit"),
    [
        ("9.0", 256, 32, 0, 8, "warps"),
        ("9.0", 32, 32, 0, 32, "blocks"),
        ("9.0", 256, 33, 0, 6, "registers"),  # 40 a thread, 12 warps of a scheduler, 48 warps
        ("9.0", 320, 96, 33312, 2, "registers"),  # 20 warps fit, as ten and ten
        ("9.0", 64, 24, 227 << 10, 1, "shared memory"),
        ("9.0", 64, 24, (227 << 10) + 1, 0, "shared memory"),
        ("9.0", 128, 24, 37 << 10, 6, "shared memory"),  # CUDA's own KiB is the 38th
        ("8.0", 1024, 64, 0, 1, "registers"),
        ("8.6", 512, 32, 0, 3, "warps"),
        ("8.9", 64, 255, 0, 4, "registers"),
        ("7.5", 1024, 64, 0, 1, "warps"),
        ("7.5", 64, 24, 32 << 10, 2, "shared memory"),
    ],
)  # fmt: skip
def test_occupancy(capability: str, threads: int, registers: int, shared: int, blocks: int, limit: str) -> None:
    found = occupancy(capability, threads, registers, shared)
    assert (found.blocks, found.limit) == (blocks, limit)
    assert found.warps == blocks * math.ceil(threads / 32)
    assert found.share == found.warps / CAPABILITIES[capability].warps


def test_occupancy_is_what_a_gpu_reported() -> None:
    launched = {
        "ReassembleBlock": {"256x25x42": (168, 256), "256x100x168": (1100, 256), "64x200x336": (1100, 128)},
        "GradFeaturesBlock": {"256x25x42": (336, 64), "256x100x168": (1050, 64), "64x200x336": (550, 128)},
        "GradKernelsBlock": {"256x25x42": (21, 320), "256x100x168": (275, 320), "64x200x336": (275, 320)},
    }
    rows = [row for row in csv.DictReader(COUNTERS.open()) if row["call"]]
    assert len(rows) == 54
    for row in rows:
        kernel = next(name for name in launched if name in row["Kernel Name"])
        blocks, threads = launched[kernel][row["call"].split()[0]]
        shared = int(row["launch__shared_mem_per_block"]) - 1024  # ncu counts CUDA's own
        found = occupancy("9.0", threads, int(row["launch__registers_per_thread"]), shared)
        assert blocks / (132 * found.blocks) == pytest.approx(float(row["launch__waves_per_multiprocessor"]), abs=0.006)


# ---------------------------------------------------------------------------------------------------------- SASS

PTX = """
.visible .entry sums(
	.param .u64 sums_param_0
)
{
	.reg .f32 	%f<9>;
	ld.param.u64 	%rd1, [sums_param_0];
	@%p1 bra 	$L__BB0_4;

$L__BB0_2: // a loop
	ld.shared.f32 	%f1, [%r1];
	fma.rn.f32 	%f2, %f1, %f1, %f2;
	add.s32 	%r1, %r1, 4;
	@%p2 bra 	$L__BB0_2;

$L__BB0_4:
	st.global.f32 	[%rd1], %f2;
	ret;
}
"""

# The loop of above, unrolled by four, with a loop for the rest; what lies before it was hoisted out of it.
SASS = """
.text.sums:
sums:
	//## File ".nv_debug_ptx_txt", line 7
        /*0000*/                   LDC.64 R2, c[0x0][0x210] ;                /* 0x00008400ff027b82 */
                                                                             /* 0x000e240000000a00 */
	//## File ".nv_debug_ptx_txt", line 13
        /*0010*/                   MOV R7, 0x4 ;                             /* 0x0000000400077802 */
                                                                             /* 0x000fe20000000f00 */
	//## File ".nv_debug_ptx_txt", line 8
        /*0020*/               @P0 BRA `(.L_x_3) ;                           /* 0x0000000000000947 */
                                                                             /* 0x000fea0003800000 */
.L_x_1:
	//## File ".nv_debug_ptx_txt", line 11
        /*0030*/                   LDS R4, [R2] ;                            /* 0x0000000002047984 */
                                                                             /* 0x000e240000000800 */
        /*0034*/                   LDS R5, [R2+0x4] ;
        /*0038*/                   LDS R6, [R2+0x8] ;
        /*003c*/                   LDS R7, [R2+0xc] ;
	//## File ".nv_debug_ptx_txt", line 12
        /*0040*/                   FFMA R9, R4, R4, R9 ;                     /* 0x0000000404097223 */
                                                                             /* 0x001fe20000000009 */
        /*0050*/                   FFMA R9, R5, R5, R9 ;
        /*0060*/                   FFMA R9, R6, R6, R9 ;
        /*0070*/                   FFMA R9, R7, R7, R9 ;
	//## File ".nv_debug_ptx_txt", line 14
        /*0080*/               @P1 BRA `(.L_x_1) ;
.L_x_2:
	//## File ".nv_debug_ptx_txt", line 11
        /*0088*/                   LDS R4, [R2] ;
	//## File ".nv_debug_ptx_txt", line 12
        /*0090*/                   FFMA R9, R4, R4, R9 ;
	//## File ".nv_debug_ptx_txt", line 14
        /*00a0*/              @!P2 BRA `(.L_x_2) ;
.L_x_3:
	//## File ".nv_debug_ptx_txt", line 17
        /*00b0*/                   STG.E desc[UR4][R2.64], R9 ;
	//## File ".nv_debug_ptx_txt", line 18
        /*00c0*/                   EXIT ;
.L_x_4:
        /*00d0*/                   BRA `(.L_x_4);
        /*00e0*/                   NOP;
"""


def test_ptx_is_read_line_by_line() -> None:
    statements = gpu_model_sass.ptx_statements(PTX)["sums"]
    assert [(each.line, each.opcode, each.predicated, each.block) for each in statements] == [
        (7, "ld.param.u64", False, 0),
        (8, "bra", True, 0),
        (11, "ld.shared.f32", False, 2),
        (12, "fma.rn.f32", False, 2),
        (13, "add.s32", False, 2),
        (14, "bra", True, 2),
        (17, "st.global.f32", False, 4),
        (18, "ret", False, 4),
    ]


def test_a_statement_of_several_lines_is_at_its_last() -> None:
    product = "\tmma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32\n\t{%f1, %f2},\n\t{%f1, %f2};\n"
    text = PTX.replace("\tadd.s32", f"{product}\tadd.s32")
    statements = gpu_model_sass.ptx_statements(text)["sums"]
    assert [(each.line, each.opcode.split(".")[0]) for each in statements[3:6]] == [
        (12, "fma"),
        (15, "mma"),
        (16, "add"),
    ]


def test_sass_is_cut_into_blocks() -> None:
    code = parse_sass(SASS)["sums"]
    assert [len(block.instructions) for block in code.blocks] == [3, 9, 3, 2]  # without the padding
    assert [block.successors for block in code.blocks] == [[3, 1], [1, 2], [2, 3], []]
    assert [block.predecessors for block in code.blocks] == [[], [0, 1], [1, 2], [0, 2]]
    first = code.instructions[0]
    assert (first.opcode, first.base, first.line, first.predicated) == ("LDC.64", "LDC", 7, False)
    assert first.encoding == 0x000E240000000A0000008400FF027B82
    assert code.instructions[2].predicated


@pytest.mark.parametrize("trips", [3, 4, 21, 24])
def test_trips_of_an_unrolled_loop_are_shared_out(trips: int) -> None:
    code, statements = parse_sass(SASS)["sums"], gpu_model_sass.ptx_statements(PTX)["sums"]
    warps = 10.0
    issued = {7: warps, 8: warps, 17: warps, 18: warps, **dict.fromkeys((11, 12, 13, 14), warps * trips)}
    gpu_model_sass.count_blocks(code, statements, issued)
    counts = [block.count for block in code.blocks]
    assert counts == [warps, warps * (trips // 4), warps * (trips % 4), warps]
    assert gpu_model_sass.totals(code)["FFMA"] == warps * trips
    checks = {check.kind: check for check in gpu_model_sass.checks(code, statements, issued)}
    assert checks["FFMA"].difference == 0
    assert checks["LDS"].difference == checks["STG"].difference == 0


def test_hoisted_instructions_do_not_count_for_their_block() -> None:
    code = parse_sass(SASS)["sums"]
    statements = gpu_model_sass.ptx_statements(PTX)["sums"]
    issued = {7: 2.0, 8: 2.0, 11: 600.0, 12: 600.0, 13: 600.0, 14: 600.0, 17: 2.0, 18: 2.0}
    hoisted = dataclasses.replace(code.instructions[1])
    code.blocks[0].instructions[1:1] = [hoisted] * 9  # a majority of line 13
    gpu_model_sass.count_blocks(code, statements, issued)
    assert (code.blocks[0].count, code.blocks[0].how) == (2.0, "voted")


def test_counts_that_contradict_each_other_are_told() -> None:
    code, statements = parse_sass(SASS)["sums"], gpu_model_sass.ptx_statements(PTX)["sums"]
    issued = {7: 2.0, 8: 2.0, 11: 8.0, 12: 8.0, 13: 8.0, 14: 8.0, 17: 2.0, 18: 2.0}
    gpu_model_sass.count_blocks(code, statements, issued)
    code.blocks[1].count = 5.0
    check = next(each for each in gpu_model_sass.checks(code, statements, issued) if each.kind == "FFMA")
    assert (check.sass, check.ptx, check.difference) == (20.0, 8.0, 1.5)


def test_latencies_follow_the_schedulers_barriers() -> None:
    code, statements = parse_sass(SASS)["sums"], gpu_model_sass.ptx_statements(PTX)["sums"]
    gpu_model_sass.count_blocks(code, statements, dict.fromkeys(range(20), 1.0))
    for block in code.blocks:
        block.count = float(block is code.blocks[1])
    control = gpu_model_sass.Control.of(code.blocks[1].instructions[0].encoding)
    assert (control.stall, control.write_barrier, control.read_barrier, control.wait) == (2, 0, 7, 0)
    assert gpu_model_sass.Control.of(code.blocks[1].instructions[4].encoding).wait == 1
    clocks, waits = gpu_model_sass.latency(code)
    # The first load's clocks, of which three go into the others, then one for each instruction, and the branch.
    known = gpu_model_sass.LATENCIES["LDS"]
    assert {line: clocks for line, clocks in waits.items() if clocks} == {12: known - 2 - 3}
    assert clocks == known + 5 + gpu_model_sass.BRANCH_CLOCKS


def test_asynchronous_copies_are_waited_for_by_group() -> None:
    pending = gpu_model_sass.Pending()
    free = gpu_model_sass.Control(1, 7, 7, 0)

    def instruction(opcode: str, operands: str = "") -> gpu_model_sass.Instruction:
        return gpu_model_sass.Instruction(0, opcode, False, operands, 0)

    for now in (0.0, 50.0):
        pending.issue(instruction("LDGDEPBAR"), free, now)
    wait = gpu_model_sass.COPY_LATENCY
    assert pending.before(instruction("DEPBAR.LE", "SB0, 0x2"), free) == 0
    assert pending.before(instruction("DEPBAR.LE", "SB0, 0x1"), free) == wait
    assert pending.before(instruction("DEPBAR.LE", "SB0, 0x0"), free) == wait + 50
    assert pending.after(100.0).before(instruction("DEPBAR.LE", "SB0, 0x1"), free) == wait - 100


def test_products_of_matrices_wait_for_what_they_add_to() -> None:
    pending = gpu_model_sass.Pending()
    free = gpu_model_sass.Control(1, 7, 7, 0)

    def product(operands: str) -> gpu_model_sass.Instruction:
        return gpu_model_sass.Instruction(0, "HMMA.16816.F32", False, operands, 0)

    pending.issue(product("R8, R2, R4.reuse, RZ"), free, 10.0)
    ready = 10.0 + gpu_model_sass.PRODUCT_LATENCIES["HMMA.16816"]
    assert pending.before(product("R8, R2, R4, R8.reuse"), free) == ready
    assert pending.before(product("R12, R2, R4, R12"), free) == 0
    assert pending.after(20.0).before(product("R8, R2, R4, R8"), free) == ready - 20


def test_what_ptxas_says_of_resources() -> None:
    code = parse_sass(SASS)
    gpu_model_sass.add_resources(
        code,
        "ptxas info    : Compiling entry function 'sums' for 'sm_90'\n"
        "ptxas info    : Function properties for sums\n"
        "    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads\n"
        "ptxas info    : Used 74 registers, used 1 barriers, 16 bytes cumulative stack size, 32 bytes smem\n",
    )
    assert (code["sums"].registers, code["sums"].spills, code["sums"].stack, code["sums"].shared) == (74, 32, 16, 32)


# -------------------------------------------------------------------------------------------------------- limits

COUNTS = Counts("k", 132, 128, 64, 40 << 10, 0, {"FFMA": 132 * 4e5}, 0.0, 0.0, 0.0, 0.0, 0.0)


def test_times_are_the_busiest_multiprocessors() -> None:
    h100, a100 = GPUS["h100"], GPUS["a100"]
    times = gpu_model_limits.times(COUNTS, h100)
    assert times["issue"] == pytest.approx(1e5 / h100.clock)
    assert times["float"] == times["issue"]  # 128 lanes take what four schedulers issue
    assert times["double"] == times["product"] == times["L2"] == 0
    one_more = dataclasses.replace(COUNTS, blocks=133, kinds={"FFMA": 133 * 4e5})
    assert gpu_model_limits.times(one_more, h100)["issue"] == pytest.approx(2 * times["issue"])
    few = dataclasses.replace(COUNTS, blocks=21, kinds={"FFMA": 21 * 4e5})
    assert gpu_model_limits.times(few, h100)["issue"] == pytest.approx(times["issue"])  # as long as on all of them
    fewer_lanes = gpu_model_limits.times(dataclasses.replace(COUNTS, blocks=108), a100)
    assert fewer_lanes["float"] == pytest.approx(2 * fewer_lanes["issue"])
    five_warps = gpu_model_limits.times(dataclasses.replace(COUNTS, threads=160), h100)
    assert five_warps["issue"] == pytest.approx(times["issue"] * 8 / 5)  # one of the schedulers has two


def test_tensor_cores_take_their_time() -> None:
    for name, clocks in (("a100", 8), ("l4", 16), ("h100", 6.4)):  # for 2048 multiply-adds, of a scheduler
        gpu = GPUS[name]
        product = dataclasses.replace(
            COUNTS, blocks=gpu.multiprocessors, kinds={"HMMA.16816": gpu.multiprocessors * 4e3}
        )
        times = gpu_model_limits.times(product, gpu)
        assert times["tensor"] == pytest.approx(1e3 * clocks / gpu.clock), name
        assert times["issue"] == pytest.approx(1e3 / gpu.clock)
        half = dataclasses.replace(product, kinds={"HMMA.1688": gpu.multiprocessors * 4e3})
        assert gpu_model_limits.times(half, gpu)["tensor"] == pytest.approx(times["tensor"] / 2)


def test_rates_of_tensor_cores_are_the_data_sheets() -> None:
    sheets = {"t4": 65, "a100": 312, "rtx3090": 71, "l4": 121, "rtx4090": 165.2, "rtx5090": 209.5}  # TFLOPS, dense
    for name, tera in sheets.items():
        gpu = GPUS[name]
        assert 2 * gpu.tensor * gpu.multiprocessors * gpu.clock == pytest.approx(tera * 1e12, rel=0.01), name


def test_exchanges_between_lanes_are_wavefronts() -> None:
    gpu = GPUS["h100"]
    shuffled = dataclasses.replace(COUNTS, kinds={"SHFL": 132e3, "MOVM": 132e3}, shared_wavefronts=132e3)
    assert gpu_model_limits.times(shuffled, gpu)["wavefronts"] == pytest.approx(3000 / gpu.clock)


def test_what_is_useful() -> None:
    problem = Problem(32, 10, 10)  # 32 x 400 outputs of 25 taps
    case = Case(problem, "forward", "contiguous", "logits")
    assert case.multiply_adds() == 320_000
    kinds = {"FFMA": 10_000.0, "IADD3": 10_000.0}
    record = gpu_model_limits.predict(case, [dataclasses.replace(COUNTS, kinds=kinds)], GPUS["h100"]).record(
        GPUS["h100"]
    )
    assert (record["useful_share"], record["useful_multiply_adds"]) == (0.5, 1.0)
    kinds = {"HMMA.16816": 250.0, "HMMA.1688": 125.0, "IADD3": 20_000.0}  # 640,000 multiply-adds, as many other lanes
    record = gpu_model_limits.predict(case, [dataclasses.replace(COUNTS, kinds=kinds)], GPUS["h100"]).record(
        GPUS["h100"]
    )
    assert (record["useful_share"], record["useful_multiply_adds"]) == (0.25, 0.5)
    kinds = {"IADD3": 20_000.0}
    record = gpu_model_limits.predict(case, [dataclasses.replace(COUNTS, kinds=kinds)], GPUS["h100"]).record(
        GPUS["h100"]
    )
    assert record["useful_multiply_adds"] is None


def test_bytes_and_wavefronts() -> None:
    gpu = GPUS["h100"]
    moved = dataclasses.replace(COUNTS, sectors_read=132e3, sectors_written=132e3, shared_wavefronts=264e3)
    times = gpu_model_limits.times(moved, gpu)
    assert times["L2"] == pytest.approx(264e3 * 32 / (5120 * gpu.clock))
    assert times["wavefronts"] == pytest.approx(2000 / gpu.clock)
    assert gpu_model_limits.times(dataclasses.replace(moved, blocks=40), GPUS["t4"])["wavefronts"] == pytest.approx(
        264e3 / 40 * 2 / GPUS["t4"].clock  # 64 bytes a clock
    )


def test_prediction_is_the_largest_limit() -> None:
    gpu = GPUS["h100"]
    case = Case(Problem(256, 100, 168), "forward", "contiguous", "logits")
    assert case.compulsory_bytes() == 4 * (256 * 100 * 168 + 25 * 200 * 336 + 256 * 200 * 336)
    assert Case(case.problem, "grad-kernels", "contiguous", "logits").compulsory_bytes() == (
        case.compulsory_bytes() + 4 * 25 * 200 * 336
    )
    found = gpu_model_limits.predict(case, [COUNTS], gpu)
    assert found.bound == pytest.approx(27.66e-6, rel=1e-3)  # 92.7 MB at 3.35 TB/s
    assert found.limited_by == "issue"
    assert found.limit == pytest.approx(1e5 / gpu.clock)
    idle = gpu_model_limits.predict(case, [dataclasses.replace(COUNTS, kinds={"FFMA": 1.0})], gpu)
    assert (idle.limit, idle.limited_by) == (found.bound, "memory")
    twice = gpu_model_limits.predict(case, [COUNTS, COUNTS], gpu)
    assert twice.limit == pytest.approx(2 * found.limit)
    waiting = dataclasses.replace(COUNTS, latency=5e4, blocks=132 * 9, kinds={"FFMA": 132 * 9 * 4e5})
    resident = waiting.resident(gpu).blocks
    assert gpu_model_limits.generations(waiting, gpu) == math.ceil(9 / resident)
    expected = gpu_model_limits.predict(case, [waiting], gpu).expected
    waits = math.ceil(9 / resident) * 5e4 / gpu.clock
    assert expected == pytest.approx(9e5 / gpu.clock + waits + gpu_model_limits.LAUNCH_SECONDS)


def test_counts_of_a_launch() -> None:
    code, statements = parse_sass(SASS)["sums"], gpu_model_sass.ptx_statements(PTX)["sums"]
    code.registers, code.shared = 40, 32
    lines = {line: Issue(4.0) for line in (7, 8, 18)} | {line: Issue(16.0) for line in (12, 13, 14)}
    lines |= {
        11: Issue(16.0, wavefronts=64.0, ideal_wavefronts=16.0),
        17: Issue(4.0, sectors=20.0, global_wavefronts=8.0),
    }
    counts = gpu_model_counts.counts_of(Launch("sums", 2, 64, 1000, lines, 2, {12: "sums.h:5"}), code, statements)
    assert counts.instructions == 4 * 3 + 4 * 9 + 4 * 2
    assert counts.kinds["FFMA"] == 16
    assert (counts.sectors_read, counts.sectors_written, counts.global_wavefronts) == (0, 20, 8)
    assert (counts.shared_wavefronts, counts.ideal_wavefronts) == (64, 16)
    assert (counts.shared, counts.registers, counts.difference) == (1032, 40, 0)
    assert ("sums.h:5", pytest.approx(16 / 56)) in [hot[:2] for hot in counts.hot]


def test_sampling_steps_are_prime() -> None:
    assert [gpu_model_counts.sampling_step(blocks, 32) for blocks in (1, 40, 64, 130, 320, 1100)] == [1, 1, 2, 3, 7, 31]
    with pytest.raises(UsageError, match="k does not fit"):
        dataclasses.replace(COUNTS, shared=200 << 10).resident(GPUS["t4"])


# ---------------------------------------------------------------------------------------------------- comparison


def test_counters_are_read(tmp_path: Path) -> None:
    found = gpu_model_compared.read_counters(COUNTERS)
    assert len(found) == 54
    assert (found[0]["time_us"], found[0]["instructions"], found[0]["registers"]) == (28.16, 8119464, 74)
    assert found[0]["wavefronts_share"] == pytest.approx(0.1353)
    columns = ["ID", "Kernel Name", *gpu_model_compared.MEASURED.values()]
    rows = [
        columns,
        ["", "", "usecond", "inst", "Mbyte", "register/thread", "%"],
        ["0", "k", "12.5", "1,000", "2", "64", "30"],
    ]
    file = tmp_path / "counters.csv"
    file.write_text("==PROF== Connected\n" + "\n".join(",".join(f'"{cell}"' for cell in row) for row in rows) + "\n")
    (row,) = gpu_model_compared.read_counters(file)
    assert (row["time_us"], row["instructions"], row["dram_bytes"], row["warps_active"]) == (12.5, 1000, 2e6, 30)
    assert "wavefronts_share" not in row  # ncu was not asked for it
    file.write_text("nothing\n")
    with pytest.raises(UsageError, match="found no column 'Kernel Name'"):
        gpu_model_compared.read_counters(file)
    file.write_text("Kernel Name,other\nk,1\n")
    with pytest.raises(UsageError, match="found no column gpu__time_duration"):
        gpu_model_compared.read_counters(file)


class OneLaunch:
    """Every call launches the same."""

    def counts(self, case: Case) -> tuple[Counts, ...]:
        return (dataclasses.replace(COUNTS, shared_wavefronts=1e6),)


def test_counters_stand_beside_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    measured = gpu_model_compared.read_counters(COUNTERS)
    records = gpu_model_compared.compare(measured, OneLaunch(), GPUS["h200"])  # type: ignore[arg-type]
    assert len(records) == 54
    assert records[0]["instructions_ratio"] == pytest.approx(132 * 4e5 / 8119464, abs=1e-4)
    assert records[0]["measured_over_limit"] == pytest.approx(28.16 / (1e11 / GPUS["h200"].clock), abs=1e-3)
    passed = 0.1353 * 28.16e-6 * GPUS["h200"].clock * 132
    assert records[0]["wavefronts_ratio"] == pytest.approx(1e6 / passed, rel=1e-3)
    for record, values in zip(records, measured, strict=True):  # in the order of the calls
        shape, call = record["shape"], values["call"]
        assert f"{shape['channels']}x{shape['height']}x{shape['width']} {shape['up']}/{shape['down']}" in call
        assert record["dtype"] in call
        assert record["layout"].replace("-", "_") in call
    gpu_model_compared.print_comparison(records, GPUS["h200"])
    assert "The model beside what ncu measured" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"53 kernels were measured, benchmarks\.gpu_probes launches 54"):
        gpu_model_compared.compare(measured[1:], OneLaunch(), GPUS["h200"])  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "voodoo2"], "--gpu: unknown GPU 'voodoo2'; known are t4, a100"),
        (["--dtype", "float8"], "--dtype: invalid choice: 'float8'"),
        (["--shapes", "256x50"], "expected CxHxW or NxCxHxW"),
        (["--shapes", "30x5x5", "--group-size", "4"], "--group-size: 30 channels cannot be divided into 4 groups"),
        (["--shapes", "30x5x5", "--kernel-size", "4"], "--kernel-size: expected an odd number, got 4"),
        (["--kernel-size", "3"], "--kernel-size goes with --shapes"),
        (["--source", "docs"], "--source: expected a folder with the CUDA sources in cuda/, got docs"),
        (["--compare", "none.csv"], "--compare: no file none.csv"),
        (["--json", "no/folder/file.json"], "no folder no/folder"),
    ],
)
def test_mistakes_end_in_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu_model.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_tool_ends_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_model_sass, "find_tool", lambda name: None if name == "nvdisasm" else "/usr/bin/true")
    assert gpu_model.main(["--source", str(gpu_model.SOURCE)]) == 2
    assert capsys.readouterr().err == "error: the kernels cannot be counted: nvdisasm is not installed\n"


def test_the_usual_problems() -> None:
    options = gpu_model.parse_arguments([])
    assert len(list(gpu_model.cases(options))) == len(options.problems) * 36
    geometries = {(p.channels, p.height, p.kernel_size, p.group_size, p.up, p.down) for p in options.problems}
    assert {(256, 25, 5, 1, 2, 1), (256, 200, 5, 1, 1, 2), (64, 200, 7, 1, 1, 2)} <= geometries
    assert {(256, 50, 3, 1, 2, 1), (256, 50, 5, 1, 4, 1), (256, 50, 5, 4, 2, 1)} <= geometries


# ------------------------------------------------------------------------------------------- the project's kernels


@pytest.fixture(scope="module")
def tally() -> gpu_model_counts.Tally:
    return gpu_model_counts.Tally(
        GPUS["a100"], "a100", gpu_model.SOURCE
    )  # of the PTX that the executor's own tests run


@needs_tools
def test_devices_are_the_executors() -> None:
    executor, _ = gpu_model_counts.import_executor()
    for name in set(GPUS) & set(executor.DEVICES):
        assert gpu_model_counts.attributes(GPUS[name]).items() <= executor.DEVICES[name].items(), name


@needs_tools
@pytest.mark.parametrize("operator", gpu_model_counts.OPERATORS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_sample_stands_for_all_blocks(tally: gpu_model_counts.Tally, operator: str, dtype: str) -> None:
    case = Case(Problem(64, 61, 83, dtype=gpu_model_counts.DTYPES[dtype]), operator, "contiguous", "logits")
    whole, some = tally.launches(case, None), tally.launches(case, 12)
    assert [launch.kernel for launch in some] == [launch.kernel for launch in whole]
    assert any(launch.sampled < launch.blocks for launch in some)
    for one, other in zip(whole, some, strict=True):
        assert one.sampled == one.blocks == other.blocks
        for name in ("issued", "sectors", "wavefronts"):
            expected, found = (sum(getattr(each, name) for each in launch.lines.values()) for launch in (one, other))
            assert found == pytest.approx(expected, rel=0.1)


@needs_tools
@pytest.mark.parametrize("operator", gpu_model_counts.OPERATORS)
def test_machine_code_agrees_with_the_executed_ptx(tally: gpu_model_counts.Tally, operator: str) -> None:
    case = Case(Problem(64, 25, 42), operator, "contiguous", "logits")
    launches, counts = tally.launches(case, None), tally.counts(case)
    assert all(each.guessed < 0.01 for each in counts)
    assert all(each.difference < gpu_model.CONTRADICTION for each in counts)
    # Every multiply-add of the definition is issued, by lanes that may be idle at the map's ends.
    assert sum(each.multiply_adds for each in counts) >= case.multiply_adds()
    # Of one statement comes about one instruction.
    executed = sum(issue.issued for launch in launches for issue in launch.lines.values())
    assert 0.5 < sum(each.instructions for each in counts) / executed < 1.5
    assert all(launch.registers > 0 for launch in counts)


@needs_tools
@pytest.mark.parametrize("trips", [1, 3, 7, 37, 64])
def test_loops_that_ptxas_unrolls_are_counted(tmp_path: Path, trips: int) -> None:
    executor, _ = gpu_model_counts.import_executor()
    import ptx

    source = tmp_path / "loop.cu"
    source.write_text(
        'extern "C" __global__ void loop(const float* from, float* to, int n, int step) {\n'
        "  float sum = 0;\n"
        "  const int base = blockIdx.x * blockDim.x + threadIdx.x;\n"
        "  for (int i = 0; i < n; ++i) { const float x = from[base + step * i]; sum = sum * x + x; }\n"
        "  to[base] = sum;\n"
        "}\n"
    )
    text = executor.compile_ptx(source)
    code = gpu_model_sass.assemble(text, "sm_80")["loop"]
    statements = gpu_model_sass.ptx_statements(text)["loop"]
    written = sum(statement.opcode == "fma.rn.f32" for statement in statements)
    if sum(one.base == "FFMA" for one in code.instructions) <= written:
        pytest.skip("this ptxas unrolls no further than the PTX")

    source_data, result = torch.ones(32 * trips), torch.zeros(32)
    number = executor.load(ptx.Module(text), "loop")
    executor.reset()
    executor.set_device("a100")
    executor.set_options()
    executor.add_range(source_data, 0)
    executor.add_range(result, 1)
    pointers = [ctypes.c_uint64(tensor.data_ptr()) for tensor in (source_data, result)]
    assert executor.launch(number, (1,), (32,), [*pointers, ctypes.c_int32(trips), ctypes.c_int32(32)]) == 0
    launch = gpu_model_counts.launch_of(executor.launches()[0])
    counts = gpu_model_counts.counts_of(launch, code, statements)
    assert counts.kinds["FFMA"] == trips
    assert counts.kinds["LDG"] == trips
    assert counts.kinds["STG"] == 1
    assert counts.difference == 0
    assert counts.guessed < 0.1  # what leads from one copy to the next


@needs_tools
def test_products_of_matrices_are_counted(tmp_path: Path) -> None:
    executor, _ = gpu_model_counts.import_executor()
    import ptx

    source = tmp_path / "products.cu"
    source.write_text(
        "#include <cstdint>\n"
        'extern "C" __global__ void products(const uint32_t* from, float* to, int n) {\n'
        "  __shared__ alignas(16) uint32_t staged[32][4];\n"
        "  float d[4] = {};\n"
        "  uint32_t a[4];\n"
        "  const uint32_t to_shared = static_cast<uint32_t>(__cvta_generic_to_shared(staged[threadIdx.x]));\n"
        "  for (int i = 0; i < n; ++i) {\n"
        '    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\\n"\n'
        '        :: "r"(to_shared), "l"(from + threadIdx.x * 4));\n'
        '    asm volatile("cp.async.wait_all;\\n" ::: "memory");\n'
        "    __syncwarp();\n"
        '    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16\\n {%0, %1, %2, %3}, [%4];\\n"\n'
        '        : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(to_shared));\n'
        '    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32\\n"\n'
        '        " {%0, %1, %2, %3}, {%4, %5, %6, %7},\\n {%4, %5}, {%0, %1, %2, %3};\\n"\n'
        '        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]));\n'
        "    __syncwarp();\n"
        "  }\n"
        "  to[threadIdx.x] = d[0] + d[1] + d[2] + d[3];\n"
        "}\n"
    )
    text = executor.compile_ptx(source)
    module = ptx.Module(text)
    for architecture in ("sm_80", "sm_90"):
        code = gpu_model_sass.assemble(text, architecture)["products"]
        data, result = torch.zeros(128, dtype=torch.int32), torch.zeros(32)
        executor.reset()
        number = executor.load(module, "products")
        executor.set_device("h100")
        executor.set_options()
        executor.add_range(data, 0)
        executor.add_range(result, 1)
        pointers = [ctypes.c_uint64(tensor.data_ptr()) for tensor in (data, result)]
        assert executor.launch(number, (1,), (32,), [*pointers, ctypes.c_int32(7)]) == 0
        assert not executor.findings()
        counts = gpu_model_counts.counts_of(
            gpu_model_counts.launch_of(executor.launches()[0]), code, gpu_model_sass.ptx_statements(text)["products"]
        )
        assert {kind: counts.kinds[kind] for kind in ("HMMA.16816", "LDSM", "LDGSTS")} == {
            "HMMA.16816": 7, "LDSM": 7, "LDGSTS": 7
        }, architecture  # fmt: skip
        assert {check.kind for check in counts.checks} >= {"HMMA", "LDSM", "LDGSTS"}
        assert counts.difference == 0
        # Four matrices of 128 bytes come, and four go.
        assert (counts.shared_wavefronts, counts.ideal_wavefronts) == (7 * 8, 7 * 8)
        assert counts.latency > 7 * (gpu_model_sass.COPY_LATENCY + gpu_model_sass.LATENCIES["LDSM"])


COMMANDS = sorted(
    path
    for path in (ROOT / "benchmarks").glob("*.py")
    if {"argparse", "__main__"} <= set(re.findall(r"\w+", path.read_text()))
)


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_commands_can_be_run_as_files(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.setattr(
        sys, "path", [str(path.parent), *(each for each in sys.path if Path(each or ".").resolve() != ROOT)]
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 0
    assert "usage: " in capsys.readouterr().out


@needs_tools
def test_command_predicts_and_says_that_it_is_a_model(
    tally: gpu_model_counts.Tally, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_model, "Tally", lambda *arguments: tally)
    file = tmp_path / "model.json"
    arguments = "--gpu a100 --shapes 32x13x21 --dtype float32 --layouts contiguous --kernels logits --details --json"
    assert gpu_model.main([*arguments.split(), str(file)]) == 0
    output = capsys.readouterr().out
    assert "Model, not measured: 32 x 13 x 21, up 2, k 5, A100" in output
    assert "FFMA" in output
    record = json.loads(file.read_text())
    assert record["model"] == "a model of the GPU, not a measurement"
    assert [each["operator"] for each in record["predictions"]] == list(gpu_model_counts.OPERATORS)
    for each in record["predictions"]:
        assert each["limit_us"] >= each["bound_us"]
        assert each["expected_us"] > each["limit_us"]
        assert 0 < each["useful_share"] < 1
        assert max(*each["launches"][0]["times_us"].values(), each["bound_us"]) <= each["limit_us"] + 0.01
