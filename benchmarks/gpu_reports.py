"""What the steps of `benchmarks.gpu_check` wrote, read: is it sound, and what is its one line in the summary?

    python -m benchmarks.gpu_reports counters RAW CALLS OUT    the profiler's CSV, cut to the counters asked for

Each reader is given the folder of results and the step's name, and returns whether what it found is sound and a line
for people; ValueError (OSError, KeyError) where there is no result to read. Imports neither torch nor the package.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

# What the profiler counts: time, instructions, bytes from and to memory, how busy issue slots and the shared memory's
# pipe are, wavefronts of shared memory, and occupancy.
COUNTERS = (
    "gpu__time_duration.sum",
    "smsp__inst_executed.sum",
    "dram__bytes.sum",
    "sm__issue_active.avg.pct_of_peak_sustained_elapsed",
    "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "launch__shared_mem_per_block",
    "launch__waves_per_multiprocessor",
)
NOTHING = "no result"
DIVIDER = "spin_kernel"  # torch's, launched before each call
Found = tuple[bool, str]


def read_json(out: Path, name: str) -> Any:
    return json.loads((out / f"{name}.json").read_text(encoding="utf-8"))


def probe(out: Path, name: str) -> Found:
    """A probe's own word, and nothing more."""
    return bool(read_json(out, name)["ok"]), ""


def build(out: Path, name: str) -> Found:
    record = read_json(out, name)
    refused = f", {len(record['rejected'])} compilers refused" if record["rejected"] else ""
    if not record["ok"]:
        return False, "; ".join(f"{compiler}: {why}" for compiler, why in record["rejected"].items())
    return True, f"{record['compiler']} for {record['architectures']} in {record['seconds']:.0f} s{refused}"


def environment(out: Path, name: str) -> Found:
    record = read_json(out, name)
    machine = record["machine"]
    return bool(
        record["ok"]
    ), f"{machine.get('gpu', machine['cpu'])}, torch {machine['torch']}, {machine['cores']} cores"


def tests(out: Path, name: str) -> Found:
    """Counts of the JUnit file, and the first tests that failed."""
    root = ElementTree.parse(out / f"{name}.xml").getroot()
    suites = [suite for suite in root.iter("testsuite")]
    total, failures, errors, skipped = (
        sum(int(suite.get(what, 0)) for suite in suites) for what in ("tests", "failures", "errors", "skipped")
    )
    bad = failures + errors
    text = f"{total - bad - skipped} passed, {bad} failed, {skipped} skipped"
    broken = (
        case for case in root.iter("testcase") if case.find("failure") is not None or case.find("error") is not None
    )
    named = [f"{case.get('classname', '').split('.')[-1]}::{case.get('name')}" for case in broken]
    if named:
        text += f": {', '.join(named[:3])}{' ...' if len(named) > 3 else ''}"
    return total > 0 and bad == 0, text


def sanitizer(out: Path, name: str) -> Found:
    """The summary that compute-sanitizer prints last: of memcheck errors, of racecheck hazards."""
    log = (out / f"{name}.log").read_text(encoding="utf-8", errors="replace")
    if "COMPUTE-SANITIZER" not in log:
        raise ValueError("compute-sanitizer did not run")
    if match := re.findall(r"ERROR SUMMARY: (\d+) errors?", log):
        return match[-1] == "0" and read_json(out, name)["ok"], f"{match[-1]} errors"
    if match := re.findall(r"RACECHECK SUMMARY: (\d+) hazards? displayed", log):
        return match[-1] == "0" and read_json(out, name)["ok"], f"{match[-1]} hazards"
    raise ValueError("compute-sanitizer ended without a summary")


def limits(out: Path, name: str) -> Found:
    cases = read_json(out, name)["cases"]
    wrong = [case["case"] for case in cases if case["ours"] != "right"]
    told = [case["mmcv"] for case in cases if not case["mmcv"].startswith("absent")]
    text = f"ours right in {len(cases) - len(wrong)} of {len(cases)} cases"
    text += f", mmcv's not in {len(told) - told.count('right')} of {len(told)}" if told else ", no mmcv"
    return bool(cases) and not wrong, text + (f"; wrong: {', '.join(wrong)}" if wrong else "")


