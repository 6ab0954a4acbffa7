"""The PTX interpreter itself: each kind of operation on a kernel of a few lines, and each check on one that is wrong
and one that is right."""

import ctypes
import math
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import executor
import ptx

pytestmark = pytest.mark.skipif(
    shutil.which(executor._cxx()[0]) is None, reason=f"no C++ compiler: {executor._cxx()[0]} is not on the PATH"
)

TEMPLATE = """
.version 8.4
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 dynamic[];
.const .align 4 .u32 table[4] = {{10, 20, 30, 40}};
.visible .entry kernel({parameters})
.maxntid 1024, 1, 1
{{
 .reg .pred %p<16>;
 .reg .b16 %h<32>;
 .reg .b32 %r<64>;
 .reg .f32 %f<64>;
 .reg .b64 %rd<64>;
 .reg .f64 %d<32>;
 .shared .align 16 .b8 buffer[{shared}];
{pointers}
 mov.u32 %r0, %tid.x;
 mul.wide.u32 %rd20, %r0, 4;
{body}
 ret;
}}
"""


def execute(body, *tensors, block=32, grid=1, shared=16, dynamic=0, results=1, target="sm_80", **options):
    """Runs a kernel; %rd0, %rd1, ... are the addresses of ``tensors``, the first ``results`` of which it writes; %r0 is
    the thread, %rd20 four times that. What was found."""
    parameters = ", ".join(f".param .u64 p{n}" for n in range(len(tensors)))
    pointers = "\n".join(f" ld.param.u64 %rd{n}, [p{n}];" for n in range(len(tensors)))
    text = TEMPLATE.format(parameters=parameters, pointers=pointers, shared=shared, body=body)
    executor.reset()
    module = ptx.Module(text.replace("sm_80", target))
    number = executor.load(module, "kernel")
    executor.set_device()
    executor.set_options(**options)
    for n, tensor in enumerate(tensors):
        executor.add_range(tensor, int(n < results))
    held = [ctypes.c_uint64(tensor.data_ptr()) for tensor in tensors]
    status = executor.launch(number, [grid], [block], held, dynamic)
    assert status in (0, 719), status
    return executor.findings()


def ints(count=32, dtype=torch.int32):
    return executor.place(torch.zeros(count, dtype=dtype), 0, (count,), (1,))


def each(instructions, *inputs, width=32):
    """The 32-bit results in %r9 (or %rd9) of instructions on %r1, %r2, %r3 (or %f1 ..., which are the same bits)."""
    count = len(inputs[0])
    out = ints(count, torch.int64 if width == 64 else torch.int32)
    loads = "\n".join(
        f" add.s64 %rd10, %rd{n + 1}, %rd20; ld.global.u32 %r{n + 1}, [%rd10]; mov.b32 %f{n + 1}, %r{n + 1};"
        for n in range(len(inputs))
    )
    store = "st.global.u32 [%rd10], %r9;"
    if width == 64:
        store = "add.s64 %rd10, %rd10, %rd20; st.global.u64 [%rd10], %rd9;"
    assert not execute(f"{loads}\n{instructions}\n add.s64 %rd10, %rd0, %rd20; {store}", out, *inputs, block=count)
    return out


def bits(values):
    return torch.tensor(values, dtype=torch.float32).view(torch.int32)


def signed(value):
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)


WORDS = [0, 1, 2, 5, 31, 32, 33, 0x7FFF, 0x8000, 0xFFFF, 0x12345678, 0x7FFFFFFF, -1, -2, -5, -(1 << 31)]
PAIRS = [(a, b) for a in WORDS for b in WORDS]
LEFT, RIGHT = (torch.tensor(column, dtype=torch.int32) for column in zip(*PAIRS, strict=True))


def unsigned(value):
    return value % (1 << 32)


INTEGERS = {
    "add.s32 %r9, %r1, %r2;": lambda a, b: a + b,
    "sub.s32 %r9, %r1, %r2;": lambda a, b: a - b,
    "mul.lo.s32 %r9, %r1, %r2;": lambda a, b: a * b,
    "mul.hi.s32 %r9, %r1, %r2;": lambda a, b: (a * b) >> 32,
    "mul.hi.u32 %r9, %r1, %r2;": lambda a, b: (unsigned(a) * unsigned(b)) >> 32,
    "mad.lo.s32 %r9, %r1, %r2, 7;": lambda a, b: a * b + 7,
    "shl.b32 %r9, %r1, %r2;": lambda a, b: a << unsigned(b) if unsigned(b) < 32 else 0,
    "shr.u32 %r9, %r1, %r2;": lambda a, b: unsigned(a) >> min(unsigned(b), 40),
    "shr.s32 %r9, %r1, %r2;": lambda a, b: a >> min(unsigned(b), 40),
    "min.s32 %r9, %r1, %r2;": min,
    "max.u32 %r9, %r1, %r2;": lambda a, b: max(unsigned(a), unsigned(b)),
    "and.b32 %r9, %r1, %r2;": lambda a, b: a & b,
    "not.b32 %r9, %r1;": lambda a, b: ~a,
    "lop3.b32 %r9, %r1, %r2, 0x0f0f, 0x96;": lambda a, b: a ^ b ^ 0x0F0F,
    "popc.b32 %r9, %r1;": lambda a, b: bin(unsigned(a)).count("1"),
    "clz.b32 %r9, %r1;": lambda a, b: 32 - unsigned(a).bit_length(),
    "brev.b32 %r9, %r1;": lambda a, b: int(f"{unsigned(a):032b}"[::-1], 2),
    "shf.l.wrap.b32 %r9, %r1, %r2, 5;": lambda a, b: unsigned(b) << 5 | unsigned(a) >> 27,
    "shf.r.wrap.b32 %r9, %r1, %r2, 5;": lambda a, b: unsigned(b) << 27 | unsigned(a) >> 5,
    "prmt.b32 %r9, %r1, %r2, 0x5410;": lambda a, b: (a & 0xFFFF) | (b & 0xFFFF) << 16,
    "prmt.b32 %r9, %r1, %r2, 0x7632;": lambda a, b: unsigned(a) >> 16 | unsigned(b) >> 16 << 16,
    "prmt.b32 %r9, %r1, %r2, 0xBBBB;": lambda a, b: -1 if a < 0 else 0,
    "bfe.u32 %r9, %r1, 4, 9;": lambda a, b: unsigned(a) >> 4 & 511,
    "bfe.s32 %r9, %r1, 4, 9;": lambda a, b: ((unsigned(a) >> 4 & 511) + 256) % 512 - 256,
    "bfi.b32 %r9, %r1, %r2, 4, 8;": lambda a, b: (b & ~0xFF0) | (a & 0xFF) << 4,
    "cvt.u32.u16 %r9, %h1;": lambda a, b: a & 0xFFFF,
    "cvt.s32.s16 %r9, %h1;": lambda a, b: ((a & 0xFFFF) + 0x8000) % 0x10000 - 0x8000,
    "cvt.s32.s8 %r9, %r1;": lambda a, b: ((a & 0xFF) + 128) % 256 - 128,
    "cvt.u8.u32 %r9, %r1;": lambda a, b: a & 0xFF,
    "mul.wide.s16 %r9, %h1, %h2;": lambda a, b: (((a & 0xFFFF) + 0x8000) % 0x10000 - 0x8000)
    * (((b & 0xFFFF) + 0x8000) % 0x10000 - 0x8000),
    "dp4a.u32.u32 %r9, %r1, %r2, 3;": lambda a, b: 3
    + sum((unsigned(a) >> 8 * k & 255) * (unsigned(b) >> 8 * k & 255) for k in range(4)),
    "dp2a.hi.u32.u32 %r9, %r1, %r2, 3;": lambda a, b: 3
    + sum((unsigned(a) >> 16 * k & 65535) * (unsigned(b) >> 8 * (k + 2) & 255) for k in range(2)),
    "setp.lt.s32 %p1, %r1, %r2; selp.b32 %r9, 3, 4, %p1;": lambda a, b: 3 if a < b else 4,
    "setp.hi.u32 %p1, %r1, %r2; selp.b32 %r9, 3, 4, %p1;": lambda a, b: 3 if unsigned(a) > unsigned(b) else 4,
    "setp.eq.s32 %p3, %r2, 5; setp.lt.and.s32 %p1|%p2, %r1, %r2, !%p3; selp.b32 %r9, 3, 4, %p1; @%p2 add.s32 %r9, "
    "%r9, 10;": lambda a, b: (3 if a < b and b != 5 else 4) + (10 if a >= b and b != 5 else 0),
    "setp.ne.s32 %p0, %r1, 0; mov.u32 %r9, 2; @!%p0 mov.u32 %r9, %r2;": lambda a, b: 2 if a else b,
}  # fmt: skip


