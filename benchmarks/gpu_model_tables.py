"""The model's predictions as tables."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

from benchmarks.gpu_model_devices import Gpu
from benchmarks.gpu_model_limits import Prediction, generations, most_common, times
from benchmarks.gpu_model_sass import Check
from benchmarks.report import make_table, shape_title
from carafe_plugin.engine.console import table_console

console = table_console(210)

MOST_DIFFERENT = 0.05  # of the machine code's counts from the PTX's, without a mark


def print_predictions(predictions: Sequence[Prediction], gpu: Gpu) -> None:
    """A table for each shape."""
    for problem, series in itertools.groupby(predictions, lambda each: shape_title(vars(each.case.problem))):
        rows = list(series)
        table = make_table(
            f"Model, not measured: {problem}, {gpu.title}",
            f"us. bound: each tensor once at {gpu.bandwidth / 1e12:.3g} TB/s; limit: the busiest part; expected: with "
            "latencies. waves: blocks over what the GPU holds at once. /output: instructions of a thread; useful: the "
            "definition's multiply-adds, of what so many instructions can (a lane one, a tensor core 1024 or 2048 at "
            "once). moved: bytes asked of the caches over the bound's. "
            "conflicts: wavefronts of shared memory over those without.",
            "operator",
            [
                "kernels", "dtype", "layout", "blocks", "waves", "warps", "regs", "KiB", "/output", "useful", "moved",
                "conflicts", "bound", "limit", "by", "x bound", "expected", "x bound",
            ],
        )  # fmt: skip
        for each in rows:
            table.add_row(*cells(each, gpu))
        console.print(table)


def cells(prediction: Prediction, gpu: Gpu) -> list[str]:
    """A row. Of several launches the one with most instructions is shown, and their number."""
    record, case = prediction.record(gpu), prediction.case
    main = max(record["launches"], key=lambda each: each["instructions"])
    more = f" +{len(prediction.launches) - 1}" if len(prediction.launches) > 1 else ""
    doubtful = "?" if any(max(each.difference, each.guessed) > MOST_DIFFERENT for each in prediction.launches) else ""
    return [
        case.operator,
        case.kernels,
        case.dtype,
        case.layout.replace("channels-last", "nhwc").replace("contiguous", "nchw"),
        f"{main['blocks']}{more}",
        f"{main['waves']:.2f}",
        f"{main['resident_warps_share']:.0%}",
        f"{main['registers']}" + (" spills" if main["spilled_bytes"] else ""),
        f"{main['shared_bytes'] / 1024:.1f}",
        f"{record['instructions_per_output']:.1f}{doubtful}",
        f"{record['useful_share']:.0%}",
        f"{record['requested_bytes'] / record['compulsory_bytes']:.2f}",
        f"{main['shared_wavefronts'] / main['ideal_wavefronts']:.2f}" if main["ideal_wavefronts"] else "",
        f"{record['bound_us']:.1f}",
        f"{record['limit_us']:.1f}",
        record["limited_by"],
        f"{record['limit_times_bound']:.2f}",
        f"{record['expected_us']:.1f}",
        f"{record['expected_times_bound']:.2f}",
    ]


def print_details(predictions: Sequence[Prediction], gpu: Gpu) -> None:
    """Of each launch: each part's time, the instructions by kind, and the lines of the source."""
    for prediction in predictions:
        for counts in prediction.launches:
            case = prediction.case
            title = f"{case.operator}, {case.kernels}, {case.dtype}, {case.layout}: {counts.kernel}"
            console.print(f"\n{title}, {counts.blocks} x {counts.threads} threads", style="bold", highlight=False)
            parts = {**times(counts, gpu), "waiting": generations(counts, gpu) * counts.latency / gpu.clock}
            busy = ", ".join(f"{name} {1e6 * time:.1f}" for name, time in parts.items() if time > 5e-8)
            of_global = counts.global_wavefronts / max(1.0, counts.global_wavefronts + counts.shared_wavefronts)
            busy += f" ({of_global:.0%} of the wavefronts are global memory's)"
            console.print(f"us: {busy}; more warps would not fit the {counts.resident(gpu).limit}", highlight=False)
            kinds = most_common(counts.kinds, 16)
            total = max(1.0, counts.instructions)
            console.print(", ".join(f"{kind} {number / total:.1%}" for kind, number in kinds), highlight=False)
            table = make_table("", None, "source", ["instructions", "waiting"])
            for place, instructions, waiting in counts.hot:
                table.add_row(place, f"{instructions:.1%}", f"{waiting:.1%}")
            console.print(table)


def print_differences(predictions: Sequence[Prediction]) -> None:
    """Where counts disagree, of each kernel and kind the most."""
    most: dict[tuple[str, str], Check] = {}
    for counts in (each for prediction in predictions for each in prediction.launches):
        for check in counts.checks:
            key = counts.kernel, check.kind
            if check.difference > max(MOST_DIFFERENT, most[key].difference if key in most else 0.0):
                most[key] = check
    for (kernel, kind), check in sorted(most.items()):
        text = f"? {kernel}: {check.sass:.4g} {kind} in the machine code, {check.ptx:.4g} in the PTX"
        console.print(text, style="yellow", highlight=False, markup=False)


def print_summary(predictions: Sequence[Prediction], gpu: Gpu) -> None:
    """How far all shapes are from the bound."""
    title = f"Model, not measured: times the bandwidth bound over all shapes and layouts, {gpu.title}"
    table = make_table(title, None, "operator", ["kernels", "dtype", "limit", "median", "expected", "median"])
    groups: dict[tuple[str, str, str], list[Prediction]] = {}
    for each in predictions:
        groups.setdefault((each.case.operator, each.case.kernels, each.case.dtype), []).append(each)
    for names, some in groups.items():
        numbers = []
        for times_bound in ([e.limit / e.bound for e in some], [e.expected / e.bound for e in some]):
            numbers += [f"{min(times_bound):.2f} to {max(times_bound):.2f}", f"{statistics.median(times_bound):.2f}"]
        table.add_row(*names, *numbers)
    console.print(table)