def streams(out: Path, name: str) -> Found:
    checks = read_json(out, name)["checks"]
    wrong = [what for what, right in checks.items() if not right]
    return bool(checks) and not wrong, f"{len(checks) - len(wrong)} of {len(checks)} the same bits" + "".join(
        f"; not {what}" for what in wrong[:3]
    )


def graphs(out: Path, name: str) -> Found:
    """How far ours is from the bound at its worst, by dtype and pass, and by how much mmcv's steps are slower."""
    record = read_json(out, name)
    failed, over, parts = [], 0, []
    worst: dict[tuple[str, str], float] = {}
    ahead: list[float] = []
    for measured in record["measured"]:
        peers = {peer["name"]: peer for peer in measured["peers"]}
        ours = [peer for each, peer in peers.items() if each.split("-")[0] in ("carafe", "fused")]
        failed += [f"{measured['problem']} {peer['name']}: {peer['detail']}" for peer in ours if peer["status"] != "ok"]
        times = [peer["times_bound"] for peer in ours if "times_bound" in peer]
        key = measured["dtype"], measured["pass"]
        worst[key] = max([worst.get(key, 0.0), *times])
        over += sum(time > measured["target"] for time in times)
        if "median_ms" in peers.get("steps-mmcv", {}) and "median_ms" in peers["fused"]:
            ahead.append(peers["steps-mmcv"]["median_ms"] / peers["fused"]["median_ms"])
    parts = [f"{dtype} {each} at most {times:.2f}x its bound" for (dtype, each), times in worst.items()]
    parts.append(f"{over} beyond their target")
    if ahead:
        parts.append(f"mmcv's steps take {min(ahead):.1f} to {max(ahead):.1f} times as long")
    return bool(record["measured"]) and not failed, "; ".join(failed[:3] or parts)


def benchmark(out: Path, name: str) -> Found:
    """That ours was measured and nobody's results differ; forward, then forward and backward in times the bound."""
    record = read_json(out, name)
    wrong, parts = [], []
    for result in record["results"]:
        shape = result["shape"]
        for peer in result["peers"]:
            for each in ("forward", "forward_backward"):
                own = peer["name"] == peer["reference"]
                if peer[each]["status"] == "wrong result" or (own and peer[each]["status"] != "ok"):
                    wrong.append(f"{peer['name']}: {peer[each]['detail']}")
        first = result["peers"][0]
        times = (f"{first[each].get('times_bound', float('nan')):.1f}" for each in ("forward", "forward_backward"))
        parts.append(f"{shape['channels']}x{shape['height']}x{shape['width']} {', '.join(times)}")
    return bool(record["results"]) and not wrong, "; ".join(wrong[:3] or parts)


def detector(out: Path, name: str) -> Found:
    record = read_json(out, name)
    return bool(record["ok"]), f"{record['times nearest']:.3f} times nearest, allowed {record['allowed']}"


def counters(out: Path, name: str) -> Found:
    rows = list(csv.DictReader(io.StringIO((out / f"{name}.csv").read_text(encoding="utf-8"))))[1:]
    calls = {row["call"] for row in rows}
    if not rows or not all(row[counter] for row in rows for counter in COUNTERS[:3]):
        raise ValueError("the profiler counted nothing")
    return True, f"{len(rows)} kernels of {len(calls)} calls"


def logged(out: Path, name: str) -> Found:
    """A step whose log is its result."""
    lines = (out / f"{name}.log").read_text(encoding="utf-8", errors="replace").splitlines()[1:]
    return bool(lines), ""