@pytest.mark.parametrize("text", INTEGERS, ids=lambda text: text.split()[0])
def test_integers(text):
    got = each(f"cvt.u16.u32 %h1, %r1; cvt.u16.u32 %h2, %r2; {text}", LEFT, RIGHT)
    assert got.tolist() == [signed(INTEGERS[text](a, b)) for a, b in PAIRS]


@pytest.mark.parametrize("name", ["div", "rem"])
@pytest.mark.parametrize("kind", ["s32", "u32"])
def test_division(name, kind):
    pairs = [(a, b) for a, b in PAIRS if b and not (kind == "s32" and a == -(1 << 31) and b == -1)]
    left, right = (torch.tensor(column, dtype=torch.int32) for column in zip(*pairs, strict=True))
    got = each(f"{name}.{kind} %r9, %r1, %r2;", left, right)
    for value, (a, b) in zip(got.tolist(), pairs, strict=True):
        a, b = (a, b) if kind == "s32" else (unsigned(a), unsigned(b))
        quotient = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
        assert value == signed(quotient if name == "div" else a - quotient * b), (a, b)


WIDE = {
    "mul.wide.s32 %rd9, %r1, %r2;": lambda a, b: a * b,
    "mul.wide.u32 %rd9, %r1, %r2;": lambda a, b: unsigned(a) * unsigned(b),
    "cvt.s64.s32 %rd9, %r1;": lambda a, b: a,
    "cvt.u64.u32 %rd9, %r1;": lambda a, b: unsigned(a),
    "mov.b64 %rd9, {%r1, %r2};": lambda a, b: unsigned(a) | unsigned(b) << 32,
    "cvt.s64.s32 %rd8, %r2; mad.wide.s32 %rd9, %r1, 3, %rd8;": lambda a, b: 3 * a + b,
    "cvt.s64.s32 %rd8, %r2; mad.lo.s64 %rd9, %rd8, 5, -1;": lambda a, b: 5 * b - 1,
    "cvt.s64.s32 %rd8, %r2; shr.s64 %rd9, %rd8, 3;": lambda a, b: b >> 3,
    "cvt.u64.u32 %rd8, %r2; shl.b64 %rd9, %rd8, 33;": lambda a, b: unsigned(b) << 33,
    "cvt.s64.s32 %rd8, %r2; cvt.s64.s32 %rd7, %r1; mul.hi.s64 %rd9, %rd7, %rd8;": lambda a, b: (a * b) >> 64,
}


@pytest.mark.parametrize("text", WIDE, ids=lambda text: text.split()[-3])
def test_64_bits(text):
    got = each(text, LEFT, RIGHT, width=64)
    assert got.tolist() == [(WIDE[text](a, b) + (1 << 63)) % (1 << 64) - (1 << 63) for a, b in PAIRS]


# --- floats

FLOATS = [0.0, -0.0, 1.0, -1.0, 1 / 3, -2 / 3, 65504.0, 65519.9, 65520.0, 1e-8, -1e-8, 6e-8, 3e38, 1e-40, 2.5, 3.5]
FLOATS += [-0.5, 1e10, 1 + 2**-11, 1 + 2**-11 + 2**-20, 1 + 3 * 2**-11, math.inf, -math.inf, math.nan]
GENERATOR = torch.Generator().manual_seed(1)
MANY = torch.cat(
    [torch.tensor(FLOATS), torch.randn(200, generator=GENERATOR) * 10 ** torch.randn(200, generator=GENERATOR)]
)


def rounded(value, digits, smallest, rounding):
    """A fraction, rounded to a binary number of so many digits, whose subnormals are multiples of ``smallest``."""
    if value == 0:
        return value
    exponent = 0
    size = abs(value)
    while size >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while size < Fraction(2) ** exponent:
        exponent -= 1
    unit = max(Fraction(2) ** (exponent - digits + 1), Fraction(smallest))
    scaled = value / unit
    whole = {
        "rn": round,  # half to even
        "rz": math.trunc,
        "rm": math.floor,
        "rp": math.ceil,
    }[rounding](scaled)
    return whole * unit


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_to_half_precision_rounds_to_the_nearest_even(kind):
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    got = each(f"cvt.rn.{kind}.f32 %h1, %f1; cvt.u32.u16 %r9, %h1;", MANY.view(torch.int32))
    narrow = got.to(torch.int16).view(dtype)
    assert torch.equal(narrow.isnan(), MANY.isnan())
    assert torch.equal(narrow.nan_to_num(0), MANY.to(dtype).nan_to_num(0))
    assert torch.equal(narrow.signbit()[~MANY.isnan()], MANY.signbit()[~MANY.isnan()])
    # All numbers, there and back.
    every = torch.arange(1024, dtype=torch.int32)
    for first in range(0, 1 << 16, 1024):
        back = each(f"cvt.u16.u32 %h1, %r1; cvt.f32.{kind} %f9, %h1; mov.b32 %r9, %f9;", every + first).view(
            torch.float32
        )
        wanted = (every + first).to(torch.int16).view(dtype).float()
        assert torch.equal(back.nan_to_num(0.5), wanted.nan_to_num(0.5))


@pytest.mark.parametrize(
    ("kind", "digits", "smallest"), [("f16", 11, Fraction(1, 2**24)), ("bf16", 8, Fraction(1, 2**133))]
)
def test_to_half_precision_towards_zero(kind, digits, smallest):
    values = MANY[MANY.isfinite() & (MANY.abs() < 60000)]
    got = each(f"cvt.rz.{kind}.f32 %h1, %f1; cvt.f32.{kind} %f9, %h1; mov.b32 %r9, %f9;", values.view(torch.int32))
    for value, narrow in zip(values.tolist(), got.view(torch.float32).tolist(), strict=True):
        assert Fraction(narrow) == rounded(Fraction(value), digits, smallest, "rz"), value


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_pairs_of_half_precision(kind):
    dtype = torch.float16 if kind == "f16x2" else torch.bfloat16
    a, b, c = (torch.randn(64, generator=GENERATOR).to(dtype) for _ in range(3))
    packed = each(f"cvt.rn.{kind}.f32 %r9, %f1, %f2;", a.float().view(torch.int32), b.float().view(torch.int32))
    pairs = packed.view(dtype).view(-1, 2)
    assert torch.equal(pairs[:, 1], a)  # the first operand is the upper half
    assert torch.equal(pairs[:, 0], b)
    words = [torch.stack([x, y], 1).flatten().view(torch.int32) for x, y in ((a, b), (b, c), (c, a))]

    def halves(text, count):
        return each(text, *words[:count]).view(dtype).view(-1, 2)

    wanted = torch.stack([a.double() * b.double() + c.double(), b.double() * c.double() + a.double()], 1).to(dtype)
    assert torch.equal(halves(f"fma.rn.{kind} %r9, %r1, %r2, %r3;", 3), wanted)
    assert torch.equal(halves(f"mul.{kind} %r9, %r1, %r2;", 2), torch.stack([a * b, b * c], 1))
    assert torch.equal(halves(f"add.{kind} %r9, %r1, %r2;", 2), torch.stack([a + b, b + c], 1))
    assert torch.equal(halves(f"max.{kind} %r9, %r1, %r2;", 2), torch.stack([a.maximum(b), b.maximum(c)], 1))


