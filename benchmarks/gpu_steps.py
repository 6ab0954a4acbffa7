"""The steps of `benchmarks.gpu_check`: what runs beside what, in which order, and how each is rehearsed."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import mmcv_operator
from benchmarks.command import SHAPES
from benchmarks.gpu_build import HALVES, ROOT, newest_library
from benchmarks.gpu_reports import COUNTERS, DIVIDER

RECORDED = ROOT / "benchmarks" / "recorded"  # what compute-sanitizer and ncu wrote on a GPU
MODEL = "benchmarks.gpu_model"  # what ncu should count, without a GPU
# So slow on a GPU, or so long to compile, that their time is better spent elsewhere.
SLOW_PEERS = ("upsample-unfold", "steps-compiled")
ON_CPU = "on the CPU, maps of a few pixels"  # how most of a dry run is
TINY = "--threads 1 --shapes 4x5x7 --repeats 1 --time-limit 1"
# Runs a tool over a program that does nothing, shows a recorded output of the tool, and goes on with the command.
REHEARSE_TOOL = """said=$({tool} true 2>&1); printf '%s\\n' "$said"
case "$said" in *nrecogni*|*nknown*|*nvalid*) exit 1;; esac
cat {recorded} && exec "$@"
"""


@dataclass(frozen=True)
class Step:
    """A process to run."""

    name: str
    command: Sequence[str]  # `{out}` stands for the folder of results
    limit: float  # seconds
    missing: str | None = None  # why it need not or cannot run on this machine; None where it runs
    rehearsed: str | None = None  # in a dry run: how
    goes_on: bool = False  # beside the steps that follow, until the last


def is_built(half: str) -> str | None:
    """Says so where a half's library is newer than every source; its build step has nothing to do then."""
    sources = [ROOT / "setup.py", *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    newest = max(path.stat().st_mtime for path in sources)
    library = newest_library(ROOT, HALVES[half][1])
    new = library is not None and library.stat().st_mtime > newest
    return "the library is newer than its sources" if new else None


def find_tool(name: str) -> str | None:
    """compute-sanitizer or ncu, on the PATH or in the CUDA toolkit."""
    home = mmcv_operator.cuda_home()
    folders = [os.environ.get("PATH", ""), *((f"{home}/bin", f"{home}/compute-sanitizer") if home else ())]
    return shutil.which(name, path=os.pathsep.join(folders))


def python(words: str, *paths: str) -> list[str]:
    """A command of this interpreter; paths may contain blanks."""
    return [sys.executable, *shlex.split(words), *paths]


def known_gpu() -> str:
    """The name by which the model knows this machine's GPU; its default where it does not."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    words = re.split(r"[\s-]+", name.lower())
    known = importlib.import_module(f"{MODEL}_devices").GPUS if find_spec(f"{MODEL}_devices") else {}
    return next((word for word in words if word in known), "h100")


def all_steps(mmcv_source: Path | None, dry: bool = False) -> list[list[Step]]:
    """The steps in order; those of one list run at the same time. `dry`: each one's rehearsal."""
    source = ["--mmcv-source", str(mmcv_source)] if mmcv_source and not dry else []
    checker, profiler = find_tool("compute-sanitizer"), find_tool("ncu")
    device, on_cpu = ("cpu", ON_CPU) if dry else ("cuda", None)

    def probe(name: str, limit: float, *before: str, of: str | None = None, missing: str | None = None) -> Step:
        words = f"-m benchmarks.gpu_probes {of or name} --device {device} --json {{out}}/{name}.json"
        command = python(words + (" --tiny" if dry else ""), *(source if name in ("limits", "graphs") else []))
        return Step(name, [*before, *command], limit, missing, on_cpu)

    def bench(tool: str, dtype: str, limit: float, *skip: str) -> Step:
        command = f"-m benchmarks.{tool} --device {device} --dtype {dtype} --time-limit 3 --skip {' '.join(skip)}"
        files = f"--json {{out}}/{tool}-{dtype}.json --plot {{out}}/{tool}-{dtype}.png"
        small = f" {TINY} --skip {' '.join(skip)} shifted-madd-compiled" if dry and tool == "op" else ""
        small = f" {TINY}" if dry and tool == "module" else small
        return Step(f"{tool}-{dtype}", python(f"{command} {files}{small}", *source), limit, None, on_cpu)

    def build(half: str) -> Step:
        command = python(f"-m benchmarks.gpu_build {half} --json {{out}}/build-{half}.json")
        if not dry:
            return Step(f"build-{half}", command, 200, is_built(half))
        files = "empty files in place of the sources"
        return Step(f"build-{half}", [*command, "--root", f"{{out}}/rehearsal-{half}"], 200, None, files)

    def sanitizer(name: str, limit: float, options: str) -> Step:
        # Without torch's caching allocator, which would hand out the memory around a tensor as one valid block.
        allocator = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
        words = [checker or "compute-sanitizer", "--tool", name, *options.split(), "--error-exitcode", "99"]
        if dry:
            return rehearse(probe(name, limit, *allocator, of="small"), words, RECORDED / f"{name}.log", checker)
        missing = None if checker else "compute-sanitizer is not installed"
        return probe(name, limit, *allocator, *words, of="small", missing=missing)

    def rehearse(step: Step, tool: Sequence[str], recorded: Path, found: str | None) -> Step:
        script = REHEARSE_TOOL.format(tool=shlex.join(tool) if found else "", recorded=shlex.quote(str(recorded)))
        name = Path(tool[0]).name
        how = f"{name} over a program without a GPU" if found else f"without {name}"
        return Step(
            step.name,
            ["sh", "-c", script, name, *step.command],
            step.limit,
            None,
            f"{ON_CPU}; {how}, a recorded output of which is read",
        )

    tests = "-m pytest -m cuda tests/ops tests/modules -q -p no:cacheprovider --junitxml {out}/tests.xml"
    if find_spec("xdist"):
        tests += " -n 1" if dry else " -n 8 --dist worksteal"
    collected = "the same tests, which skip what needs a GPU" if dry else None
    # The clocks stay as they are, which the benchmarks ran at.
    counted = ["--clock-control", "none", "--kernel-name-base", "mangled", "--kernel-name", f"regex:carafe|{DIVIDER}"]
    counted += ["--csv", "--metrics", ",".join(COUNTERS), "--page", "raw", "--log-file", "{out}/counters-raw.csv"]
    table = ["{out}/counters-raw.csv", "{out}/counters-raw.json"]
    if dry:
        table = [str(RECORDED / "counters-raw.csv"), str(RECORDED / "counters-raw.json")]
        counters = probe("counters-raw", 90, of="counters")
        counters = rehearse(counters, [profiler or "ncu", *counted[:-2]], Path(os.devnull), profiler)
    else:
        missing = None if profiler else "ncu is not installed"
        counters = probe("counters-raw", 90, profiler or "ncu", *counted, of="counters", missing=missing)
    recorded = "on a recorded table of the profiler" if dry else None
    tabulate = python("-m benchmarks.gpu_reports counters", *table, "{out}/counters.csv")
    no_model = None if find_spec(MODEL) else f"there is no {MODEL}"
    gpu = ["--gpu", "h200" if dry else known_gpu()]

    def predict(name: str, limit: float, *options: str, missing: str | None = None, goes_on: bool = False) -> Step:
        missing = no_model or (None if dry else missing)
        if not dry:
            return Step(name, python(f"-m {MODEL}", *gpu, *options), limit, missing, goes_on=goes_on)
        # The recorded table is of other sources; what all kernels compile to, the tests of the kernels look at.
        read = f"import sys, {MODEL} as m; a = m.parse_arguments(sys.argv[1:])"
        show = "print(m.read_counters(a.compare) if a.compare else a)"
        how = "its options and a recorded table of the profiler are read, nothing is counted"
        command = [*python("-c", f"{read}; {show}"), *gpu, *options]
        return Step(name, command, limit, missing, how, goes_on)

    small = "--shapes 4x5x7 --dtype float32 --ops forward --kernels masks"  # all kernels are compiled for it, once
    return [
        [
            *(build("cuda"), build("cpu"), compile_mmcv(mmcv_source, dry), *warm_up(dry)),
            predict("compile-model", 300, *small.split(), goes_on=True),
        ],
        [
            probe("environment", 60),
            probe("compiled", 60),
            Step("tests", python(tests), 120, None, collected),
            sanitizer("memcheck", 90, ""),
            sanitizer("racecheck", 90, "--kernel-regex kns=carafe"),
            probe("limits", 90),
            probe("streams", 60),
        ],
        [probe("graphs", 75)],
        [bench("op", "float32", 90, *SLOW_PEERS)],
        [counters],
        [Step("counters", tabulate, 20, None if dry else counters.missing, recorded)],
        [probe("detector", 60, missing=None if find_spec("torchvision") else "torchvision is not installed")],
        [bench("op", "float16", 60, *SLOW_PEERS, "shifted-madd-compiled")],
        [bench("module", "float32", 60, "pack-compiled")],
        [predict("model", 120, "--compare", "{out}/counters.csv", missing=counters.missing)],
    ]


def compile_mmcv(source: Path | None, dry: bool) -> Step:
    """The step that compiles mmcv's operator, by the reference's side: our own libraries are being built."""
    command = ["env", "CARAFE_BACKEND=reference", *python("-m benchmarks.mmcv_operator")]
    if dry:
        files = "empty files in place of mmcv's"
        return Step("mmcv", [*command, "{out}/rehearsal-mmcv", "--empty"], 150, None, files)
    return Step("mmcv", [*command, str(source)], 150, None if source else "no source of mmcv: --mmcv-source names it")


def warm_up(dry: bool) -> list[Step]:
    """Steps that fill torch.compile's caches, a process for each problem: one after the other takes minutes."""
    shapes = [(str(scale), "x".join(map(str, shape[1:]))) for scale, shapes in SHAPES.items() for shape in shapes]
    command = "-m benchmarks.op --dtype float32 --peers shifted-madd-compiled --repeats 1 --time-limit 1"
    if dry:
        words = ["env", "CARAFE_BACKEND=reference", "TORCH_COMPILE_DISABLE=1", *python(f"{command} {TINY}")]
        return [Step("warm-up", words, 120, None, f"{ON_CPU}; without the compiler")]
    return [
        Step(
            f"warm-up-{shape}-{scale.replace('/', '-')}",
            [
                "env",
                "CARAFE_BACKEND=reference",
                *python(f"{command} --device cuda --shapes {shape} --scale-factor {scale}"),
            ],
            120,
        )
        for scale, shape in shapes
    ]


EMPTY_MODULE = """#include <Python.h>
#include <string>
static std::string name = "{module}";
PyMODINIT_FUNC PyInit_{module}() {{
  static PyModuleDef definition = {{PyModuleDef_HEAD_INIT, name.c_str(), nullptr, -1}};
  return PyModule_Create(&definition);
}}
"""


def prepare_rehearsal(out: Path) -> None:
    """What the build steps of a dry run compile: copies of what setup.py reads, the sources empty but for a module."""
    named = {"csrc/registration.cpp": "_C", "csrc/cuda/carafe.cu": "_C_cuda"}
    for half in HALVES:
        root = out / f"rehearsal-{half}"
        shutil.rmtree(root, ignore_errors=True)
        (root / "carafe_plugin").mkdir(parents=True)
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "model-index.yml"):
            shutil.copy(ROOT / name, root)
        for path in (ROOT / "carafe_plugin").glob("*.py"):
            shutil.copy(path, root / "carafe_plugin")
        for path in (*ROOT.glob("csrc/**/*.cpp"), *ROOT.glob("csrc/**/*.cu")):
            source = path.relative_to(ROOT)
            (root / source).parent.mkdir(parents=True, exist_ok=True)
            module = named.get(source.as_posix())
            (root / source).write_text(EMPTY_MODULE.format(module=module) if module else "")
    launchers = out / "rehearsal-mmcv" / mmcv_operator.LAUNCHERS
    launchers.parent.mkdir(parents=True, exist_ok=True)
    launchers.write_text("__global__ void nothing() {}\n")
