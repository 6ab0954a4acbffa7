"""Cases that cover many options."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def pairwise(options: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Few cases in which every pair of values of every two options occurs: greedy, deterministic."""
    names = list(options)

    def pair(axis: int, value: int, other: int, other_value: int) -> tuple[int, int, int, int]:
        return (axis, value, other, other_value) if axis < other else (other, other_value, axis, value)

    pending = {
        (a, i, b, j)
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in range(len(options[names[a]]))
        for j in range(len(options[names[b]]))
    }
    while pending:
        a, i, b, j = min(pending)
        case = {a: i, b: j}
        for axis in range(len(names)):
            if axis not in case:
                values = range(len(options[names[axis]]))
                covered = [sum(pair(axis, value, *other) in pending for other in case.items()) for value in values]
                case[axis] = covered.index(max(covered))
        for a, b in itertools.combinations(range(len(names)), 2):
            pending.discard((a, case[a], b, case[b]))
        yield {name: options[name][case[axis]] for axis, name in enumerate(names)}