def test_a_pair_is_fused_with_one_rounding():
    # 1 + 2^-11 is a tie that the term of 2^-25 decides: rounded twice it would be 1.
    one, tiny, half = (torch.tensor([x], dtype=torch.float16) for x in (1.0, 2.0**-12, 2.0**-11))
    a = torch.cat([tiny, tiny]).view(torch.int32)
    b = torch.cat([half / 4, half / 4]).view(torch.int32)
    c = torch.cat([one + 2 * half, one + 2 * half]).view(torch.int32)
    got = each("fma.rn.f16x2 %r9, %r1, %r2, %r3;", a, b, c).view(torch.float16)
    assert got.tolist() == [float(one + 2 * half)] * 2
    near = torch.tensor([1.0 + 2**-10, 1.0 + 2**-10], dtype=torch.float16).view(torch.int32)
    got = each("fma.rn.f16x2 %r9, %r1, %r2, %r3;", near, near, c).view(torch.float16)
    exact = (1 + Fraction(1, 1024)) ** 2 + Fraction(float(one + 2 * half))
    assert Fraction(float(got[0])) == rounded(exact, 11, Fraction(1, 2**24), "rn")


@pytest.mark.parametrize("rounding", ["rn", "rz", "rm", "rp"])
def test_float32_by_every_rounding(rounding):
    finite = MANY[MANY.isfinite() & (MANY.abs() > 1e-12) & (MANY.abs() < 1e12)]
    a, b = finite[:-1], finite.flip(0)[:-1]
    c = finite.roll(7)[:-1]
    held = [x.contiguous().view(torch.int32) for x in (a, b, c)]
    exact = {
        f"add.{rounding}.f32 %f9, %f1, %f2;": lambda x, y, z: x + y,
        f"sub.{rounding}.f32 %f9, %f1, %f2;": lambda x, y, z: x - y,
        f"mul.{rounding}.f32 %f9, %f1, %f2;": lambda x, y, z: x * y,
        f"fma.{rounding}.f32 %f9, %f1, %f2, %f3;": lambda x, y, z: x * y + z,
        f"div.{rounding}.f32 %f9, %f1, %f2;": lambda x, y, z: x / y,
    }
    for text, function in exact.items():
        got = each(f"{text} mov.b32 %r9, %f9;", *held).view(torch.float32)
        for x, y, z, value in zip(a.tolist(), b.tolist(), c.tolist(), got.tolist(), strict=True):
            wanted = rounded(function(*map(Fraction, (x, y, z))), 24, Fraction(1, 2**149), rounding)
            assert Fraction(value) == wanted, (text, x, y, z)


def test_minimum_and_maximum_of_what_is_not_a_number():
    pairs = [(a, b) for a in (0.0, -0.0, 1.0, math.nan, -math.inf) for b in (0.0, -0.0, 2.0, math.nan, math.inf)]
    left, right = (bits(column) for column in zip(*pairs, strict=True))
    for name in ("min", "max"):
        got = each(f"{name}.f32 %f9, %f1, %f2; mov.b32 %r9, %f9;", left, right).view(torch.float32)
        strict = each(f"{name}.NaN.f32 %f9, %f1, %f2; mov.b32 %r9, %f9;", left, right).view(torch.float32)
        for (a, b), value, other in zip(pairs, got.tolist(), strict.tolist(), strict=True):
            assert math.isnan(value) == (math.isnan(a) and math.isnan(b))
            assert math.isnan(other) == (math.isnan(a) or math.isnan(b))
            if a == b == 0:
                assert math.copysign(1, value) == (min if name == "min" else max)(
                    math.copysign(1, a), math.copysign(1, b)
                )
            elif not math.isnan(other):
                assert value == other == (min if name == "min" else max)(a, b)


def test_approximate_functions():
    values = MANY[MANY.isfinite() & (MANY.abs() < 80)]
    for text, function in {
        "ex2.approx.ftz.f32": lambda x: x.double().exp2(),
        "rcp.approx.f32": lambda x: 1 / x.double(),
        "sqrt.approx.f32": lambda x: x.double().sqrt(),
        "lg2.approx.f32": lambda x: x.double().log2(),
    }.items():
        got = each(f"{text} %f9, %f1; mov.b32 %r9, %f9;", values.view(torch.int32)).view(torch.float32)
        wanted = function(values)
        fine = wanted.isfinite() & (wanted.abs() > 1e-37) & (wanted.abs() < 1e38)
        assert torch.allclose(got[fine].double(), wanted[fine], rtol=3e-7, atol=1e-7), text
    # What the hardware's quick division makes of a divisor beyond 2^126.
    big = bits([2.0**127, -(2.0**127), 2.0**126])
    got = each("div.approx.f32 %f9, %f1, %f2; mov.b32 %r9, %f9;", bits([1e38] * 3), big).view(torch.float32)
    assert got[0] == 0
    assert got[1] == 0
    assert got[2] > 1


def test_to_integers():
    values = torch.tensor([0.0, 0.5, 1.5, 2.5, -0.5, -1.5, 3e9, -3e9, 1e20, math.nan, math.inf, -math.inf, 7.999])
    wanted = {
        "rni.s32": lambda x: max(min(round(x), 2**31 - 1), -(2**31)),
        "rzi.u32": lambda x: max(min(math.trunc(x), 2**32 - 1), 0),
        "rmi.s32": lambda x: max(min(math.floor(x), 2**31 - 1), -(2**31)),
    }
    for how, function in wanted.items():
        got = each(f"cvt.{how}.f32 %r9, %f1;", values.view(torch.int32))
        for value, whole in zip(values.tolist(), got.tolist(), strict=True):
            if math.isnan(value):
                assert whole == 0
            else:
                assert whole == signed(function(max(min(value, 1e30), -1e30))), (how, value)


# --- control

LOOP = """
 mov.u32 %r9, 0; mov.u32 %r8, 0;
$L_loop:
 setp.ge.u32 %p1, %r8, %r1;
 @%p1 bra $L_done;
 and.b32 %r7, %r8, 1; setp.eq.s32 %p2, %r7, 0;
 @%p2 bra $L_even;
 add.s32 %r9, %r9, 100;
 bra.uni $L_next;
$L_even:
 add.s32 %r9, %r9, 1;
$L_next:
 add.s32 %r8, %r8, 1;
 bra $L_loop;
$L_done:
"""


