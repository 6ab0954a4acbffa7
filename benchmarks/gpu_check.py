"""Checks and measures this package on a machine with a GPU, in one command, without the OpenMMLab packages.

    python -m benchmarks.gpu_check [--out DIR] [--mmcv-source DIR] [--only STEP ...]

It builds the extension in place for this machine's GPU, and mmcv's operator from its source where that is given or
installed; then come the tests of operator and modules on CUDA, the benchmarks in float32 and float16,
compute-sanitizer and ncu over small runs, a detector, and the modules. Each step is a process with a log; one that
fails does not stop the others. DIR receives a log for each step, the benchmarks' JSON and figures, and summary.json,
which is written after every step.

Needs torch >= 2.10 with CUDA, torchvision, rich, matplotlib, pytest, hypothesis, setuptools, ninja, g++ and a CUDA
toolkit (CUDA_HOME). Where a tool is missing, its step is skipped and says so.

Exit code: 0; 1 when a step failed; 2 for invalid arguments, or where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import mmcv_operator
from benchmarks.report import console, make_table

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 530.0  # seconds: under nine minutes
# So slow on a GPU, or so long to compile, that their time is better spent elsewhere.
SLOW_PEERS = ("upsample-unfold", "steps-compiled")

# Time, instructions, bytes from and to memory, how busy issue slots and the shared memory's pipe are, and occupancy.
COUNTERS = (
    "gpu__time_duration.sum",
    "smsp__inst_executed.sum",
    "dram__bytes.sum",
    "sm__issue_active.avg.pct_of_peak_sustained_elapsed",
    "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "launch__shared_mem_per_block",
    "launch__waves_per_multiprocessor",
)


@dataclass(frozen=True)
class Step:
    """A process to run."""

    name: str
    command: Sequence[str]  # `{out}` stands for the folder of results
    limit: float  # seconds
    missing: str | None = None  # why it need not or cannot run on this machine; None where it runs


def run_step(step: Step, out: Path, deadline: float) -> dict[str, Any]:
    """Runs a step within its limit and the time left; its output goes to `out`/NAME.log.

    The 'status' returned is 'ok', 'failed', 'timed out' or 'skipped'; 'detail' is there unless it is 'ok'.
    """
    record: dict[str, Any] = {"name": step.name, "status": "skipped", "code": None, "seconds": 0.0}
    begin = time.monotonic()
    limit = min(step.limit, deadline - begin)
    if reason := step.missing or ("no time is left" if limit < 1 else None):
        return record | {"detail": reason}
    command = [word.replace("{out}", str(out)) for word in step.command]
    log = out / f"{step.name}.log"
    with log.open("w", encoding="utf-8") as stream:
        print("$", *command, file=stream, flush=True)
        try:
            # A session of its own: what a step starts ends with it.
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment(out), stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )
            record["code"] = process.wait(limit)
            record["status"] = "failed" if record["code"] else "ok"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            release_locks(out)
            record["status"] = "timed out"
        except OSError as error:
            print(error, file=stream)
            record["status"] = "failed"
    record["seconds"] = round(time.monotonic() - begin, 1)
    return record if record["status"] == "ok" else record | {"detail": last_line(log)}


def last_line(log: Path) -> str:
    """What a failing step said last."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if len(lines) > 1 else "it said nothing"


def release_locks(out: Path) -> None:
    """Removes what a killed compilation of mmcv's operator leaves behind: torch would wait for it forever."""
    for lock in (out / "extensions").glob("*/lock"):
        lock.unlink()


def environment(out: Path) -> dict[str, str]:
    """The steps' environment: this checkout's package, and extensions for this GPU alone."""
    variables = dict(os.environ, PYTHONUNBUFFERED="1", COLUMNS="170", TORCH_EXTENSIONS_DIR=str(out / "extensions"))
    # ninja is found beside the interpreter although its environment need not be activated.
    for name, folder in (("PYTHONPATH", ROOT), ("PATH", Path(sys.executable).parent)):
        variables[name] = os.pathsep.join([str(folder), *filter(None, [os.environ.get(name)])])
    return {"TORCH_CUDA_ARCH_LIST": mmcv_operator.architecture(), **variables}


