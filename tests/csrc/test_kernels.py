"""The kernel mathematics on the host: what a CUDA thread computes (operators.h) and a CPU vector computes (tiles.h),
compiled with g++ alone, without torch's headers, against the reference."""

import ctypes
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from carafe_plugin.ops import reference
from carafe_plugin.ops.functional import scale_ratio
from carafe_plugin.ops.reference import NORMALIZERS, masks_from_logits
from carafe_plugin.testing import SCALES, TOLERANCES, assert_close, random_case

sys.path.insert(0, str(Path(__file__).parent))  # also where this file runs as a script
sys.path.append(str(Path(__file__).parents[1] / "support"))
from covering import pairwise
from hosts import (
    ARM_CXX,
    ARM_EMULATOR,
    DTYPES,
    HERE,
    ORDERS,
    WARNINGS,
    Emulated,
    compile_host,
    geometry,
    label,
    outputs_of,
    require_arm,
    run_under_sanitizers,
)

CROPS = ((0, 0), (1, 0), (0, 1), (1, 1), (3, 2), (9, 70))  # rows and columns of the output that are not wanted
CASES = list(
    pairwise(
        {
            "kernel_size": (1, 3, 5, 7),
            "group_size": (1, 2, 4),
            "scale": (*SCALES, Fraction(5, 4), Fraction(2, 5)),
            "size": ((6, 8), (5, 7), (1, 1), (2, 33)),
            "dtype": reference.DTYPES,
            "layout": (0, 1, 2),
            "crop": CROPS,
        }
    )
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return ctypes.CDLL(str(compile_host("host.cpp", tmp_path_factory.mktemp("host"), "-O2")))


def run(library, op, path, case, output, *tensors):
    sizes = geometry(case, 2, *scale_ratio(case["scale"]))
    there, back = ORDERS[case["layout"]]

    def arrange(tensor):
        return tensor.permute(there).contiguous()

    held = [arrange(tensor) for tensor in (torch.full_like(output, float("nan")), *tensors)]
    normalizer = ("none", *NORMALIZERS).index(case.get("normalizer", "none"))
    arguments = (op, path, normalizer, DTYPES.index(case["dtype"]), sizes, case["layout"])
    if isinstance(library, Emulated):
        library.run(*arguments, held)
    else:
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in held] + [ctypes.c_void_p()] * (3 - len(tensors))
        library.carafe_run(*arguments, *pointers)
    return held[0].permute(back)


def check_all_operators(library, path, case):
    args = (case["kernel_size"], case["group_size"], *scale_ratio(case["scale"]))
    features, masks, grad = random_case(
        case["size"],
        case.get("channels", 8),
        case["kernel_size"],
        case["group_size"],
        case["scale"],
        dtype=case["dtype"],
    )
    rows, columns = outputs_of(case["size"], *args[2:], case.get("crop", (0, 0)))
    masks, grad = masks[..., :rows, :columns], grad[..., :rows, :columns]
    for op, expected, first, second in (
        (0, reference.reassemble(features, masks, *args), features, masks),
        (1, reference.grad_features(grad, masks, *case["size"], *args), grad, masks),
        (2, reference.grad_masks(grad, features, *args), grad, features),
    ):
        assert_close(run(library, op, path, case, expected, first, second), expected)


@pytest.mark.parametrize("path", [0, 1], ids=["element", "rows"])
@pytest.mark.parametrize("case", CASES, ids=label)
def test_kernels_equal_the_reference(case, path, library):
    check_all_operators(library, path, case)


