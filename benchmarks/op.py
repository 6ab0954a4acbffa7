"""Measures `carafe_plugin.ops.carafe` against the other ways to compute it, and against other ways to rescale.

For each shape: forward, forward + backward (to features and kernels), peak additional memory and what autograd keeps,
of each peer, beside a bound of the hardware measured in the same run. Two rows are ours: `carafe`, the public operator,
from masks; and `fused`, what the modules call, from the content encoder's output. A peer is compared with the one that
has the same inputs: first its results, then its time. Peers take turns, and each is given the median of its turns;
compilation and warm-up do not count.

    python -m benchmarks.op --device cpu --json result.json --plot result.png
    python -m benchmarks.op --growth --json growth.json --plot growth.png

Exit code: 0; 1 when ours fails or a peer's result differs from ours; 2 for invalid arguments.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks import command, growth
from benchmarks.peers import OURS, PEERS


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; exits with code 2 and one clear line when an argument is invalid."""
    parser = command.make_parser("op", "Measure the CARAFE operator against other ways to compute it.", OURS, PEERS)
    parser.add_argument(
        "--growth",
        nargs="*",
        choices=growth.AXES,
        metavar="AXIS",
        help=f"instead: how ours grows with {', '.join(growth.AXES)} [all of them], one at a time around a base point, "
        "which one of --shapes may set",
    )
    options = parser.parse_args(arguments)
    if options.growth is not None and options.peers:
        parser.error("--growth measures ours only: it takes no --peers")
    return command.complete(parser, options, arguments, PEERS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    options = parse_arguments(arguments)
    if options.growth is None:
        return command.compare(options, OURS)
    record = command.start(options)
    base = options.problems[0] if options.shapes else growth.base(options.problems[0])
    points = growth.points(options.growth or growth.AXES, base, options.threads, options.quick)
    record |= {"results": [], "growth": growth.measure(list(points), command.settings(options))}
    growth.print_tables(record["growth"], base)
    return command.finish(options, record, growth.plot)


if __name__ == "__main__":
    sys.exit(main())
