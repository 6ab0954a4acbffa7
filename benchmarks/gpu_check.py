"""Checks and measures this package on a machine with a GPU, in one command, without the OpenMMLab packages.

    python -m benchmarks.gpu_check [--out DIR] [--mmcv-source DIR] [--only STEP ...]

It builds the extension in place for the GPU at hand, and mmcv's operator from its source where that is given or
installed; then come the tests of operator and modules on CUDA, sizes at which mmcv fails, the benchmarks in float32 and
float16, compute-sanitizer over a small run, a detector, and the modules. Each step is a process with a log; one that
fails does not stop the others. DIR gets a log for each step, the benchmarks' JSON and figures, and summary.json, which
is written after every step.

Needs torch >= 2.10 with CUDA, torchvision, rich, matplotlib, pytest, hypothesis, setuptools, ninja, g++ and a CUDA
toolkit (CUDA_HOME). Where a tool is missing, its step is skipped and says so.

Exit code: 0; 1 when a step failed; 2 when something that was given does not fit, or there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import mmcv_peer

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 530.0  # seconds: under nine minutes
# So slow on a GPU, or so long to compile, that their time is better spent elsewhere.
SLOW_PEERS = ("upsample-unfold", "steps-compiled")


@dataclass(frozen=True)
class Step:
    """A process to run.

    Attributes:
        name: of the step and its log.
        command: arguments; `{out}` stands for the folder of results.
        limit: seconds it may take.
        folder: where it runs.
        missing: why it need not or cannot run on this machine; None where it runs.
    """

    name: str
    command: Sequence[str]
    limit: float
    folder: Path = ROOT
    missing: str | None = None


def run_step(step: Step, out: Path, deadline: float) -> dict[str, Any]:
    """Runs a step within its limit and the time left; its output goes to `out`/NAME.log.

    Returns:
        Its name, 'status' ('ok', 'failed', 'timed out', 'skipped'), exit code, seconds and, where it matters, 'detail'.
    """
    record: dict[str, Any] = {"name": step.name, "status": "skipped", "code": None, "seconds": 0.0}
    reason = step.missing
    limit = min(step.limit, deadline - time.monotonic())
    if reason is None and limit < 1:
        reason = "no time is left"
    if reason is not None:
        return record | {"detail": reason}
    command = [word.replace("{out}", str(out)) for word in step.command]
    log = out / f"{step.name}.log"
    begin = time.monotonic()
    with log.open("w", encoding="utf-8") as stream:
        stream.write(f"$ {' '.join(command)}\n")
        stream.flush()
        try:
            # A session of its own: what a step starts ends with it.
            process = subprocess.Popen(
                command,
                cwd=step.folder,
                env=environment(out),
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            code: int | None = process.wait(limit)
            status = "failed" if code else "ok"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            release_locks(out)
            code, status = None, "timed out"
        except OSError as error:
            stream.write(f"{error}\n")
            code, status = None, "failed"
    record |= {"status": status, "code": code, "seconds": round(time.monotonic() - begin, 1)}
    return record if status == "ok" else record | {"detail": last_line(log)}


def last_line(log: Path) -> str:
    """What a failing step said last."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if len(lines) > 1 else "it said nothing"


def release_locks(out: Path) -> None:
    """Removes what a killed compilation of `mmcv_peer` leaves behind: torch waits for it for ever."""
    for lock in (out / "extensions").glob("*/lock"):
        lock.unlink()