@pytest.mark.parametrize("layout", [0, 2], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("scale", [2, 3, 1, Fraction(1, 2), Fraction(3, 2)], ids=str)
def test_several_chunks_bands_and_spans(scale, layout, library):
    """A band of source rows has at most 16, a span at most 192 lanes, and 8 or 16 channels are staged at a time."""
    case = dict(kernel_size=3, group_size=2, scale=scale, size=(20, 401), channels=70, dtype=torch.float32)
    check_all_operators(library, 1, case | dict(layout=layout))


def check_from_logits(library, case):
    k, g, scale, size, channels = (case[name] for name in ("kernel_size", "group_size", "scale", "size", "channels"))
    up, down = scale_ratio(scale)
    features, masks, grad = random_case(size, channels, k, g, scale, dtype=case["dtype"])
    logits = masks if up == 1 else random_case(size, channels, k, g * up * up, 1, dtype=case["dtype"], seed=1)[1]
    rows, columns = outputs_of(size, up, down, case["crop"])
    grad, logits = grad[..., :rows, :columns], logits[..., :rows, :columns] if up == 1 else logits
    exact = [tensor.double().requires_grad_() for tensor in (features, logits)]
    kernels = masks_from_logits(exact[1], k, g, up, down, case["normalizer"])[..., :rows, :columns]
    output = reference.reassemble(exact[0], kernels, k, g, up, down)
    expected, expected_logits = torch.autograd.grad(output, exact, grad.double())
    assert_close(run(library, 0, 1, case, grad, features, logits), output.detach().to(case["dtype"]))
    assert_close(run(library, 1, 1, case, features, grad, logits), expected.to(case["dtype"]))
    got = run(library, 2, 1, case, logits, grad, features, logits)
    # A difference: what is lost is relative to its terms, not to what remains of them.
    difference = (got.double() - expected_logits).norm()
    assert difference <= 4 * TOLERANCES[case["dtype"]] * (expected_logits.norm() + grad.double().norm())


FROM_LOGITS = list(
    pairwise(
        {
            "kernel_size": (1, 3, 5),
            "group_size": (1, 2),
            "scale": (1, 2, 3, Fraction(1, 2), Fraction(1, 3)),
            "size": ((6, 8), (1, 1), (19, 9), (3, 209)),
            "channels": (8, 38),
            "normalizer": NORMALIZERS,
            "dtype": reference.DTYPES,
            "layout": (0, 1, 2),
            "crop": CROPS,
        }
    )
)


@pytest.mark.parametrize("case", FROM_LOGITS, ids=label)
def test_kernels_from_logits_equal_the_definition(case, library):
    check_from_logits(library, case)


def check_all_cases(library, types=None):
    """With each type, or with what takes its place in ``types``."""
    types = types or {dtype: dtype for dtype in DTYPES}
    for case in CASES:
        for path in (0, 1):
            check_all_operators(library, path, case | dict(dtype=types[case["dtype"]]))
    for case in FROM_LOGITS:
        check_from_logits(library, case | dict(dtype=types[case["dtype"]]))
    return f"{2 * len(CASES) + len(FROM_LOGITS)} cases"


def test_kernels_under_sanitizers(tmp_path):
    """And what they do on processors of as many registers as AVX-512 has."""
    assert run_under_sanitizers(__file__, "host.cpp", tmp_path, "-DREGISTERS=32", "-DFLOAT_AND_HALF").endswith(" cases")


def test_kernels_on_64_bit_arm(tmp_path):
    """What NEON computes, by an emulator."""
    emulator = Emulated(tmp_path)
    check_all_cases(emulator)
    emulator.close()


@pytest.fixture(scope="module")
def conversions(tmp_path_factory):
    return ctypes.CDLL(str(compile_host("conversions.cpp", tmp_path_factory.mktemp("conversions"), "-O2")))


def convert(conversions, name, source, target):
    """In how many results a number and a vector at a time differ; NaNs count as one value."""
    function = getattr(conversions, name)
    function.restype = ctypes.c_int64
    return function(ctypes.c_int64(len(source)), *(ctypes.c_void_p(t.data_ptr()) for t in (source, target)))


@pytest.mark.parametrize("flush", [False, True], ids=["subnormals", "flushed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
@pytest.mark.parametrize("path", ["baseline", "avx2", "avx512"])
def test_conversions_of_half_precision(path, dtype, flush, conversions):
    """As torch converts them, and the same with instructions and without, also where subnormal floats are zero."""
    if path != "baseline" and not getattr(conversions, f"has_{path}")():
        pytest.skip(f"this processor has no {path}")
    suffix = f"{'half' if dtype == torch.float16 else 'bfloat16'}_{path}"
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    widened = bits.view(dtype).float()
    # Every finite value, its neighbours half a step away (ties), just beside the ties, and float32 at random.
    finite = widened[widened.isfinite()].double().sort().values
    middle = ((finite[1:] + finite[:-1]) / 2).float()
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31 - 1, (200_000,), generator=generator).to(torch.int32).view(torch.float32)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 65519.9, 65520.0, 3.4e38, 1e-45])
    near = (torch.nextafter(middle, torch.tensor(9e9)), torch.nextafter(middle, torch.tensor(-9e9)))
    wide = torch.cat([finite.float(), middle, *near, anything, special])
    wide = torch.cat([wide, wide.new_zeros(len(wide) % 2)])
    if flush and dtype == torch.float16:  # no half is as small as a subnormal float
        wide = wide[(wide == 0) | ~(wide.abs() < torch.finfo(torch.float32).tiny)][: len(wide) // 4 * 2]
    narrowed = wide.to(dtype)
    to_wide, to_narrow = torch.empty(65536), [torch.empty(len(wide), dtype=torch.int16) for _ in range(2)]
    assert torch.set_flush_denormal(flush) or not flush
    try:
        differences = convert(conversions, f"widen_{suffix}", bits, to_wide)
        for name, target in zip(("narrow", "pairs"), to_narrow, strict=True):
            differences += convert(conversions, f"{name}_{suffix}", wide, target)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(to_wide.isnan(), widened.isnan())
    kept = ~widened.isnan()
    assert torch.equal(to_wide[kept].view(torch.int32), widened[kept].view(torch.int32))
    kept = ~narrowed.isnan()
    for each in (target.view(dtype) for target in to_narrow):
        assert torch.equal(each.isnan(), narrowed.isnan())
        assert torch.equal(each[kept].view(torch.int16), narrowed[kept].view(torch.int16))
    assert differences == 0


@pytest.mark.skipif(not shutil.which("clang++"), reason="clang++ is not on the PATH")
@pytest.mark.parametrize("source", ["avx2", "avx512", "baseline"])
def test_kernels_compile_with_clang(source):
    """Which checks more of a function than GCC does before it is inlined into one of an instruction set."""
    command = ["clang++", "-std=c++17", "-fsyntax-only", "-Wall", "-Werror", "-Wno-psabi"]
    result = subprocess.run([*command, HERE.parents[1] / f"csrc/cpu/{source}.cpp"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[:4000]


def test_conversions_of_half_precision_on_64_bit_arm(tmp_path):
    require_arm(ARM_CXX, ARM_EMULATOR[0])
    program = tmp_path / "conversions"
    subprocess.run([ARM_CXX, *WARNINGS, "-O1", HERE / "conversions.cpp", "-o", program], check=True)
    assert subprocess.check_output([*ARM_EMULATOR, program], text=True).strip() == "0"


def test_offsets_of_more_than_2_to_the_31_elements(library):
    library.last_offset.restype = library.source_index.restype = library.first_output.restype = ctypes.c_int64
    c, h, w = 64, 16400, 16400
    assert c * h * w > 2**33
    assert library.last_offset(*(ctypes.c_int64(v) for v in (c, h, w))) == c * h * w - 1
    for up, down in ((3, 2), (2, 3), (2, 1), (1, 2)):
        for output in (0, 1, 5, 2**33 + 1):
            source = library.source_index(*(ctypes.c_int64(v) for v in (output, up, down)))
            assert source == output * down // up
            first = library.first_output(*(ctypes.c_int64(v) for v in (source, up, down)))
            assert first == -(-source * up // down) <= output


if __name__ == "__main__":
    single, half = torch.float32, torch.float16
    types = {torch.float64: single, single: single, half: half, torch.bfloat16: half}
    print(check_all_cases(ctypes.CDLL(sys.argv[1]), types))
