"""``make sanitize``: the CPU library, instrumented, does random calls on real tensors (tests/ops/fuzz_operators.py).

AddressSanitizer and UndefinedBehaviorSanitizer watch one build, with torch's own threads; ThreadSanitizer another, with
those of threads.cpp. Mutants of the library show that each would report what it is there for. The host tests of the
kernels run under the first two as well. Everything is built below build/sanitize. Ten minutes on
two cores, six of them to build; --calls makes it more or less.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT / "tests" / "support")]

from campaign import SEED, update_figures  # noqa: E402
from hosts import CXX  # noqa: E402

BUILD = ROOT / "build" / "sanitize"
SOURCES = ("registration", "cpu/carafe", "cpu/baseline", "cpu/avx2", "cpu/avx512")
PATHS = ("plain", "baseline", "avx2", "avx512")
#: The flags, the runtime that has to be there before Python, and what else is linked into the library.
BUILDS = {
    "address": (["-fsanitize=address,undefined", "-fno-sanitize-recover=all"], "libasan.so", ()),
    "thread": (["-fsanitize=thread"], "libtsan.so", (ROOT / "tests" / "csrc" / "threads.cpp",)),
}
OPTIONS = dict(
    ASAN_OPTIONS="detect_leaks=0",  # the interpreter's are none of our business
    UBSAN_OPTIONS="print_stacktrace=1",
    TSAN_OPTIONS="halt_on_error=1",
    OMP_NUM_THREADS="1",
)
#: A fault planted in cpu/carafe.cpp by replacing a text, and what the sanitizer has to say.
MUTANTS = {
    "a row that is one column too long": ("address", "j < width", "j <= width", "heap-buffer-overflow"),
    "a shift out of the number": (
        "address",
        "index / height / channels",
        "index / height / channels + 0 * (height << 62)",
        "left shift of",
    ),
    "rows in each other's place": ("thread", "call.result.at(n, c, i, j)", "call.result.at(n, c, 0, j)", "data race"),
}


def object_of(kind: str, source: Path, folder: Path) -> Path:
    """The object file of a source; one that is newer than all of csrc stays."""
    made = folder / f"{source.stem}.o"
    newest = max(path.stat().st_mtime for path in (*(ROOT / "csrc").rglob("*"), source) if path.is_file())
    if not made.exists() or made.stat().st_mtime < newest:
        folder.mkdir(parents=True, exist_ok=True)
        flags = ["-O1", "-g1", "-std=c++17", "-fPIC", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-psabi"]
        flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", *BUILDS[kind][0]]
        flags += [f"-isystem{path}" for path in (*include_paths(), sysconfig.get_paths()["include"])]
        subprocess.run([CXX, "-c", *flags, str(source), "-o", f"{made}.tmp"], check=True)
        Path(f"{made}.tmp").replace(made)
    return made


def link(kind: str, objects: Sequence[Path], library: Path) -> Path:
    folders = [f"-L{path}" for path in library_paths()]
    flags = ["-shared", "-Wl,-Bsymbolic", *BUILDS[kind][0], *folders, "-ltorch_cpu", "-lc10"]
    subprocess.run([CXX, *map(str, objects), *flags, "-o", str(library)], check=True)
    return library


def fuzz(kind: str, library: Path, path: str, calls: int, faults: int, *more: str) -> subprocess.CompletedProcess:
    """Random calls by that library on an instruction set."""
    # The C++ library too, or the sanitizer's own does not find what it stands in for where an exception is thrown.
    runtimes = [
        subprocess.run([CXX, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in (BUILDS[kind][1], "libstdc++.so.6")
    ]
    variables = dict(LD_PRELOAD=" ".join(runtimes), CARAFE_LIBRARY=str(library), CARAFE_CPU_PATH=path)
    if kind == "thread":
        variables["OMP_THREAD_LIMIT"] = "1"  # torch's own operators
    script = ROOT / "tests" / "ops" / "fuzz_operators.py"
    arguments = [f"--calls={calls}", f"--faults={faults}", f"--seed={SEED}", "--no-shrink", *more]
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(script), *arguments],
        env={**os.environ, **OPTIONS, **variables},
        capture_output=True,
        text=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100, help="random calls on each instruction set in each build")
    args = parser.parse_args()
    started, counts, failed = time.monotonic(), Counter(), []

    def report(name: str, passed: bool, result: subprocess.CompletedProcess) -> None:
        print(f"{time.monotonic() - started:5.0f} s  {'passed' if passed else 'FAILED'}  {name}", flush=True)
        if not passed:
            failed.append(name)
            print(result.stdout[-2000:], result.stderr[:4000], result.stderr[-1000:], sep="\n", flush=True)

    pool, jobs = ThreadPoolExecutor(2), []
    sources = [ROOT / "csrc" / f"{name}.cpp" for name in SOURCES]
    wanted = [(kind, source) for kind, (*_, more) in BUILDS.items() for source in (*reversed(sources), *more)]
    made = dict(zip(wanted, pool.map(lambda each: object_of(*each, BUILD / each[0]), wanted), strict=True))
    objects = {kind: [each for (where, _), each in made.items() if where == kind] for kind in BUILDS}
    for kind in BUILDS:
        library = link(kind, objects[kind], BUILD / kind / "_C.so")
        jobs += [(f"{kind}, {path}", kind, library, path, "", args.calls) for path in PATHS]
    for number, (name, (kind, old, new, expected)) in enumerate(MUTANTS.items()):
        copy = BUILD / f"mutant{number}"
        shutil.copytree(ROOT / "csrc", copy / "csrc", dirs_exist_ok=True)
        source = copy / "csrc" / "cpu" / "carafe.cpp"
        text = source.read_text()
        assert text.count(old) == 1, f"{name}: {old!r} occurs {text.count(old)} times"
        source.write_text(text.replace(old, new))
        others = [each for each in objects[kind] if each.stem != "carafe"]
        mutant = link(kind, [object_of(kind, source, copy), *others], copy / "_C.so")
        jobs.append((f"{kind} reports {name}", kind, mutant, "plain", expected, 40))
    print(f"{time.monotonic() - started:5.0f} s  built", flush=True)

    def run(job: tuple) -> None:
        name, kind, library, path, expected, calls = job
        # A planted fault is the sanitizer's to find, before a wrong number ends the run.
        result = fuzz(kind, library, path, calls, *((0, "--no-compare") if expected else (calls,)))
        if not expected:
            if passed := result.returncode == 0:
                counts.update({f"{kind}_{key}": number for key, number in json.loads(result.stdout).items()})
        elif passed := result.returncode != 0 and expected in result.stderr:
            counts["planted_faults_reported"] += 1
        report(name, passed, result)

    list(pool.map(run, jobs))
    hosts = ["tests/csrc/test_kernels.py", "-k", "sanitizers", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run([sys.executable, "-m", "pytest", *hosts], cwd=ROOT, capture_output=True, text=True)
    report("host tests of the kernels", passed := result.returncode == 0, result)
    counts["host_tests"] = int(passed)
    seconds = round(time.monotonic() - started)
    print(f"{len(failed)} of {len(jobs) + 1} failed after {seconds} s: {dict(counts)}")
    update_figures("sanitizers", dict(counts=dict(sorted(counts.items())), failed=failed, seconds=seconds))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