def is_built() -> str | None:
    """Says so where both libraries are newer than every source; the build step has nothing to do then."""
    sources = [ROOT / "setup.py", *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    newest = max(path.stat().st_mtime for path in sources)
    libraries = [path.stat().st_mtime for path in (ROOT / "carafe_plugin").glob("_C*.so")]
    new = len(libraries) >= 2 and min(libraries) > newest
    return "the libraries are newer than their sources" if new else None


def find_tool(name: str) -> str | None:
    """compute-sanitizer or ncu, on the PATH or in the CUDA toolkit."""
    home = mmcv_operator.cuda_home()
    folders = [os.environ.get("PATH", ""), *((f"{home}/bin", f"{home}/compute-sanitizer") if home else ())]
    return shutil.which(name, path=os.pathsep.join(folders))


def python(words: str, *paths: str) -> list[str]:
    """A command of this interpreter; paths may contain blanks."""
    return [sys.executable, *shlex.split(words), *paths]


def all_steps(mmcv_source: Path | None) -> list[list[Step]]:
    """The steps in order; those of one list run at the same time."""
    source = ["--mmcv-source", str(mmcv_source)] if mmcv_source else []
    checker, profiler = find_tool("compute-sanitizer"), find_tool("ncu")

    def probe(name: str, limit: float, *before: str, missing: str | None = None) -> Step:
        command = python(f"-m benchmarks.gpu_probes {name} --json {{out}}/{name}.json")
        return Step(name, [*before, *command], limit, missing)

    def bench(tool: str, dtype: str, limit: float, *skip: str) -> Step:
        command = f"-m benchmarks.{tool} --device cuda --dtype {dtype} --time-limit 3 --skip {' '.join(skip)}"
        files = f"--json {{out}}/{tool}-{dtype}.json --plot {{out}}/{tool}-{dtype}.png"
        return Step(f"{tool}-{dtype}", python(f"{command} {files}", *source), limit)

    tests = "-m pytest -m cuda tests/ops tests/modules -q -p no:cacheprovider --junitxml {out}/tests.xml"
    if find_spec("xdist"):
        tests += " -n 4 --dist loadfile"
    # Without torch's caching allocator, which would hand out the memory around a tensor as one valid block.
    memcheck = f"env PYTORCH_NO_CUDA_MEMORY_CACHING=1 {checker} --tool memcheck --error-exitcode 99".split()
    # The clocks stay as they are, which the benchmarks ran at.
    counted = f"{profiler} --clock-control none --kernel-name regex:run_block|for_each_element --csv".split()
    counted += ["--metrics", ",".join(COUNTERS), "--page", "raw", "--log-file", "{out}/counters.csv"]
    no_source = None if mmcv_source else "no source of mmcv: --mmcv-source names it"
    return [
        [
            Step("build", python("setup.py build_ext --inplace --force"), 240, is_built()),
            Step("mmcv", python("-m benchmarks.mmcv_operator", str(mmcv_source)), 240, no_source),
        ],
        [probe("environment", 60)],
        [probe("compiled", 60)],
        [Step("tests", python(tests), 150)],
        [bench("op", "float32", 270, *SLOW_PEERS)],
        [bench("op", "float16", 120, *SLOW_PEERS, "shifted-madd-compiled")],
        [probe("small", 120, *memcheck, missing=None if checker else "compute-sanitizer is not installed")],
        [probe("counters", 90, *counted, missing=None if profiler else "ncu is not installed")],
        [probe("detector", 90, missing=None if find_spec("torchvision") else "torchvision is not installed")],
        [bench("module", "float32", 120, "pack-compiled")],
    ]


def run_all(groups: Sequence[Sequence[Step]], out: Path, budget: float) -> list[dict[str, Any]]:
    """Runs the steps, prints how each went, and writes summary.json after every group."""
    deadline = time.monotonic() + budget
    records: list[dict[str, Any]] = []
    for group in groups:
        with ThreadPoolExecutor(len(group)) as pool:
            for record in pool.map(lambda step: run_step(step, out, deadline), group):
                records.append(record)
                result = f"{record['name']}: {record['status']} ({record['seconds']:.0f} s)"
                console.print(f"{result} {record.get('detail', '')}", highlight=False, markup=False)
        summary = {"python": sys.version.split()[0], "torch": torch.__version__, "steps": records}
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return records


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; exits with code 2 and one clear line when an argument is invalid."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description="Check and measure this package on a GPU."
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("work_dirs/gpu_check"), metavar="DIR", help="results [work_dirs/gpu_check]")
    add("--mmcv-source", type=Path, metavar="DIR", help="mmcv, or its csrc, to compile its operator from [installed]")
    add("--only", nargs="+", metavar="STEP", help="run only these steps")
    add("--budget", type=float, default=BUDGET, metavar="S", help=f"seconds that all steps may take [{BUDGET:.0f}]")
    options = parser.parse_args(arguments)
    source = mmcv_operator.find_source(options.mmcv_source)
    if options.mmcv_source and source is None:
        parser.error(f"--mmcv-source: no {mmcv_operator.LAUNCHERS} in {options.mmcv_source}")
    options.groups = all_steps(source.resolve() if source else None)
    names = [step.name for group in options.groups for step in group]
    for name in options.only or ():
        if name not in names:
            parser.error(f"--only: unknown step {name!r}; known are {', '.join(names)}")
    kept = [[step for step in group if step.name in (options.only or names)] for group in options.groups]
    options.groups = [group for group in kept if group]
    if not options.budget > 0:
        parser.error(f"--budget: expected a positive number of seconds, got {options.budget:g}")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out: expected a folder, {options.out} is a file")
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device, torch sees none")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the check; returns the exit code."""
    options = parse_arguments(arguments)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    release_locks(out)
    records = run_all(options.groups, out, options.budget)
    title = f"GPU check: logs and results in {options.out}"
    table = make_table(title, None, "step", ("status", "exit code", "seconds"))
    table.add_column("detail")
    styles = {"ok": "green", "skipped": "yellow"}
    for record in records:
        code = "" if record["code"] is None else str(record["code"])
        cells = (record["name"], record["status"], code, f"{record['seconds']:.1f}", record.get("detail", ""))
        table.add_row(*cells, style=styles.get(record["status"], "red"))
    console.print(table)
    return 1 if any(record["status"] in ("failed", "timed out") for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