def tabulate(raw: str, calls: Sequence[str]) -> str:
    """The profiler's `--page raw --csv`, cut to `COUNTERS`, each kernel beside the call that it belongs to.

    Kernels named `DIVIDER` start a call each. Without any, kernels are shared out evenly where that is possible.
    """
    lines = raw.splitlines()
    first = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        raise ValueError(f"the profiler wrote no table, but: {(lines or ['nothing'])[-1][:200]}")
    rows = list(csv.DictReader(lines[first:]))
    units, kernels = rows[0], rows[1:]
    divided = any(DIVIDER in row["Kernel Name"] for row in kernels)
    found: list[tuple[str, dict[str, str]]] = []
    number = -1
    for row in kernels:
        if DIVIDER in row["Kernel Name"]:
            number += 1
        elif divided:
            found.append((calls[number] if 0 <= number < len(calls) else "", row))
        else:
            each, rest = divmod(len(kernels), len(calls) or 1)
            found.append(("" if rest else calls[len(found) // each], row))
    if divided and number + 1 != len(calls):
        raise ValueError(f"the profiler saw {number + 1} of {len(calls)} calls")
    present = [counter for counter in COUNTERS if counter in units]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["call", "Kernel Name", *present])
    writer.writerow(["", "", *(units[counter] for counter in present)])
    for call, row in found:  # numbers as numbers: the profiler groups thousands
        writer.writerow([call, row["Kernel Name"], *(row[counter].replace(",", "") for counter in present)])
    return stream.getvalue()


READERS: dict[str, Callable[[Path, str], Found]] = {
    "build-cpu": build,
    "build-cuda": build,
    "environment": environment,
    "compiled": probe,
    "tests": tests,
    "memcheck": sanitizer,
    "racecheck": sanitizer,
    "limits": limits,
    "streams": streams,
    "graphs": graphs,
    "op-float32": benchmark,
    "op-float16": benchmark,
    "module-float32": benchmark,
    "counters": counters,
    "detector": detector,
}


def tables(out: Path) -> list[str]:
    """The graphs' times and mmcv's fate at its limits, in lines of Markdown; none where these steps have not run."""
    lines: list[str] = []
    if (out / "graphs.json").exists():
        columns = (
            "carafe",
            "fused",
            "fused-channels-last",
            "steps-mmcv",
            "shifted-madd-compiled",
            "bilinear",
            "deconvolution",
        )
        lines += ["", "Microseconds of one call in a captured graph (times the bound):", ""]
        lines += [f"| pass | bound | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
        for measured in read_json(out, "graphs")["measured"]:
            peers = {peer["name"]: peer for peer in measured["peers"]}
            cells = [
                f"{measured['problem']}, {measured['dtype']}, {measured['pass']}",
                f"{1e3 * measured['bound_ms']:.1f}",
            ]
            for name in columns:
                peer = peers.get(name, {"status": ""})
                cells.append(
                    f"{1e3 * peer['median_ms']:.1f} ({peer['times_bound']:.2f})"
                    if "median_ms" in peer
                    else peer["status"]
                )
            lines.append(f"| {' | '.join(cells)} |")
    if (out / "limits.json").exists():
        lines += ["", "| where mmcv's operator fails | ours | mmcv's |", "|---|---|---|"]
        lines += [
            f"| {case['case']} | {case['ours']} | {case.get('mmcv', '')} |"
            for case in read_json(out, "limits")["cases"]
        ]
    return lines


def read(out: Path, name: str) -> Found:
    """What a step found. Where its result cannot be read it found nothing, and is not sound."""
    try:
        return READERS.get(name, logged)(out, name)
    except (OSError, ValueError, LookupError, ElementTree.ParseError) as error:
        return False, f"{NOTHING}: {type(error).__name__}: {error}"


def main(arguments: Sequence[str]) -> int:
    """Cuts the profiler's table; returns the exit code."""
    if len(arguments) != 4 or arguments[0] != "counters":
        print("usage: python -m benchmarks.gpu_reports counters RAW CALLS OUT", file=sys.stderr)
        return 2
    raw, calls, out = (Path(word) for word in arguments[1:])
    try:
        table = tabulate(raw.read_text(encoding="utf-8"), json.loads(calls.read_text(encoding="utf-8"))["calls"])
    except (OSError, ValueError, KeyError) as error:
        print(error, file=sys.stderr)
        return 1
    unfinished = out.with_name(f"{out.name}.tmp")
    unfinished.write_text(table, encoding="utf-8")
    unfinished.replace(out)
    print(table, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
