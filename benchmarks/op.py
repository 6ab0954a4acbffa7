"""Measures `carafe_plugin.ops.carafe` against the other ways to compute it, and against other ways to rescale.

For each shape: forward, forward + backward (to features and kernels), peak additional memory and what autograd keeps,
of each peer, beside a bound of the hardware measured in the same run. Two rows are ours: `carafe`, the public operator,
from masks; and `fused`, what the modules call, from the content encoder's output. A peer is compared with the one that
takes what it takes: its results before it is timed, then its time. Peers take turns, and each gets the median of its
turns; compilation and warm-up do not count.

    python -m benchmarks.op --device cpu --json result.json --plot result.png
    python -m benchmarks.op --growth --json growth.json --plot growth.png

Exit code: 0; 1 when ours fails or a peer's result differs from ours; 2 for arguments that do not fit.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import growth, options, report
from benchmarks.peers import OURS, PEERS, mmcv
from benchmarks.runner import Options, is_sound


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; exits with code 2 and one clear line when something in it does not fit."""
    parser = options.make_parser("op", "Measure the CARAFE operator against other ways to compute it.", (*OURS, *PEERS))
    parser.add_argument(
        "--growth",
        nargs="*",
        metavar="AXIS",
        help=f"instead: how ours grows with {', '.join(growth.AXES)} [all of them], one at a time around a base point, "
        "which one of --shapes may set",
    )
    options.add_mmcv_option(parser)
    parsed = parser.parse_args(arguments)
    options.check(parser, parsed)
    for axis in parsed.growth or ():
        if axis not in growth.AXES:
            parser.error(f"--growth: unknown axis {axis!r}; known are {', '.join(growth.AXES)}")
    if parsed.growth is not None and parsed.peers:
        parser.error("--growth measures ours alone: it takes no --peers")
    mmcv.source = options.find_mmcv_source(parser, parsed.mmcv_source)
    parsed.peers = options.choose_peers(parser, parsed, PEERS)
    return parsed


def measure_growth(parsed: argparse.Namespace, how: Options) -> list[dict[str, Any]]:
    """Measures how ours grows, and shows it."""
    base = options.problems(parsed)[0]
    if not parsed.shapes:  # the peers' shapes are no base point
        batch, channels, height, width = growth.BASE
        base = dataclasses.replace(base, batch=batch, channels=channels, height=height, width=width)
    axes = [axis for axis in parsed.growth or growth.AXES if axis != "threads" or parsed.device == "cpu"]
    points = list(growth.points(axes, base, parsed.threads, parsed.quick))
    results = growth.measure_growth(points, how)
    growth.print_growth(results, base)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parsed = parse_arguments(arguments)
    record = options.new_report("op", parsed, arguments)
    report.print_header(record)
    how = options.engine_options(parsed)
    if parsed.growth is None:
        record["results"] = options.measure_peers(options.problems(parsed), OURS, parsed.peers, how)
    else:
        record["results"], record["growth"] = [], measure_growth(parsed, how)
    options.write_json(parsed, record)
    if parsed.plot:
        (report.plot if parsed.growth is None else growth.plot_growth)(record, parsed.plot)
    return 0 if all(map(is_sound, [*record["results"], *record.get("growth", ())])) else 1


if __name__ == "__main__":
    sys.exit(main())