def test_lanes_part_and_meet_again():
    trips = torch.arange(32, dtype=torch.int32)
    got = each(LOOP, trips)
    assert got.tolist() == [(n + 1) // 2 + n // 2 * 100 for n in range(32)]
    # Each instruction is issued once for all lanes that are there: the loop's head as often as the longest trip.
    heads = [r for r in executor.launches()[0].records() if r["ptx"].startswith("setp.ge")]
    assert [(r["issued"], r["lanes"]) for r in heads] == [(32, sum(range(1, 33)))]
    after = [r for r in executor.launches()[0].records() if r["ptx"].startswith("st.global")]
    assert [(r["issued"], r["lanes"], r["sectors"], r["global_wavefronts"]) for r in after] == [(1, 32, 4, 1)]


def test_branches_by_a_table():
    text = """
 bra $L_go;
$L_table:
 .branchtargets $L_a, $L_b, $L_c;
$L_go:
 and.b32 %r5, %r1, 3; min.u32 %r5, %r5, 2;
 brx.idx %r5, $L_table;
$L_a:
 mov.u32 %r9, 10; bra $L_end;
$L_b:
 mov.u32 %r9, 20; bra $L_end;
$L_c:
 mov.u32 %r9, 30;
$L_end:
"""
    assert each(text, torch.arange(32, dtype=torch.int32)).tolist() == [10, 20, 30, 30] * 8


def test_threads_that_leave_early():
    got = ints()
    assert not execute("setp.gt.u32 %p1, %r0, 9; @%p1 ret; add.s64 %rd9, %rd0, %rd20; st.global.u32 [%rd9], 1;", got)
    assert got.tolist() == [1] * 10 + [0] * 22


def test_shuffles_votes_and_special_registers():
    lanes = torch.arange(32, dtype=torch.int32) * 3
    wanted = {
        "shfl.sync.bfly.b32 %r9, %r1, 5, 31, -1;": lambda lane: 3 * (lane ^ 5),
        "shfl.sync.down.b32 %r9|%p1, %r1, 4, 31, -1; @!%p1 mov.u32 %r9, 7;": lambda lane: (
            3 * (lane + 4) if lane < 28 else 7
        ),
        "shfl.sync.up.b32 %r9, %r1, 4, 0, -1;": lambda lane: 3 * (lane - 4) if lane >= 4 else 3 * lane,
        "shfl.sync.idx.b32 %r9, %r1, 2, 6175, -1;": lambda lane: (
            3 * (lane // 8 * 8 + 2)
        ),  # 6175: segments of eight lanes
        "setp.lt.u32 %p1, %r1, 30; vote.sync.ballot.b32 %r9, %p1, -1;": lambda lane: 1023,
        "setp.lt.u32 %p1, %r1, 93; vote.sync.all.pred %p2, %p1, -1; selp.b32 %r9, 1, 2, %p2;": lambda lane: 2,
        "redux.sync.add.s32 %r9, %r1, -1;": lambda lane: 3 * 496,
        "redux.sync.max.u32 %r9, %r1, -1;": lambda lane: 93,
        "activemask.b32 %r9;": lambda lane: -1,
        "mov.u32 %r9, %laneid;": lambda lane: lane,
        "mov.u32 %r9, %lanemask_lt;": lambda lane: (1 << lane) - 1,
        "mov.u32 %r9, %ntid.x;": lambda lane: 32,
        "ld.const.u32 %r9, [table+8];": lambda lane: 30,
        "mov.u64 %rd9, table; cvta.const.u64 %rd9, %rd9; ld.u32 %r9, [%rd9+4];": lambda lane: 20,
    }
    for text, function in wanted.items():
        assert each(text, lanes).tolist() == [function(lane) for lane in range(32)], text


def test_local_and_generic_memory():
    text = """
 .local .align 8 .b8 mine[16];
 mov.u64 %rd8, mine; cvta.local.u64 %rd7, %rd8;
 st.local.u32 [%rd8+4], %r1; ld.u32 %r8, [%rd7+4];
 mov.u32 %r7, buffer; mad.lo.s32 %r7, %r0, 4, %r7; st.shared.u32 [%r7], %r8;
 cvt.u64.u32 %rd6, %r7; cvta.shared.u64 %rd6, %rd6; ld.u32 %r9, [%rd6];
"""
    tensors = (ints(), torch.arange(32, dtype=torch.int32) * 7)
    load, store = (
        "add.s64 %rd9, %rd1, %rd20; ld.global.u32 %r1, [%rd9];",
        "add.s64 %rd9, %rd0, %rd20; st.global.u32 [%rd9], %r9;",
    )
    assert not execute(load + text + store, *tensors, shared=128)
    assert torch.equal(*tensors)
    assert problems(load + text.replace("[%rd7+4]", "[%rd7+16]") + store, *tensors, shared=128) == {
        "local access out of bounds"
    }


# --- the checks


def problems(*arguments, **options):
    return {finding.problem for finding in execute(*arguments, **options)}


STORE = "add.s64 %rd9, %rd0, %rd20; st.global.u32 [%rd9], %r9;"
SHIFTED = """
 mov.u32 %r1, buffer; shl.b32 %r2, %r0, 2; add.s32 %r3, %r1, %r2;
 st.shared.u32 [%r3], %r0;
 {barrier}
 add.s32 %r4, %r0, 1; and.b32 %r4, %r4, {last}; shl.b32 %r4, %r4, 2; add.s32 %r4, %r4, %r1;
 ld.shared.u32 %r9, [%r4];
"""


@pytest.mark.parametrize(("barrier", "block", "found"), [
    ("bar.sync 0;", 64, set()),
    ("", 64, {"race in shared memory", "uninitialized shared memory"}),
    ("bar.warp.sync -1;", 64, {"race in shared memory", "uninitialized shared memory"}),
    ("bar.warp.sync -1;", 32, set()),
    ("", 32, {"race in shared memory"}),
    ("barrier.sync.aligned 3, 64;", 64, set()),
    ("shfl.sync.bfly.b32 %r8, %r0, 1, 31, -1;", 32, {"race in shared memory"}),  # orders no memory
])  # fmt: skip
def test_what_another_thread_wrote_is_read_after_a_barrier(barrier, block, found):
    got = ints(block)
    assert problems(SHIFTED.format(barrier=barrier, last=block - 1) + STORE, got, block=block, shared=256) == found
    if not found:
        assert got.tolist() == [*range(1, block), 0]


def test_writes_over_what_is_read():
    read_write = SHIFTED.format(barrier="bar.sync 0;", last=63) + "{} st.shared.u32 [%r3], 5;"
    assert problems(read_write.format("bar.sync 0;") + STORE, ints(64), block=64, shared=256) == set()
    assert problems(read_write.format("") + STORE, ints(64), block=64, shared=256) == {"race in shared memory"}


def test_two_threads_write_one_place():
    same = "mov.u32 %r1, buffer; st.shared.u32 [%r1], 1; mov.u32 %r9, 0;" + STORE  # though it is the same value
    assert problems(same, ints()) == {"race in shared memory"}
    halves = "shl.b32 %r2, %r0, 1; mov.u32 %r1, buffer; add.s32 %r1, %r1, %r2; st.shared.u16 [%r1], %h1;"
    assert problems("mov.u16 %h1, 3; mov.u32 %r9, 0;" + halves + STORE, ints(), shared=64) == set()
    bytes_ = halves.replace("shl.b32 %r2, %r0, 1", "mov.u32 %r2, %r0").replace("u16 [", "u8 [")
    assert problems("mov.u16 %h1, 3; mov.u32 %r9, 0;" + bytes_ + STORE, ints(), shared=64) == set()
    assert problems("mov.u16 %h1, 3; mov.u32 %r9, 0;" + bytes_.replace("u8 [", "u16 [") + STORE, ints(), shared=64) == {
        "race in shared memory", "misaligned access"
    }  # fmt: skip


def test_named_barriers_order_those_that_take_part():
    # The first warp writes and arrives, the second waits for it; the third does not take part.
    text = """
 mov.u32 %r1, buffer; shr.u32 %r2, %r0, 5; mov.u32 %r9, 0;
 setp.ne.u32 %p1, %r2, 0; @%p1 bra $L_reader;
 shl.b32 %r3, %r0, 2; add.s32 %r3, %r3, %r1; st.shared.u32 [%r3], %r0;
 bar.arrive 1, 64; bra $L_end;
$L_reader:
 setp.ne.u32 %p2, %r2, 1; @%p2 bra $L_{third};
 bar.sync 1, 64;
$L_read:
 and.b32 %r4, %r0, 31; shl.b32 %r4, %r4, 2; add.s32 %r4, %r4, %r1; ld.shared.u32 %r9, [%r4];
$L_end:
"""
    got = ints(96)
    assert problems(text.format(third="end") + STORE, got, block=96, shared=128) == set()
    assert got.tolist() == [0] * 32 + list(range(32)) + [0] * 32
    assert "race in shared memory" in problems(text.format(third="read") + STORE, got, block=96, shared=128)
    # What is done after the arrival is not ordered by it.
    late = text.replace("st.shared.u32 [%r3], %r0;\n bar.arrive 1, 64;", "bar.arrive 1, 64; st.shared.u32 [%r3], %r0;")
    assert late != text
    assert problems(late.format(third="end") + STORE, got, block=96, shared=128) == {"race in shared memory"}


COPY = """
 mov.u32 %r1, buffer; shl.b32 %r2, %r0, 4; add.s32 %r3, %r1, %r2; cvt.u64.u32 %rd8, %r2; add.s64 %rd7, %rd1, %rd8;
 cp.async.cg.shared.global [%r3], [%rd7], 16{size};
 cp.async.commit_group;
 cp.async.ca.shared.global [%r3+1024], [%rd7], 8;
 cp.async.commit_group;
 {wait}
 xor.b32 %r4, %r0, {other}; shl.b32 %r4, %r4, 4; add.s32 %r4, %r4, %r1; ld.shared.u32 %r9, [%r4+{at}];
"""


@pytest.mark.parametrize(("wait", "other", "at", "found"), [
    ("cp.async.wait_group 1;", 0, 0, set()),
    ("cp.async.wait_group 0;", 0, 1024, set()),
    ("cp.async.wait_all;", 0, 1024, set()),
    ("cp.async.wait_group 1; bar.sync 0;", 1, 0, set()),
    ("", 0, 0, {"shared memory that a copy is on its way to"}),
    ("cp.async.wait_group 2;", 0, 0, {"shared memory that a copy is on its way to"}),
    ("cp.async.wait_group 1;", 0, 1024, {"shared memory that a copy is on its way to"}),
    ("cp.async.wait_group 1;", 1, 0, {"race in shared memory"}),
    ("bar.sync 0; cp.async.wait_group 1;", 1, 0, {"race in shared memory"}),
    ("bar.sync 0;", 1, 0, {"shared memory that a copy is on its way to"}),
])  # fmt: skip
def test_asynchronous_copies_are_waited_for(wait, other, at, found):
    source = torch.arange(256, dtype=torch.int32)
    got = ints(64)
    text = COPY.format(wait=wait, other=other, at=at, size="") + STORE
    assert problems(text, got, source, block=64, shared=2048) == found
    if not found:
        assert got.tolist() == [4 * (n ^ other) for n in range(64)]


def test_asynchronous_copies_fill_with_zeros():
    source = torch.arange(1, 257, dtype=torch.int32)
    for size, at, wanted in ((8, 4, 2), (8, 8, 0), (0, 0, 0), (16, 12, 4), (6, 4, 2)):
        got = ints(64)
        text = COPY.format(wait="cp.async.wait_all;", other=0, at=at, size=f", {size}") + STORE
        assert not execute(text, got, source, block=64, shared=2048)
        low = [4 * n + wanted if wanted else 0 for n in range(64)]
        assert got.tolist() == ([x & 0xFFFF for x in low] if size == 6 else low), size
    # Nothing is read where the size is 0, wherever the address points.
    outside = COPY.format(wait="cp.async.wait_group 0;", other=0, at=0, size=", 0").replace(
        "cp.async.cg", "add.s64 %rd6, %rd7, 1048576; cp.async.cg"
    ).replace("[%r3], [%rd7]", "[%r3], [%rd6]")  # fmt: skip
    assert not execute(outside + STORE, ints(64), source, block=64, shared=2048)
    assert problems(outside.replace("16, 0", "16") + STORE, ints(64), source, block=64, shared=2048) == {
        "global access out of bounds"
    }


def test_a_copy_over_what_is_still_read():
    text = """
 mov.u32 %r1, buffer; shl.b32 %r2, %r0, 2; add.s32 %r3, %r1, %r2; add.s64 %rd7, %rd1, %rd20;
 st.shared.u32 [%r3], %r0; bar.sync 0;
 xor.b32 %r4, %r2, 4; add.s32 %r4, %r4, %r1; ld.shared.u32 %r9, [%r4];
 {}
 cp.async.ca.shared.global [%r3], [%rd7], 4;
 cp.async.wait_all;
"""
    for barrier, found in (("bar.sync 0;", set()), ("", {"race in shared memory"})):
        source = torch.arange(64, dtype=torch.int32)
        assert problems(text.format(barrier) + STORE, ints(64), source, block=64, shared=256) == found


def test_a_copy_from_what_is_written_meanwhile():
    text = """
 mov.u32 %r1, buffer; add.s64 %rd7, %rd1, %rd20; st.global.u32 [%rd7], %r0; mad.lo.s32 %r3, %r0, 4, %r1;
 cp.async.ca.shared.global [%r3], [%rd7], 4;
 ld.global.u32 %r4, [%rd7];
 {}
 st.global.u32 [%rd7], 5;
 cp.async.wait_all;
 ld.shared.u32 %r9, [%r3];
"""
    for wait, found in (("cp.async.wait_all;", set()), ("", {"race in global memory"})):
        got = ints()
        assert problems(text.format(wait) + STORE, got, ints(), results=2, shared=128) == found
        assert got.tolist() == list(range(32))


# --- matrices, which a whole warp holds


def fragments(matrix):
    """The registers (32, n) of a matrix of 16-bit elements, in the order of A's in the PTX ISA."""
    pairs = matrix.contiguous().view(torch.int32)  # of two columns
    return torch.stack([
        torch.stack([pairs[lane // 4 + 8 * lower, lane % 4 + 4 * right] for lane in range(32)])
        for right in range(matrix.shape[1] // 8) for lower in range(matrix.shape[0] // 8)
    ], 1)  # fmt: skip


def multiply(a, b, c, kind):
    """D of ``mma``, whose lanes load fragments that are cut from A, B and C here."""
    k = a.shape[1]
    accumulators = torch.empty(32, 4)
    for lane in range(32):
        row, column = lane // 4, 2 * (lane % 4)
        accumulators[lane] = torch.cat([c[row, column : column + 2], c[row + 8, column : column + 2]])
    words = [fragments(a), fragments(b.T), accumulators.view(torch.int32)]
    loads, names = [], []
    for n, count in enumerate((k // 4, k // 8, 4)):
        letter = "f" if n == 2 else "r"
        names.append([f"%{letter}{10 * n + 10 + j}" for j in range(count)])
        loads.append(f"mul.wide.u32 %rd8, %r0, {4 * count}; add.s64 %rd8, %rd8, %rd{n + 1};")
        loads += [f"ld.global.b32 {name}, [%rd8+{4 * j}];" for j, name in enumerate(names[-1])]
    operands = ", ".join("{" + ", ".join(part) + "}" for part in names)
    text = f"""
 mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32 {{%f30, %f31, %f32, %f33}}, {operands};
 mul.wide.u32 %rd8, %r0, 16; add.s64 %rd8, %rd8, %rd0; st.global.v4.f32 [%rd8], {{%f30, %f31, %f32, %f33}};
"""
    got = ints(128)
    inputs = [executor.place(part.contiguous(), 0, part.shape, part.stride()) for part in words]
    assert not execute("\n".join(loads) + text, got, *inputs)
    held = got.view(torch.float32).view(8, 4, 2, 2)  # row, pair of columns, upper or lower half, column
    return held.permute(2, 0, 1, 3).reshape(16, 8)


@pytest.mark.parametrize("k", [8, 16])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_products_of_matrices(kind, k):
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    a, b = (torch.randint(-9, 10, shape, generator=GENERATOR).to(dtype) for shape in ((16, k), (k, 8)))
    c = torch.randint(-1000, 1000, (16, 8), generator=GENERATOR).float() / 8
    assert torch.equal(multiply(a, b, c, kind), a.float() @ b.float() + c)  # sums of integers are exact
    a, b, c = torch.randn(16, k, generator=GENERATOR), torch.randn(k, 8, generator=GENERATOR), torch.zeros(16, 8)
    a, b = a.to(dtype), b.to(dtype)
    exact = a.double() @ b.double()
    bound = 2.0**-23 * k * (a.double().abs() @ b.double().abs())
    assert ((multiply(a, b, c, kind).double() - exact).abs() <= bound).all()
    # The sum has float32's 24 digits, and takes products one by one: each of these alone is rounded away beside 1.
    small = torch.full((16, k), 2.0**-12, dtype=dtype)
    assert torch.equal(multiply(small, small.T[:, :8], c + 1, kind), c + 1)
    assert torch.equal(multiply(small, small.T[:, :8], c, kind), c + k * 2.0**-24)


LDMATRIX = """
 mov.u32 %r1, buffer; mul.wide.u32 %rd8, %r0, 16; add.s64 %rd8, %rd8, %rd1;
 ld.global.v4.u32 {{%r10, %r11, %r12, %r13}}, [%rd8];
 mad.lo.s32 %r2, %r0, 32, %r1; {guard} st.shared.v4.u32 [%r2], {{%r10, %r11, %r12, %r13}}; {barrier}
 mov.u32 %r10, 0; mov.u32 %r11, 0; mov.u32 %r12, 0; mov.u32 %r13, 0;
 xor.b32 %r3, %r0, 3; mad.lo.s32 %r3, %r3, 32, %r1;
 {before}
 ldmatrix.sync.aligned.m8n8.{form}.shared.b16 {to}, [%r3+{at}];
 {after}
 mul.wide.u32 %rd8, %r0, 16; add.s64 %rd8, %rd8, %rd0; st.global.v4.u32 [%rd8], {{%r10, %r11, %r12, %r13}};
"""
SPREAD = torch.arange(256, dtype=torch.int16).view(32, 8)  # rows of four matrices


def load_matrix(form, guard="", barrier="bar.warp.sync -1;", before="", after="", at=0, got=None, shared=1024):
    count = int(form[1])
    to = "{" + ", ".join(f"%r{10 + j}" for j in range(count)) + "}"
    body = LDMATRIX.format(form=form, to=to, guard=guard, barrier=barrier, before=before, after=after, at=at)
    return execute(body, ints(128) if got is None else got, SPREAD.view(torch.int32).flatten(), shared=shared)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_from_shared_memory(count, transposed):
    got = ints(128)
    assert not load_matrix(f"x{count}{'.trans' if transposed else ''}", got=got)
    # Lane l gives the address of row l ^ 3.
    rows = SPREAD[[lane ^ 3 for lane in range(32)]].view(4, 8, 8)
    for j, matrix in enumerate(rows):
        wanted = fragments(matrix.T if transposed else matrix).flatten()
        assert torch.equal(got.view(32, 4)[:, j], wanted if j < count else torch.zeros_like(wanted)), j


STMATRIX = """
 mov.u32 %r1, buffer; shl.b32 %r2, %r0, 4; add.s32 %r3, %r1, %r2; mul.wide.u32 %rd8, %r0, 16; add.s64 %rd9, %rd8, %rd1;
 ld.global.v4.u32 {{%r10, %r11, %r12, %r13}}, [%rd9]; {before}
 stmatrix.sync.aligned.m8n8.{form}.shared.b16 [%r3], {to};
 {after} ld.shared.v4.u32 {{%r14, %r15, %r16, %r17}}, [%r3];
 add.s64 %rd9, %rd8, %rd0; st.global.v4.u32 [%rd9], {{%r14, %r15, %r16, %r17}};
"""


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_to_shared_memory(transposed):
    """Row r of matrix j to where lane 8 j + r says."""
    matrices = SPREAD.view(4, 8, 8)
    held = torch.cat([fragments(matrix.T if transposed else matrix) for matrix in matrices], 1).contiguous().flatten()
    form = "x4" + ".trans" * transposed

    def store(before="", after="", shared=512, got=None, **changes):
        body = STMATRIX.format(**dict(form=form, to="{%r10, %r11, %r12, %r13}", before=before, after=after) | changes)
        got = ints(128) if got is None else got
        return {(f.problem, f.thread) for f in execute(body, got, held, shared=shared, target="sm_90")}

    got = ints(128)
    assert store(got=got) == set()  # each lane reads what it gave the address of
    assert torch.equal(got, SPREAD.view(torch.int32).flatten())
    assert store("xor.b32 %r3, %r3, 16;", "xor.b32 %r3, %r3, 16;") == {("race in shared memory", 0)}
    assert store("xor.b32 %r3, %r3, 16;", "xor.b32 %r3, %r3, 16; bar.warp.sync -1;") == set()
    assert store(shared=496) >= {("shared access out of bounds", 31)}
    assert ("uninitialized shared memory", 8) in store(form="x1", to="{%r10}")
    with pytest.raises(ptx.PtxError, match=r"sm_80 has no stmatrix\.sync.*sm_90"):
        execute(STMATRIX.format(form=form, to="{%r10, %r11, %r12, %r13}", before="", after=""), ints(128), held)


def test_what_is_read_of_matrices_is_checked():
    def found(*arguments, **options):
        return {(f.problem, f.thread) for f in load_matrix(*arguments, **options)}

    assert found("x4") == set()
    assert found("x4", barrier="") == {("race in shared memory", 0)}
    assert found("x4", after="st.shared.u32 [%r2], 0;") == {("race in shared memory", 0)}
    assert found("x4", after="bar.warp.sync -1; st.shared.u32 [%r2], 0;") == set()
    # Lane 30 reads what lane 29 should have written; the first two matrices do not depend on it.
    unwritten = "setp.ne.u32 %p1, %r0, 29; @%p1"
    assert found("x4", guard=unwritten) == {("uninitialized shared memory", 30)}
    assert found("x2", guard=unwritten) == set()
    assert found("x4", at=8) >= {("misaligned access", 0)}
    # The addresses of lanes that give no row are not looked at; 28's row is the last.
    assert found("x4", before="setp.eq.u32 %p1, %r0, 28; @%p1 add.s32 %r3, %r3, 16;") == {
        ("uninitialized shared memory", 28)
    }
    assert found("x4", before="setp.eq.u32 %p1, %r0, 28; @%p1 add.s32 %r3, %r3, 32;") == {
        ("shared access out of bounds", 28)
    }
    assert found("x1", before="setp.ge.u32 %p1, %r0, 8; @%p1 add.s32 %r3, %r3, 4096;") == set()


def test_wavefronts_of_matrices():
    def count(form, scale):
        load_matrix(form, before=f"mad.lo.s32 %r3, %r0, {scale}, %r1;", shared=8192)
        (record,) = (r for r in executor.launches()[0].records() if r["ptx"].startswith("ldmatrix"))
        return record["wavefronts"], record["ideal_wavefronts"]

    assert count("x1", 16) == (1, 1)
    assert count("x4", 16) == (4, 4)
    assert count("x4", 32) == (8, 4)
    assert count("x2", 128) == (16, 2)
    assert count("x4.trans", 144) == (4, 4)


def test_a_matrix_is_transposed_between_lanes():
    matrix = torch.arange(64, dtype=torch.int16).view(8, 8)
    got = each("movmatrix.sync.aligned.m8n8.trans.b16 %r9, %r1;", fragments(matrix).flatten())
    assert torch.equal(got, fragments(matrix.T).flatten())


@pytest.mark.parametrize("text", [
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f1, %f2, %f3, %f4}, {%r0, %r0, %r0, %r0}, {%r0, %r0}, "
    "{%f5, %f5, %f5, %f5};",
    "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r9}, [%r1];",
    "movmatrix.sync.aligned.m8n8.trans.b16 %r9, %r0;",
], ids=lambda text: text.split(".")[0])  # fmt: skip
def test_the_whole_warp_is_together_for_matrices(text):
    text = f"mov.u32 %r1, buffer; mov.f32 %f5, 0f00000000; st.shared.v4.u32 [%r1], {{%r0, %r0, %r0, %r0}};{text}"
    text = text.replace("st.", "setp.eq.u32 %p2, %r0, 0; @%p2 st.", 1).replace(";ldm", ";bar.warp.sync -1; ldm")
    name = "instruction of the whole warp in divergent code"
    assert problems(text, ints()) == set()
    head, last = text[:-1].rsplit("; ", 1) if ";bar" in text else text[:-1].rsplit(";", 1)
    assert {f.problem for f in execute(f"{head}; setp.lt.u32 %p1, %r0, 31; @%p1 {last};", ints())} == {name}
    assert name in problems(text, ints(), block=40)


def test_matrices_of_an_architecture_that_has_none():
    head, at = TEMPLATE.format(parameters="", pointers="", shared=16, body="{}"), "sm_80"
    for text, target, needed in (
        ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f1, %f1, %f1, %f1}, {%r0, %r0, %r0, %r0}, {%r0, %r0}, "
         "{%f1, %f1, %f1, %f1};", "sm_75", 80),
        ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r9}, [%r1];", "sm_70", 75),
        ("cp.async.wait_all;", "sm_75", 80),
    ):  # fmt: skip
        whole = head.replace("{}", text)
        assert ptx.Module(whole).kernel("kernel")
        with pytest.raises(ptx.PtxError, match=rf"{target} has no .* begins with sm_{needed}"):
            ptx.Module(whole.replace(at, target)).kernel("kernel")


def test_bounds_of_global_memory():
    assert problems("mov.u32 %r9, 1;" + STORE, ints(32)) == set()
    found = execute("mov.u32 %r9, 1;" + STORE, ints(31))
    assert [(f.problem, f.thread, f.block, f.bytes, f.count) for f in found] == [
        ("global access out of bounds", 31, 0, 4, 1)
    ]
    assert found[0].instruction.startswith("st.global.u32")
    text = "add.s64 %rd9, %rd1, %rd20; ld.global.u32 %r9, [%rd9+{}];" + STORE
    assert problems(text.format(0), ints(), ints()) == set()
    assert problems(text.format(4), ints(), ints()) == {"global access out of bounds"}
    assert problems(text.format(-4), ints(), ints()) == {"global access out of bounds"}
    vector = "and.b32 %r2, %r0, 3; mul.wide.u32 %rd8, %r2, 16;"
    vector += " add.s64 %rd9, %rd1, %rd8; ld.global.v4.u32 {%r5, %r6, %r7, %r9}, [%rd9];"
    assert problems(vector + STORE, ints(), ints(16)) == set()
    assert problems(vector + STORE, ints(), ints(15)) == {"global access out of bounds"}
    assert problems("mov.u32 %r9, 1; add.s64 %rd9, %rd1, %rd20; st.global.u32 [%rd9], %r9;", ints(), ints()) == {
        "write to an input"
    }


def test_bounds_of_shared_memory():
    text = (
        "mov.u32 %r1, dynamic; mad.lo.s32 %r1, %r0, 4, %r1; st.shared.u32 [%r1], %r0; ld.shared.u32 %r9, [%r1];" + STORE
    )
    assert problems(text, ints(), dynamic=128) == set()
    found = execute(text, ints(), dynamic=124)
    assert {f.problem for f in found} == {"shared access out of bounds"}
    assert [f.thread for f in found] == [31, 31]
    assert problems(text.replace("[%r1], %r0", "[%r1+-20], %r0"), ints(), dynamic=128) >= {
        "shared access out of bounds"
    }


def test_alignment():
    text = "and.b32 %r2, %r0, 3; mad.wide.u32 %rd9, %r2, 16, %rd1; ld.global.v2.u32 {{%r8, %r9}}, [%rd9+{}];" + STORE
    assert problems(text.format(8), ints(), ints(20)) == set()
    assert problems(text.format(4), ints(), ints(20)) == {"misaligned access"}
    shared = (
        "mov.u32 %r1, buffer; mad.lo.s32 %r1, %r0, 16, %r1; st.shared.v2.u32 [%r1+{}], {{%r0, %r0}}; mov.u32 %r9, 0;"
        + STORE
    )
    assert problems(shared.format(8), ints(), shared=512) == set()
    assert problems(shared.format(4), ints(), shared=512) == {"misaligned access"}


def test_uninitialized_memory():
    text = "mov.u32 %r1, buffer; mad.lo.s32 %r1, %r0, 4, %r1; setp.lt.u32 %p1, %r0, {}; @%p1 st.shared.u32 [%r1], %r0;"
    text += " bar.sync 0; ld.shared.u32 %r9, [%r1];"
    assert problems(text.format(32) + STORE, ints(), shared=128) == set()
    found = execute(text.format(30) + STORE, ints(), shared=128)
    assert [(f.problem, f.thread, f.count) for f in found] == [("uninitialized shared memory", 30, 2)]
    own = "add.s64 %rd9, %rd0, %rd20; {} ld.global.u32 %r9, [%rd9]; st.global.u32 [%rd9], %r9;"
    assert problems(own.format("st.global.u32 [%rd9], 4;"), ints()) == set()
    assert problems(own.format(""), ints()) == {"uninitialized global memory"}


def test_uninitialized_registers():
    # One of the ways through writes it; or only lanes that do not read it have not.
    text = """
 setp.lt.u32 %p1, %r0, {}; @%p1 bra $L_skip;
 mov.u32 %r9, 3;
$L_skip:
 @{}%p1 mov.u32 %r8, %r9; mov.u32 %r9, 0;
"""
    assert problems(text.format(0, "!") + STORE, ints()) == set()
    assert problems(text.format(20, "!") + STORE, ints()) == set()
    found = execute(text.format(20, "") + STORE, ints())
    assert [(f.problem, f.thread, f.count) for f in found] == [("uninitialized register", 0, 1)]
    assert "%r8, %r9" in found[0].instruction
    predicate = "setp.lt.u32 %p1, %r0, 9; @%p1 setp.lt.u32 %p2, %r0, 4; selp.u32 %r9, 1, 0, %p2;"
    assert problems(predicate + STORE, ints()) == {"uninitialized register"}
    assert problems("setp.ne.u32 %p2, %r0, 4;" + predicate + STORE, ints()) == set()


def test_races_in_global_memory():
    # Each thread writes its own; or each block the same; or a thread reads what another block, or its own, has written.
    mine = "mov.u32 %r1, %ctaid.x; mad.lo.s32 %r1, %r1, 32, %r0;"
    mine += " mul.wide.u32 %rd9, %r1, 4; add.s64 %rd9, %rd9, %rd0; st.global.u32 [%rd9], %r1;"
    assert problems(mine, ints(64), grid=2) == set()
    assert problems(mine.replace("mad.lo.s32 %r1, %r1, 32, %r0;", "mov.u32 %r1, %r0;"), ints(64), grid=2) == {
        "race in global memory"
    }
    neighbour = (
        mine
        + " {} xor.b32 %r2, %r1, {}; mul.wide.u32 %rd8, %r2, 4; add.s64 %rd8, %rd8, %rd0; ld.global.u32 %r9, [%rd8];"
    )
    assert problems(neighbour.format("bar.sync 0;", 1), ints(64), grid=2) == set()
    assert problems(neighbour.format("", 1), ints(64), grid=2) == {"race in global memory"}
    assert problems(neighbour.format("bar.sync 0;", 32), ints(64), grid=2) == {
        "race in global memory",
        "uninitialized global memory",
    }


def test_barriers_that_not_all_threads_reach():
    assert problems("setp.gt.u32 %p1, %r0, 31; @%p1 ret; bar.sync 0;", ints(), block=64) == {
        "barrier that not all threads reach"
    }
    assert problems("setp.gt.u32 %p1, %r0, 15; @%p1 bra $L_out; bar.sync 0;\n$L_out:", ints()) == {
        "barrier in divergent code"
    }
    assert problems("bar.sync 1, 96;", ints(), block=64) == {"invalid barrier or trap"}
    assert problems("bar.sync 17;", ints(), block=64) == {"invalid barrier or trap"}
    assert problems("bar.sync 0; bar.sync 0;", ints(), block=64) == set()


def test_reductions_at_a_barrier():
    got = ints(64)
    text = "setp.lt.u32 %p1, %r0, 40; bar.red.popc.u32 %r9, 0, %p1; bar.red.or.pred %p2, 0, !%p1; @!%p2 mov.u32 %r9, 0;"
    assert not execute(text + STORE, got, block=64)
    assert got.tolist() == [40] * 64


def test_lanes_that_are_not_there():
    text = "mov.u32 %r9, 0; setp.gt.u32 %p1, %r0, 15; @%p1 bra $L_out; shfl.sync.bfly.b32 %r9, %r0, 1, 31, {};\n$L_out:"
    assert problems(text.format(65535) + STORE, ints()) == set()
    assert problems(text.format(-1) + STORE, ints()) == {"lane that is not there"}


def test_a_loop_that_does_not_end():
    assert problems("$L_on:\n bra $L_on;", ints(), limit=1000) == {"endless loop"}


def test_shared_memory_wavefronts():
    def count(text, block=32):
        execute("mov.u32 %r1, buffer;" + text, ints(), shared=16384, block=block)
        (record,) = (r for r in executor.launches()[0].records() if r["ptx"].startswith("st.shared"))
        return record["wavefronts"], record["ideal_wavefronts"]

    store = "mad.lo.s32 %r2, %r0, {}, %r1; st.shared.{} [%r2], {};"
    assert count(store.format(4, "u32", "%r0")) == (1, 1)
    assert count(store.format(8, "u32", "%r0")) == (2, 1)
    assert count(store.format(128, "u32", "%r0")) == (32, 1)
    assert count(store.format(132, "u32", "%r0")) == (1, 1)
    assert count(store.format(0, "u32", "%r0")) == (1, 1)
    assert count(store.format(8, "v2.u32", "{%r0, %r0}")) == (2, 2)
    assert count(store.format(16, "v4.u32", "{%r0, %r0, %r0, %r0}")) == (4, 4)
    assert count(store.format(32, "v4.u32", "{%r0, %r0, %r0, %r0}")) == (8, 4)
    assert count(store.format(144, "v4.u32", "{%r0, %r0, %r0, %r0}")) == (4, 4)
    assert count(store.format(2, "u16", "%h1")) == (1, 1)
    pairs = "shr.u32 %r2, %r0, 1; mad.lo.s32 %r2, %r2, 128, %r1; st.shared.u32 [%r2], %r0;"  # two lanes of each word
    assert count(pairs) == (16, 1)


def test_global_memory_wavefronts():
    def count(text):
        execute("mov.u32 %r1, 0;" + text, ints(32 * 64), ints(32 * 64), shared=512)
        (record,) = (
            r for r in executor.launches()[0].records() if r["ptx"].startswith(("ld.global", "st.global", "cp"))
        )
        return record["global_wavefronts"], record["sectors"], record["wavefronts"]

    load = "mul.wide.u32 %rd8, %r0, {}; add.s64 %rd8, %rd8, %rd1; ld.global.{} {}, [%rd8+{}];"
    assert count(load.format(4, "u32", "%r9", 0)) == (1, 4, 0)
    assert count(load.format(4, "u32", "%r9", 4)) == (1, 5, 0)  # of two lines
    assert count(load.format(0, "u32", "%r9", 0)) == (1, 1, 0)
    assert count(load.format(2, "u16", "%h1", 0)) == (1, 2, 0)
    assert count(load.format(128, "u32", "%r9", 0)) == (32, 32, 0)  # one bank
    assert count(load.format(132, "u32", "%r9", 0)) == (1, 32, 0)
    assert count(load.format(64, "u32", "%r9", 0)) == (16, 32, 0)
    assert count(load.format(16, "v4.u32", "{%r6, %r7, %r8, %r9}", 0)) == (4, 16, 0)
    assert count(load.format(128, "v4.u32", "{%r6, %r7, %r8, %r9}", 0)) == (32, 32, 0)
    store = "mul.wide.u32 %rd8, %r0, 8; add.s64 %rd8, %rd8, %rd0; st.global.u32 [%rd8], %r0;"
    assert count(store) == (2, 8, 0)
    # What is copied to shared memory passes once, when it is written there.
    copy = "mul.wide.u32 %rd8, %r0, 16; add.s64 %rd8, %rd8, %rd1; mov.u32 %r1, buffer; mad.lo.s32 %r1, %r0, 16, %r1;"
    assert count(f"{copy} cp.async.cg.shared.global [%r1], [%rd8], 16;") == (0, 16, 4)


@pytest.mark.parametrize(("text", "message"), [
    ("frobnicate.b32 %r1, %r2;", r"line \d+: the unknown opcode frobnicate.b32"),
    ("atom.global.add.u32 %r1, [%rd0], 1;", "atomic operations"),
    ("add.s32 %r1, %r99, 1;", "unknown register or symbol %r99"),
    ("bra $L_nowhere;", "unknown label"),
    ("cvt.rna.tf32.f32 %r1, %f1;", "unknown opcode cvt.rna.tf32"),
    ("mma.sync.aligned.m16n8k16.row.col.f32.f16.bf16.f32 {%f1}, {%r1}, {%r1}, {%f1};", "unknown opcode mma"),
    ("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%f1, %f1, %f1}, {%r1}, {%r1}, {%f1};", "3 registers of 4"),
    ("ldmatrix.sync.aligned.m8n8.x2.trans.global.b16 {%r1, %r2}, [%r3];", "unknown opcode ldmatrix"),
])  # fmt: skip
def test_what_is_not_known_is_an_error(text, message):
    with pytest.raises(ptx.PtxError, match=message):
        execute(text, ints())


def test_order_and_samples_of_blocks():
    mine = "mov.u32 %r1, %ctaid.x; mul.wide.u32 %rd9, %r1, 4;"
    mine += " add.s64 %rd9, %rd9, %rd0; setp.eq.u32 %p1, %r0, 0; @%p1 st.global.u32 [%rd9], 1;"
    got = ints(10)
    assert not execute(mine, got, grid=10, every=3, first=1)
    assert got.tolist() == [0, 1, 0, 0, 1, 0, 0, 1, 0, 0]
    assert executor.launches()[0].blocks_executed == 3
    got = ints(10)
    assert not execute(mine, got, grid=10, descending=True)
    assert got.tolist() == [1] * 10


def test_lanes_that_go_on_early_meet_the_others_at_the_barrier():
    # As `continue` in a loop of barriers: the way back to the barrier is shorter for some lanes.
    text = """
 mov.u32 %r8, 0; mov.u32 %r9, 0;
$L_head:
 bar.sync 0;
 add.s32 %r8, %r8, 1;
 setp.ge.u32 %p2, %r8, 4;
 setp.lt.u32 %p1, %r0, 7;
 @%p1 bra $L_next;
 add.s32 %r9, %r9, %r0;
$L_next:
 @!%p2 bra $L_head;
"""
    direct = text.replace(" @%p1 bra $L_next;", " @%p2 bra $L_last; @%p1 bra $L_head;").replace(
        "$L_next:\n @!%p2 bra $L_head;", " bra $L_head;\n$L_last:\n @!%p1 add.s32 %r9, %r9, %r0;"
    )
    for body in (text, direct):
        got = ints(64)
        assert not execute(body + STORE, got, block=64)
        assert got.tolist() == [0] * 7 + [4 * n for n in range(7, 64)]


def test_lanes_that_leave_do_not_keep_the_others_apart():
    text = """
 setp.lt.u32 %p1, %r0, 16; setp.lt.u32 %p2, %r0, 4; mov.u32 %r9, 0;
 @%p1 bra $L_low;
 add.s32 %r9, %r9, 5; bra $L_both;
$L_low:
 @%p2 ret;
 add.s32 %r9, %r9, 6;
$L_both:
 add.s32 %r9, %r9, 10;
"""
    got = ints()
    assert not execute(text + STORE, got)
    assert got.tolist() == [0] * 4 + [16] * 12 + [15] * 16
    both = [r for r in executor.launches()[0].records() if r["ptx"].startswith("add.s32") and r["ptx"].endswith("10")]
    assert [(r["issued"], r["lanes"]) for r in both] == [(1, 28)]
