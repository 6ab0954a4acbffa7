"""Checks and measures this package on a machine with a GPU, in one command, without the OpenMMLab packages.

    python -m benchmarks.gpu_check [--out DIR] [--mmcv-source DIR] [--only STEP ...] [--budget SECONDS] [--dry-run]

First, at the same time: both halves of the extension are built in place, for this machine's GPU alone, mmcv's operator
is compiled from its source where that is given or installed, and torch.compile's caches are filled; what the model of
the kernels compiles takes three minutes of one core, and goes on until it is asked for. Then what is not timed, again
at the same time: the tests of operator and modules on CUDA, compute-sanitizer's memcheck and racecheck over small runs,
sizes at which mmcv fails, side streams. Then one by one: CUDA graphs of ours and others, captured, compared and timed;
the benchmark in float32 (channels_last and bfloat16 beside it); ncu over the kernels; a detector; the benchmark in
float16; the modules; what `benchmarks.gpu_model` predicts, beside what ncu counted.

Each step is a process with a limit and a log; one that fails does not stop the others. DIR receives NAME.log for each
step, the benchmarks' JSON and figures, and after every step summary.json and summary.md, whole. A step whose result
cannot be read has failed, whatever its exit code.

With --dry-run, which needs no GPU, every step is rehearsed: the same commands on the CPU with maps of a few pixels;
empty files in place of the sources that are to be compiled; and, where a tool is missing, its part left out and a
recorded output given to what reads it. The summary says of each step how it was rehearsed.

Needs torch >= 2.10 with CUDA, torchvision, rich, matplotlib, pytest, hypothesis, setuptools, ninja, g++ and a CUDA
toolkit (CUDA_HOME). Where a tool is missing, its step is skipped and says so.

Exit code: 0; 1 when a step failed; 2 for invalid arguments, or where there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])
from benchmarks import gpu_reports, measure, mmcv_operator
from benchmarks.gpu_build import ROOT, working_compiler
from benchmarks.gpu_steps import Step, all_steps, prepare_rehearsal
from benchmarks.report import console, make_table
from carafe_plugin.engine.writing import write_whole

BUDGET = 460.0  # seconds: under eight minutes with what comes before and after
_running: set[subprocess.Popen[bytes]] = set()  # the steps' processes, each the first of a group


def run_step(step: Step, out: Path, deadline: float) -> dict[str, Any]:
    """Runs a step within its limit and the time left; its output goes to `out`/NAME.log.

    The 'status' returned is 'ok', 'failed', 'timed out' or 'skipped'; 'detail' is what it found, or why it did not.
    """
    record: dict[str, Any] = {"name": step.name, "status": "skipped", "code": None, "seconds": 0.0}
    if step.rehearsed:
        record["rehearsed"] = step.rehearsed
    begin = time.monotonic()
    limit = min(step.limit, deadline - begin)
    if reason := step.missing or ("no time is left" if limit < 1 else None):
        return record | {"detail": reason}
    command = [word.replace("{out}", str(out)) for word in step.command]
    log = out / f"{step.name}.log"
    for ending in (".json", ".xml", ".csv"):  # of an earlier run
        (out / f"{step.name}{ending}").unlink(missing_ok=True)
    with log.open("w", encoding="utf-8") as stream:
        print("$", *command, file=stream, flush=True)
        try:
            # A session of its own: what a step starts ends with it.
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment(out), stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )
            _running.add(process)
            record["code"] = process.wait(limit)
            record["status"] = "failed" if record["code"] else "ok"
        except subprocess.TimeoutExpired:
            end(process)
            release_locks(out)
            record["status"] = "timed out"
        except OSError as error:
            print(error, file=stream)
            record["status"] = "failed"
    record["seconds"] = round(time.monotonic() - begin, 1)
    sound, found = gpu_reports.read(out, step.name)
    if record["status"] == "ok" and not sound:
        record["status"] = "failed"
    # Also of a step that failed in the end, or ran out of time, what it had found stays.
    if record["status"] != "ok" and (not found or (found.startswith(gpu_reports.NOTHING) and record["code"] != 0)):
        found = last_line(log)
    return record | ({"detail": found} if found else {})


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a step's process and all that it started."""
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        os.killpg(process.pid, 9)
    process.wait()


def last_line(log: Path) -> str:
    """What a failing step said last."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if len(lines) > 1 else "it said nothing"


def release_locks(out: Path) -> None:
    """Removes what a killed compilation of mmcv's operator leaves behind: torch would wait for it forever."""
    for lock in (out / "extensions").glob("*/lock"):
        lock.unlink()


def environment(out: Path) -> dict[str, str]:
    """The steps' environment: this checkout's package, code for this GPU alone, a compiler whose libraries work."""
    variables = dict(os.environ, PYTHONUNBUFFERED="1", COLUMNS="170", TORCH_EXTENSIONS_DIR=str(out / "extensions"))
    variables |= {"TORCHINDUCTOR_CACHE_DIR": str(out / "cache"), "TRITON_CACHE_DIR": str(out / "cache" / "triton")}
    variables["TORCH_CUDA_ARCH_LIST"] = mmcv_operator.architecture()
    if compiler := working_compiler():
        variables |= {"CXX": compiler.command, **compiler.variables}
        variables.pop("CC", None)  # nvcc would compile with it what is not device code
    # ninja is found beside the interpreter although its environment need not be activated.
    for name, folder in (("PYTHONPATH", ROOT), ("PATH", Path(sys.executable).parent)):
        variables[name] = os.pathsep.join([str(folder), *filter(None, [os.environ.get(name)])])
    return variables