def environment(out: Path) -> dict[str, str]:
    """The steps' environment: this checkout's package, and extensions for this GPU alone."""
    variables = dict(os.environ, PYTHONUNBUFFERED="1", COLUMNS="170", TORCH_EXTENSIONS_DIR=str(out / "extensions"))
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # ninja is found beside the interpreter although its environment need not be activated.
    variables["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    variables.setdefault("TORCH_CUDA_ARCH_LIST", mmcv_peer.architecture())
    return variables


def is_built() -> str | None:
    """Says so where both libraries are newer than every source; the build step has nothing to do then."""
    libraries = [*(ROOT / "carafe_plugin").glob("_C*.so")]
    sources = [ROOT / "setup.py", *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    newest = max(path.stat().st_mtime for path in sources)
    new = len(libraries) >= 2 and all(path.stat().st_mtime > newest for path in libraries)
    return "the libraries are newer than their sources" if new else None


def sanitizer() -> str | None:
    """compute-sanitizer, on the PATH or in the CUDA toolkit."""
    home = mmcv_peer.cuda_home()
    folders = [Path(home) / below for below in ("bin", "compute-sanitizer")] if home else []
    return shutil.which("compute-sanitizer") or next(
        filter(None, (shutil.which("compute-sanitizer", path=str(folder)) for folder in folders)), None
    )


def all_steps(mmcv_source: Path | None) -> list[list[Step]]:
    """The steps in order; those of one list run at the same time."""
    python = sys.executable
    peer = ["--mmcv-source", str(mmcv_source)] if mmcv_source else []

    def probe(name: str, limit: float, *before: str, missing: str | None = None) -> Step:
        command = [*before, python, "-m", "benchmarks.gpu_probes", name, "--json", f"{{out}}/{name}.json"]
        return Step(name, command, limit, missing=missing)

    def bench(tool: str, dtype: str, limit: float, *skip: str) -> Step:
        name = f"{tool}-{dtype}"
        command = [python, "-m", f"benchmarks.{tool}", "--device", "cuda", "--dtype", dtype, *peer]
        command += ["--time-limit", "3", "--skip", *skip, "--json", f"{{out}}/{name}.json"]
        return Step(name, [*command, "--plot", f"{{out}}/{name}.png"], limit)

    tests = ["-m", "cuda", "tests/ops", "tests/modules", "-q", "-p", "no:cacheprovider"]
    checker = sanitizer()
    no_torchvision = None if importlib.util.find_spec("torchvision") else "torchvision is not installed"
    no_checker = None if checker else "compute-sanitizer is not installed"
    no_source = None if mmcv_source else "no source of mmcv: --mmcv-source names it"
    # Without torch's caching allocator, which would hand out the memory around a tensor as one valid block.
    memcheck = [
        "env",
        "PYTORCH_NO_CUDA_MEMORY_CACHING=1",
        checker or "",
        "--tool",
        "memcheck",
        "--error-exitcode",
        "99",
    ]
    build = [python, "setup.py", "build_ext", "--inplace", "--force"]
    compile_peer = [python, "-m", "benchmarks.mmcv_peer", str(mmcv_source)]
    return [
        [
            Step("build", build, 240, missing=is_built()),
            Step("mmcv", compile_peer, 240, missing=no_source),
        ],
        [probe("environment", 60)],
        [probe("compiled", 60)],
        [Step("tests", [python, "-m", "pytest", *tests, "--junitxml", "{out}/tests.xml"], 150)],
        [probe("large", 60)],
        [probe("groups", 60)],
        [bench("op", "float32", 180, *SLOW_PEERS)],
        [bench("op", "float16", 120, *SLOW_PEERS, "shifted-madd-compiled")],
        [probe("small", 120, *memcheck, missing=no_checker)],
        [probe("detector", 90, missing=no_torchvision)],
        [bench("module", "float32", 120, "pack-compiled")],
    ]


def run_all(groups: Sequence[Sequence[Step]], out: Path, budget: float, console: Console) -> list[dict[str, Any]]:
    """Runs the steps, says how each went, and writes summary.json after every group."""
    deadline = time.monotonic() + budget
    records: list[dict[str, Any]] = []
    for group in groups:
        with ThreadPoolExecutor(len(group)) as pool:
            for record in pool.map(lambda step: run_step(step, out, deadline), group):
                records.append(record)
                said = f"{record['name']}: {record['status']} ({record['seconds']:.0f} s)"
                console.print(f"{said} {record.get('detail', '')}", highlight=False, markup=False)
        summary = {"python": sys.version.split()[0], "torch": torch.__version__, "steps": records}
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return records


def show(records: Sequence[dict[str, Any]], out: Path, console: Console) -> None:
    """The table at the end."""
    table = Table(title=f"GPU check: logs and results in {out}", title_justify="left")
    for heading in ("step", "status", "exit code", "seconds", "detail"):
        table.add_column(heading, justify="right" if heading in ("exit code", "seconds") else "left")
    styles = {"ok": "green", "skipped": "yellow"}
    for record in records:
        code = "" if record["code"] is None else str(record["code"])
        cells = [record["name"], record["status"], code, f"{record['seconds']:.1f}", record.get("detail", "")]
        table.add_row(*cells, style=styles.get(record["status"], "red"))
    console.print(table)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; ends with code 2 and one clear line when something in it does not fit."""
    parser = argparse.ArgumentParser(prog="gpu_check.py", description="Check and measure this package on a GPU.")
    add = parser.add_argument
    add("--out", type=Path, default=Path("work_dirs/gpu_check"), metavar="DIR", help="results [work_dirs/gpu_check]")
    add("--mmcv-source", type=Path, metavar="DIR", help="mmcv, or its csrc, to compile its operator from [installed]")
    add("--only", nargs="+", metavar="STEP", help="run these steps alone")
    add("--budget", type=float, default=BUDGET, metavar="S", help=f"seconds that all steps may take [{BUDGET:.0f}]")
    options = parser.parse_args(arguments)
    source = mmcv_peer.find_source(options.mmcv_source)
    if options.mmcv_source and source is None:
        parser.error(f"--mmcv-source: no {mmcv_peer.LAUNCHERS} in {options.mmcv_source}")
    options.groups = all_steps(source.resolve() if source else None)
    names = [step.name for group in options.groups for step in group]
    for name in options.only or ():
        if name not in names:
            parser.error(f"--only: unknown step {name!r}; known are {', '.join(names)}")
    if options.only:
        kept = [[step for step in group if step.name in options.only] for group in options.groups]
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
    # A terminal is as wide as it is; a file or a pipe gets the whole table.
    console = Console() if Console().is_terminal else Console(width=150)
    records = run_all(options.groups, out, options.budget, console)
    show(records, options.out, console)
    return 1 if any(record["status"] in ("failed", "timed out") for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