def run_all(groups: Sequence[Sequence[Step]], out: Path, budget: float, dry: bool = False) -> list[dict[str, Any]]:
    """Runs the steps, prints how each went, and writes the summary after each."""
    deadline = time.monotonic() + budget
    order = [step.name for group in groups for step in group]
    records: dict[str, dict[str, Any]] = {}
    lock = threading.Lock()

    def run(step: Step) -> None:
        record = run_step(step, out, deadline)
        with lock:
            records[step.name] = record
            write_summary(out, [records[name] for name in order if name in records], dry)
            result = f"{record['name']}: {record['status']} ({record['seconds']:.0f} s)"
            console.print(f"{result} {record.get('detail', '')}", highlight=False, markup=False)

    with ThreadPoolExecutor() as behind:
        left: list[Future[None]] = []
        for group in groups:
            with ThreadPoolExecutor(len(group)) as pool:
                try:
                    if group is groups[-1]:
                        wait(left)
                    left += [behind.submit(run, step) for step in group if step.goes_on]
                    list(pool.map(run, [step for step in group if not step.goes_on]))
                except KeyboardInterrupt:  # does not reach the steps, which are groups of their own
                    for process in _running:
                        end(process)
                    raise
    return [records[name] for name in order]


def write_summary(out: Path, records: Sequence[dict[str, Any]], dry: bool) -> None:
    """summary.json, and the same for people in summary.md."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    summary: dict[str, Any] = {"python": sys.version.split()[0], "torch": torch.__version__, "gpu": gpu, "dry_run": dry}
    summary |= {"revision": measure.revision(), "steps": list(records)}
    write_whole((json.dumps(summary, indent=1) + "\n").encode(), out / "summary.json")
    title = "rehearsal without a GPU" if dry else str(gpu)
    lines = [f"# GPU check: {title}, torch {torch.__version__}, revision {summary['revision']}", ""]
    lines += ["| step | status | seconds | what it found |", "|---|---|---|---|"]
    for record in records:
        found = [record.get("detail", ""), f"rehearsed {record['rehearsed']}" if "rehearsed" in record else ""]
        cells = (record["name"], record["status"], f"{record['seconds']:.0f}", "; ".join(filter(None, found)))
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    with contextlib.suppress(OSError, ValueError, LookupError):  # another run's, cut short
        lines += gpu_reports.tables(out)
    write_whole(("\n".join(lines) + "\n").encode(), out / "summary.md")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; exits with code 2 and one clear line when an argument is invalid."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description="Check and measure this package on a GPU."
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("work_dirs/gpu_check"), metavar="DIR", help="results [work_dirs/gpu_check]")
    add("--mmcv-source", type=Path, metavar="DIR", help="mmcv, or its csrc, to compile its operator from [installed]")
    add("--only", nargs="+", metavar="STEP", help="run only these steps")
    add("--dry-run", action="store_true", help="rehearse every step, without a GPU")
    add("--budget", type=float, default=BUDGET, metavar="S", help=f"seconds that all steps may take [{BUDGET:.0f}]")
    options = parser.parse_args(arguments)
    source = mmcv_operator.find_source(options.mmcv_source)
    if options.mmcv_source and source is None:
        parser.error(f"--mmcv-source: no {mmcv_operator.LAUNCHERS} in {options.mmcv_source}")
    options.groups = all_steps(source.resolve() if source else None, options.dry_run)
    names = [step.name for group in options.groups for step in group]
    for name in options.only or ():
        if name not in names:
            parser.error(f"--only: unknown step {name!r}; known are {', '.join(names)}")
    kept = [[step for step in group if step.name in (options.only or names)] for group in options.groups]
    options.groups = [group for group in kept if group]
    if not options.budget > 0:
        parser.error(f"--budget: expected a positive number of seconds, got {options.budget:g}")
    if not torch.cuda.is_available() and not options.dry_run:
        parser.error("needs a CUDA device, torch sees none; --dry-run rehearses without one")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: expected a folder or a place for one, got {options.out}: {error.strerror}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the check; returns the exit code."""
    options = parse_arguments(arguments)
    out = options.out.resolve()
    release_locks(out)
    if options.dry_run:
        prepare_rehearsal(out)
    if (compiler := working_compiler()) is None:
        console.print("no C++ compiler here makes a library that works beside torch", style="yellow")
    else:
        console.print(f"C++ compiler: {compiler}", highlight=False, markup=False)
    try:
        records = run_all(options.groups, out, options.budget, options.dry_run)
    except KeyboardInterrupt:
        console.print(f"interrupted; what was found is in {options.out}", style="red")
        return 130
    title = f"GPU check{' (rehearsal)' if options.dry_run else ''}: logs and results in {options.out}"
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
